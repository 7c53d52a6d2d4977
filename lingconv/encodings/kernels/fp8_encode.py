"""Encoding of BF16 or float32 to FP8 e4m3 with scales, compiled by numba.

Shapes: a matrix is M x N, in blocks of BM x BN, with scales of ceil(M/BM) x ceil(N/BN); edge blocks
are smaller. BF16 is passed as uint16, e4m3 as uint8. Rounding is to nearest, ties to even, always.
Every kernel equals torch bit for bit (tests/test_kernels.py).

The kernel processes whole rows across all blocks, which is memory order. The fast path is for
blocks of whole chunks (`tiles.py`) with finite numbers and scales that are neither huge nor tiny,
which are almost all; the slow path handles everything.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, uint8, uint16, uint32

from lingconv.encodings.dtypes import E4M3_MAX
from lingconv.encodings.kernels.fp8_table import (
    ENCODED,
    MANTISSAS,
    can_look_up,
    encode_64,
    fill_octave,
    least_normal,
)
from lingconv.encodings.kernels.intrinsics import fused, prefetch
from lingconv.encodings.kernels.jit import BF16, BOOL, BYTES, F32, FLOAT, INT, helper, kernel
from lingconv.encodings.kernels.numeric import (
    Array,
    bf16_from_bits,
    e4m3,
    float_bits,
    float_of,
    from_magnitude,
    is_nonfinite,
    load,
    magnitude_of,
)
from lingconv.encodings.kernels.tiles import CHUNK, LINE, PAIRS, chunks_of_block, has_chunks, spread

# Rounding modes of `quantize` for scales, which are rounded before they are used.
SCALE_F32: Final = 0
SCALE_BF16: Final = 1
SCALE_UE8M0: Final = 2

NO_NONFINITE: Final = -1
_EXPONENT: Final = 0x7F800000
_MAGNITUDE: Final = 0x7FFFFFFF
_MIN_UE8M0_BITS: Final = 0x00400000  # 2^-127
_MAX_FINITE_POWER_BITS: Final = 0x7F000000  # 2^127

# With scales between these, the factors below and all products and quotients stay in range.
_LEAST_SCALE: Final = 2.0**-90
_MOST_SCALE: Final = 2.0**90
_ONES: Final = 0x7FFFFF  # a mantissa of ones, see `_quotient`
_LIFT: Final = 2.0**7  # see `_short_code`
_LEAST_LIFTED: Final = (127 - 6 + 7) << 23  # 2^-6, lifted
_WORTH_A_TABLE: Final = 8  # rows


@helper
def _round_scale(scale: Any, rounding: Any) -> Any:
    """Return a scale (>= 0, finite) rounded to its stored dtype; zero becomes one."""
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


def _new_magnitudes(line: Any) -> Any:
    """Return an array for the magnitudes of a line's elements."""


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
    Returns -1, or the first row of the first block with a NaN or Inf; if those are allowed, amax
    ignores them, Inf saturates and NaN stays NaN.
    """
    rows, cols = source.shape
    peaks = _new_magnitudes(source[0])
    divisors = np.empty(cols, np.float32)
    room = room_for(scales.shape[1])
    for block_row in range(scales.shape[0]):
        first = block_row * block_rows
        last = min(first + block_rows, rows)
        peaks[:] = 0
        _find_peaks(source, first, last, peaks)
        line = scales[block_row]
        is_plain = has_chunks(cols, block_cols)
        for block_col in range(line.size):
            left = block_col * block_cols
            right = min(left + block_cols, cols)
            peak = _largest(peaks[left:right])
            if is_nonfinite(peak):
                if not allow_nonfinite:
                    return first
                is_plain = False
                peak = _finite_peak(source[first:last, left:right])
            amax = max(from_magnitude(peak), float32(min_amax))
            line[block_col] = _round_scale(amax / float32(E4M3_MAX), rounding)
            is_plain &= _is_plain_scale(line[block_col])
        if is_plain:
            _encode_chunks(source, target, first, last, line, block_cols, room)
        else:
            spread(line, block_cols, divisors)
            for row in range(first, last):
                _encode_long(source[row], target[row], divisors)
    return NO_NONFINITE


@helper
def _is_plain_scale(scale: Any) -> Any:
    has_room = float32(_LEAST_SCALE) < scale < float32(_MOST_SCALE)
    return has_room and uint32(float_bits(scale) & uint32(_ONES)) != uint32(_ONES)


@helper
def _set_reciprocals(scales: Array, into: Array) -> None:
    """Fill `into` [blocks, 2] with 1 / (scale / 2^7), as a float32 and its remainder."""
    for block in range(scales.size):
        scale = scales[block] * float32(1 / _LIFT)
        reciprocal = float32(1) / scale
        into[block, 0] = reciprocal
        into[block, 1] = fused(-scale, reciprocal, float32(1)) * reciprocal


@helper
def _find_peaks(source: Array, first: int, last: int, peaks: Array) -> None:
    """Update each column's largest magnitude with rows `first` to `last`, four rows at a time."""
    fours = first + (last - first) // 4 * 4
    for row in range(first, fours, 4):
        for col in range(peaks.size):
            upper = max(magnitude_of(source[row, col]), magnitude_of(source[row + 1, col]))
            lower = max(magnitude_of(source[row + 2, col]), magnitude_of(source[row + 3, col]))
            peaks[col] = max(peaks[col], max(upper, lower))
    for row in range(fours, last):
        for col in range(peaks.size):
            peaks[col] = max(peaks[col], magnitude_of(source[row, col]))


