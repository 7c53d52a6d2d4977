"""`Scaling`: the scale policy of one matrix in a plan."""

from typing import NamedTuple


class Scaling(NamedTuple):
    """The scale policy of one matrix: lower bound of amax, and whether scales are powers of two."""

    min_amax: float
    power_of_two: bool
