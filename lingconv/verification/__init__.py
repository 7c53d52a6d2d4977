"""Proof that two checkpoints are the same model: tensor by tensor, and in what they compute.

pairing     which rows of SRC ought to be in which stored tensor of DST; what is missing
limits      how far apart numbers may be after what was done to them
tensors     reads both, strip by strip
scales      whether FP8 scales are what weights and labels call for
diagnosis   where a wrong tensor's numbers come from
forward     both forward passes, side by side; logits has the metrics
verdict     what was found, as a value
report      the same to look at
"""
