"""The arithmetic between BF16, F32 and FP8 e4m3, compiled by numba.

Shapes: a matrix is M x N, in blocks of BM x BN, with scales of ceil(M/BM) x ceil(N/BN); edge blocks
are smaller. BF16 travels as uint16, e4m3 as uint8. Rounding is to nearest, ties to even, always.
Every kernel equals torch bit for bit (tests/test_kernels.py) and returns whether it met NaN or Inf;
`quantize` stops there.

Everything is branch-free integer and float32 arithmetic, so that LLVM turns the inner loops into
SIMD; no fast-math, which would change bits. numba widens uint32 arithmetic to 64 bits, which would
halve the lanes: hence the uint32() around each step.
"""

from typing import Any, Final

import numpy as np
from numba import njit, types
from numba.extending import overload
from numpy import float32, uint8, uint16, uint32

from lingconv.encodings.fp8 import E4M3_MAX

Array = np.ndarray[Any, Any]

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


@njit
def float_bits(value: Any) -> Any:
    """Return the bits of a float32."""
    return float32(value).view(np.uint32)


@njit
def _float(bits: Any) -> Any:
    return uint32(bits).view(np.float32)


@njit
def _load_bf16(value: Any) -> Any:
    return _float(uint32(value) << uint32(16))


@njit
def _bf16_from_bits(bits: Any) -> Any:
    """Round float32 bits to BF16; a NaN stays a (quiet) NaN."""
    odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    rounded = uint32(uint32(uint32(bits + uint32(0x7FFF)) + odd) >> uint32(16))
    is_nan = uint32(bits & uint32(_MAGNITUDE)) > uint32(_EXPONENT)
    quiet = uint32(uint32(bits >> uint32(16)) | uint32(0x40))
    return uint16(quiet if is_nan else rounded)


@njit
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
        float_bits(_float(magnitude) + float32(_SUBNORMAL_MAGIC)) - uint32(_SUBNORMAL_MAGIC_BITS)
    )
    code = subnormal if magnitude < uint32(_MIN_NORMAL_E4M3_BITS) else normal
    code = uint32(0x7F) if is_nan else code
    return uint8(code | sign)


@njit
def _round_scale(scale: Any, rounding: Any) -> Any:
    """Round a scale (>= 0, finite) as it is going to be stored; zero becomes one."""
    bits = float_bits(scale)
    if rounding == SCALE_BF16:
        bits = uint32(uint32(_bf16_from_bits(bits)) << uint32(16))
    if rounding == SCALE_UE8M0 and bits != 0:
        # The next power of two: any mantissa bit carries into the exponent.
        bits = uint32(uint32(bits + uint32(0x7FFFFF)) & uint32(_EXPONENT))
        if bits > uint32(_MAX_FINITE_POWER_BITS):
            bits = uint32(_MAX_FINITE_POWER_BITS)
        if scale <= _float(uint32(_MIN_UE8M0_BITS)):
            bits = uint32(_MIN_UE8M0_BITS)
    rounded = _float(bits)
    return float32(1.0) if rounded == float32(0.0) else rounded


@njit
def _load_e4m3(code: Any) -> Any:
    """Return the float32 of an e4m3 code without its sign; code 0x7F is NaN."""
    magnitude = uint32(uint32(code) & uint32(0x7F))
    normal = _float(uint32(uint32(magnitude << uint32(20)) + uint32(120 << 23)))
    subnormal = float32(np.int32(magnitude)) * float32(2.0**-9)
    value = subnormal if magnitude < uint32(8) else normal
    return float32(np.nan) if magnitude == uint32(0x7F) else value


@njit
def _sign_of(code: Any) -> Any:
    return uint32(uint32(uint32(code) & uint32(0x80)) << uint32(24))


# An element is BF16 (uint16 bits), e4m3 (uint8 codes) or float32: numba picks the body by its type.
def load(value: Any) -> Any:
    """Return the element as float32."""


def _magnitude(value: Any) -> Any:
    """Return the element's bits without the sign, in its own width; they order like |value|."""


def _from_magnitude(magnitude: Any) -> Any:
    """Return the float32 that `_magnitude` came from, without its sign."""


def _is_nonfinite(magnitude: Any) -> Any:
    """Return whether a magnitude is Inf or NaN."""


@overload(load)
def _load_overload(value: Any) -> Any:
    bodies = {types.uint16: _load_bf16_body, types.uint8: _load_e4m3_body}
    return bodies.get(value, _identity_body)


@overload(_magnitude)
def _magnitude_overload(value: Any) -> Any:
    return _magnitude_bf16_body if value == types.uint16 else _magnitude_f32_body


@overload(_from_magnitude)
def _from_magnitude_overload(magnitude: Any) -> Any:
    return _from_magnitude_bf16_body if magnitude == types.uint16 else _from_magnitude_f32_body


