"""Opening and recognition of checkpoints: the format, the model, the role of each stored tensor.

Imports containers and everything below; contains nothing about targets.
"""
