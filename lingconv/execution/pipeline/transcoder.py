"""Transcoding of one strip of rows: decode, encode, write.

Between the two, rows are BF16 bits (uint16) if that loses nothing, else float32
(`lowering.works_in_f32`).
"""

from collections.abc import Mapping, Sequence

from lingconv.checkpoint.decoder import BF16_BITS, F32, Decoder, Nonfinite, source_of
from lingconv.checkpoint.transposed import transposed
from lingconv.encodings.codec import RowRange
from lingconv.encodings.dtypes import DType
from lingconv.encodings.kernels.groups import largest_magnitude
from lingconv.encodings.plain import PLAIN
from lingconv.errors import CheckpointError
from lingconv.execution.pipeline.averager import Averager
from lingconv.execution.pipeline.peaks import Peaks
from lingconv.plans.lowering import RowStrip, offset_of, row_strips, works_in_f32
from lingconv.plans.plan import Source, Transfer
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes
from lingconv.storage.local_output import WritableBlob

_NARROW = (PLAIN[DType.BF16], PLAIN[DType.F16])


class Transcoder:
    """Transcodes strips of rows, one at a time; one Transcoder per thread."""

    def __init__(
        self,
        arena: Arena,
        opened: Sequence[Mapping[str, Blob]],
        sources: Sequence[Source],
        *,
        allow_nonfinite: bool,
        peaks: Peaks | None = None,
    ) -> None:
        self._peaks = peaks or Peaks()
        self._allow_nonfinite = allow_nonfinite
        self._arena = arena
        self._sources = sources
        self._decoders = [Decoder(arena, blobs) for blobs in opened]
        self._averager = Averager(arena, self._decoders, [source.weight for source in sources])

    def run(self, strip: RowStrip, output: WritableBlob) -> int:
        """Fill one strip of the file `output`; return how many bytes were written."""
        needs_amax = strip.transfer.target.encoding.needs_amax
        amax = self._peaks.of(strip.transfer, self._find_amax) if needs_amax else 0.0
        return self._write_rows(strip, self._decode_rows(strip), amax, output)

    def _find_amax(self, transfer: Transfer) -> float:
        """Return the largest magnitude of a matrix, which is read for that."""
        return max(largest_magnitude(self._decode_rows(strip)) for strip in row_strips(transfer))

    def _decode_rows(self, strip: RowStrip) -> Array:
        """Return the strip's rows [rows, cols], decoded to BF16 bits or float32."""
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

    def _refuse(self, met: Nonfinite | None, number: int = -1, *, keeps: bool = True) -> None:
        """Raise CheckpointError for NaN or Inf in source `number`, unless that is allowed.

        `keeps`: whether the target's encoding can store them, so that allowing them makes sense.
        """
        if met is not None and not (keeps and self._allow_nonfinite):
            uri, name = self._sources[number].uri, met.source.name
            otherwise = "pass `allow_nonfinite`" if keeps else f"keep it as it is: `ignore={name}`"
            raise CheckpointError(
                f"{uri}/{met.source.first_extent.file}: {name}: NaN or Inf at or below row"
                f" {met.row} (or a value too large for the target's dtype)",
                hint=f"mend the source, or {otherwise}",
            )

    def _write_rows(self, strip: RowStrip, values: Array, amax: float, output: WritableBlob) -> int:
        transfer, target = strip.transfer, strip.transfer.target
        encoded = target.encoding.codec.encode(
            values,
            row_range(strip)._replace(amax=amax),
            transfer.scaling,
            self._arena,
            allow_nonfinite=self._allow_nonfinite,
        )
        if encoded.bad_row >= 0:
            keeps = target.encoding.holds_nonfinite
            self._refuse(_source_of(strip, encoded.bad_row), keeps=keeps)
        elements, *others = encoded.parts
        written = output.write(as_bytes(transposed(self._arena, strip, elements)), strip.offset)
        return written + write_others(strip, others, output)


def _source_of(strip: RowStrip, row: int) -> Nonfinite:
    return source_of(strip.segments, strip.transfer.cols, row)


def row_range(strip: RowStrip) -> RowRange:
    """Return the rows of a strip as the RowRange that its target's codec takes."""
    target = strip.transfer.target
    count = strip.last - strip.first
    return RowRange(strip.first, count, target.height, target.cols, strip.offset)


def write_others(strip: RowStrip, parts: Sequence[Array], output: WritableBlob) -> int:
    """Write a strip's further tensors (its scales); return the number of bytes written."""
    target, count = strip.transfer.target, strip.last - strip.first
    return sum(
        output.write(as_bytes(data), offset_of(target, number, strip.first, count))
        for number, data in enumerate(parts, 1)
    )