@helper
def _largest(peaks: Array) -> Any:
    largest = peaks[0]
    for col in range(peaks.size):
        largest = max(largest, peaks[col])
    return largest


@helper
def _finite_peak(block: Array) -> Any:
    """Return the largest magnitude among the finite elements of a block."""
    peak = magnitude_of(block[0, 0])
    peak = np.bitwise_xor(peak, peak)
    for row in range(block.shape[0]):
        for col in range(block.shape[1]):
            magnitude = magnitude_of(block[row, col])
            if not is_nonfinite(magnitude):
                peak = max(peak, magnitude)
    return peak


@helper
def _encode_long(line: Array, out: Array, divisors: Array) -> None:
    for col in range(line.size):
        out[col] = e4m3(load(line[col]) / divisors[col])


@helper
def _quotient(value: Any, reciprocal: Any, rest: Any) -> Any:
    """Return BF16 value / scale, rounded once, from the scale's reciprocal and its remainder.

    The product has an error of about 2^-47 before it is rounded. Of all pairs of mantissas, eleven
    are rounded to the wrong neighbour, and one of these changes the e4m3 code: 1 / (a mantissa of
    ones). Scales with such a mantissa take the slow path. tests/test_kernels.py tries all pairs.
    """
    return fused(value, reciprocal, value * rest)


@helper
def _short_code(quotient: Any) -> Any:
    """Return the e4m3 code of |w| / scale, at most 464, in the low byte; `quotient` is lifted.

    Adding 2^(e + 20) to a number of exponent e rounds it to e4m3's three bits of mantissa, and
    leaves them, with the leading one, in the low bits of the sum, whose exponent field gives e.
    Here the number is divided by 2^20 instead. The lift (a factor of 2^7) makes the sum of exponent
    and mantissa equal to the code, without another constant.
    """
    exponent = max(uint32(float_bits(quotient) & uint32(_EXPONENT)), uint32(_LEAST_LIFTED))
    bits = float_bits(fused(quotient, float32(2.0**-20), float_of(exponent)))
    return uint32(bits + uint32(bits >> uint32(20)))


@helper
def room_for(blocks: int) -> Any:
    """Return the work arrays for a row of blocks: reciprocals, octaves, least normals."""
    return (
        np.empty((blocks, 2), np.float32),
        np.empty((blocks, MANTISSAS), np.uint8),
        np.empty(blocks, np.uint16),
    )


def _encode_chunks(
    source: Any, target: Any, first: Any, last: Any, scales: Any, block_cols: Any, room: Any
) -> Any:
    """Encode rows `first` to `last`, one row of blocks, finite and of whole chunks.

    CPUs prefetch within the rows on their own; the next row of blocks is prefetched here.
    """


# Indices instead of slices: numba counts references of slices, which takes longer than some rows.
@overload(_encode_chunks)
def _encode_chunks_overload(
    source: Any, target: Any, first: Any, last: Any, scales: Any, block_cols: Any, room: Any
) -> Any:
    def bf16(
        source: Any, target: Any, first: Any, last: Any, scales: Any, block_cols: Any, room: Any
    ) -> None:
        encode_bf16_by_product(source, target, first, last, scales, block_cols, room)

    def bf16_by_table(
        source: Any, target: Any, first: Any, last: Any, scales: Any, block_cols: Any, room: Any
    ) -> None:
        if last - first < _WORTH_A_TABLE:
            encode_bf16_by_product(source, target, first, last, scales, block_cols, room)
        else:
            encode_bf16_by_table(source, target, first, last, scales, block_cols, room)

    def f32(
        source: Any, target: Any, first: Any, last: Any, scales: Any, block_cols: Any, room: Any
    ) -> None:
        rows, chunks = source.shape[0], source.shape[1] // CHUNK
        numbers = source.reshape(rows, chunks, CHUNK)
        codes = target.reshape(rows, chunks, CHUNK)
        each = chunks_of_block(chunks, block_cols)
        for row in range(first, last):
            for block in range(scales.size):
                scale = scales[block] * float32(1 / _LIFT)
                for chunk in range(block * each, min(block * each + each, chunks)):
                    for i in range(CHUNK):
                        codes[row, chunk, i] = _code_of(numbers[row, chunk, i], scale)

    if source.dtype != types.uint16:
        return f32
    return bf16_by_table if can_look_up() else bf16


