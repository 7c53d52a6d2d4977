"""Encoding of float32 as ggml's quantized blocks, compiled by numba, equal to ggml bit for bit.

Every `quantize_*` takes `values` [blocks, elements] (float32) and fills `out` [blocks, bytes]
(uint8), with the block layouts of ggml/src/ggml-common.h in github.com/ggml-org/llama.cpp at
0c1e5709. Numbers are little-endian, scales F16.
Algorithms: ggml/src/ggml-quants.c there. Values must be finite.
"""

import math
from typing import Any, Final

import numpy as np
from numpy import float32, float64, int32, uint8, uint16, uint32

from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.kernels.ggml_search import (
    LANES,
    LEVELS,
    MIN,
    PEAK,
    SCALE,
    STATE_SIZE,
    TINY,
    WON_ISCALE,
    WON_MIN,
    W,
    X,
    clamped,
    iq4_index,
    load_lanes,
    nearest_int,
    search_scale,
    search_scale_iq4,
    search_scale_min,
    search_scale_moving,
    search_scales_moving,
)
from lingconv.encodings.kernels.intrinsics import repeat_16
from lingconv.encodings.kernels.jit import BYTES, F32, INT, helper, kernel
from lingconv.encodings.kernels.numeric import Array, float_bits

# Half-way between e2m1's magnitudes x 2, which are 0, 1, 2, 3, 4, 6, 8 and 12 (kvalues_fp4).
_FP4_MIDDLES: Final = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)


@helper
def half_bits(value: Any) -> Any:
    """Return the bits of a float32 rounded to F16, to nearest, ties to even."""
    bits = float_bits(value)
    sign = uint32(uint32(bits >> uint32(16)) & uint32(0x8000))
    magnitude = uint32(bits & uint32(0x7FFFFFFF))
    if magnitude > uint32(0x7F800000):
        return uint16(sign | uint32(0x7E00))
    if magnitude >= uint32(0x47800000):  # 65536
        return uint16(sign | uint32(0x7C00))
    if magnitude < uint32(0x38800000):  # 2^-14: below it F16 is subnormal, in steps of 2^-24
        code = uint32(
            float_bits(uint32(magnitude).view(np.float32) + float32(0.5)) - uint32(0x3F000000)
        )
        return uint16(sign | code)
    odd = uint32(uint32(magnitude >> uint32(13)) & uint32(1))
    rounded = uint32(uint32(magnitude - uint32(112 << 23)) + uint32(0xFFF) + odd)
    return uint16(sign | uint32(rounded >> uint32(13)))


@helper
def half_value(bits: Any) -> Any:
    """Return the float32 of F16 bits."""
    magnitude = uint32(uint32(bits) & uint32(0x7FFF))
    if magnitude >= uint32(0x7C00):
        raised = uint32(uint32(magnitude << uint32(13)) + uint32(224 << 23))
        value = uint32(raised).view(np.float32)
    elif magnitude >= uint32(0x400):
        raised = uint32(uint32(magnitude << uint32(13)) + uint32(112 << 23))
        value = uint32(raised).view(np.float32)
    else:
        value = float32(float32(magnitude) * float32(2.0**-24))
    return -value if uint32(bits) & uint32(0x8000) else value


@helper
def _put_half(out: Array, block: int, at: int, value: Any) -> Any:
    """Store a number as F16; return the stored number."""
    bits = half_bits(value)
    out[block, at] = uint8(bits & uint16(0xFF))
    out[block, at + 1] = uint8(bits >> uint16(8))
    return half_value(bits)


@helper
def _inverse(value: Any) -> Any:
    return float32(1) / value if value != float32(0) else float32(0)


@helper
def _peak(values: Array, block: int) -> Any:
    """Return the largest |value| of a block."""
    bits = uint32(0)
    for i in range(values.shape[1]):
        bits = max(bits, uint32(float_bits(values[block, i]) & uint32(0x7FFFFFFF)))
    return uint32(bits).view(np.float32)


@helper
def _extreme(values: Array, block: int) -> Any:
    """Return the first value whose magnitude is the largest of its block; never a negative zero."""
    peak = _peak(values, block)
    for i in range(values.shape[1]):
        if abs(values[block, i]) == peak and peak > float32(0):
            return values[block, i]
    return float32(0)


