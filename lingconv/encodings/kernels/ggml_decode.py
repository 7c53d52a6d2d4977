"""Decoding of ggml's quantized blocks to float32, compiled by numba, equal to gguf-py bit for bit.

Every `dequantize_*` takes `blocks` [blocks, bytes] (uint8) and fills `values` [blocks, elements]
(float32). Layouts: ggml/src/ggml-common.h in github.com/ggml-org/llama.cpp at 0c1e5709; order of
operations: gguf/quants.py of gguf-py 0.19.
"""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy import float32, int8, int32, uint8, uint16, uint32

from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.kernels.ggml_encode import half_value
from lingconv.encodings.kernels.jit import BYTES, F32, helper, kernel
from lingconv.encodings.kernels.numeric import Array

# kvalues_iq4nl of ggml-common.h.
IQ4_VALUES: Final = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# e2m1 x 2, in the order of its codes; scales of MXFP4 are halved for it.
_FP4_VALUES: Final = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


@helper
def _half(block: Array, place: Any) -> Any:
    """Return the F16 at byte `place` as float32."""
    return half_value(uint16(uint16(block[place]) | uint16(uint16(block[place + 1]) << uint16(8))))


@kernel((BYTES, F32))
def dequantize_q8_0(blocks: Array, values: Array) -> None:
    """d; 32 signed bytes: d x q."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 0)
        for index in range(32):
            out[index] = float32(int8(block[2 + index])) * scale


@kernel((BYTES, F32))
def dequantize_q4_0(blocks: Array, values: Array) -> None:
    """d; 16 bytes of two nibbles, 16 elements apart: d x (q - 8)."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 0)
        for index in range(16):
            pair = int32(block[2 + index])
            out[index] = scale * float32((pair & 15) - 8)
            out[index + 16] = scale * float32((pair >> 4) - 8)


@kernel((BYTES, F32))
def dequantize_q4_1(blocks: Array, values: Array) -> None:
    """d, m; nibbles as in Q4_0: d x q + m."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale, low = _half(block, 0), _half(block, 2)
        for index in range(16):
            pair = int32(block[4 + index])
            out[index] = scale * float32(pair & 15) + low
            out[index + 16] = scale * float32(pair >> 4) + low


@helper
def _fifth_bits(block: Array, place: Any) -> Any:
    """Return the 32 bits at byte `place`: bit i is the fifth bit of element i."""
    bits = uint32(0)
    for index in range(4):
        bits |= uint32(block[place + index]) << uint32(8 * index)
    return bits


@helper
def _five_bits(pair: Any, bits: Any, index: Any) -> Any:
    """Return elements `index` and `index + 16` of a block of five-bit numbers."""
    low = (pair & 15) | (int32((bits >> uint32(index)) & uint32(1)) << 4)
    high = (pair >> 4) | (int32((bits >> uint32(index + 16)) & uint32(1)) << 4)
    return low, high


@kernel((BYTES, F32))
def dequantize_q5_0(blocks: Array, values: Array) -> None:
    """d; the fifth bits; nibbles as in Q4_0: d x (q - 16)."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale, bits = _half(block, 0), _fifth_bits(block, 2)
        for index in range(16):
            low, high = _five_bits(int32(block[6 + index]), bits, index)
            out[index] = scale * float32(low - 16)
            out[index + 16] = scale * float32(high - 16)


