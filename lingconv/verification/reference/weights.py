"""Prefetched weights: read by threads, a few rows (a strip) at a time, in the order of their use.

    ask("layers.3.q", ...)  ->  strips are read and decoded into a fixed set of buffers
    linear("layers.3.q", x) ->  takes them in the same order, and returns the buffers

Memory is that of the buffers, whatever the size of a matrix. Readers decode rows to the dtype of
the computation; BF16 rows for a GPU stay BF16 until they are there.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from threading import Lock, local
from typing import NamedTuple, Self

import torch
from torch import Tensor

from lingconv.checkpoint.decoder import Decoder
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.encodings.dtypes import DType
from lingconv.encodings.plain import PLAIN
from lingconv.errors import CheckpointError
from lingconv.model.family import LogicalName
from lingconv.plans.tensor_map import MatrixSlice
from lingconv.storage.aligned_buffers import Arena
from lingconv.storage.machine import num_processors
from lingconv.storage.open_files import OpenFiles
from lingconv.verification.reference.activations import fake_quantize

STRIP_BYTES = 8 << 20
READERS = max(2, num_processors() // 2)
BUFFERS = READERS + 28  # enough to prefetch a layer's attention


class _Strip(NamedTuple):
    """Some rows of a matrix, and the buffer that contains them."""

    rows: Tensor
    buffer: Tensor


class _Order(NamedTuple):
    """Rows of `cols` columns to be read, and the future of the result."""

    segments: tuple[MatrixSlice, ...]
    first_row: int
    num_rows: int
    cols: int
    strip: "Future[_Strip]"


class WeightStream:
    """Reads logical tensors of one checkpoint ahead of their use."""

    def __init__(
        self,
        model: Model,
        *,
        compute: torch.dtype,
        device: str = "cpu",
        fp8_activations: bool = False,
    ) -> None:
        self.waited_s = 0.0
        self.bytes_read = 0
        self._compute = compute
        self._device = device
        self._fp8_activations = fp8_activations
        self._locator = model.locator()
        self._files = OpenFiles(model.checkpoint.storage)
        self._threads = ThreadPoolExecutor(READERS, "weights")
        self._own = local()
        self._asked: deque[tuple[LogicalName, deque[Future[_Strip]]]] = deque()
        self._orders: deque[_Order] = deque()
        self._turn = Lock()
        self._buffers: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(BUFFERS):
            pinned = device != "cpu"
            self._buffers.put(torch.empty(STRIP_BYTES, dtype=torch.uint8, pin_memory=pinned))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _ in range(READERS):
            self._buffers.put(None)  # a reader that waits for a buffer ends
        self._threads.shutdown(wait=True)
        self._files.__exit__(*error)

    def has(self, name: LogicalName) -> bool:
        """Return whether the checkpoint has a tensor of this name."""
        return self._locator.holds(name)

    def ask(self, names: Iterable[LogicalName]) -> None:
        """Queue the reading of matrices; they must be used in the same order."""
        for name in names:
            segments = self._locator.whole(name)
            rows, cols = self._locator.shape(name)
            step = max(1, STRIP_BYTES // (cols * self._dtype(segments).itemsize))
            strips: deque[Future[_Strip]] = deque()
            for first in range(0, rows, step):
                order = _Order(segments, first, min(step, rows - first), cols, Future())
                strips.append(order.strip)
                self._orders.append(order)
                self._threads.submit(self._read_next)
            self._asked.append((name, strips))

    def small(self, name: LogicalName) -> Tensor:
        """Return a norm or a bias in float32; it is too small to be worth a prefetch."""
        found = torch.empty(*self._locator.shape(name), dtype=torch.float32)
        self._fill(self._locator.whole(name), 0, found)
        return found.flatten().to(self._device)

    def linear(self, name: LogicalName, x: Tensor) -> Tensor:
        """Return x W^T in x's dtype; `name` must be the next matrix that was asked for."""
        asked, strips = self._asked.popleft()
        if asked != name:
            raise AssertionError(f"{name} is used where {asked} was asked for")
        segments = self._locator.whole(name)
        self.bytes_read += sum(segment.nbytes for segment in segments)
        encoding = segments[0].source.encoding
        operand = x
        if self._fp8_activations and encoding.is_e4m3:
            operand = fake_quantize(x, encoding)
        parts = []
        while strips:
            strip = self._wait(strips.popleft())
            rows = strip.rows.to(self._device).to(operand.dtype)
            parts.append(operand @ rows.T)
            self._buffers.put(strip.buffer)  # free: the copy to the GPU, or the product, is done
        return torch.cat(parts, dim=-1).to(x.dtype)

    def rows(self, name: LogicalName, ids: Tensor) -> Tensor:
        """Return some rows of a matrix (embeddings), in the dtype of the computation."""
        unique, places = torch.unique(ids, return_inverse=True)
        segments = self._locator.whole(name)
        found = torch.empty(len(unique), self._locator.shape(name)[1], dtype=self._dtype(segments))
        for number, row in enumerate(unique.tolist()):
            self._fill(segments, row, found[number : number + 1])
        return found[places.cpu()].to(self._device).to(self._compute)

    def _wait(self, strip: "Future[_Strip]") -> _Strip:
        started = time.perf_counter()
        found = strip.result()
        self.waited_s += time.perf_counter() - started
        return found

    def _dtype(self, segments: Sequence[MatrixSlice]) -> torch.dtype:
        """Return the dtype of decoded rows: that of the computation, or BF16 for a GPU."""
        encodings = {segment.source.encoding for segment in segments}
        if all(encoding == PLAIN[DType.BF16] for encoding in encodings):
            return self._compute if self._device == "cpu" else torch.bfloat16
        scaled = all(encoding.has_scales for encoding in encodings)
        return self._compute if scaled and not self._fp8_activations else torch.float32

    def _read_next(self) -> None:
        # Orders get their buffers in the order of use: if a later one could take the buffer for
        # which an earlier one waits, all buffers could hold later strips, which is a deadlock.
        with self._turn:
            order = self._orders.popleft()
            buffer = self._buffers.get()
        if buffer is None:
            return
        dtype = self._dtype(order.segments)
        used = buffer[: order.num_rows * order.cols * dtype.itemsize]
        rows = used.view(dtype).view(order.num_rows, order.cols)
        try:
            self._fill(order.segments, order.first_row, rows)
        except BaseException as exc:
            self._buffers.put(buffer)
            order.strip.set_exception(exc)
        else:
            order.strip.set_result(_Strip(rows, buffer))

    def _fill(self, segments: Sequence[MatrixSlice], first: int, rows: Tensor) -> None:
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder(Arena(), self._files)
        bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
        met = self._own.decoder.fill(segments, first, bits.numpy())
        if met is not None:
            raise CheckpointError(
                f"{met.source.extents[0].file}: {met.source.name}: NaN or Inf at or below row"
                f" {met.row}",
                hint="mend the checkpoint: its forward pass would be NaN as well",
            )
