"""One strip of rows: decode, encode, write.

Rows travel as BF16 bits (uint16) where that loses nothing, else as float32 (`strips.works_in_f32`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lingconv.buffers import Arena, Array, as_bytes
from lingconv.decoding import BF16_BITS, F32, Decoder, Nonfinite
from lingconv.dtypes import DType
from lingconv.encodings import Fp8
from lingconv.errors import CheckpointError
from lingconv.kernels import numeric
from lingconv.model import Segment
from lingconv.plan import Scaling
from lingconv.storage import Blob
from lingconv.storage.output import OutputBlob
from lingconv.strips import RowStrip, works_in_f32


class Transcoder:
    """Fills strips of rows, one at a time; one Transcoder per thread."""

    def __init__(self, arena: Arena, blobs: Mapping[str, Blob], *, allow_nonfinite: bool) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._arena = arena
        self._decoder = Decoder(arena, blobs)

    def run(self, strip: RowStrip, output: OutputBlob) -> int:
        """Fill one strip of the file `output`; return how many bytes were written."""
        return self._write_rows(strip, self._decode_rows(strip), output)

    def _decode_rows(self, strip: RowStrip) -> Array:
        """Return the strip's rows as numbers, from all the segments that hold some of them."""
        transfer = strip.transfer
        dtype = F32 if works_in_f32(transfer) else BF16_BITS
        values = self._arena.take("values", (strip.last - strip.first, transfer.cols), dtype)
        self._refuse(self._decoder.fill(transfer.segments, strip.first, values))
        return values

    def _refuse(self, met: Nonfinite | None) -> None:
        if met is not None and not self._allow_nonfinite:
            raise CheckpointError(
                f"{met.source.extents[0].file}: {met.source.name}: NaN or Inf at or below row"
                f" {met.row} (or a value too large for the target's dtype)",
                hint="mend the source, or pass `--allow-nonfinite`",
            )

    def _write_rows(self, strip: RowStrip, values: Array, output: OutputBlob) -> int:
        target = strip.transfer.target
        encoding = target.encoding
        if isinstance(encoding, Fp8):
            return self._write_fp8(strip, encoding, values, output)
        written, nonfinite = _ENCODERS[encoding.dtype, values.dtype](self, values)
        if nonfinite:
            self._refuse(Nonfinite(_segment_of(strip).source, strip.first))
        row_bytes = written.itemsize * strip.transfer.cols
        return output.write(as_bytes(written), target.extents[0].offset + strip.first * row_bytes)

    def _write_fp8(self, strip: RowStrip, encoding: Fp8, values: Array, output: OutputBlob) -> int:
        elements, scale_extent = strip.transfer.target.extents
        rows, cols = values.shape
        block_rows, block_cols = encoding.block(strip.transfer.rows, cols)
        codes = self._arena.take("write", values.shape, np.uint8)
        scales = self._arena.take("scales out", encoding.grid(rows, cols), np.float32)
        scaling = strip.transfer.scaling
        bad_row = numeric.quantize(
            values,
            codes,
            scales,
            block_rows,
            block_cols,
            scaling.min_amax,
            scale_rounding(encoding, scaling),
            self._allow_nonfinite,
        )
        if bad_row != numeric.NO_NONFINITE:
            self._refuse(Nonfinite(_segment_of(strip).source, strip.first + bad_row))
        raw = encode_scales(scales, encoding.scale_dtype)
        offset = scale_extent.offset + strip.first // block_rows * raw.shape[1] * raw.itemsize
        written = output.write(as_bytes(codes), elements.offset + strip.first * cols)
        return written + output.write(as_bytes(raw), offset)

    def _encode_same(self, values: Array) -> tuple[Array, int]:
        return values, 0  # whoever decoded them has looked

    def _encode_bf16(self, values: Array) -> tuple[Array, int]:
        rounded = self._arena.take("write", values.shape, np.uint16)
        return rounded, numeric.f32_to_bf16(values.reshape(-1), rounded.reshape(-1))

    def _encode_f16(self, values: Array) -> tuple[Array, int]:
        rounded = self._arena.take("write", values.shape, np.float16)
        with np.errstate(over="ignore"):
            np.copyto(rounded, values, casting="same_kind")
        return rounded, not np.isfinite(rounded).all()


_ENCODERS: dict[tuple[DType, np.dtype[Any]], Callable[..., tuple[Array, int]]] = {
    (DType.BF16, BF16_BITS): Transcoder._encode_same,
    (DType.BF16, F32): Transcoder._encode_bf16,
    (DType.F16, F32): Transcoder._encode_f16,
    (DType.F32, F32): Transcoder._encode_same,
}


def _segment_of(strip: RowStrip) -> Segment:
    """Return the segment that holds the first row of a strip."""
    top = 0
    for segment in strip.transfer.segments:
        top += segment.num_rows
        if strip.first < top:
            return segment
    return strip.transfer.segments[-1]


def scale_rounding(encoding: Fp8, scaling: Scaling) -> int:
    """Return how `numeric.quantize` has to round scales, so that storing them changes nothing."""
    if scaling.power_of_two:
        return numeric.SCALE_UE8M0
    return numeric.SCALE_BF16 if encoding.scale_dtype == DType.BF16 else numeric.SCALE_F32


def encode_scales(scales: Array, dtype: DType) -> Array:
    """Return float32 scales, rounded for `dtype` already, in their stored form."""
    bits = scales.view(np.uint32)
    if dtype == DType.BF16:
        return (bits >> 16).astype(np.uint16)
    if dtype == DType.F8_E8M0:
        return (bits >> 23).astype(np.uint8)
    return scales