@helper
def encode_bf16_by_product(
    source: Array,
    target: Array,
    first: int,
    last: int,
    scales: Array,
    block_cols: int,
    room: Any,
) -> None:
    """Encode rows of BF16, two numbers per word, with the reciprocals of their scales."""
    rows, chunks = source.shape[0], source.shape[1] // CHUNK
    words = source.view(np.uint32).reshape(rows, chunks, PAIRS)
    codes = target.view(np.uint16).reshape(rows, chunks, PAIRS)
    each = chunks_of_block(chunks, block_cols)
    reciprocals, _, _ = room
    _set_reciprocals(scales, reciprocals)
    for row in range(first, last):
        ahead = min(row + last - first, rows - 1)
        for block in range(scales.size):
            reciprocal, rest = reciprocals[block, 0], reciprocals[block, 1]
            for chunk in range(block * each, min(block * each + each, chunks)):
                for line in range(0, PAIRS, LINE // 4):
                    prefetch(words, ahead, chunk, line)
                for i in range(PAIRS):
                    word = words[row, chunk, i]
                    codes[row, chunk, i] = _pair_of_codes(word, reciprocal, rest)


@helper
def encode_bf16_by_table(
    source: Array,
    target: Array,
    first: int,
    last: int,
    scales: Array,
    block_cols: int,
    room: Any,
) -> None:
    """Encode rows of BF16, 64 numbers at once, by their block's table; small ones by product."""
    rows, chunks = source.shape[0], source.shape[1] // CHUNK
    numbers, bytes_of_codes = source.reshape(-1), target.reshape(-1)
    words = source.view(np.uint32).reshape(rows, chunks, PAIRS)
    codes = target.view(np.uint16).reshape(rows, chunks, PAIRS)
    each = chunks_of_block(chunks, block_cols)
    reciprocals, octaves, least = room
    _set_reciprocals(scales, reciprocals)
    for block in range(scales.size):
        fill_octave(scales[block], e4m3, octaves[block])
        least[block] = least_normal(scales[block])
    for row in range(first, last):
        ahead = min(row + last - first, rows - 1)
        for block in range(scales.size):
            for chunk in range(block * each, min(block * each + each, chunks)):
                for line in range(0, PAIRS, LINE // 4):
                    prefetch(words, ahead, chunk, line)
                for half in range(0, PAIRS, ENCODED // 2):
                    at = (row * chunks + chunk) * CHUNK + 2 * half
                    small = encode_64(numbers, bytes_of_codes, at, octaves, block, least[block])
                    if small:
                        reciprocal, rest = reciprocals[block, 0], reciprocals[block, 1]
                        for i in range(half, half + ENCODED // 2):
                            word = words[row, chunk, i]
                            codes[row, chunk, i] = _pair_of_codes(word, reciprocal, rest)


@helper
def _code_of(number: Any, scale: Any) -> Any:
    bits = float_bits(number)
    code = _short_code(float_of(uint32(bits & uint32(_MAGNITUDE))) / scale)
    sign = uint32(uint32(bits >> uint32(24)) & uint32(0x80))
    return uint8(uint32(code & uint32(0x7F)) | sign)


@helper
def _pair_of_codes(word: Any, reciprocal: Any, rest: Any) -> Any:
    """Return the codes of two BF16 in a word; adjacent numbers need no shuffles that way."""
    left = float_of(uint32(uint32(word << uint32(16)) & uint32(_MAGNITUDE)))
    right = float_of(uint32(word & uint32(0x7FFF0000)))
    low = _short_code(_quotient(left, reciprocal, rest))
    high = _short_code(_quotient(right, reciprocal, rest))
    codes = uint32(uint32(low & uint32(0xFF)) | uint32(high << uint32(8)))
    codes = uint32(codes | uint32(uint32(word >> uint32(8)) & uint32(0x80)))
    return uint16(codes | uint32(uint32(word >> uint32(16)) & uint32(0x8000)))
