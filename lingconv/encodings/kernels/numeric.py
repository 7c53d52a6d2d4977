"""Arithmetic of BF16, F32 and FP8 e4m3 that all kernels share, compiled by numba.

BF16 is passed as uint16, e4m3 as uint8. Rounding is to nearest, ties to even, always. Every kernel
equals torch bit for bit (tests/test_kernels.py) and returns whether it found NaN or Inf.

Everything is branch-free integer and float32 arithmetic, so that LLVM vectorizes the inner loops;
no fast-math, which would change bits. numba widens uint32 arithmetic to 64 bits, which would halve
the number of SIMD lanes: hence the uint32() around each step.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, uint8, uint16, uint32

from lingconv.encodings.kernels.jit import BF16_LINE, F32_LINE, INT, helper, kernel

Array = np.ndarray[Any, Any]

_EXPONENT: Final = 0x7F800000
_MAGNITUDE: Final = 0x7FFFFFFF
_MAX_E4M3_BITS: Final = 0x43E00000  # 448.0
_MIN_NORMAL_E4M3_BITS: Final = 0x3C800000  # 2^-6, the smallest normal e4m3
_REBIAS: Final = (0x7FFFF - (120 << 23)) & 0xFFFFFFFF  # half an ulp less, exponent bias 127 -> 7
_SUBNORMAL_MAGIC: Final = 16384.0  # 2^14: its float32 ulp is 2^-9, the e4m3 subnormal step
_SUBNORMAL_MAGIC_BITS: Final = 0x46800000
_NAN_CODE: Final = 0x7F


@helper
def float_bits(value: Any) -> Any:
    """Return the bits of a float32."""
    return float32(value).view(np.uint32)


@helper
def float_of(bits: Any) -> Any:
    """Return the float32 of bits."""
    return uint32(bits).view(np.float32)


@helper
def _load_bf16(value: Any) -> Any:
    return float_of(uint32(value) << uint32(16))


@helper
def bf16_from_bits(bits: Any) -> Any:
    """Return float32 bits rounded to BF16; a NaN stays a (quiet) NaN."""
    odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    rounded = uint32(uint32(uint32(bits + uint32(0x7FFF)) + odd) >> uint32(16))
    is_nan = uint32(bits & uint32(_MAGNITUDE)) > uint32(_EXPONENT)
    quiet = uint32(uint32(bits >> uint32(16)) | uint32(0x40))
    return uint16(quiet if is_nan else rounded)


@helper
def e4m3(value: Any) -> Any:
    """Return the e4m3fn code of a float32: saturates at 448, keeps -0 and NaN."""
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
def load_e4m3(code: Any) -> Any:
    """Return the float32 of an e4m3 code without its sign; code 0x7F is NaN."""
    magnitude = uint32(uint32(code) & uint32(0x7F))
    normal = float_of(uint32(uint32(magnitude << uint32(20)) + uint32(120 << 23)))
    subnormal = float32(np.int32(magnitude)) * float32(2.0**-9)
    value = subnormal if magnitude < uint32(8) else normal
    return float32(np.nan) if magnitude == uint32(0x7F) else value


@helper
def sign_of_e4m3(code: Any) -> Any:
    """Return the sign of an e4m3 code, as the sign bit of float32."""
    return uint32(uint32(uint32(code) & uint32(0x80)) << uint32(24))


# An element is BF16 (uint16 bits), e4m3 (uint8 codes) or float32: numba selects overloads by type.
def load(value: Any) -> Any:
    """Return the element as float32."""


@overload(load)
def _load_overload(value: Any) -> Any:
    bodies = {types.uint16: _load_bf16_body, types.uint8: _load_e4m3_body}
    return bodies.get(value, _identity_body)


def _load_bf16_body(value: Any) -> Any:
    return _load_bf16(value)


def _load_e4m3_body(value: Any) -> Any:
    return float_of(uint32(float_bits(load_e4m3(value)) ^ sign_of_e4m3(value)))


def _identity_body(value: Any) -> Any:
    return value


def magnitude_of(value: Any) -> Any:
    """Return the element's bits without the sign, in its own width; they order like |value|."""


def from_magnitude(magnitude: Any) -> Any:
    """Return the absolute value, as float32, of a `magnitude_of`."""


def is_nonfinite(magnitude: Any) -> Any:
    """Return whether a magnitude is Inf or NaN."""


@overload(magnitude_of)
def _magnitude_overload(value: Any) -> Any:
    def bf16(value: Any) -> Any:
        return uint16(value & uint16(0x7FFF))

    def f32(value: Any) -> Any:
        return uint32(float_bits(value) & uint32(_MAGNITUDE))

    return bf16 if value == types.uint16 else f32


@overload(from_magnitude)
def _from_magnitude_overload(magnitude: Any) -> Any:
    def bf16(magnitude: Any) -> Any:
        return load(magnitude)

    def f32(magnitude: Any) -> Any:
        return float_of(magnitude)

    return bf16 if magnitude == types.uint16 else f32


@overload(is_nonfinite)
def _is_nonfinite_overload(magnitude: Any) -> Any:
    def bf16(magnitude: Any) -> Any:
        return magnitude >= uint16(0x7F80)

    def f32(magnitude: Any) -> Any:
        return magnitude >= uint32(_EXPONENT)

    return bf16 if magnitude == types.uint16 else f32


def store(out: Any, index: Any, bits: Any) -> Any:
    """Store float32 bits as the array's own element: rounded to BF16 in uint16, or as float32."""


@overload(store)
def _store_overload(out: Any, index: Any, bits: Any) -> Any:
    return _store_bf16_body if out.dtype == types.uint16 else _store_f32_body


def _store_bf16_body(out: Any, index: Any, bits: Any) -> Any:
    out[index] = bf16_from_bits(bits)


def _store_f32_body(out: Any, index: Any, bits: Any) -> Any:
    out[index] = float_of(bits)


@kernel((BF16_LINE, F32_LINE))
def bf16_to_f32(source: Array, target: Array) -> int:
    """Widen BF16 (uint16) to float32; return 1 if any element is NaN or Inf, else 0."""
    worst = uint16(0)
    for i in range(source.size):
        worst = max(worst, uint16(source[i] & uint16(0x7FFF)))
        target[i] = _load_bf16(source[i])
    return int(worst >= uint16(0x7F80))


@kernel((F32_LINE, INT))
def count_beyond(values: Array, exponent: int) -> int:
    """Return the number of float32 values that are NaN, Inf or at least 2^exponent in magnitude."""
    count = 0
    bits = values.view(np.uint32)
    least = np.uint32((127 + exponent) << 23)
    for index in range(bits.size):
        count += (bits[index] & np.uint32(0x7FFFFFFF)) >= least
    return count


@kernel((F32_LINE, BF16_LINE))
def f32_to_bf16(source: Array, target: Array) -> int:
    """Round float32 to BF16 (uint16); return 1 if any result is NaN or Inf, else 0."""
    bits = source.view(np.uint32)
    worst = uint16(0)
    for i in range(source.size):
        rounded = bf16_from_bits(bits[i])
        worst = max(worst, uint16(rounded & uint16(0x7FFF)))
        target[i] = rounded
    return int(worst >= uint16(0x7F80))
