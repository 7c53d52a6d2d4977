"""Files become a recognised checkpoint: which format, which model, what each stored tensor is.

Imports containers and everything below; knows nothing of targets.
"""
