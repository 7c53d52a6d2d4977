"""Files that are far away, read by byte ranges.

    read_into(offset, buffer)
      small   -> a block of the file, kept for its neighbours: headers, norms, scales
      coming  -> a range that was expected, and is fetched by a thread already
      else    -> a request of its own

How bytes get here is the file's own business (`Ranged`).
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

from lingconv.errors import CheckpointError

PARALLEL = 16
REQUEST_BYTES = 16 << 20
BLOCK_BYTES = 256 << 10
SMALL_BYTES = 64 << 10
_MAX_BLOCKS = 128


class Ranged(Protocol):
    """A file far away, which many threads share."""

    @property
    def uri(self) -> str:
        """The address of the file, for messages."""

    @property
    def size(self) -> int:
        """Its bytes."""

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`, or raise an error that says why not."""


class Ranges:
    """What the files of one storage share: blocks for small reads, and threads that fetch."""

    def __init__(self) -> None:
        self._blocks = _Blocks()
        self._threads = ThreadPoolExecutor(PARALLEL, "fetch")

    def open(self, file: Ranged) -> "RangeBlob":
        """Open a file for strip-wise reading."""
        return RangeBlob(file, self._blocks, self._threads)

    def read(self, file: Ranged, offset: int, nbytes: int | None) -> bytes:
        """Return bytes of a file, or what is left of it when that is less."""
        if offset >= file.size:
            return b""
        left = file.size - offset
        buffer = bytearray(left if nbytes is None else min(nbytes, left))
        blob = self.open(file)
        try:
            blob.read_into(offset, memoryview(buffer))
        finally:
            blob.close()
        return bytes(buffer)


class _Blocks:
    """Blocks of files, kept for small reads; those that were not used for longest go first."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Ranged, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, file: Ranged, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a file."""
        done = 0
        while done < len(buffer):
            start = (offset + done) // BLOCK_BYTES * BLOCK_BYTES
            block = self._block(file, start)
            part = block[offset + done - start :][: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _block(self, file: Ranged, start: int) -> bytes:
        key = file, start
        with self._lock:
            held = self._held.get(key)
            mine = held is None
            if held is None:
                held = self._held[key] = Future()
            self._held.move_to_end(key)
            if len(self._held) > _MAX_BLOCKS:
                self._held.popitem(last=False)
        if mine:
            try:
                held.set_result(_fetch_block(file, start))
            except BaseException as exc:
                with self._lock:
                    self._held.pop(key, None)
                held.set_exception(exc)
                raise
        return held.result()


def _fetch_block(file: Ranged, offset: int) -> bytes:
    buffer = bytearray(min(BLOCK_BYTES, file.size - offset))
    file.fetch(offset, memoryview(buffer))
    return bytes(buffer)


class _PendingRange:
    """A range of a file that is going to be read, and as many of its bytes as were not yet."""

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.unread = nbytes
        self.data: Future[bytearray] | None = None

    def covers(self, offset: int, nbytes: int) -> bool:
        return self.offset <= offset and offset + nbytes <= self.offset + self.nbytes


class RangeBlob:
    """An open file that is far away."""

    descriptor = None

    def __init__(self, file: Ranged, blocks: _Blocks, threads: ThreadPoolExecutor) -> None:
        self._file = file
        self._blocks = blocks
        self._threads = threads
        self._coming: list[_PendingRange] = []
        self._lock = threading.Lock()

    def expect(self, offset: int, nbytes: int) -> None:
        """Fetch bytes that are going to be read, neighbours together, in large requests."""
        if nbytes < SMALL_BYTES:
            return
        with self._lock:
            last = self._coming[-1] if self._coming else None
            if last and last.data is None:
                goes_on = last.offset + last.nbytes == offset
                if goes_on and last.nbytes + nbytes <= REQUEST_BYTES:
                    last.nbytes += nbytes
                    last.unread += nbytes
                    return
                self._begin(last)
            self._coming.append(_PendingRange(offset, nbytes))

    def _begin(self, coming: _PendingRange) -> None:
        if coming.data is None:
            coming.data = self._threads.submit(self._fetch, coming.offset, coming.nbytes)

    def _fetch(self, offset: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        self._file.fetch(offset, memoryview(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raise CheckpointError when the file ends before."""
        if offset + len(buffer) > self._file.size:
            raise CheckpointError(
                f"{self._file.uri} ends at byte {self._file.size:,}, before what is to be read",
                hint="restore the file, and run the same command again",
            )
        if len(buffer) < SMALL_BYTES:
            self._blocks.read_into(self._file, offset, buffer)
            return
        with self._take(offset, len(buffer)) as coming:
            if coming is None or coming.data is None:
                self._file.fetch(offset, buffer)
            else:
                start = offset - coming.offset
                with memoryview(coming.data.result()) as data:
                    buffer[:] = data[start : start + len(buffer)]

    @contextmanager
    def _take(self, offset: int, nbytes: int) -> Iterator[_PendingRange | None]:
        """Give the range that holds some bytes, if one is coming; drop it once all were read."""
        with self._lock:
            found = next((each for each in self._coming if each.covers(offset, nbytes)), None)
            if found is not None:
                self._begin(found)
        yield found
        if found is not None:
            with self._lock:
                found.unread -= nbytes
                if found.unread <= 0 and found in self._coming:
                    self._coming.remove(found)

    def close(self) -> None:
        """Stop fetching."""
        with self._lock:
            for coming in self._coming:
                if coming.data is not None:
                    coming.data.cancel()
            self._coming.clear()