@helper
def _round_half_away(value: Any) -> Any:
    """Return a number rounded as by C's roundf: halves away from zero."""
    magnitude = abs(value)
    whole = float32(np.floor(magnitude))
    whole += float32(1) if magnitude - whole >= float32(0.5) else float32(0)
    return int32(-whole) if value < float32(0) else int32(whole)


# Blocks of 32 ------------------------------------------------------------------------------------


@kernel((F32, BYTES))
def quantize_q8_0(values: Array, out: Array) -> None:
    """F16 scale, 32 signed bytes."""
    for block in range(values.shape[0]):
        scale = _peak(values, block) / float32(127)
        inverse = _inverse(scale)
        _put_half(out, block, 0, scale)
        for i in range(32):
            out[block, 2 + i] = uint8(_round_half_away(values[block, i] * inverse))


@kernel((F32, BYTES))
def quantize_q4_0(values: Array, out: Array) -> None:
    """F16 scale, 32 levels -8 ... 7 in nibbles: byte j holds elements j and j + 16."""
    half = _half(values)
    for block in range(values.shape[0]):
        scale = _extreme(values, block) / float32(-8)
        inverse = _inverse(scale)
        _put_half(out, block, 0, scale)
        for j in range(half):
            low = min(int32(15), int32(values[block, j] * inverse + float32(8.5)))
            high = min(int32(15), int32(values[block, j + half] * inverse + float32(8.5)))
            out[block, 2 + j] = uint8(low | (high << 4))


@helper
def _half(values: Array) -> Any:
    """Return 16, hidden from LLVM: it would unroll a constant loop instead of using SIMD."""
    return values.shape[1] // 2


@kernel((F32, BYTES))
def quantize_q5_0(values: Array, out: Array) -> None:
    """F16 scale, 32 fifth bits, nibbles: levels -16 ... 15."""
    for block in range(values.shape[0]):
        scale = _extreme(values, block) / float32(-16)
        _put_half(out, block, 0, scale)
        _put_five_bits(values, out, block, 2, float32(0), _inverse(scale), float32(16.5))


@helper
def _put_five_bits(
    values: Array, out: Array, block: int, at: int, low: Any, inverse: Any, offset: Any
) -> None:
    """Store 32 levels 0 ... 31: four bytes of fifth bits, then nibbles."""
    fifths = uint32(0)
    half = _half(values)
    for j in range(half):
        first = min(int32(31), int32((values[block, j] - low) * inverse + offset))
        second = min(int32(31), int32((values[block, j + half] - low) * inverse + offset))
        out[block, at + 4 + j] = uint8((first & 15) | ((second & 15) << 4))
        bits = uint32(uint32(first >> 4) | uint32(uint32(second >> 4) << uint32(16)))
        fifths |= uint32(bits << uint32(j))
    for byte in range(4):
        out[block, at + byte] = uint8(uint32(fifths >> uint32(8 * byte)) & uint32(0xFF))


@helper
def _ordered(value: Any) -> Any:
    """Return an integer with the order of finite float32: SIMD finds its minimum and maximum."""
    bits = int32(float_bits(value))
    return int32(bits ^ int32(int32(bits >> int32(31)) & int32(0x7FFFFFFF)))


@helper
def _from_ordered(key: Any) -> Any:
    return float32(int32(key ^ int32(int32(key >> int32(31)) & int32(0x7FFFFFFF))).view(np.float32))


@helper
def _put_range(values: Array, out: Array, block: int, levels: int) -> tuple[Any, Any]:
    """Store scale and minimum of a block as F16; return minimum and inverse scale, unrounded."""
    least, most = int32(0x7FFFFFFF), int32(-0x80000000)
    for i in range(values.shape[1]):
        key = _ordered(values[block, i])
        least, most = min(least, key), max(most, key)
    low, high = _from_ordered(least), _from_ordered(most)
    if low == float32(0):  # -0.0 and 0.0 compare equal: keep the first one, as ggml does
        for i in range(values.shape[1] - 1, -1, -1):
            low = values[block, i] if values[block, i] == low else low
    scale = (high - low) / float32(levels)
    _put_half(out, block, 0, scale)
    _put_half(out, block, 2, low)
    return low, _inverse(scale)


