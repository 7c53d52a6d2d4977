"""Strips transcoded on a GPU: rows are uploaded, decoded and encoded there, and downloaded.

    read -> pinned -> upload -> decode -> encode -> download -> pinned   queued by the worker
                                                     wait -> write       by the file's writer thread

Every slot has a stream and buffers of its own, so that the next strip is read and uploaded while
this one is downloaded. The result equals the CPU's byte for byte; a strip in which a number is not
finite or a scale is out of range is transcoded again on the CPU, which reports the fault.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from lingconv.checkpoint.decoder import Decoder
from lingconv.encodings import Encoding
from lingconv.encodings.codec import GpuCodec, RowRange
from lingconv.execution.pipeline.transcoder import Transcoder, row_range, write_others
from lingconv.execution.pipeline.write_behind import PendingWrites
from lingconv.plans.lowering import RowStrip, works_in_f32
from lingconv.plans.plan import Source
from lingconv.plans.tensor_map import MatrixSlice
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes
from lingconv.storage.local_output import WritableBlob


class _Lane:
    """One slot's stream and tensors on the GPU; tensors are allocated once and reused."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor for `purpose`; its former content is overwritten."""
        count = prod(shape)
        held = self._held.get(purpose)
        if held is None or held.dtype != dtype or held.numel() < count:
            held = self._held[purpose] = torch.empty(count, dtype=dtype, device=self._device)
        return held[:count].view(shape)


class _PendingCopy(NamedTuple):
    """Bytes being downloaded: elements; `notes` are an int32 flag, then a `grid` of F32 scales."""

    elements: Array
    notes: Array
    grid: tuple[int, ...]


class GpuTranscoder:
    """Fills strips on one GPU, one at a time; one GpuTranscoder per thread."""

    def __init__(
        self,
        device: str,
        opened: Sequence[Mapping[str, Blob]],
        sources: Sequence[Source],
        *,
        allow_nonfinite: bool,
    ) -> None:
        self._device = torch.device(device)
        self._opened = opened
        self._sources = sources
        self._allow_nonfinite = allow_nonfinite
        self._arena = Arena(_pinned_buffer)
        self._decoder = Decoder(self._arena, opened[-1])
        self._lanes: dict[int, _Lane] = {}

    def takes(self, strip: RowStrip) -> bool:
        """Return whether the GPU has kernels for what a strip needs."""
        transfer, target = strip.transfer, strip.transfer.target
        gpu = target.encoding.gpu
        if transfer.is_average or target.pitch or gpu is None:
            return False
        decodes = all(_can_decode(segment, transfer.cols) for segment in strip.segments)
        return decodes and gpu.can_encode(target.height, target.cols)

    def run(self, strip: RowStrip, pending: PendingWrites, slot: int) -> None:
        """Queue the transcoding of a strip; `pending.parts()` waits for its result."""
        self._arena.slot = slot
        if slot not in self._lanes:
            self._lanes[slot] = _Lane(self._device)
        lane = self._lanes[slot]
        with torch.cuda.stream(lane.stream):
            target = strip.transfer.target
            gpu, place = _gpu_codec(target.encoding), row_range(strip)
            grid = gpu.scale_grid(place)
            notes = lane.take("notes", (1 + prod(grid),), torch.float32)
            odd, scales = notes[:1].view(torch.int32).zero_(), notes[1:].view(grid)
            values = self._decode(strip, lane, odd)
            scaling = strip.transfer.scaling
            encoded = gpu.encode(values, scales, place, scaling, odd, lane.take)
            elements = self._down("write", encoded, strip.offset)
            coming = _PendingCopy(elements, self._down("notes", notes, 0), grid)
            lane.done.record()
        pending.later(lambda output: self._finish(strip, lane, coming, output))

    def _decode(self, strip: RowStrip, lane: _Lane, odd: torch.Tensor) -> torch.Tensor:
        """Queue upload and decoding of a strip's rows; return the tensor that will hold them."""
        cols = strip.transfer.cols
        dtype = torch.float32 if works_in_f32(strip.transfer) else torch.bfloat16
        values = lane.take("values", (strip.last - strip.first, cols), dtype)
        widths = [segment.source.encoding.row_bytes(cols) for segment in strip.segments]
        sizes = [s.num_rows * w for s, w in zip(strip.segments, widths, strict=True)]
        stored = self._arena.take("read", (sum(sizes),), np.uint8, like=0)
        grids = self._grids(strip)
        top = begin = 0
        for segment, nbytes, scales in zip(strip.segments, sizes, grids, strict=True):
            source = segment.source
            raw = stored[begin : begin + nbytes]
            self._decoder.read(source, 0, segment.first_row * (nbytes // segment.num_rows), raw)
            into = values[top : top + segment.num_rows]
            place = RowRange(segment.first_row, segment.num_rows, source.height, source.cols, 0)
            _gpu_codec(source.encoding).decode(raw, scales, place, into, odd, lane.take)
            top, begin = top + segment.num_rows, begin + nbytes
        return values

    def _grids(self, strip: RowStrip) -> list[Array]:
        """Return the scales of each segment, in one pinned buffer of the slot."""
        found = [
            self._decoder.scales(s.source, s.first_row, s.num_rows).copy()
            if s.source.encoding.has_scales
            else np.empty((0, 0), np.float32)
            for s in strip.segments
        ]
        room = self._arena.take("scales", (sum(grid.size for grid in found),), np.float32, like=0)
        held, begin = [], 0
        for grid in found:
            part = room[begin : begin + grid.size].reshape(grid.shape)
            part[...] = grid
            held.append(part)
            begin += grid.size
        return held

    def _down(self, purpose: str, tensor: torch.Tensor, like: int) -> Array:
        """Queue a copy of a tensor to pinned memory; return the bytes that it is copied to."""
        held = self._arena.take(purpose, (tensor.nbytes,), np.uint8, like=like)
        torch.from_numpy(held).copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
        return held

    def _finish(
        self, strip: RowStrip, lane: _Lane, coming: _PendingCopy, output: WritableBlob
    ) -> None:
        """Wait for the download of a strip, and write it."""
        lane.done.synchronize()
        if coming.notes[:4].any():
            self._do_again(strip, output)
            return
        scales = coming.notes[4:].view(np.float32).reshape(coming.grid)
        gpu = _gpu_codec(strip.transfer.target.encoding)
        elements, *others = gpu.stored_parts(coming.elements, scales)
        output.write(as_bytes(elements), strip.offset)
        write_others(strip, others, output)

    def _do_again(self, strip: RowStrip, output: WritableBlob) -> None:
        """Transcode a strip on the CPU; raises CheckpointError for NaN or Inf unless allowed."""
        allowed = self._allow_nonfinite
        alone = Transcoder(Arena(), self._opened, self._sources, allow_nonfinite=allowed)
        alone.run(strip, output)


def _can_decode(segment: MatrixSlice, cols: int) -> bool:
    source = segment.source
    gpu = source.encoding.gpu
    if gpu is None or source.pitch or not segment.is_whole_rows or segment.num_cols != cols:
        return False
    return gpu.can_decode(source.height, cols)


def _gpu_codec(encoding: Encoding) -> GpuCodec:
    gpu = encoding.gpu
    if gpu is None:
        raise AssertionError(f"no GPU kernel for {encoding.label}")
    return gpu


def _pinned_buffer(nbytes: int) -> Array:
    """Return new page-aligned, page-locked memory, which a GPU accesses by DMA."""
    buffer: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer
