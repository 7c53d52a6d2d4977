"""One strip of rows: decode, encode, write.

Rows travel as BF16 bits (uint16) where that loses nothing, else as float32 (`strips.works_in_f32`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lingconv.checkpoint.decoder import BF16_BITS, F32, Decoder, Nonfinite, source_of
from lingconv.checkpoint.transposed import transposed
from lingconv.encodings import Fp8, Ggml
from lingconv.encodings.dtypes import DType, GgmlType
from lingconv.encodings.kernels import fp8_encode as fp8
from lingconv.encodings.kernels import ggml_encode as ggml
from lingconv.encodings.kernels import numeric
from lingconv.encodings.plain import PLAIN
from lingconv.errors import CheckpointError
from lingconv.execution.pipeline.averager import Averager
from lingconv.plans.lowering import RowStrip, works_in_f32
from lingconv.plans.plan import Scaling, Source
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes
from lingconv.storage.local_output import WritableBlob

_NARROW = (PLAIN[DType.BF16], PLAIN[DType.F16])
# From 2^17 on, the squared sums of ggml's searches leave float32, and a block may end up as zeros.
_SQUARES_OVERFLOW = 17


class Transcoder:
    """Fills strips of rows, one at a time; one Transcoder per thread."""

    def __init__(
        self,
        arena: Arena,
        opened: Sequence[Mapping[str, Blob]],
        sources: Sequence[Source],
        *,
        allow_nonfinite: bool,
    ) -> None:
        self._allow_nonfinite = allow_nonfinite
        self._arena = arena
        self._sources = sources
        self._decoders = [Decoder(arena, blobs) for blobs in opened]
        self._averager = Averager(arena, self._decoders, [source.weight for source in sources])

    def run(self, strip: RowStrip, output: WritableBlob) -> int:
        """Fill one strip of the file `output`; return how many bytes were written."""
        return self._write_rows(strip, self._decode_rows(strip), output)

    def _decode_rows(self, strip: RowStrip) -> Array:
        """Return the strip's rows as numbers."""
        transfer = strip.transfer
        dtype = F32 if works_in_f32(transfer) else BF16_BITS
        shape = strip.last - strip.first, transfer.cols
        values = self._arena.take("values", shape, dtype, like=strip.offset)
        if not strip.transfer.is_average:
            self._decoders[-1].rounds_to_odd = transfer.target.encoding in _NARROW
            self._refuse(self._decoders[-1].fill(strip.segments, 0, values))
        elif self._averager.fill(strip, values) and not self._allow_nonfinite:
            self._refuse(*self._averager.find_nonfinite(strip))
        return values

    def _refuse(self, met: Nonfinite | None, number: int = -1) -> None:
        """Raise CheckpointError for what was met in source `number`, unless that is allowed."""
        if met is not None and not self._allow_nonfinite:
            uri = self._sources[number].uri
            raise CheckpointError(
                f"{uri}/{met.source.extents[0].file}: {met.source.name}: NaN or Inf at or below row"
                f" {met.row} (or a value too large for the target's dtype)",
                hint="mend the source, or pass `--allow-nonfinite`",
            )

    def _write_rows(self, strip: RowStrip, values: Array, output: WritableBlob) -> int:
        encoding = strip.transfer.target.encoding
        if isinstance(encoding, Fp8):
            return self._write_fp8(strip, encoding, values, output)
        if isinstance(encoding, Ggml):
            return self._write_ggml(strip, encoding.type, values, output)
        offset = strip.offset
        written, nonfinite = _ENCODERS[encoding.dtype, values.dtype](self, values, offset)
        if nonfinite:
            infinity = 0x7F80 if encoding.dtype == DType.BF16 else 0x7C00
            bad = (written.view(np.uint16) & infinity) == infinity
            self._refuse(_source_of(strip, int(bad.any(axis=1).argmax())))
        return output.write(as_bytes(transposed(self._arena, strip, written)), offset)

    def _write_ggml(
        self, strip: RowStrip, kind: GgmlType, values: Array, output: WritableBlob
    ) -> int:
        numbers = self._tame_f32(strip, values).reshape(-1, kind.elements)
        blocks = self._arena.take("write", (len(numbers), kind.nbytes), np.uint8, like=strip.offset)
        ggml.QUANTIZERS[kind](numbers, blocks)
        for place in ggml.SCALES_AT[kind]:
            bad_block = ggml.find_infinite_half(blocks, place)
            if bad_block >= 0:
                row = bad_block * kind.elements // strip.transfer.cols
                self._refuse(_source_of(strip, row))
        return output.write(as_bytes(blocks), strip.offset)

    def _tame_f32(self, strip: RowStrip, values: Array) -> Array:
        """Return the values as float32; one that is NaN or huge would spoil its whole block."""
        wide = values
        if values.dtype != F32:
            wide = self._arena.take("wide", values.shape, np.float32)
            numeric.bf16_to_f32(values.reshape(-1), wide.reshape(-1))
        if numeric.count_beyond(wide.reshape(-1), _SQUARES_OVERFLOW):
            tame = np.abs(wide) < 2.0**_SQUARES_OVERFLOW
            self._refuse(_source_of(strip, int((~tame).any(axis=1).argmax())))
        return wide

    def _write_fp8(
        self, strip: RowStrip, encoding: Fp8, values: Array, output: WritableBlob
    ) -> int:
        target = strip.transfer.target
        block_rows, block_cols = encoding.block(target.height, target.cols)
        codes = self._arena.take("write", values.shape, np.uint8, like=strip.offset)
        scales = self._arena.take("scales out", grid_of_scales(strip), np.float32, like=0)
        scaling = strip.transfer.scaling
        bad_row = fp8.quantize(
            values,
            codes,
            scales,
            block_rows,
            block_cols,
            scaling.min_amax,
            scale_rounding(encoding, scaling),
            self._allow_nonfinite,
        )
        if bad_row != fp8.NO_NONFINITE:
            self._refuse(_source_of(strip, bad_row))
        raw = encode_scales(scales, encoding.scale_dtype)
        written = output.write(as_bytes(codes), strip.offset)
        return written + output.write(as_bytes(raw), offset_of_scales(strip, encoding, raw))

    def _encode_same(self, values: Array, offset: int) -> tuple[Array, int]:
        return values, 0  # whoever decoded them has looked

    def _encode_bf16(self, values: Array, offset: int) -> tuple[Array, int]:
        rounded = self._arena.take("write", values.shape, np.uint16, like=offset)
        return rounded, numeric.f32_to_bf16(values.reshape(-1), rounded.reshape(-1))

    def _encode_f16(self, values: Array, offset: int) -> tuple[Array, int]:
        rounded = self._arena.take("write", values.shape, np.float16, like=offset)
        with np.errstate(over="ignore"):
            np.copyto(rounded, values, casting="same_kind")
        return rounded, not np.isfinite(rounded).all()