@overload(_is_nonfinite)
def _is_nonfinite_overload(magnitude: Any) -> Any:
    return _is_nonfinite_bf16_body if magnitude == types.uint16 else _is_nonfinite_f32_body


def _load_bf16_body(value: Any) -> Any:
    return _load_bf16(value)


def _load_e4m3_body(value: Any) -> Any:
    return _float(uint32(float_bits(_load_e4m3(value)) ^ _sign_of(value)))


def _identity_body(value: Any) -> Any:
    return value


def _magnitude_bf16_body(value: Any) -> Any:
    return uint16(value & uint16(0x7FFF))


def _magnitude_f32_body(value: Any) -> Any:
    return uint32(float_bits(value) & uint32(_MAGNITUDE))


def _from_magnitude_bf16_body(magnitude: Any) -> Any:
    return _load_bf16(magnitude)


def _from_magnitude_f32_body(magnitude: Any) -> Any:
    return _float(magnitude)


def _is_nonfinite_bf16_body(magnitude: Any) -> Any:
    return magnitude >= uint16(0x7F80)


def _is_nonfinite_f32_body(magnitude: Any) -> Any:
    return magnitude >= uint32(_EXPONENT)


@njit(nogil=True, cache=True)
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
    for block_row in range(scales.shape[0]):
        first = block_row * block_rows
        last = min(first + block_rows, rows)
        for block_col in range(scales.shape[1]):
            left = block_col * block_cols
            right = min(left + block_cols, cols)
            peak = _magnitude(source[first, left])
            for row in range(first, last):
                line = source[row, left:right]
                for col in range(line.size):
                    peak = max(peak, _magnitude(line[col]))
            if _is_nonfinite(peak):
                if not allow_nonfinite:
                    return first
                peak = _finite_peak(source[first:last, left:right])
            amax = max(_from_magnitude(peak), float32(min_amax))
            scale = _round_scale(amax / float32(E4M3_MAX), rounding)
            scales[block_row, block_col] = scale
            for row in range(first, last):
                line = source[row, left:right]
                out = target[row, left:right]
                for col in range(line.size):
                    out[col] = _e4m3(load(line[col]) / scale)
    return NO_NONFINITE


@njit(nogil=True)
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


def store(out: Any, index: Any, bits: Any) -> Any:
    """Store float32 bits as the array's own element: rounded to BF16 in uint16, or as float32."""


@overload(store)
def _store_overload(out: Any, index: Any, bits: Any) -> Any:
    return _store_bf16_body if out.dtype == types.uint16 else _store_f32_body


def _store_bf16_body(out: Any, index: Any, bits: Any) -> Any:
    out[index] = _bf16_from_bits(bits)


def _store_f32_body(out: Any, index: Any, bits: Any) -> Any:
    out[index] = _float(bits)


@njit(nogil=True, cache=True)
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
    Returns how many lines of blocks have a product that is not finite.
    """
    rows, cols = source.shape
    nonfinite = 0
    for row in range(rows):
        block_row = (first_row + row) // block_rows
        for block_col in range(scales.shape[1]):
            left = block_col * block_cols
            right = min(left + block_cols, cols)
            line = source[row, left:right]
            out = target[row, left:right]
            scale = scales[block_row, block_col]
            worst = uint32(0)
            for col in range(line.size):
                bits = float_bits(_load_e4m3(line[col]) * scale)
                worst = max(worst, uint32(bits & uint32(_MAGNITUDE)))
                store(out, col, uint32(bits ^ _sign_of(line[col])))
            nonfinite += int(worst >= uint32(_EXPONENT))
    return nonfinite


@njit(nogil=True, cache=True)
def bf16_to_f32(source: Array, target: Array) -> int:
    """Widen BF16 (uint16) to float32; return 1 when any element is NaN or Inf."""
    worst = uint16(0)
    for i in range(source.size):
        worst = max(worst, uint16(source[i] & uint16(0x7FFF)))
        target[i] = _load_bf16(source[i])
    return int(worst >= uint16(0x7F80))


@njit(nogil=True, cache=True)
def count_beyond(values: Array, exponent: int) -> int:
    """Return how many float32 values are NaN, Inf or at least 2^exponent in magnitude."""
    count = 0
    bits = values.view(np.uint32)
    least = np.uint32((127 + exponent) << 23)
    for index in range(bits.size):
        count += (bits[index] & np.uint32(0x7FFFFFFF)) >= least
    return count


@njit(nogil=True, cache=True)
def f32_to_bf16(source: Array, target: Array) -> int:
    """Round float32 to BF16 (uint16); return 1 when any result is NaN or Inf."""
    bits = source.view(np.uint32)
    worst = uint16(0)
    for i in range(source.size):
        rounded = _bf16_from_bits(bits[i])
        worst = max(worst, uint16(rounded & uint16(0x7FFF)))
        target[i] = rounded
    return int(worst >= uint16(0x7F80))
