"""Weighted sums of checkpoints in float64, rounded once.

Every element's sum starts at 0.0 and takes its terms in the order of the checkpoints, each product
and each sum rounded to float64: no threads, no lanes and no fast-math change a bit of it.
"""

from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy import float32, float64, uint16, uint32, uintp

from lingconv.kernels.numeric import float_bits, load

Array = np.ndarray[Any, Any]

# So many checkpoints are added at once, while a sum is in a register.
WIDTHS: Final = (8, 4, 2, 1)
_EXPONENT: Final = 0x7F800000
# Sums that are rounded at once stay in the processor's first cache.
_BLOCK: Final = 1024


@njit(inline="always")
def _add_some(
    terms: Any, first: Any, weights: Any, sums: Any, begin: Any, width: Any
) -> None:  # inlined with a constant width, so that the inner loop is unrolled
    for i in range(sums.size):
        total = float64(0.0) if begin else sums[i]
        for j in range(width):
            total += weights[j] * float64(load(terms[j, uintp(first + i)]))
        sums[i] = total


@njit(nogil=True, cache=True)
def _add(terms: Array, first: int, weights: Array, sums: Array, begin: bool) -> None:
    """Add the terms from column `first` on."""
    if len(weights) == 8:
        _add_some(terms, first, weights, sums, begin, 8)
    elif len(weights) == 4:
        _add_some(terms, first, weights, sums, begin, 4)
    elif len(weights) == 2:
        _add_some(terms, first, weights, sums, begin, 2)
    else:
        _add_some(terms, first, weights, sums, begin, 1)


@njit
def _to_odd(value: Any) -> Any:
    """Return the bits of float32 next to a float64 towards zero, or whose last bit is odd.

    What is rounded that way first can be rounded to fewer bits as if it came from the float64
    itself (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    near = float32(value)
    bits = float_bits(near)
    error = value - float64(near)
    inexact = error != 0.0 and uint32(bits & uint32(1)) == uint32(0)
    beyond = (error > 0.0) == (value > 0.0)
    step = uint32(1) if beyond else uint32(0xFFFFFFFF)
    return uint32(bits + step) if inexact else bits


@njit(nogil=True, cache=True)
def _round_bf16(sums: Array, target: Array) -> int:
    worst = uint32(0)
    for i in range(sums.size):
        bits = _to_odd(sums[i])
        odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
        rounded = uint32(uint32(uint32(bits + uint32(0x7FFF)) + odd) >> uint32(16))
        worst = max(worst, uint32(rounded & uint32(0x7FFF)))
        target[i] = uint16(rounded)
    return int(worst >= uint32(0x7F80))


@njit(nogil=True, cache=True)
def _round_f32(sums: Array, target: Array, to_odd: bool) -> int:
    bits = target.view(np.uint32)
    worst = uint32(0)
    for i in range(sums.size):
        found = _to_odd(sums[i]) if to_odd else float_bits(sums[i])
        worst = max(worst, uint32(found & uint32(0x7FFFFFFF)))
        bits[i] = found
    return int(worst >= uint32(_EXPONENT))


def add(terms: Array, weights: Array, sums: Array, *, begin: bool) -> None:
    """Add weights[j] * terms[j] to `sums`, or set `sums` to that where they `begin`.

    `terms` [J, N] are BF16 (uint16) or float32, J one of WIDTHS; `sums` [N] are float64.
    """
    _add(terms, 0, weights, sums, begin)


def _round(sums: Any, target: Any, to_odd: Any) -> Any:
    """Round to BF16 or float32, as the type of the target says."""


@overload(_round)
def _round_of(sums: Any, target: Any, to_odd: Any) -> Any:
    def to_bf16(sums: Any, target: Any, to_odd: Any) -> Any:
        return _round_bf16(sums, target)

    def to_f32(sums: Any, target: Any, to_odd: Any) -> Any:
        return _round_f32(sums, target, to_odd)

    return to_bf16 if target.dtype == types.uint16 else to_f32


@njit(nogil=True, cache=True)
def finish(
    terms: Array, weights: Array, sums: Array, begin: bool, target: Array, to_odd: bool
) -> int:
    """Add the last terms, as `add` does, and round: to BF16 (a uint16 `target`) or to float32.

    Ties go to even; with `to_odd` a float32 is to be rounded again, to fewer bits. Returns 1 when
    any result is NaN or Inf. `sums` are only read, and not even that where they `begin`.
    """
    held = np.empty(_BLOCK, np.float64)
    nonfinite = 0
    for first in range(0, target.size, _BLOCK):
        part = held[: min(_BLOCK, target.size - first)]
        into = target[first : first + part.size]
        if not begin:
            part[:] = sums[first : first + part.size]
        _add(terms, first, weights, part, begin)
        nonfinite |= _round(part, into, to_odd)
    return nonfinite
