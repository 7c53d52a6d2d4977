"""Side-by-side measurements; ratios, not seconds, are what carries over to another machine."""
