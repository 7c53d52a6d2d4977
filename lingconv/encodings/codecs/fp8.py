"""The codec of FP8: e4m3 codes times the scale of their block."""

import numpy as np

from lingconv.encodings.codec import Array, Buffers, Encoded, RowRange, StoredRows
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import Fp8
from lingconv.encodings.kernels import fp8_decode, fp8_encode
from lingconv.encodings.scaling import Scaling

_SCALE_STORAGE = {DType.F32: np.float32, DType.BF16: np.uint16, DType.F8_E8M0: np.uint8}


class Fp8Codec:
    """Codec of e4m3 with scales in a tensor of their own."""

    def __init__(self, encoding: Fp8) -> None:
        self._encoding = encoding

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` with code x scale, as float32 or rounded to BF16."""
        encoding = self._encoding
        codes = rows.buffers.take("read", values.shape, np.uint8)
        rows.read_rows(first, codes)
        block_rows, block_cols = encoding.block(rows.height, rows.cols)
        nonfinite = 0
        for done, count, inner in encoding.by_matrix(first, len(values), rows.height):
            part = slice(done, done + count)
            nonfinite += fp8_decode.dequantize(
                codes[part],
                self.scales(rows, first + done, count),
                values[part],
                block_rows,
                block_cols,
                inner % block_rows,
            )
        return bool(nonfinite)

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return codes and scales; a scale is amax / 448 of its block, rounded to its dtype."""
        encoding = self._encoding
        block_rows, block_cols = encoding.block(place.height, place.cols)
        codes = buffers.take("write", values.shape, np.uint8, like=place.offset)
        grid = scale_grid(encoding, place)
        scales = buffers.take("scales out", grid, np.float32, like=0)
        bad_row = fp8_encode.quantize(
            values,
            codes,
            scales,
            block_rows,
            block_cols,
            scaling.min_amax,
            scale_rounding(encoding, scaling),
            allow_nonfinite,
        )
        bad_row = -1 if bad_row == fp8_encode.NO_NONFINITE else bad_row
        return Encoded([codes, encode_scales(scales, encoding.scale_dtype)], bad_row)

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Return the scales of the blocks that contain rows, float32 [block rows, block cols]."""
        encoding = self._encoding
        top, bottom = encoding.scale_rows(first, num_rows, rows.height)
        width = encoding.grid(rows.height, rows.cols)[1]
        stored = _SCALE_STORAGE[encoding.scale_dtype]
        raw = rows.buffers.take("scales in", (bottom - top, width), stored)
        rows.read(1, top * width * raw.itemsize, raw)
        return decode_scales(raw, encoding.scale_dtype)


def scale_grid(encoding: Fp8, place: RowRange) -> tuple[int, int]:
    """Return the numbers of blocks of rows: down and across."""
    block_rows, block_cols = encoding.block(place.height, place.cols)
    return -(-place.num_rows // block_rows), -(-place.cols // block_cols)


def scale_rounding(encoding: Fp8, scaling: Scaling) -> int:
    """Return the kernel's rounding mode for scales, so that storing them is exact."""
    if scaling.power_of_two:
        return fp8_encode.SCALE_UE8M0
    is_bf16 = encoding.scale_dtype == DType.BF16
    return fp8_encode.SCALE_BF16 if is_bf16 else fp8_encode.SCALE_F32


def decode_scales(raw: Array, dtype: DType) -> Array:
    """Return stored scales as float32. E8M0 code e is 2^(e - 127), 255 is NaN (OCP MX v1.0)."""
    if dtype == DType.BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == DType.F8_E8M0:
        bits = raw.astype(np.uint32) << 23
        bits[raw == 0] = 0x00400000  # 2^-127 is subnormal in float32
        bits[raw == 255] = 0x7FC00000
        return bits.view(np.float32)
    return raw


def encode_scales(scales: Array, dtype: DType) -> Array:
    """Return float32 scales, already rounded to `dtype`, in their stored form."""
    bits = scales.view(np.uint32)
    if dtype == DType.BF16:
        return (bits >> 16).astype(np.uint16)
    if dtype == DType.F8_E8M0:
        return (bits >> 23).astype(np.uint8)
    return scales
