"""HTML pages and their plots: one file, no network, no script."""
