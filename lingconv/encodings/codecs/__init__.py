"""The Codec of each encoding: stored bytes to numbers and back, by the loops in `kernels/`."""
