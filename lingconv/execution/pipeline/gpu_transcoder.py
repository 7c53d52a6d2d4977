"""One strip by way of a GPU: rows go up, are decoded and encoded there, and come back.

    read -> pinned -> up -> decode -> encode -> down -> pinned      queued by the worker
                                             wait -> write          by whoever writes the file

Every turn has a stream and buffers of its own, so that the next strip is read and goes up while
this one comes down. The bytes are the processor's, and whatever it would say more about (a number
that is not finite, a scale beyond all measure), it says: it does such a strip again.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from lingconv.checkpoint.decoder import Decoder
from lingconv.encodings import Encoding, Fp8, Plain
from lingconv.encodings.dtypes import DType
from lingconv.encodings.kernels import fp8_triton as cuda
from lingconv.execution.pipeline.transcoder import (
    Transcoder,
    encode_scales,
    grid_of_scales,
    offset_of_scales,
    scale_rounding,
)
from lingconv.execution.pipeline.write_behind import PendingWrites
from lingconv.plans.lowering import RowStrip, works_in_f32
from lingconv.plans.plan import Source
from lingconv.plans.tensor_map import MatrixSlice
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes
from lingconv.storage.local_output import WritableBlob

_TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


class _Lane:
    """What one turn has on the GPU: a stream, and tensors that are made once."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._device = device
        self._held: dict[str, torch.Tensor] = {}

    def take(self, purpose: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor for `purpose`; what it held before is gone."""
        count = prod(shape)
        held = self._held.get(purpose)
        if held is None or held.dtype != dtype or held.numel() < count:
            held = self._held[purpose] = torch.empty(count, dtype=dtype, device=self._device)
        return held[:count].view(shape)


class _PendingCopy(NamedTuple):
    """What is on its way down, as bytes: elements, and whether to look closer before the scales."""

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
        transfer = strip.transfer
        target = transfer.target
        if transfer.is_average or target.pitch or not _can_encode(target.encoding, target):
            return False
        return all(_can_decode(segment, transfer.cols) for segment in strip.segments)

    def run(self, strip: RowStrip, filled: PendingWrites, turn: int) -> None:
        """Queue what fills a strip; `filled` waits for it."""
        self._arena.turn = turn
        if turn not in self._lanes:
            self._lanes[turn] = _Lane(self._device)
        lane = self._lanes[turn]
        with torch.cuda.stream(lane.stream):
            grid = grid_of_scales(strip)
            notes = lane.take("notes", (1 + prod(grid),), torch.float32)
            odd, scales = notes[:1].view(torch.int32).zero_(), notes[1:].view(grid)
            values = self._decode(strip, lane, odd)
            encoded = self._encode(strip, values, lane, odd, scales)
            elements = self._down("write", encoded, strip.offset)
            coming = _PendingCopy(elements, self._down("notes", notes, 0), grid)
            lane.done.record()
        filled.later(lambda output: self._finish(strip, lane, coming, output))

    def _decode(self, strip: RowStrip, lane: _Lane, odd: torch.Tensor) -> torch.Tensor:
        """Queue the reading of a strip's rows; return them as they are going to be, as numbers."""
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
            if isinstance(source.encoding, Fp8):
                codes = lane.take("stored", into.shape, torch.uint8)
                _copy(raw, codes)
                _dequantize(segment, codes, _up(scales, lane, "scales in"), into, odd)
            elif _dtype_of(source.encoding) == dtype:
                _copy(raw, into)
            else:
                wide = lane.take("stored", into.shape, _dtype_of(source.encoding))
                _copy(raw, wide)
                cuda.convert(wide, into, odd)
            top, begin = top + segment.num_rows, begin + nbytes
        return values

    def _grids(self, strip: RowStrip) -> list[Array]:
        """Return the scales of all segments, in one buffer that lasts as long as the turn."""
        found = [
            self._decoder.scales(s.source, s.first_row, s.num_rows).copy()
            if isinstance(s.source.encoding, Fp8)
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

    def _encode(
        self,
        strip: RowStrip,
        values: torch.Tensor,
        lane: _Lane,
        odd: torch.Tensor,
        scales: torch.Tensor,
    ) -> torch.Tensor:
        """Queue the encoding of a strip's rows, and fill `scales` if it has some."""
        target = strip.transfer.target
        encoding = target.encoding
        if isinstance(encoding, Fp8):
            scaling = strip.transfer.scaling
            block = encoding.block(target.height, target.cols)
            codes = lane.take("encoded", values.shape, torch.uint8)
            rounding = scale_rounding(encoding, scaling)
            cuda.quantize(values, codes, scales, odd, block, scaling.min_amax, rounding)
            return codes
        if values.dtype == _dtype_of(encoding):
            return values
        rounded = lane.take("encoded", values.shape, _dtype_of(encoding))
        cuda.convert(values, rounded, odd)
        return rounded

    def _down(self, purpose: str, tensor: torch.Tensor, like: int) -> Array:
        """Queue a copy to this machine's memory; return the bytes that are going to be there."""
        held = self._arena.take(purpose, (tensor.nbytes,), np.uint8, like=like)
        torch.from_numpy(held).copy_(tensor.view(-1).view(torch.uint8), non_blocking=True)
        return held

    def _finish(
        self, strip: RowStrip, lane: _Lane, coming: _PendingCopy, output: WritableBlob
    ) -> None:
        """Wait for what comes down, and write it."""
        lane.done.synchronize()
        if coming.notes[:4].any():
            self._do_again(strip, output)
            return
        output.write(as_bytes(coming.elements), strip.offset)
        if coming.grid[0]:
            encoding = cast("Fp8", strip.transfer.target.encoding)
            scales = coming.notes[4:].view(np.float32).reshape(coming.grid)
            raw = encode_scales(scales, encoding.scale_dtype)
            output.write(as_bytes(raw), offset_of_scales(strip, encoding, raw))

    def _do_again(self, strip: RowStrip, output: WritableBlob) -> None:
        """Have the processor fill a strip, or say what is wrong with it."""
        allowed = self._allow_nonfinite
        alone = Transcoder(Arena(), self._opened, self._sources, allow_nonfinite=allowed)
        alone.run(strip, output)


def _can_encode(encoding: Encoding, target: Any) -> bool:
    if isinstance(encoding, Fp8):
        return cuda.can_quantize(*encoding.block(target.height, target.cols))
    return isinstance(encoding, Plain) and encoding.dtype in _TORCH


def _can_decode(segment: MatrixSlice, cols: int) -> bool:
    source = segment.source
    if source.pitch or not segment.is_whole_rows or segment.num_cols != cols:
        return False
    if isinstance(source.encoding, Fp8):
        return cuda.can_dequantize(source.encoding.block(source.height, cols)[1], cols)
    return isinstance(source.encoding, Plain) and source.encoding.dtype in _TORCH


def _dtype_of(encoding: Encoding) -> torch.dtype:
    return _TORCH[cast("Plain", encoding).dtype]


def _dequantize(
    segment: MatrixSlice,
    codes: torch.Tensor,
    scales: torch.Tensor,
    into: torch.Tensor,
    odd: torch.Tensor,
) -> None:
    """Queue the decoding of rows."""
    source = segment.source
    encoding = cast("Fp8", source.encoding)
    block = encoding.block(source.height, source.cols)
    above = encoding.scale_rows(segment.first_row, 1, source.height)[0]
    first = segment.first_row
    for done, count, inner in encoding.by_matrix(first, segment.num_rows, source.height):
        part = slice(done, done + count)
        top = encoding.scale_rows(first + done, count, source.height)[0] - above
        cuda.dequantize(codes[part], scales[top:], into[part], odd, block, inner % block[0])


def _up(array: Array, lane: _Lane, purpose: str) -> torch.Tensor:
    """Queue a copy of float32 numbers to the GPU."""
    tensor = lane.take(purpose, array.shape, torch.float32)
    return tensor.copy_(torch.from_numpy(array), non_blocking=True)


def _copy(raw: Array, tensor: torch.Tensor) -> None:
    """Queue a copy of stored bytes to the GPU."""
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw), non_blocking=True)


def _pinned_buffer(nbytes: int) -> Array:
    """Return fresh bytes, at a page boundary, that a GPU reads and writes by itself."""
    buffer: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return buffer
