"""Proof that two checkpoints are the same model: tensor by tensor, and by their forward passes.

pairing     the rows of SRC that belong in each stored tensor of DST; what is missing
limits      the largest error that is allowed, by the encodings of both sides
tensors     reads and compares both checkpoints, strip by strip
scales      whether FP8 scales match the weights and the config's label
diagnosis   the origin of a wrong tensor's numbers
forward     both forward passes, side by side; logits has the metrics
verdict     the result, as a value
reports     the result, as HTML
"""
