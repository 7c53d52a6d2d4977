"""Check of FP8 scales: does each match its block's weights and the config's label?

Rounding errors do not show it: a checkpoint with scales of the wrong kind may be as close to its
source as a right one, and still be garbage in a runtime that trusts the label.
"""

from typing import Any, NamedTuple

import numpy as np

from lingconv.encodings import Encoding
from lingconv.encodings.dtypes import E4M3_MAX, DType, StoredType

Array = np.ndarray[Any, Any]

# A scale may be rounded to BF16 (2^-9), after an amax that was divided in BF16 (2^-9).
_FIT = 2.0**-8
# Ling-V2's converter and DeepSeek's kernels do not let amax fall below 1e-4.
_MIN_AMAX = 1e-4 * (1 + _FIT)
_MANTISSA = np.uint32(0x007FFFFF)
_INFINITY = np.uint32(0x7F800000)


# The smallest scale of each dtype; one that is rounded to zero becomes 1, as that of zeros does.
_LEAST: dict[StoredType, float] = {
    DType.F32: 2.0**-149,
    DType.BF16: 2.0**-133,
    DType.F8_E8M0: 2.0**-127,
}


class ScaleCounts(NamedTuple):
    """Counts over some blocks, and the first bad one: (row, col of the grid, description)."""

    blocks: int
    unfit: int
    mislabelled: int
    invalid: int
    example: tuple[int, int, str] | None


def check(scales: Array, peaks: Array | None, encoding: Encoding, first_row: int) -> ScaleCounts:
    """Return the counts of invalid, mislabelled and unfit scales.

    `scales` [rows, cols] are float32, `peaks` the largest magnitudes of the source's blocks, or
    None if the source is rounded itself; `first_row` is the row of the grid where they start.
    """
    bits = scales.view(np.uint32)
    invalid = bits - 1 >= _INFINITY - 1  # zero wraps around; signs, Inf and NaN are above
    # A subnormal has no implicit bit: 2^-127, E8M0's code 0, is one.
    mantissa = bits & _MANTISSA
    power_of_two = (mantissa == 0) | ((bits <= _MANTISSA) & ((mantissa & (mantissa - 1)) == 0))
    wrong = {"invalid": invalid}
    if encoding.has_power_of_two_scales:
        wrong["mislabelled"] = ~invalid & ~power_of_two
    if peaks is not None:
        vanishes = peaks / E4M3_MAX <= _LEAST[encoding.stored_types[1]] / 2
        stands_in = (scales == 1) & vanishes
        wrong["unfit"] = ~invalid & ~stands_in & ~_fits(scales, peaks, power_of_two)
    counts = {what: int(np.count_nonzero(bad)) for what, bad in wrong.items()}
    example = None
    for what in (what for what, count in counts.items() if count):
        row, col = (int(axis[0]) for axis in np.nonzero(wrong[what]))
        peak = 0.0 if peaks is None else float(peaks[row, col])
        example = first_row + row, col, _describe(what, float(scales[row, col]), peak)
        break
    return ScaleCounts(
        scales.size,
        counts.get("unfit", 0),
        counts.get("mislabelled", 0),
        counts["invalid"],
        example,
    )


def _fits(scales: Array, peaks: Array, power_of_two: Array) -> Array:
    """Return a mask of scales that are amax / 448, or the power of two above it, or for zeros."""
    reach = scales.astype(np.float64) * E4M3_MAX  # float64, like the peaks: nothing overflows
    slack = _FIT * peaks
    highest = np.where(power_of_two, 2.0, 1.0)
    fits = (reach >= peaks - slack) & (reach <= np.maximum(peaks + slack, _MIN_AMAX) * highest)
    return np.asarray(fits | (peaks == 0))


def _describe(what: str, scale: float, peak: float) -> str:
    if what == "invalid":
        return f"is {scale}"
    if what == "mislabelled":
        return f"is {scale:.6g}, no power of two, and the config says `ue8m0`"
    return f"is {scale:.6g}, its weights call for {peak / E4M3_MAX:.6g}"


def histogram(scales: Array) -> dict[int, int]:
    """Return the number of scales in each octave: floor(log2(scale)) -> count."""
    exponents = (scales.view(np.uint32).reshape(-1) >> np.uint32(23)).astype(np.intp)
    counts = np.bincount(exponents, minlength=512)[1:255]  # positive and normal, finite
    return {int(place) - 126: int(counts[place]) for place in np.flatnonzero(counts)}
