"""The kernels of `fp8_encode.py`, `fp8_decode.py` and `numeric.py` in Triton, with the same bits.

Tensors are contiguous and on one device: BF16, F16 and F32 under torch's dtypes, e4m3 codes as
uint8, scales as float32. The caller makes the device and the stream current. A number that is not
finite only sets `odd` (int32 [1], zero before): the results must then not be used, and the caller
runs the CPU's kernels, which report or handle it.

Quotients, products and roundings are IEEE's, to nearest, ties to even. Each element is read once
and written once.
"""

from typing import Final

import torch
import triton
import triton.language as tl

from lingconv.encodings.dtypes import E4M3_MAX
from lingconv.encodings.kernels.fp8_encode import SCALE_BF16, SCALE_UE8M0

Tensor = torch.Tensor

_EXPONENT: Final = tl.constexpr(0x7F800000)
_MAGNITUDE: Final = tl.constexpr(0x7FFFFFFF)
_E4M3_MAX: Final = tl.constexpr(E4M3_MAX)
_BF16_SCALE: Final = tl.constexpr(SCALE_BF16)
_UE8M0_SCALE: Final = tl.constexpr(SCALE_UE8M0)
# With scales between these, all products and quotients stay in range.
_LEAST_SCALE: Final = tl.constexpr(2.0**-90)
_MOST_SCALE: Final = tl.constexpr(2.0**90)
# Most elements in a block of a program of `quantize`; the CPU encodes other blocks.
_LARGEST_BLOCK: Final = 1 << 15
_LONGEST_ROW: Final = 1 << 15
_TILE: Final = 1 << 13
_NARROWEST: Final = 16
_WARPS: Final = 8


def can_quantize(block_rows: int, block_cols: int) -> bool:
    """Return whether `quantize` supports blocks of this size: powers of two, or single rows."""
    if block_rows == 1:
        return block_cols <= _LONGEST_ROW
    powers = all(size & (size - 1) == 0 for size in (block_rows, block_cols))
    return powers and block_rows * block_cols <= _LARGEST_BLOCK


def can_dequantize(block_cols: int, cols: int) -> bool:
    """Return whether `dequantize` supports blocks of `block_cols` columns."""
    return block_cols >= cols or _power_of_two_in(block_cols) >= _NARROWEST


def _power_of_two_in(number: int) -> int:
    return number & -number


def quantize(
    source: Tensor,
    codes: Tensor,
    scales: Tensor,
    odd: Tensor,
    block: tuple[int, int],
    min_amax: float,
    rounding: int,
) -> None:
    """Quantize `source` [M, N] into `codes` [M, N] and `scales`, as `fp8_encode.quantize` does."""
    rows, cols = source.shape
    block_rows, block_cols = block
    grid = (scales.shape[0], scales.shape[1])
    _quantize[grid](
        source,
        codes,
        scales,
        odd,
        rows,
        cols,
        min_amax,
        ROUNDING=rounding,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        TILE_COLS=triton.next_power_of_2(min(block_cols, cols)),
        num_warps=_WARPS,
    )


def dequantize(
    codes: Tensor,
    scales: Tensor,
    target: Tensor,
    odd: Tensor,
    block: tuple[int, int],
    first_row: int,
) -> None:
    """Fill `target` [M, N] with code x scale, as `fp8_decode.dequantize` does."""
    rows, cols = codes.shape
    block_rows, block_cols = block
    whole = 1024 if block_cols >= cols else _power_of_two_in(block_cols)
    tile_cols = min(1024, whole)
    tile_rows = max(1, _TILE // tile_cols)
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(cols, tile_cols))
    _dequantize[grid](
        codes,
        scales,
        target,
        odd,
        rows,
        cols,
        scales.shape[1],
        first_row,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        TILE_ROWS=tile_rows,
        TILE_COLS=tile_cols,
        num_warps=_WARPS,
    )


