"""Weighted sums of checkpoints in float64, rounded once.

Every element's sum starts at 0.0 and takes its terms in the order of the checkpoints, each product
and each sum rounded to float64: no threads, no lanes and no fast-math change a bit of it.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit
from numpy import float32, float64, uint16, uint32

from lingconv.kernels.numeric import float_bits, load

Array = np.ndarray[Any, Any]

# So many checkpoints are added at once, while a sum is in a register.
WIDTHS: Final = (8, 4, 2, 1)
_EXPONENT: Final = 0x7F800000


def _adder(width: int) -> Callable[[Array, Array, Array, bool], None]:
    """Return the kernel that adds `width` checkpoints: a loop of constant length is unrolled."""

    @njit(nogil=True, cache=True)
    def add(terms: Array, weights: Array, sums: Array, begin: bool) -> None:
        for i in range(sums.size):
            total = float64(0.0) if begin else sums[i]
            for j in range(width):
                total += weights[j] * float64(load(terms[j, i]))
            sums[i] = total

    return add


_ADDERS: Final = {width: _adder(width) for width in WIDTHS}


def add(terms: Array, weights: Array, sums: Array, *, begin: bool) -> None:
    """Add weights[j] * terms[j] to `sums`, or set `sums` to that where they `begin`.

    `terms` [J, N] are BF16 (uint16) or float32, J one of WIDTHS; `sums` [N] are float64.
    """
    _ADDERS[len(terms)](terms, weights, sums, begin)


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
def round_to_bf16(sums: Array, target: Array) -> int:
    """Round float64 to BF16 (uint16), ties to even; return 1 when any result is NaN or Inf."""
    worst = uint32(0)
    for i in range(sums.size):
        bits = _to_odd(sums[i])
        odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
        rounded = uint32(uint32(uint32(bits + uint32(0x7FFF)) + odd) >> uint32(16))
        worst = max(worst, uint32(rounded & uint32(0x7FFF)))
        target[i] = uint16(rounded)
    return int(worst >= uint32(0x7F80))


@njit(nogil=True, cache=True)
def round_to_f32(sums: Array, target: Array, to_odd: bool) -> int:
    """Round float64 to float32; return 1 when any result is NaN or Inf.

    With `to_odd`, the result is to be rounded again, to fewer bits; else ties go to even.
    """
    bits = target.view(np.uint32)
    worst = uint32(0)
    for i in range(sums.size):
        found = _to_odd(sums[i]) if to_odd else float_bits(sums[i])
        worst = max(worst, uint32(found & uint32(0x7FFFFFFF)))
        bits[i] = found
    return int(worst >= uint32(_EXPONENT))