@kernel((F32, BYTES))
def quantize_q4_1(values: Array, out: Array) -> None:
    """F16 scale, F16 minimum, nibbles."""
    half = _half(values)
    for block in range(values.shape[0]):
        low, inverse = _put_range(values, out, block, 15)
        for j in range(half):
            first = int32((values[block, j] - low) * inverse + float32(0.5))
            second = int32((values[block, j + half] - low) * inverse + float32(0.5))
            out[block, 4 + j] = uint8(min(int32(15), first) | (min(int32(15), second) << 4))


@kernel((F32, BYTES))
def quantize_q5_1(values: Array, out: Array) -> None:
    """F16 scale, F16 minimum, 32 fifth bits, nibbles."""
    for block in range(values.shape[0]):
        low, inverse = _put_range(values, out, block, 31)
        _put_five_bits(values, out, block, 4, low, inverse, float32(0.5))


@kernel((F32, BYTES))
def quantize_mxfp4(values: Array, out: Array) -> None:
    """A power of two (E8M0), 32 e2m1 numbers in nibbles."""
    for block in range(values.shape[0]):
        peak = _peak(values, block)
        exponent = int32(0)
        if peak > float32(0):
            # log2f in C: rounded to float32 before the floor.
            exponent = int32(math.floor(float32(np.log2(float64(peak))))) - int32(2) + int32(127)
        exponent &= int32(0xFF)
        bits = uint32(0x200000) << uint32(exponent)
        if exponent >= 2:
            bits = uint32(exponent - 1) << uint32(23)
        scale = uint32(bits).view(np.float32)  # 2^(exponent - 128): the values are doubled
        out[block, 0] = uint8(exponent)
        for j in range(16):
            low = _fp4_index(values[block, j], scale)
            high = _fp4_index(values[block, j + 16], scale)
            out[block, 1 + j] = uint8(low | (high << 4))


@helper
def _fp4_index(value: Any, scale: Any) -> Any:
    """Return the index of the nearest e2m1 number; of two, that nearer to zero; 0 for both zeros.

    Near a midpoint both distances are exact in float32, so comparing with it gives ggml's result.
    """
    magnitude = abs(value)
    index = int32(0)
    for k in range(7):
        index += int32(magnitude > _FP4_MIDDLES[k] * scale)
    sign = int32(8) if value < float32(0) else int32(0)
    return index | (sign if index > 0 else int32(0))


@kernel((F32, BYTES))
def quantize_iq4_nl(values: Array, out: Array) -> None:
    """F16 scale, 32 indices of IQ4's values in nibbles."""
    state = np.empty(STATE_SIZE, np.float32)
    for first in range(0, values.shape[0], LANES):
        load_lanes(values, first, 32, state)
        search_scale_iq4(state, 32)
        for k in range(min(LANES, values.shape[0] - first)):
            scale = state[SCALE + k]
            _put_half(out, first + k, 0, scale)
            _put_iq4(values, first + k, out, first + k, 2, _inverse(scale))


@helper
def _put_iq4(values: Array, row: int, out: Array, block: int, at: int, inverse: Any) -> None:
    """Store the 32 values of a row as indices in nibbles."""
    for j in range(16):
        low = iq4_index(inverse * values[row, j])
        high = iq4_index(inverse * values[row, j + 16])
        out[block, at + j] = uint8(low | (high << 4))


# Blocks of 256 -----------------------------------------------------------------------------------


