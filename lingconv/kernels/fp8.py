"""Matrices of BF16 or float32 to FP8 e4m3 with scales, and back, compiled by numba.

Shapes: a matrix is M x N, in blocks of BM x BN, with scales of ceil(M/BM) x ceil(N/BN); edge blocks
are smaller. BF16 travels as uint16, e4m3 as uint8. Rounding is to nearest, ties to even, always.
Every kernel equals torch bit for bit (tests/test_kernels.py).

Both go through whole rows of all blocks side by side, as memory likes it; the scale of each column
lies in a line of its own. Almost every row takes the short way: numbers that are finite, scales
that are neither huge nor tiny. The long way has all the answers.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, uint8, uint16, uint32

from lingconv.encodings.fp8 import E4M3_MAX
from lingconv.kernels.compiled import BF16, BOOL, BYTES, F32, FLOAT, INT, helper, kernel
from lingconv.kernels.half import E4M3_GAIN, finite_e4m3
from lingconv.kernels.numeric import (
    Array,
    bf16_from_bits,
    float_bits,
    float_of,
    load,
    load_e4m3,
    sign_of_e4m3,
    store,
)

# How `quantize` rounds a scale before it is used.
SCALE_F32: Final = 0
SCALE_BF16: Final = 1
SCALE_UE8M0: Final = 2

NO_NONFINITE: Final = -1
_EXPONENT: Final = 0x7F800000
_MAGNITUDE: Final = 0x7FFFFFFF
_MAX_E4M3_BITS: Final = 0x43E00000  # 448.0
_MIN_NORMAL_E4M3_BITS: Final = 0x3C800000  # 2^-6, the smallest normal e4m3
_REBIAS: Final = (0x7FFFF - (120 << 23)) & 0xFFFFFFFF  # half an ulp less, exponent bias 127 -> 7
_SUBNORMAL_MAGIC: Final = 16384.0  # 2^14: its float32 ulp is 2^-9, the e4m3 subnormal step
_SUBNORMAL_MAGIC_BITS: Final = 0x46800000
_MIN_UE8M0_BITS: Final = 0x00400000  # 2^-127
_MAX_FINITE_POWER_BITS: Final = 0x7F000000  # 2^127

# Scales between these leave room for the factors below and for every product and quotient.
_LEAST_SCALE: Final = 2.0**-90
_MOST_SCALE: Final = 2.0**90
_LIFT: Final = 2.0**13  # see `_short_code`
_LEAST_LIFTED: Final = (127 - 6 - 13) << 23  # 2^-6, lowered by it
_NAN_CODE: Final = 0x7F


@helper
def _e4m3(value: Any) -> Any:
    """Round a float32 to e4m3fn: saturates at 448, keeps the sign of zero, NaN stays NaN."""
    bits = float_bits(value)
    sign = uint32(uint32(bits >> uint32(24)) & uint32(0x80))
    magnitude = uint32(bits & uint32(_MAGNITUDE))
    is_nan = magnitude > uint32(_EXPONENT)
    magnitude = min(magnitude, uint32(_MAX_E4M3_BITS))
    odd = uint32(uint32(magnitude >> uint32(20)) & uint32(1))
    normal = uint32(uint32(uint32(magnitude + uint32(_REBIAS)) + odd) >> uint32(20))
    subnormal = uint32(
        float_bits(float_of(magnitude) + float32(_SUBNORMAL_MAGIC)) - uint32(_SUBNORMAL_MAGIC_BITS)
    )
    code = subnormal if magnitude < uint32(_MIN_NORMAL_E4M3_BITS) else normal
    code = uint32(_NAN_CODE) if is_nan else code
    return uint8(code | sign)


@helper
def _round_scale(scale: Any, rounding: Any) -> Any:
    """Round a scale (>= 0, finite) as it is going to be stored; zero becomes one."""
    bits = float_bits(scale)
    if rounding == SCALE_BF16:
        bits = uint32(uint32(bf16_from_bits(bits)) << uint32(16))
    if rounding == SCALE_UE8M0 and bits != 0:
        # The next power of two: any mantissa bit carries into the exponent.
        bits = uint32(uint32(bits + uint32(0x7FFFFF)) & uint32(_EXPONENT))
        if bits > uint32(_MAX_FINITE_POWER_BITS):
            bits = uint32(_MAX_FINITE_POWER_BITS)
        if scale <= float_of(uint32(_MIN_UE8M0_BITS)):
            bits = uint32(_MIN_UE8M0_BITS)
    rounded = float_of(bits)
    return float32(1.0) if rounded == float32(0.0) else rounded


# An element is BF16 (uint16 bits) or float32: numba picks the body by its type.
def _magnitude(value: Any) -> Any:
    """Return the element's bits without the sign, in its own width; they order like |value|."""


