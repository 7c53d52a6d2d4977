"""Decoding of numbers of 4 bits with a scale for each group of columns.

A byte holds two codes, the even column in its low half. Every kernel returns 1 if a result is NaN
or Inf, else 0.
"""

from typing import Any

import numpy as np
from numpy import float32, uint32

from lingconv.encodings.kernels.fp4_encode import magnitude_of_e2m1
from lingconv.encodings.kernels.groups import spread_groups, unpack
from lingconv.encodings.kernels.jit import BF16, BYTES, F32, helper, kernel
from lingconv.encodings.kernels.numeric import Array, float_bits, store

_EXPONENT = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF


@helper
def _e2m1_bits(code: Any, unit: Any) -> Any:
    """Return the bits of code x unit, with the sign of the code also at zero."""
    bits = float_bits(magnitude_of_e2m1(code) * unit)
    return uint32(bits ^ uint32(uint32(uint32(code) & uint32(8)) << uint32(28)))


_E2M1 = BYTES, F32


@kernel((*_E2M1, BF16), (*_E2M1, F32))
def dequantize_e2m1(packed: Array, units: Array, values: Array) -> int:
    """Decode `packed` [rows, cols / 2] to BF16 (uint16) or float32 `values` [rows, cols].

    `units` [rows, groups] are the numbers that code 1.0 stands for. Rounded once.
    """
    rows, cols = values.shape
    width = cols // units.shape[1]
    codes = np.empty(cols, np.uint8)
    spread = np.empty(cols, np.float32)
    worst = uint32(0)
    for row in range(rows):
        unpack(packed[row], codes)
        spread_groups(units[row], width, spread)
        out = values[row]
        for col in range(cols):
            bits = _e2m1_bits(codes[col], spread[col])
            worst = max(worst, uint32(bits & uint32(_MAGNITUDE)))
            store(out, col, bits)
    return int(worst >= uint32(_EXPONENT))


_INT4 = BYTES, F32, F32


@kernel((*_INT4, BF16), (*_INT4, F32))
def dequantize_int4(packed: Array, scales: Array, zeros: Array, values: Array) -> int:
    """Decode (code - zero) x scale to BF16 (uint16) or float32 `values` [rows, cols].

    `scales` and `zeros` are [rows, groups], zeros as unsigned codes (8 if codes are symmetric).
    """
    rows, cols = values.shape
    width = cols // scales.shape[1]
    codes = np.empty(cols, np.uint8)
    spread = np.empty(cols, np.float32)
    origin = np.empty(cols, np.float32)
    worst = uint32(0)
    for row in range(rows):
        unpack(packed[row], codes)
        spread_groups(scales[row], width, spread)
        spread_groups(zeros[row], width, origin)
        out = values[row]
        for col in range(cols):
            bits = float_bits((float32(codes[col]) - origin[col]) * spread[col])
            worst = max(worst, uint32(bits & uint32(_MAGNITUDE)))
            store(out, col, bits)
    return int(worst >= uint32(_EXPONENT))