def convert(source: Tensor, target: Tensor, odd: Tensor) -> None:
    """Fill `target` with `source`, rounded or widened between BF16, F16 and F32."""
    count = source.numel()
    _convert[(triton.cdiv(count, _TILE),)](source, target, odd, count, TILE=_TILE, num_warps=_WARPS)


@triton.jit
def _note_nonfinite(values, odd):
    bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE
    if tl.max(tl.ravel(bits), axis=0) >= _EXPONENT:
        tl.store(odd, 1)


@triton.jit
def _round_scale(scale, ROUNDING: tl.constexpr):
    """Return a scale (>= 0, finite) rounded to its stored dtype; zero becomes one."""
    bits = scale.to(tl.int32, bitcast=True)
    if ROUNDING == _BF16_SCALE:
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0x7FFF0000
    if ROUNDING == _UE8M0_SCALE:
        power = tl.minimum((bits + 0x7FFFFF) & _EXPONENT, 0x7F000000)
        power = tl.where(bits <= 0x00400000, 0x00400000, power)  # 2^-127, subnormal
        bits = tl.where(bits == 0, 0, power)
    return tl.where(bits == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _quantize(
    source,
    codes,
    scales,
    odd,
    rows,
    cols,
    min_amax,
    ROUNDING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    block_row, block_col = tl.program_id(0), tl.program_id(1)
    row = block_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    inner = tl.arange(0, TILE_COLS)[None, :]
    col = block_col * BLOCK_COLS + inner
    inside = (row < rows) & (col < cols) & (inner < BLOCK_COLS)
    place = row.to(tl.int64) * cols + col
    values = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes have the order of their bits; NaN is the largest.
    peak_bits = tl.max(tl.ravel(values.to(tl.int32, bitcast=True) & _MAGNITUDE), axis=0)
    if peak_bits >= _EXPONENT:
        tl.store(odd, 1)
    amax = tl.maximum(peak_bits.to(tl.float32, bitcast=True), min_amax)
    scale = _round_scale(tl.div_rn(amax, _E4M3_MAX), ROUNDING)
    tl.store(scales + block_row * tl.num_programs(1) + block_col, scale)
    if (scale <= _LEAST_SCALE) | (scale >= _MOST_SCALE):
        tl.store(odd, 1)
    if source.dtype.element_ty == tl.bfloat16:
        quotients = _divide_bf16(values, scale)
    else:
        quotients = tl.div_rn(values, scale)
    tl.store(codes + place, quotients.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)


@triton.jit
def _divide_bf16(values, divisor):
    """Return BF16 numbers divided by scales, with the same e4m3 codes as IEEE division.

    One correction of the product with the reciprocal is exact to the last bit for all quotients in
    a block of BF16: tests/test_cuda.py tries them all. It loses the sign of a zero.
    """
    inverse = tl.div_rn(1.0, divisor)
    near = values * inverse
    better = tl.fma(tl.fma(-near, divisor, values), inverse, near)
    return tl.where(near == 0.0, near, better)


@triton.jit
def _dequantize(
    codes,
    scales,
    target,
    odd,
    rows,
    cols,
    scales_per_row,
    first_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
):
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    first_col = tl.program_id(1) * TILE_COLS
    col = first_col + tl.arange(0, TILE_COLS)[None, :]
    inside = (row < rows) & (col < cols)
    place = row.to(tl.int64) * cols + col
    block = ((first_row + row) // BLOCK_ROWS) * scales_per_row + first_col // BLOCK_COLS
    scale = tl.load(scales + block, mask=row < rows, other=0.0)
    code = tl.load(codes + place, mask=inside, other=0)
    product = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    _note_nonfinite(product, odd)
    tl.store(target + place, product.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _convert(source, target, odd, count, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = place < count
    rounded = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    rounded = rounded.to(target.dtype.element_ty)
    _note_nonfinite(rounded.to(tl.float32), odd)
    tl.store(target + place, rounded, mask=inside)