@kernel((BYTES, F32))
def dequantize_q5_1(blocks: Array, values: Array) -> None:
    """d, m; the fifth bits; nibbles as in Q4_0: d x q + m."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale, least, bits = _half(block, 0), _half(block, 2), _fifth_bits(block, 4)
        for index in range(16):
            low, high = _five_bits(int32(block[8 + index]), bits, index)
            out[index] = scale * float32(low) + least
            out[index + 16] = scale * float32(high) + least


@kernel((BYTES, F32))
def dequantize_q2_k(blocks: Array, values: Array) -> None:
    """16 scales and minima of 4 bits; 64 bytes of four elements; d, dmin: d x s x q - dmin x m."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale, least = _half(block, 80), _half(block, 82)
        for part in range(16):
            step = scale * float32(block[part] & 15)
            low = least * float32(block[part] >> 4)
            first = 16 + 32 * (part // 8) + 16 * (part % 2)
            shift = 2 * (part % 8 // 2)
            for index in range(16):
                q = (int32(block[first + index]) >> shift) & 3
                out[16 * part + index] = step * float32(q) - low


@helper
def _q3_k_scale(block: Array, part: Any) -> Any:
    """Return the six-bit scale of sixteen elements, from -32 to 31."""
    low = (int32(block[96 + part % 8]) >> (4 * (part // 8))) & 15
    high = (int32(block[104 + part % 4]) >> (2 * (part // 4))) & 3
    return (low | (high << 4)) - 32


@kernel((BYTES, F32))
def dequantize_q3_k(blocks: Array, values: Array) -> None:
    """32 bytes of third bits, 64 of two bits, 12 of scales; d: d x s x (q - 4 where no bit)."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 108)
        for part in range(16):
            step = scale * float32(_q3_k_scale(block, part))
            first = 32 + 32 * (part // 8) + 16 * (part % 2)
            shift, bit = 2 * (part % 8 // 2), part // 2
            for index in range(16):
                q = (int32(block[first + index]) >> shift) & 3
                third = (int32(block[16 * (part % 2) + index]) >> bit) & 1
                out[16 * part + index] = step * float32(q - 4 * (1 - third))


@helper
def _scale_and_min(block: Array, part: Any) -> Any:
    """Return the six-bit scale and minimum of 32 elements, packed in 12 bytes from byte 4."""
    if part < 4:
        return int32(block[4 + part]) & 63, int32(block[8 + part]) & 63
    both = int32(block[8 + part])
    scale = (both & 15) | ((int32(block[part]) >> 6) << 4)
    return scale, (both >> 4) | ((int32(block[4 + part]) >> 6) << 4)


@kernel((BYTES, F32))
def dequantize_q4_k(blocks: Array, values: Array) -> None:
    """d, dmin; 12 bytes of scales and minima; 128 bytes of nibbles: d x s x q - dmin x m."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale, least = _half(block, 0), _half(block, 2)
        for part in range(8):
            units, lows = _scale_and_min(block, part)
            step, low = scale * float32(units), least * float32(lows)
            first, shift = 16 + 32 * (part // 2), 4 * (part % 2)
            for index in range(32):
                q = (int32(block[first + index]) >> shift) & 15
                out[32 * part + index] = step * float32(q) - low


@kernel((BYTES, F32))
def dequantize_q5_k(blocks: Array, values: Array) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale, least = _half(block, 0), _half(block, 2)
        for part in range(8):
            units, lows = _scale_and_min(block, part)
            step, low = scale * float32(units), least * float32(lows)
            first, shift = 48 + 32 * (part // 2), 4 * (part % 2)
            for index in range(32):
                fifth = (int32(block[16 + index]) >> part) & 1
                q = ((int32(block[first + index]) >> shift) & 15) | (fifth << 4)
                out[32 * part + index] = step * float32(q) - low


@kernel((BYTES, F32))
def dequantize_q6_k(blocks: Array, values: Array) -> None:
    """128 bytes of nibbles, 64 of two upper bits, 16 signed scales; d: d x s x (q - 32)."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 208)
        for part in range(16):
            step = scale * float32(int8(block[192 + part]))
            half, quarter, left = part // 8, part % 8 // 2, 16 * (part % 2)
            lower = 64 * half + 32 * (quarter % 2) + left
            upper = 128 + 32 * half + left
            for index in range(16):
                low = (int32(block[lower + index]) >> (4 * (quarter // 2))) & 15
                high = (int32(block[upper + index]) >> (2 * quarter)) & 3
                out[16 * part + index] = step * float32((low | (high << 4)) - 32)


@kernel((BYTES, F32))
def dequantize_iq4_nl(blocks: Array, values: Array) -> None:
    """d; nibbles as in Q4_0 that index a table: d x table[q]."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 0)
        for index in range(16):
            out[index] = scale * IQ4_VALUES[block[2 + index] & 15]
            out[index + 16] = scale * IQ4_VALUES[block[2 + index] >> 4]


@kernel((BYTES, F32))
def dequantize_iq4_xs(blocks: Array, values: Array) -> None:
    """d; eight six-bit scales in 2 + 4 bytes; nibbles as in IQ4_NL: d x (s - 32) x table[q]."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 0)
        highs = int32(block[2]) | (int32(block[3]) << 8)
        for part in range(8):
            low = (int32(block[4 + part // 2]) >> (4 * (part % 2))) & 15
            high = (highs >> (2 * part)) & 3
            step = scale * float32((low | (high << 4)) - 32)
            for index in range(16):
                pair = block[8 + 16 * part + index]
                out[32 * part + index] = step * IQ4_VALUES[pair & 15]
                out[32 * part + index + 16] = step * IQ4_VALUES[pair >> 4]


@kernel((BYTES, F32))
def dequantize_mxfp4(blocks: Array, values: Array) -> None:
    """An exponent e; nibbles as in Q4_0 that are e2m1: 2^(e - 128) x 2 x q."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        exponent = uint32(block[0])
        bits = (
            uint32(0x00200000) << exponent
            if exponent < uint32(2)
            else uint32(exponent - uint32(1)) << uint32(23)
        )
        scale = uint32(bits).view(np.float32)
        for index in range(16):
            out[index] = scale * _FP4_VALUES[block[1 + index] & 15]
            out[index + 16] = scale * _FP4_VALUES[block[1 + index] >> 4]


@helper
def _trit(byte: Any, power: Any) -> Any:
    """Return a digit of a base-3 fraction of 256, from -1 to 1."""
    digit = (uint16(uint8(uint8(byte) * uint8(power))) * uint16(3)) >> uint16(8)
    return float32(int32(digit) - 1)


@kernel((BYTES, F32))
def dequantize_tq1_0(blocks: Array, values: Array) -> None:
    """48 bytes of five ternary digits, 4 of four; d: d x digit."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 52)
        power = 1
        for digit in range(5):
            for index in range(32):
                out[32 * digit + index] = scale * _trit(block[index], power)
            for index in range(16):
                out[160 + 16 * digit + index] = scale * _trit(block[32 + index], power)
            if digit < 4:
                for index in range(4):
                    out[240 + 4 * digit + index] = scale * _trit(block[48 + index], power)
            power *= 3


@kernel((BYTES, F32))
def dequantize_tq2_0(blocks: Array, values: Array) -> None:
    """64 bytes of four two-bit digits; d: d x (q - 1)."""
    for number in range(blocks.shape[0]):
        block, out = blocks[number], values[number]
        scale = _half(block, 64)
        for part in range(8):
            first, shift = 32 * (part // 4), 2 * (part % 4)
            for index in range(32):
                q = (int32(block[first + index]) >> shift) & 3
                out[32 * part + index] = scale * float32(q - 1)


def dequantize(kind: GgmlType, blocks: Array, values: Array) -> None:
    """Decode `blocks` [blocks, bytes] of any type that gguf-py supports.

    The types that are only read (IQ1, IQ2, IQ3) are decoded by gguf-py, which is slower.
    """
    decode = DEQUANTIZERS.get(kind)
    if decode is not None:
        decode(blocks, values)
        return
    import gguf

    with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for NaN and Inf
        values[:] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.id))


DEQUANTIZERS: Final[dict[GgmlType, Callable[[Array, Array], None]]] = {
    GgmlType.Q4_0: dequantize_q4_0,
    GgmlType.Q4_1: dequantize_q4_1,
    GgmlType.Q5_0: dequantize_q5_0,
    GgmlType.Q5_1: dequantize_q5_1,
    GgmlType.Q8_0: dequantize_q8_0,
    GgmlType.Q2_K: dequantize_q2_k,
    GgmlType.Q3_K: dequantize_q3_k,
    GgmlType.Q4_K: dequantize_q4_k,
    GgmlType.Q5_K: dequantize_q5_k,
    GgmlType.Q6_K: dequantize_q6_k,
    GgmlType.IQ4_NL: dequantize_iq4_nl,
    GgmlType.IQ4_XS: dequantize_iq4_xs,
    GgmlType.MXFP4: dequantize_mxfp4,
    GgmlType.TQ1_0: dequantize_tq1_0,
    GgmlType.TQ2_0: dequantize_tq2_0,
}
