"""Planning: a recognised checkpoint and options give a Plan, or an error with all reasons."""