@kernel((F32, BYTES))
def quantize_iq4_xs(values: Array, out: Array) -> None:
    """F16 scale, 8 scales of 6 bits (high bits, low bits), 256 indices in nibbles."""
    state = np.empty(STATE_SIZE, np.float32)
    parts = values.reshape(-1, 32)
    for first in range(0, parts.shape[0], LANES):
        load_lanes(parts, first, 32, state)
        search_scale_iq4(state, 32)
        for block in range(first // 8, min(first + LANES, parts.shape[0]) // 8):
            lane = block * 8 - first
            scale = -_largest(state, SCALE + lane, 8) / float32(32)
            inverse = _inverse(scale)
            _put_half(out, block, 0, scale)
            high_bits = uint32(0)
            for j in range(4):
                out[block, 4 + j] = 0
            for j in range(8):
                level = clamped(inverse * state[SCALE + lane + j], -32, 31)
                _put_iq4(
                    parts, block * 8 + j, out, block, 8 + 16 * j, _inverse(scale * float32(level))
                )
                level += int32(32)
                out[block, 4 + j // 2] |= uint8((level & 15) << (4 * (j % 2)))
                high_bits |= uint32(uint32(level >> 4) << uint32(2 * j))
            out[block, 2] = uint8(high_bits & uint32(0xFF))
            out[block, 3] = uint8(high_bits >> uint32(8))


@helper
def _largest(scales: Array, first: int, count: int) -> Any:
    """Return the first of `count` scales whose magnitude is the largest, or 0."""
    peak = float32(0)
    for j in range(count):
        peak = max(peak, abs(scales[first + j]))
    largest = float32(0)
    for j in range(count - 1, -1, -1):
        scale = scales[first + j]
        largest = scale if abs(scale) == peak and peak > float32(0) else largest
    return largest


@helper
def _levels_of(values: Array, block: int, steps: Array, low: int, high: int, levels: Array) -> None:
    """Fill `levels` for a block of 256, counted from `low`; `steps` has the step of each x."""
    for i in range(256):
        levels[i] = uint8(clamped(values[block, i] / steps[i], low, high) - int32(low))


@kernel((F32, BYTES))
def quantize_q6_k(values: Array, out: Array) -> None:
    """Low nibbles, high bit pairs, 16 signed scales, F16 scale of scales."""
    state = np.empty(STATE_SIZE, np.float32)
    steps = np.empty(256, np.float32)
    levels = np.empty(256, np.uint8)
    parts = values.reshape(-1, 16)
    for first in range(0, parts.shape[0], LANES):
        load_lanes(parts, first, 16, state)
        search_scale(state, 16, 32)
        for block in range(first // 16, min(first + LANES, parts.shape[0]) // 16):
            lane = block * 16 - first
            largest = _largest(state, SCALE + lane, 16)
            if abs(largest) < TINY:
                out[block] = 0
                continue
            inverse = float32(-128) / largest
            scale = _put_half(out, block, 208, float32(1) / inverse)
            for j in range(16):
                code = min(int32(127), nearest_int(inverse * state[SCALE + lane + j]))
                out[block, 192 + j] = uint8(code)
                repeat_16(steps, 16 * j, scale * float32(code))
            _levels_of(values, block, steps, -32, 31, levels)
            for j in range(16):
                if steps[16 * j] == float32(0):
                    _keep_q6_levels(values, block, j, state, lane + j, levels)
            _put_q6_levels(levels, out, block)


@helper
def _keep_q6_levels(
    values: Array, block: int, part: int, state: Array, lane: int, levels: Array
) -> None:
    """Fill `levels` with those of the search, for a part whose rounded scale is 0."""
    for i in range(16 * part, 16 * part + 16):
        level = clamped(state[WON_ISCALE + lane] * values[block, i], -32, 31) + 32
        levels[i] = uint8(0 if state[PEAK + lane] < TINY else level)


@helper
def _put_q6_levels(levels: Array, out: Array, block: int) -> None:
    for part in range(2):
        for i in range(32):
            at = 128 * part + i
            a, b, c, d = levels[at], levels[at + 32], levels[at + 64], levels[at + 96]
            out[block, 64 * part + i] = uint8((a & 15) | ((c & 15) << 4))
            out[block, 64 * part + 32 + i] = uint8((b & 15) | ((d & 15) << 4))
            pairs = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
            out[block, 128 + 32 * part + i] = uint8(pairs)


# Number of blocks whose sixteen sub-blocks are searched together: enough that the sub-blocks which
# take more rounds than the others fill SIMD lanes of their own.
_Q3_BLOCKS: Final = 256


@kernel((F32, BYTES))
def quantize_q3_k(values: Array, out: Array) -> None:
    """Third bits, low bit pairs, 16 scales of 6 bits, F16 scale of scales."""
    state = np.empty(STATE_SIZE, np.float32)
    scales = np.empty(16 * _Q3_BLOCKS, np.float32)
    codes = np.empty(16, np.int32)
    steps = np.empty(256, np.float32)
    levels = np.empty(256, np.uint8)
    parts = values.reshape(-1, 16)
    for first in range(0, values.shape[0], _Q3_BLOCKS):
        last = min(first + _Q3_BLOCKS, values.shape[0])
        search_scales_moving(parts[16 * first : 16 * last], 16, 4, state, scales)
        for block in range(first, last):
            _put_q3_scales(scales, 16 * (block - first), out, block, codes, steps)
            _levels_of(values, block, steps, -4, 3, levels)
            for j in range(16):
                if steps[16 * j] == float32(0):
                    _keep_q3_levels(parts[16 * block + j : 16 * block + j + 1], state, j, levels)
            _put_q3_levels(levels, out, block)


@helper
def _put_q3_scales(
    scales: Array, first: int, out: Array, block: int, codes: Array, steps: Array
) -> None:
    """Store the scale of scales and 16 scales of 6 bits; fill `steps` with their products."""
    own = scales[first : first + 16]
    largest = _largest(own, 0, 16)
    inverse = float32(-32) / largest
    scale = _put_half(
        out, block, 108, float32(1) / inverse if largest != float32(0) else float32(0)
    )
    is_zero = largest == float32(0)  # ggml leaves the bits of such a block at zero: scale -32
    for j in range(16):
        codes[j] = int32(0) if is_zero else clamped(inverse * own[j], -32, 31) + int32(32)
    for j in range(16):
        repeat_16(steps, 16 * j, scale * float32(codes[j] - int32(32)))
    for j in range(8):
        out[block, 96 + j] = uint8((codes[j] & 15) | ((codes[j + 8] & 15) << 4))
    for j in range(4):
        pairs = (codes[j] >> 4) | ((codes[j + 4] >> 4) << 2)
        pairs |= ((codes[j + 8] >> 4) << 4) | ((codes[j + 12] >> 4) << 6)
        out[block, 104 + j] = uint8(pairs)


@helper
def _keep_q3_levels(sub_block: Array, state: Array, part: int, levels: Array) -> None:
    """Fill `levels` with those of a repeated search, for a sub-block whose rounded scale is 0."""
    load_lanes(sub_block, 0, 16, state)
    search_scale_moving(state, 16, 4)
    for i in range(16):
        level = int32(state[LEVELS + i * LANES]) + 4
        levels[16 * part + i] = uint8(0 if state[PEAK] < TINY else level)


@helper
def _put_q3_levels(levels: Array, out: Array, block: int) -> None:
    for i in range(32):
        thirds = 0
        for part in range(8):
            thirds |= (levels[32 * part + i] >> 2) << part
            levels[32 * part + i] &= 3
        out[block, i] = uint8(thirds)
    _put_bit_pairs(levels, out, block, 32)


@helper
def _put_bit_pairs(levels: Array, out: Array, block: int, at: int) -> None:
    """Store 256 levels 0 ... 3: byte i of a half holds elements i, i + 32, i + 64, i + 96."""
    for part in range(2):
        for i in range(32):
            j = 128 * part + i
            pairs = levels[j] | (levels[j + 32] << 2)
            pairs |= (levels[j + 64] << 4) | (levels[j + 96] << 6)
            out[block, at + 32 * part + i] = uint8(pairs)


@kernel((F32, BYTES))
def quantize_q2_k(values: Array, out: Array) -> None:
    """16 scales and minima in nibbles, bit pairs, F16 scale of scales, F16 scale of minima."""
    state = np.empty(STATE_SIZE, np.float32)
    levels = np.empty(256, np.uint8)
    parts = values.reshape(-1, 16)
    for first in range(0, parts.shape[0], LANES):
        load_lanes(parts, first, 16, state)
        for i in range(16 * LANES):
            state[W + i] = abs(state[X + i])
        search_scale_min(state, 16, 3, float32(-0.5), float32(0.1), 15, True)
        for block in range(first // 16, min(first + LANES, parts.shape[0]) // 16):
            lane = block * 16 - first
            top_scale, top_min = _largest_two(state, lane, 16)
            scale = _put_half(out, block, 80, top_scale / float32(15))
            low = _put_half(out, block, 82, top_min / float32(15))
            to_scale = float32(15) / top_scale if top_scale > float32(0) else float32(0)
            to_min = float32(15) / top_min if top_min > float32(0) else float32(0)
            for j in range(16):
                code = nearest_int(to_scale * state[SCALE + lane + j])
                min_code = nearest_int(to_min * -state[MIN + lane + j])
                out[block, j] = uint8(code | (min_code << 4))
                step, offset = scale * float32(code & 15), low * float32(min_code)
                _put_levels(values, block, 16, j, step, offset, 3, state, lane + j, levels)
            _put_bit_pairs(levels, out, block, 16)


@helper
def _largest_two(state: Array, lane: int, count: int) -> tuple[Any, Any]:
    """Return the largest scale and the largest (negated) minimum of some sub-blocks."""
    top_scale, top_min = float32(0), float32(0)
    for j in range(count):
        top_scale = max(top_scale, state[SCALE + lane + j])
        top_min = max(top_min, -state[MIN + lane + j])
    return top_scale, top_min


@helper
def _put_levels(
    values: Array,
    block: int,
    size: int,
    part: int,
    step: Any,
    offset: Any,
    top: int,
    state: Array,
    lane: int,
    levels: Array,
) -> None:
    """Fill `levels` for a sub-block's rounded scale; if that is 0, with the search's levels."""
    begin = size * part
    if step != float32(0):
        for i in range(size):
            levels[begin + i] = uint8(clamped((values[block, begin + i] + offset) / step, 0, top))
        return
    iscale, low = state[WON_ISCALE + lane], state[WON_MIN + lane]
    for i in range(size):
        levels[begin + i] = uint8(clamped(iscale * (values[block, begin + i] - low), 0, top))


@helper
def _search_k4(parts: Array, first: int, state: Array, top: int, start: Any, steps: int) -> None:
    """Search scales and minima of sub-blocks of 32, each x weighted by rms + |x| (Q4_K, Q5_K)."""
    load_lanes(parts, first, 32, state)
    for k in range(LANES):
        state[SCALE + k] = float32(0)
    for i in range(32):
        for k in range(LANES):
            x = state[X + i * LANES + k]
            state[SCALE + k] += x * x
    for k in range(LANES):
        state[SCALE + k] = float32(math.sqrt(state[SCALE + k] / float32(32)))
    for i in range(32):
        for k in range(LANES):
            state[W + i * LANES + k] = state[SCALE + k] + abs(state[X + i * LANES + k])
    search_scale_min(state, 32, top, start, float32(0.1), steps, False)


@helper
def _put_k4(
    values: Array, block: int, state: Array, lane: int, top: int, out: Array, levels: Array
) -> None:
    """Store F16 scales of scales and minima, and eight pairs of 6 bits; fill `levels`."""
    top_scale, top_min = _largest_two(state, lane, 8)
    to_scale = float32(63) / top_scale if top_scale > float32(0) else float32(0)
    to_min = float32(63) / top_min if top_min > float32(0) else float32(0)
    scale = _put_half(out, block, 0, top_scale / float32(63))
    low = _put_half(out, block, 2, top_min / float32(63))
    for j in range(8):
        code = min(int32(63), nearest_int(to_scale * state[SCALE + lane + j]))
        min_code = min(int32(63), nearest_int(to_min * -state[MIN + lane + j]))
        if j < 4:
            out[block, 4 + j] = uint8(code)
            out[block, 8 + j] = uint8(min_code)
        else:
            out[block, 8 + j] = uint8((code & 15) | ((min_code & 15) << 4))
            out[block, j] |= uint8((code >> 4) << 6)
            out[block, 4 + j] |= uint8((min_code >> 4) << 6)
        step, offset = scale * float32(code), low * float32(min_code)
        _put_levels(values, block, 32, j, step, offset, top, state, lane + j, levels)


@kernel((F32, BYTES))
def quantize_q4_k(values: Array, out: Array) -> None:
    """F16 scale of scales and of minima, 8 pairs of 6 bits, 256 nibbles."""
    state = np.empty(STATE_SIZE, np.float32)
    levels = np.empty(256, np.uint8)
    parts = values.reshape(-1, 32)
    for first in range(0, parts.shape[0], LANES):
        _search_k4(parts, first, state, 15, float32(-1), 20)
        for block in range(first // 8, min(first + LANES, parts.shape[0]) // 8):
            _put_k4(values, block, state, block * 8 - first, 15, out, levels)
            for part in range(4):
                for i in range(32):
                    at = 64 * part + i
                    out[block, 16 + 32 * part + i] = uint8(levels[at] | (levels[at + 32] << 4))


@kernel((F32, BYTES))
def quantize_q5_k(values: Array, out: Array) -> None:
    """As Q4_K, with 256 fifth bits before the nibbles."""
    state = np.empty(STATE_SIZE, np.float32)
    levels = np.empty(256, np.uint8)
    parts = values.reshape(-1, 32)
    for first in range(0, parts.shape[0], LANES):
        _search_k4(parts, first, state, 31, float32(-0.5), 15)
        for block in range(first // 8, min(first + LANES, parts.shape[0]) // 8):
            _put_k4(values, block, state, block * 8 - first, 31, out, levels)
            for i in range(32):
                fifths = 0
                for part in range(8):
                    fifths |= (levels[32 * part + i] >> 4) << part
                out[block, 16 + i] = uint8(fifths)
            for part in range(4):
                for i in range(32):
                    low, high = levels[64 * part + i] & 15, levels[64 * part + 32 + i] & 15
                    out[block, 48 + 32 * part + i] = uint8(low | (high << 4))


@kernel((F32, BYTES))
def quantize_tq1_0(values: Array, out: Array) -> None:
    """256 levels -1, 0, 1, five to a byte (the last sixteen four to a byte), F16 scale."""
    for block in range(values.shape[0]):
        scale = _peak(values, block)
        inverse = _inverse(scale)
        _put_half(out, block, 52, scale)
        for i in range(32):
            out[block, i] = _trits(values, block, i, 32, 5, inverse)
        for i in range(16):
            out[block, 32 + i] = _trits(values, block, 160 + i, 16, 5, inverse)
        for i in range(4):
            out[block, 48 + i] = _trits(values, block, 240 + i, 4, 4, inverse)


@helper
def _trits(values: Array, block: int, at: int, step: int, count: int, inverse: Any) -> Any:
    """Return `count` levels in a byte, as a fraction of 3^5: multiplying by 3 unpacks them."""
    packed = 0
    for n in range(5):
        level = 0
        if n < count:
            level = _round_half_away(values[block, at + n * step] * inverse) + 1
        packed = packed * 3 + level
    return uint8((packed * 256 + 242) // 243)


@kernel((F32, BYTES))
def quantize_tq2_0(values: Array, out: Array) -> None:
    """256 levels -1, 0, 1 in bit pairs, F16 scale."""
    levels = np.empty(256, np.uint8)
    for block in range(values.shape[0]):
        scale = _peak(values, block)
        inverse = _inverse(scale)
        _put_half(out, block, 64, scale)
        for i in range(256):
            levels[i] = uint8(_round_half_away(values[block, i] * inverse) + 1)
        _put_bit_pairs(levels, out, block, 0)


@kernel((BYTES, INT))
def find_infinite_half(blocks: Array, place: int) -> int:
    """Return the first block whose F16 at byte `place` is Inf or NaN, or -1.

    Its numbers were too large for the type.
    """
    for number in range(blocks.shape[0]):
        if (blocks[number, place + 1] & 0x7C) == 0x7C:
            return number
    return -1


QUANTIZERS: Final = {
    GgmlType.Q4_0: quantize_q4_0,
    GgmlType.Q4_1: quantize_q4_1,
    GgmlType.Q5_0: quantize_q5_0,
    GgmlType.Q5_1: quantize_q5_1,
    GgmlType.Q8_0: quantize_q8_0,
    GgmlType.Q2_K: quantize_q2_k,
    GgmlType.Q3_K: quantize_q3_k,
    GgmlType.Q4_K: quantize_q4_k,
    GgmlType.Q5_K: quantize_q5_k,
    GgmlType.Q6_K: quantize_q6_k,
    GgmlType.IQ4_NL: quantize_iq4_nl,
    GgmlType.IQ4_XS: quantize_iq4_xs,
    GgmlType.MXFP4: quantize_mxfp4,
    GgmlType.TQ1_0: quantize_tq1_0,
    GgmlType.TQ2_0: quantize_tq2_0,
}
# Offsets of a block's F16 scales in bytes.
SCALES_AT: Final = {
    GgmlType.Q4_0: (0,),
    GgmlType.Q4_1: (0, 2),
    GgmlType.Q5_0: (0,),
    GgmlType.Q5_1: (0, 2),
    GgmlType.Q8_0: (0,),
    GgmlType.Q2_K: (80, 82),
    GgmlType.Q3_K: (108,),
    GgmlType.Q4_K: (0, 2),
    GgmlType.Q5_K: (0, 2),
    GgmlType.Q6_K: (208,),
    GgmlType.IQ4_NL: (0,),
    GgmlType.IQ4_XS: (0,),
    GgmlType.MXFP4: (),
    GgmlType.TQ1_0: (52,),
    GgmlType.TQ2_0: (64,),
}
