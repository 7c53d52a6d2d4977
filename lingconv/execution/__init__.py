"""Execution of a plan: locks the target, runs the pipeline, closes and publishes the result."""