def _from_magnitude(magnitude: Any) -> Any:
    """Return the float32 that `_magnitude` came from, without its sign."""


def _is_nonfinite(magnitude: Any) -> Any:
    """Return whether a magnitude is Inf or NaN."""


def _new_magnitudes(line: Any) -> Any:
    """Return room for a magnitude of each element of a line."""


@overload(_magnitude)
def _magnitude_overload(value: Any) -> Any:
    def bf16(value: Any) -> Any:
        return uint16(value & uint16(0x7FFF))

    def f32(value: Any) -> Any:
        return uint32(float_bits(value) & uint32(_MAGNITUDE))

    return bf16 if value == types.uint16 else f32


@overload(_from_magnitude)
def _from_magnitude_overload(magnitude: Any) -> Any:
    def bf16(magnitude: Any) -> Any:
        return load(magnitude)

    def f32(magnitude: Any) -> Any:
        return float_of(magnitude)

    return bf16 if magnitude == types.uint16 else f32


@overload(_is_nonfinite)
def _is_nonfinite_overload(magnitude: Any) -> Any:
    def bf16(magnitude: Any) -> Any:
        return magnitude >= uint16(0x7F80)

    def f32(magnitude: Any) -> Any:
        return magnitude >= uint32(_EXPONENT)

    return bf16 if magnitude == types.uint16 else f32


@overload(_new_magnitudes)
def _new_magnitudes_overload(line: Any) -> Any:
    def bf16(line: Any) -> Any:
        return np.empty(line.size, np.uint16)

    def f32(line: Any) -> Any:
        return np.empty(line.size, np.uint32)

    return bf16 if line.dtype == types.uint16 else f32


_QUANTIZE = BYTES, F32, INT, INT, FLOAT, INT, BOOL


@kernel((BF16, *_QUANTIZE), (F32, *_QUANTIZE))
def quantize(
    source: Array,
    target: Array,
    scales: Array,
    block_rows: int,
    block_cols: int,
    min_amax: float,
    rounding: int,
    allow_nonfinite: bool,
) -> int:
    """Quantize a matrix (BF16 as uint16, or float32) into `target` (uint8) and `scales` (float32).

    Per block: scale = max(amax, min_amax) / 448, rounded as `rounding` says; element = w / scale.
    Returns -1, or the first row of the first block with a NaN or Inf unless those are allowed; then
    amax ignores them, Inf saturates and NaN stays NaN.
    """
    rows, cols = source.shape
    peaks = _new_magnitudes(source[0])
    divisors = np.empty(cols, np.float32)
    for block_row in range(scales.shape[0]):
        first = block_row * block_rows
        last = min(first + block_rows, rows)
        peaks[:] = 0
        for row in range(first, last):
            _raise_peaks(source[row], peaks)
        is_plain = True
        for block_col in range(scales.shape[1]):
            left = block_col * block_cols
            right = min(left + block_cols, cols)
            peak = _largest(peaks[left:right])
            if _is_nonfinite(peak):
                if not allow_nonfinite:
                    return first
                is_plain = False
                peak = _finite_peak(source[first:last, left:right])
            amax = max(_from_magnitude(peak), float32(min_amax))
            scale = _round_scale(amax / float32(E4M3_MAX), rounding)
            is_plain &= float32(_LEAST_SCALE) < scale < float32(_MOST_SCALE)
            scales[block_row, block_col] = scale
        line = scales[block_row]
        if is_plain:
            _encode_short(source[first:last], target[first:last], line, block_cols, divisors)
        else:
            _spread(line, block_cols, float32(1), divisors)
            for row in range(first, last):
                _encode_long(source[row], target[row], divisors)
    return NO_NONFINITE


