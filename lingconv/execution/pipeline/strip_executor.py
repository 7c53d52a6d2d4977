"""Execution of one strip: bytes copied or cloned, rows assembled, or rows transcoded."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lingconv.checkpoint.transposed import read_rows, transposed
from lingconv.execution.pipeline.peaks import Peaks
from lingconv.execution.pipeline.write_behind import BlockClone, PendingWrites
from lingconv.plans.lowering import CopyStrip, RowStrip, Strip
from lingconv.plans.plan import Source
from lingconv.plans.tensor_map import side_by_side
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, as_bytes
from lingconv.storage.local_output import WritableBlob

if TYPE_CHECKING:
    from lingconv.execution.pipeline.gpu_transcoder import GpuTranscoder
    from lingconv.execution.pipeline.transcoder import Transcoder


class StripExecutor:
    """Executes strips one at a time; one StripExecutor per thread. Transcoding imports numba."""

    def __init__(
        self,
        opened: Sequence[Mapping[str, Blob]],
        sources: Sequence[Source],
        *,
        allow_nonfinite: bool,
        gpu: str = "",
        peaks: Peaks | None = None,
    ) -> None:
        self._peaks = peaks
        self._opened = opened
        self._sources = sources
        # Copied bytes always come from the last source; the others are only averaged.
        self._blobs = opened[-1]
        self._allow_nonfinite = allow_nonfinite
        self._arena = Arena()
        self._gpu = gpu

    @cached_property
    def _transcoder(self) -> "Transcoder":
        from lingconv.execution.pipeline.transcoder import Transcoder

        return Transcoder(
            self._arena,
            self._opened,
            self._sources,
            allow_nonfinite=self._allow_nonfinite,
            peaks=self._peaks,
        )

    @cached_property
    def _gpu_transcoder(self) -> "GpuTranscoder":
        from lingconv.execution.pipeline.gpu_transcoder import GpuTranscoder

        return GpuTranscoder(
            self._gpu, self._opened, self._sources, allow_nonfinite=self._allow_nonfinite
        )

    def fill(self, strip: Strip, output: PendingWrites, slot: int) -> None:
        """Fill one strip of `output` with the buffers of `slot`; other slots may await writing."""
        self._arena.slot = slot
        if isinstance(strip, CopyStrip):
            self._copy(strip, output)
        elif strip.transfer.copies:
            self._assemble(strip, output)
        elif self._gpu and self._gpu_transcoder.takes(strip):
            self._gpu_transcoder.run(strip, output, slot)
        else:
            self._transcoder.run(strip, output)

    def _copy(self, strip: CopyStrip, output: PendingWrites) -> None:
        if output.clone(self._clones(strip)):
            return
        data = self._arena.take("read", (strip.nbytes,), "u1", like=strip.offset).data
        filled = 0
        for source in strip.sources:
            part = data[filled : filled + source.nbytes]
            self._blobs[source.file].read_into(source.offset, part)
            filled += source.nbytes
        output.write(data, strip.offset)

    def _clones(self, strip: CopyStrip) -> list[BlockClone]:
        """Return the clones that fill a strip; none unless all its sources are local files."""
        clones, offset = [], strip.offset
        for source in strip.sources:
            descriptor = self._blobs[source.file].descriptor
            if descriptor is None:
                return []
            clones.append(BlockClone(descriptor, source.offset, source.nbytes, offset))
            offset += source.nbytes
        return clones

    def _assemble(self, strip: RowStrip, output: WritableBlob) -> None:
        """Assemble rows from windows of stored matrices, as bytes."""
        cols = strip.transfer.cols
        target = strip.transfer.target
        dtype = f"u{target.encoding.row_bytes(1)}"
        shape = strip.last - strip.first, cols
        data = self._arena.take("read", shape, dtype, like=strip.offset)
        top = 0
        for beside in side_by_side(strip.segments, cols):
            left, bottom = 0, top + beside[0].num_rows
            for segment in beside:
                source, right = segment.source, left + segment.num_cols
                rows = self._arena.take("window", (segment.num_rows, source.cols), dtype)
                read_rows(self._arena, self._blobs, source, segment.first_row, rows)
                first = segment.first_col
                data[top:bottom, left:right] = rows[:, first : first + right - left]
                left = right
            top = bottom
        output.write(as_bytes(transposed(self._arena, strip, data)), strip.offset)
