"""A recognised checkpoint and options become a plan, or are refused with every reason."""
