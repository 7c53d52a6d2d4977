"""Is every FP8 scale what its weights and its label call for?

Rounding errors alone cannot tell: a checkpoint with scales of the wrong kind may be as close to its
source as a right one, and still be garbage in a runtime that trusts the label.
"""

from typing import Any, NamedTuple

import numpy as np

from lingconv.encodings.fp8 import E4M3_MAX, Fp8

Array = np.ndarray[Any, Any]

# A scale may be rounded to BF16 (2^-9), after an amax that was divided in BF16 (2^-9).
_FIT = 2.0**-8
# Ling-V2's converter and DeepSeek's kernels do not let amax fall below 1e-4.
_MIN_AMAX = 1e-4 * (1 + _FIT)
_MANTISSA = 0x007FFFFF


class ScaleCounts(NamedTuple):
    """Counts over some blocks, and the first bad one: (row, col of the grid, what is wrong)."""

    blocks: int
    unfit: int
    mislabelled: int
    invalid: int
    example: tuple[int, int, str] | None


def check(scales: Array, peaks: Array | None, encoding: Fp8, first_row: int) -> ScaleCounts:
    """Count the scales that are not what they ought to be.

    `scales` [rows, cols] are float32, `peaks` the largest magnitudes of the source's blocks, or None
    where the source is rounded itself; `first_row` is the row of the grid that they start at.
    """
    invalid = ~(np.isfinite(scales) & (scales > 0))
    power_of_two = (scales.view(np.uint32) & _MANTISSA) == 0
    mislabelled = ~invalid & ~power_of_two if encoding.power_of_two else np.zeros_like(invalid)
    unfit = np.zeros_like(invalid)
    if peaks is not None:
        unfit = ~invalid & ~_fits(scales, peaks, power_of_two)
    example = None
    for bad, what in ((invalid, "invalid"), (mislabelled, "mislabelled"), (unfit, "unfit")):
        if bad.any() and example is None:
            row, col = (int(axis[0]) for axis in np.nonzero(bad))
            peak = None if peaks is None else float(peaks[row, col])
            text = _describe(what, float(scales[row, col]), peak)
            example = first_row + row, col, text
    return ScaleCounts(
        scales.size, int(unfit.sum()), int(mislabelled.sum()), int(invalid.sum()), example
    )


def _fits(scales: Array, peaks: Array, power_of_two: Array) -> Array:
    """Return where a scale is amax / 448, or the power of two above it, or no block needs one."""
    with np.errstate(over="ignore"):
        reach = scales * np.float32(E4M3_MAX)
    wanted = np.maximum(peaks, 1e-30)
    close = np.abs(reach - peaks) <= _FIT * wanted
    above = power_of_two & (reach >= peaks * (1 - _FIT)) & (reach <= 2 * peaks * (1 + _FIT))
    clamped = (reach >= peaks) & (reach <= np.where(power_of_two, 2 * _MIN_AMAX, _MIN_AMAX))
    return np.asarray(close | above | clamped | (peaks == 0))


def _describe(what: str, scale: float, peak: float | None) -> str:
    if what == "invalid":
        return f"is {scale}"
    if what == "mislabelled":
        return f"is {scale:.6g}, no power of two, and the config says `ue8m0`"
    return f"is {scale:.6g}, its weights call for {(peak or 0.0) / E4M3_MAX:.6g}"


def histogram(scales: Array) -> dict[int, int]:
    """Return how many scales lie in each octave: floor(log2(scale)) -> count."""
    good = scales[np.isfinite(scales) & (scales > 0)]
    octaves, counts = np.unique(np.frexp(good)[1] - 1, return_counts=True)
    return dict(zip(octaves.tolist(), counts.tolist(), strict=True))
