"""Decoding of FP8 e4m3 with scales to BF16 or float32, compiled by numba.

Shapes as in `fp8_encode.py`. Rounding is to nearest, ties to even. The fast path is for rows of
whole chunks (`tiles.py`) without NaN and with scales of ordinary size, which are almost all; the
slow path handles everything.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, int8, int32, uint8, uint32

from lingconv.encodings.kernels.intrinsics import prefetch
from lingconv.encodings.kernels.jit import BF16, BYTES, F32, INT, helper, inlined, kernel
from lingconv.encodings.kernels.numeric import (
    Array,
    float_bits,
    float_of,
    load_e4m3,
    sign_of_e4m3,
    store,
)
from lingconv.encodings.kernels.tiles import CHUNK, LINE, PAIRS, chunks_of_block, has_chunks, spread

_EXPONENT: Final = 0x7F800000
_MAGNITUDE: Final = 0x7FFFFFFF
_NAN_CODE: Final = 0x7F
_BIAS: Final = 2.0**120  # the factor by which an e4m3 code, placed in float32's bits, is too small
_MOST_SCALE: Final = 2.0**7  # so that scale x 2^120 stays finite


@kernel((BYTES, F32, BF16, INT, INT, INT), (BYTES, F32, F32, INT, INT, INT))
def dequantize(
    source: Array,
    scales: Array,
    target: Array,
    block_rows: int,
    block_cols: int,
    first_row: int,
) -> int:
    """Fill `target` with float32(q) * scale, rounded once to BF16 (uint16) or kept as float32.

    `source` (uint8, M x N) starts `first_row` rows below the top of the first row of `scales`.
    Returns the number of rows with a product that is not finite.
    """
    rows, cols = source.shape
    chunks = cols // CHUNK if has_chunks(cols, block_cols) else 0
    factors = np.empty(cols, np.float32)
    is_plain = False
    nonfinite = 0
    for row in range(rows):
        scale_row = (first_row + row) // block_rows
        if row == 0 or (first_row + row) % block_rows == 0:
            is_plain = chunks > 0 and _has_plain_scales(scales[scale_row])
        if is_plain and not _has_nan(source, row):
            _decode_chunks(source, target, row, scales, scale_row, block_cols)
        else:
            spread(scales[scale_row], block_cols, factors)
            nonfinite += _decode_long(source[row], target[row], factors)
    return nonfinite


def _decode_chunks(
    source: Any, target: Any, row: Any, scales: Any, scale_row: Any, block_cols: Any
) -> Any:
    """Decode a row of whole chunks without NaN; prefetch the next one."""


@overload(_decode_chunks, inline="always")
def _decode_chunks_overload(
    source: Any, target: Any, row: Any, scales: Any, scale_row: Any, block_cols: Any
) -> Any:
    def bf16(
        source: Any, target: Any, row: Any, scales: Any, scale_row: Any, block_cols: Any
    ) -> None:
        rows, chunks = source.shape[0], source.shape[1] // CHUNK
        codes = source.view(np.int16).reshape(rows, chunks, PAIRS)
        numbers = target.view(np.uint32).reshape(rows, chunks, PAIRS)
        each = chunks_of_block(chunks, block_cols)
        ahead = min(row + 1, rows - 1)
        for block in range(scales.shape[1]):
            factor = scales[scale_row, block] * float32(_BIAS)
            for chunk in range(block * each, min(block * each + each, chunks)):
                for line in range(0, PAIRS, LINE // 2):
                    prefetch(codes, ahead, chunk, line)
                for i in range(PAIRS):
                    numbers[row, chunk, i] = _pair_of_numbers(codes[row, chunk, i], factor)

    def f32(
        source: Any, target: Any, row: Any, scales: Any, scale_row: Any, block_cols: Any
    ) -> None:
        rows, chunks = source.shape[0], source.shape[1] // CHUNK
        codes = source.reshape(rows, chunks, CHUNK)
        numbers = target.reshape(rows, chunks, CHUNK)
        each = chunks_of_block(chunks, block_cols)
        for block in range(scales.shape[1]):
            factor = scales[scale_row, block] * float32(_BIAS)
            for chunk in range(block * each, min(block * each + each, chunks)):
                for i in range(CHUNK):
                    code = int32(int8(codes[row, chunk, i]))
                    numbers[row, chunk, i] = _small_float(code << int32(20)) * factor

    return bf16 if target.dtype == types.uint16 else f32


@helper
def _small_float(bits: Any) -> Any:
    """Return the float32 with a sign-extended e4m3 code in its bits; it is 2^120 too small."""
    return float_of(uint32(uint32(bits) & uint32(0x87F00000)))


@helper
def _pair_of_numbers(codes: Any, factor: Any) -> Any:
    """Return two BF16, decoded from two e4m3 in a word."""
    word = int32(codes)
    low = float_bits(_small_float(int32(word << int32(24)) >> int32(4)) * factor)
    high = float_bits(_small_float(word << int32(12)) * factor)
    low = uint32(_rounded(low) >> uint32(16))
    return uint32(low | uint32(_rounded(high) & uint32(0xFFFF0000)))


@helper
def _rounded(bits: Any) -> Any:
    """Return the bits of a finite float32, rounded so that the upper half is its BF16."""
    odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
    return uint32(uint32(bits + uint32(0x7FFF)) + odd)


@helper
def _has_plain_scales(scales: Array) -> Any:
    worst = float32(0)
    for scale in scales:
        worst = max(worst, abs(scale) if scale == scale else float32(np.inf))
    return worst < float32(_MOST_SCALE)


@inlined
def _has_nan(codes: Array, row: int) -> Any:
    worst = uint8(0)
    for col in range(codes.shape[1]):
        worst = max(worst, uint8(codes[row, col] & uint8(0x7F)))
    return worst == uint8(_NAN_CODE)


@helper
def _decode_long(line: Array, out: Array, factors: Array) -> int:
    worst = uint32(0)
    for col in range(line.size):
        bits = float_bits(load_e4m3(line[col]) * factors[col])
        worst = max(worst, uint32(bits & uint32(_MAGNITUDE)))
        store(out, col, uint32(bits ^ sign_of_e4m3(line[col])))
    return int(worst >= uint32(_EXPONENT))
