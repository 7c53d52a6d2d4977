"""`Scaling`: the scale policy of one matrix in a plan."""

from enum import StrEnum
from typing import NamedTuple


class Search(StrEnum):
    """Which scales of a group are tried; the one with the least squared error is taken."""

    NONE = "none"
    FOUR_OVER_SIX = "four-over-six"  # NVFP4: the largest number becomes 6, or 4
    SWEEP = "sweep"  # NVFP4: the e4m3 codes around the nearest
    MSE = "mse"  # INT4: smaller scales; MXFP4: the exponents beside


class Rule(StrEnum):
    """How INT4's scale follows from the largest magnitude of a group."""

    QUOTIENT = "f32"  # amax / 7.5
    BF16_QUOTIENT = "ct"  # the same, and w / scale is rounded to BF16: llm-compressor on a CPU
    DIVIDED_BY_7 = "kimi"  # amax / 7, codes -7 to 7
    SIGNED = "signed"  # amax / 8, with the sign that makes the largest number -8


class Scaling(NamedTuple):
    """The scale policy of one matrix.

    `min_amax` is a lower bound of amax; `power_of_two`: scales are powers of two; `search` and
    `rule` are for four bits.
    """

    min_amax: float
    power_of_two: bool
    search: Search = Search.NONE
    rule: Rule = Rule.QUOTIENT
