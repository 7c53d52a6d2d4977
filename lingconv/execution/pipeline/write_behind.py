"""Write-behind: a worker fills the next strip while the last one is written to disk.

Direct writes wait for the disk, and writers of one file for each other, so the compute threads must
not write. Each file has a writer thread; a worker alternates between slots, each a set of buffers.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from lingconv.storage import BLOCK_BYTES
from lingconv.storage.local_output import ComparedOutput, LocalOutput


class BlockClone(NamedTuple):
    """A reflink request: `nbytes` from `start` of the file descriptor `source`, to `offset`."""

    source: int
    start: int
    nbytes: int
    offset: int

    @property
    def is_whole_blocks(self) -> bool:
        """Whether start, size and offset are multiples of BLOCK_BYTES, as reflinks require."""
        return not (self.start | self.nbytes | self.offset) % BLOCK_BYTES


class PendingWrite(NamedTuple):
    """Bytes to be written at `offset`; their buffer must not change until then."""

    data: memoryview
    offset: int


class PendingWrites:
    """The writes of one strip, collected while it is filled, in place of the output file."""

    def __init__(self, file: "LocalOutput | ComparedOutput") -> None:
        self.cloned_bytes = 0
        self._file = file
        self._parts: list[PendingWrite] = []
        self._later: Callable[[PendingWrites], object] | None = None

    def write(self, data: memoryview, offset: int) -> int:
        """Add bytes to be written at `offset`; return their number."""
        self._parts.append(PendingWrite(data, offset))
        return data.nbytes

    def clone(self, clones: Sequence[BlockClone]) -> bool:
        """Reflink all `clones` into the file now; return False if any of them is impossible."""
        whole = bool(clones) and all(clone.is_whole_blocks for clone in clones)
        if not whole or not all(self._file.clone(*clone) for clone in clones):
            return False
        self.cloned_bytes += sum(clone.nbytes for clone in clones)
        return True

    def later(self, fill: "Callable[[PendingWrites], object]") -> None:
        """Defer `fill`: `parts` calls it with these PendingWrites, to which it writes."""
        self._later = fill

    def parts(self) -> list[PendingWrite]:
        """Return the writes, after running the deferred `fill`, which may wait for a GPU."""
        if self._later is not None:
            self._later(self)
            self._later = None
        return self._parts


class WriterThread:
    """A thread that runs submitted work in order; it is started by the first submission.

    `concurrent.futures` executors would do, but all of them share one lock, for which dozens of
    threads would contend with every strip.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def submit(self, work: Callable[[], None]) -> None:
        """Queue `work`, which must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="write", daemon=True)
            self._thread.start()
        self._queue.put(work)

    def end(self) -> None:
        """End the thread after the work queued so far; may be called from that thread."""
        self._queue.put(None)

    def stop(self) -> None:
        """Wait until the thread has ended; work that it has not started is dropped."""
        self._is_stopped = True
        self.end()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if not self._is_stopped:
                work()


class BufferSlots:
    """The slots of a worker's buffers: one is in use from `take` until its strip is written.

    Each slot is a plain lock that the worker acquires and the writer thread releases: anything
    heavier would be most of the work that Python does for a strip.
    """

    def __init__(self, count: int) -> None:
        self._in_use = [threading.Lock() for _ in range(count)]
        self._next = 0

    def take(self) -> int:
        """Return the number of the next slot, after waiting until its last strip is written."""
        slot = self._next
        self._next = (slot + 1) % len(self._in_use)
        self._in_use[slot].acquire()
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot whose strip is written."""
        self._in_use[slot].release()

    def wait(self) -> None:
        """Wait until the strips of all slots are written."""
        for lock in self._in_use:
            with lock:
                pass