@helper
def _spread(scales: Array, block_cols: int, factor: Any, into: Array) -> None:
    """Give each column the scale of its block, times `factor`."""
    for block_col in range(scales.size):
        scale = scales[block_col] * factor
        left = block_col * block_cols
        part = into[left : min(left + block_cols, into.size)]
        for i in range(part.size):  # counted from 0: an index that may be negative stops SIMD
            part[i] = scale


@helper
def _raise_peaks(line: Array, peaks: Array) -> None:
    for col in range(line.size):
        peaks[col] = max(peaks[col], _magnitude(line[col]))


@helper
def _largest(peaks: Array) -> Any:
    largest = peaks[0]
    for col in range(peaks.size):
        largest = max(largest, peaks[col])
    return largest


@helper
def _finite_peak(block: Array) -> Any:
    """Return the largest magnitude among the finite elements of a block."""
    peak = _magnitude(block[0, 0])
    peak = np.bitwise_xor(peak, peak)
    for row in range(block.shape[0]):
        for col in range(block.shape[1]):
            magnitude = _magnitude(block[row, col])
            if not _is_nonfinite(magnitude):
                peak = max(peak, magnitude)
    return peak


@helper
def _encode_long(line: Array, out: Array, divisors: Array) -> None:
    for col in range(line.size):
        out[col] = _e4m3(load(line[col]) / divisors[col])


@helper
def _short_code(magnitude: Any, divisor: Any) -> Any:
    """Return the e4m3 code of |w| / scale, at most 464, in the low byte; `divisor` is lifted.

    Adding 2^(e + 20) to a number of exponent e rounds it to e4m3's three bits of mantissa, and
    leaves them, with the one before them, in the low bits of the sum, whose exponent says e. The
    lift by 2^13 makes the two, added, the code without a constant more.
    """
    quotient = float_of(magnitude) / divisor
    exponent = max(uint32(float_bits(quotient) & uint32(_EXPONENT)), uint32(_LEAST_LIFTED))
    bits = float_bits(quotient + float_of(uint32(exponent + uint32(20 << 23))))
    return uint32(bits + uint32(bits >> uint32(20)))


def _encode_short(source: Any, target: Any, scales: Any, block_cols: Any, divisors: Any) -> Any:
    """Encode rows that are finite, by scales that are neither huge nor tiny."""


