"""`Scaling`: what a plan says of how the scales of one matrix are chosen."""

from typing import NamedTuple


class Scaling(NamedTuple):
    """How scales are chosen for one matrix: lower bound of amax, powers of two or not."""

    min_amax: float
    power_of_two: bool
