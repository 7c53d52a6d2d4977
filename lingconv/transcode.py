"""One strip of rows: read, decode, encode, write.

Rows travel as BF16 bits (uint16) where that loses nothing, else as float32 (`strips.works_in_f32`).
Two tables say how to get there and back.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np

from lingconv.buffers import Arena, Array, as_bytes
from lingconv.dtypes import DType
from lingconv.encodings import Fp8
from lingconv.errors import CheckpointError
from lingconv.kernels import numeric
from lingconv.model import Stored
from lingconv.plan import Scaling, Segment
from lingconv.storage import Blob
from lingconv.storage.output import OutputBlob
from lingconv.strips import RowStrip, works_in_f32

_BF16_BITS = np.dtype(np.uint16)
_F32 = np.dtype(np.float32)


class Transcoder:
    """Fills strips of rows, one at a time; one Transcoder per thread."""

    def __init__(self, arena: Arena, *, allow_nonfinite: bool) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._arena = arena
        self._blobs: Mapping[str, Blob] = {}

    def run(self, strip: RowStrip, blobs: Mapping[str, Blob], output: OutputBlob) -> int:
        """Fill one strip of the file `output` from `blobs`; return how many bytes were written."""
        self._blobs = blobs
        return self._write_rows(strip, self._decode_rows(strip), output)

    def _read(self, file: str, offset: int, into: Array) -> None:
        self._blobs[file].read_into(offset, as_bytes(into))

    def _decode_rows(self, strip: RowStrip) -> Array:
        """Return the strip's rows as numbers, from all the segments that hold some of them."""
        transfer = strip.transfer
        dtype = _F32 if works_in_f32(transfer) else _BF16_BITS
        values = self._arena.take("values", (strip.last - strip.first, transfer.cols), dtype)
        top = 0
        for segment in transfer.segments:
            first = max(strip.first, top)
            last = min(strip.last, top + segment.num_rows)
            if first < last:
                rows = values[first - strip.first : last - strip.first]
                self._decode(segment, segment.first_row + first - top, rows)
            top += segment.num_rows
        return values

    def _decode(self, segment: Segment, first: int, values: Array) -> None:
        source = segment.source
        kind = "fp8" if isinstance(source.encoding, Fp8) else source.encoding.dtype
        nonfinite = _DECODERS[kind, values.dtype](self, source, first, values)
        if nonfinite:
            self._refuse_nonfinite(source, first)

    def _refuse_nonfinite(self, source: Stored, row: int) -> None:
        if not self._allow_nonfinite:
            raise CheckpointError(
                f"{source.extents[0].file}: {source.name}: NaN or Inf at or below row {row}"
                " (or a value too large for the target's dtype)",
                hint="mend the source, or pass `--allow-nonfinite`",
            )

    def _read_plain(self, source: Stored, first: int, into: Array) -> None:
        """Fill `into` with the stored elements of the rows from `first`."""
        offset = source.extents[0].offset + first * into.shape[1] * into.itemsize
        self._read(source.extents[0].file, offset, into)

    def _decode_plain(self, source: Stored, first: int, values: Array) -> int:
        self._read_plain(source, first, values)
        return 0  # the encoder looks at the values itself, or they pass as they are

    def _decode_bf16(self, source: Stored, first: int, values: Array) -> int:
        stored = self._arena.take("read", values.shape, np.uint16)
        self._read_plain(source, first, stored)
        return numeric.bf16_to_f32(stored.reshape(-1), values.reshape(-1))

    def _decode_f16(self, source: Stored, first: int, values: Array) -> int:
        stored = self._arena.take("read", values.shape, np.float16)
        self._read_plain(source, first, stored)
        np.copyto(values, stored)
        return not np.isfinite(stored).all()

    def _decode_fp8(self, source: Stored, first: int, values: Array) -> int:
        codes = self._arena.take("read", values.shape, np.uint8)
        self._read_plain(source, first, codes)
        encoding = cast("Fp8", source.encoding)
        block_rows, block_cols = encoding.block(*source.shape)
        top = first // block_rows
        bottom = -(-(first + values.shape[0]) // block_rows)
        scales = self._read_scales(source, encoding, top, bottom)
        return numeric.dequantize(
            codes, scales, values, block_rows, block_cols, first - top * block_rows
        )

    def _read_scales(self, source: Stored, encoding: Fp8, top: int, bottom: int) -> Array:
        """Return rows `top` to `bottom` of the scale grid as float32."""
        width = encoding.grid(*source.shape)[1]
        extent = source.extents[1]
        raw = self._arena.take(
            "scales in", (bottom - top, width), _SCALE_STORAGE[encoding.scale_dtype]
        )
        self._read(extent.file, extent.offset + top * width * raw.itemsize, raw)
        return decode_scales(raw, encoding.scale_dtype)

    def _write_rows(self, strip: RowStrip, values: Array, output: OutputBlob) -> int:
        target = strip.transfer.target
        encoding = target.encoding
        if isinstance(encoding, Fp8):
            return self._write_fp8(strip, encoding, values, output)
        written, nonfinite = _ENCODERS[encoding.dtype, values.dtype](self, values)
        if nonfinite:
            self._refuse_nonfinite(_segment_of(strip).source, strip.first)
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
            self._refuse_nonfinite(_segment_of(strip).source, strip.first + bad_row)
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


_DECODERS: dict[tuple[str, np.dtype[Any]], Callable[..., int]] = {
    (DType.BF16, _BF16_BITS): Transcoder._decode_plain,
    (DType.BF16, _F32): Transcoder._decode_bf16,
    (DType.F16, _F32): Transcoder._decode_f16,
    (DType.F32, _F32): Transcoder._decode_plain,
    ("fp8", _BF16_BITS): Transcoder._decode_fp8,
    ("fp8", _F32): Transcoder._decode_fp8,
}
_ENCODERS: dict[tuple[DType, np.dtype[Any]], Callable[..., tuple[Array, int]]] = {
    (DType.BF16, _BF16_BITS): Transcoder._encode_same,
    (DType.BF16, _F32): Transcoder._encode_bf16,
    (DType.F16, _F32): Transcoder._encode_f16,
    (DType.F32, _F32): Transcoder._encode_same,
}
_SCALE_STORAGE = {DType.F32: np.float32, DType.BF16: np.uint16, DType.F8_E8M0: np.uint8}


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