_ENCODERS: dict[tuple[DType, np.dtype[Any]], Callable[..., tuple[Array, int]]] = {
    (DType.BF16, BF16_BITS): Transcoder._encode_same,
    (DType.BF16, F32): Transcoder._encode_bf16,
    (DType.F16, F32): Transcoder._encode_f16,
    (DType.F32, F32): Transcoder._encode_same,
}


def _source_of(strip: RowStrip, row: int) -> Nonfinite:
    return source_of(strip.segments, strip.transfer.cols, row)


def scale_rounding(encoding: Fp8, scaling: Scaling) -> int:
    """Return how `fp8.quantize` has to round scales, so that storing them changes nothing."""
    if scaling.power_of_two:
        return fp8.SCALE_UE8M0
    return fp8.SCALE_BF16 if encoding.scale_dtype == DType.BF16 else fp8.SCALE_F32


def grid_of_scales(strip: RowStrip) -> tuple[int, int]:
    """Return how many blocks a strip has each way; none where its target has no scales."""
    target = strip.transfer.target
    if not isinstance(target.encoding, Fp8):
        return 0, 0
    block_rows, block_cols = target.encoding.block(target.height, target.cols)
    return -(-(strip.last - strip.first) // block_rows), -(-target.cols // block_cols)


def offset_of_scales(strip: RowStrip, encoding: Fp8, raw: Array) -> int:
    """Return where in the target's file the stored scales of a strip begin."""
    target = strip.transfer.target
    top, _ = encoding.scale_rows(strip.first, strip.last - strip.first, target.height)
    return target.extents[1].offset + top * int(raw.shape[1]) * raw.itemsize


def encode_scales(scales: Array, dtype: DType) -> Array:
    """Return float32 scales, rounded for `dtype` already, in their stored form."""
    bits = scales.view(np.uint32)
    if dtype == DType.BF16:
        return (bits >> 16).astype(np.uint16)
    if dtype == DType.F8_E8M0:
        return (bits >> 23).astype(np.uint8)
    return scales
