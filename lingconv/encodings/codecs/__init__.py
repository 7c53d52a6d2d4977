"""The Codec of each encoding: stored bytes to numbers and back, with the loops in `kernels/`."""