@overload(_encode_short)
def _encode_short_overload(
    source: Any, target: Any, scales: Any, block_cols: Any, divisors: Any
) -> Any:
    def bf16(source: Any, target: Any, scales: Any, block_cols: Any, divisors: Any) -> None:
        if source.shape[1] % 2 or block_cols % 2:
            _encode_rows(source, target, scales, block_cols, divisors)
        else:
            halved = divisors[: source.shape[1] // 2]
            _spread(scales, block_cols // 2, float32(_LIFT), halved)
            for row in range(source.shape[0]):
                _encode_pairs(source[row].view(np.uint32), target[row].view(np.uint16), halved)

    def f32(source: Any, target: Any, scales: Any, block_cols: Any, divisors: Any) -> None:
        _encode_rows(source, target, scales, block_cols, divisors)

    return bf16 if source.dtype == types.uint16 else f32


@helper
def _encode_rows(
    source: Array, target: Array, scales: Array, block_cols: int, divisors: Array
) -> None:
    _spread(scales, block_cols, float32(_LIFT), divisors)
    for row in range(source.shape[0]):
        _encode_numbers(source[row], target[row], divisors)


@helper
def _encode_numbers(line: Array, out: Array, divisors: Array) -> None:
    for col in range(line.size):
        bits = float_bits(load(line[col]))
        code = _short_code(uint32(bits & uint32(_MAGNITUDE)), divisors[col])
        sign = uint32(uint32(bits >> uint32(24)) & uint32(0x80))
        out[col] = uint8(uint32(code & uint32(0x7F)) | sign)


@helper
def _encode_pairs(line: Array, out: Array, divisors: Array) -> None:
    """Encode BF16, two to a word: neighbours need no shuffling that way."""
    for i in range(line.size):
        word = line[i]
        low = _short_code(uint32(uint32(word << uint32(16)) & uint32(_MAGNITUDE)), divisors[i])
        high = _short_code(uint32(word & uint32(0x7FFF0000)), divisors[i])
        signs = uint32(uint32(word >> uint32(8)) & uint32(0x80))
        signs = uint32(signs | uint32(uint32(word >> uint32(16)) & uint32(0x8000)))
        codes = uint32(uint32(low & uint32(0xFF)) | uint32(high << uint32(8)))
        out[i] = uint16(codes | signs)


@kernel((BYTES, F32, BF16, INT, INT, INT), (BYTES, F32, F32, INT, INT, INT))
def dequantize(
    source: Array,
    scales: Array,
    target: Array,
    block_rows: int,
    block_cols: int,
    first_row: int,
) -> int:
    """Write float32(q) * scale, rounded once to BF16 (uint16) or kept as float32.

    `source` (uint8, M x N) starts `first_row` rows below the top of the first row of `scales`.
    Returns how many rows have a product that is not finite.
    """
    rows, cols = source.shape
    factors = np.empty(cols, np.float32)
    lifted = np.empty(cols, np.float32)
    is_plain = False
    nonfinite = 0
    for row in range(rows):
        line = scales[(first_row + row) // block_rows]
        if row == 0 or (first_row + row) % block_rows == 0:
            is_plain = _has_plain_scales(line)
            _spread(line, block_cols, float32(E4M3_GAIN), lifted)
        if is_plain and not _has_nan(source[row]):
            _decode_short(source[row], target[row], lifted)
        else:
            _spread(line, block_cols, float32(1), factors)
            nonfinite += _decode_long(source[row], target[row], factors)
    return nonfinite


@helper
def _has_plain_scales(scales: Array) -> Any:
    worst = float32(0)
    for scale in scales:
        worst = max(worst, abs(scale) if scale == scale else float32(np.inf))
    return worst < float32(_MOST_SCALE)


@helper
def _has_nan(codes: Array) -> Any:
    worst = uint8(0)
    for code in codes:
        worst = max(worst, uint8(code & uint8(0x7F)))
    return worst == uint8(_NAN_CODE)


@helper
def _decode_long(line: Array, out: Array, factors: Array) -> int:
    worst = uint32(0)
    for col in range(line.size):
        bits = float_bits(load_e4m3(line[col]) * factors[col])
        worst = max(worst, uint32(bits & uint32(_MAGNITUDE)))
        store(out, col, uint32(bits ^ sign_of_e4m3(line[col])))
    return int(worst >= uint32(_EXPONENT))


@helper
def _decode_short(line: Array, out: Array, lifted: Array) -> None:
    for col in range(line.size):
        _store_finite(out, col, float_bits(finite_e4m3(line[col]) * lifted[col]))


def _store_finite(out: Any, index: Any, bits: Any) -> Any:
    """Store float32 bits as `store` does, but for NaN."""


@overload(_store_finite)
def _store_finite_overload(out: Any, index: Any, bits: Any) -> Any:
    def bf16(out: Any, index: Any, bits: Any) -> None:
        odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
        out[index] = uint16(uint32(uint32(bits + uint32(0x7FFF)) + odd) >> uint32(16))

    def f32(out: Any, index: Any, bits: Any) -> None:
        out[index] = float_of(bits)

    return bf16 if out.dtype == types.uint16 else f32
