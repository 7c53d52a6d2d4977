"""Writing behind: a worker fills the next strip while the last one goes to the disk.

Direct writes wait for the disk, and writers of one file for each other; whoever computes had
better not. Each file has a thread that writes it; a worker takes turns with the buffers that wait.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from lingconv.storage import BLOCK_BYTES
from lingconv.storage.local_output import ComparedOutput, LocalOutput


class BlockClone(NamedTuple):
    """Bytes of an open file that need not be read to be in the target: `nbytes` from `start` on."""

    source: int
    start: int
    nbytes: int
    offset: int

    @property
    def is_whole_blocks(self) -> bool:
        """Whether disk blocks hold nothing else, here and there."""
        return not (self.start | self.nbytes | self.offset) % BLOCK_BYTES


class PendingWrite(NamedTuple):
    """Bytes to be written, which their buffer holds until that is done."""

    data: memoryview
    offset: int


class PendingWrites:
    """Stands in for a file while a strip is filled, and remembers what is to be written."""

    def __init__(self, file: "LocalOutput | ComparedOutput") -> None:
        self.cloned_bytes = 0
        self._file = file
        self._parts: list[PendingWrite] = []
        self._later: Callable[[PendingWrites], object] | None = None

    def write(self, data: memoryview, offset: int) -> int:
        """Remember bytes for later; return how many they are."""
        self._parts.append(PendingWrite(data, offset))
        return data.nbytes

    def clone(self, clones: Sequence[BlockClone]) -> bool:
        """Have the file share what others have on disk, at once; return whether all of it does."""
        whole = bool(clones) and all(clone.is_whole_blocks for clone in clones)
        if not whole or not all(self._file.clone(*clone) for clone in clones):
            return False
        self.cloned_bytes += sum(clone.nbytes for clone in clones)
        return True

    def later(self, fill: "Callable[[PendingWrites], object]") -> None:
        """Have `fill` write to this, as soon as somebody asks for the parts."""
        self._later = fill

    def parts(self) -> list[PendingWrite]:
        """Return what is to be written; waits for what is still to come."""
        if self._later is not None:
            self._later(self)
            self._later = None
        return self._parts


class WriterThread:
    """A thread that does what it is handed, one after the other, begun with the first of it.

    An executor of the standard library would do, but all of them share one lock, where dozens of
    threads meet for every strip.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done, which raises nothing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="write", daemon=True)
            self._thread.start()
        self._queue.put(work)

    def end(self) -> None:
        """Let the thread end with what it has been handed; it may ask for that itself."""
        self._queue.put(None)

    def stop(self) -> None:
        """Return when the thread has ended; what it has not begun, it leaves."""
        self._is_stopped = True
        self.end()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if not self._is_stopped:
                work()


class BufferSlots:
    """The buffers of a worker, which takes turns with them: each is lent until it is written.

    Locks that one thread takes and another gives back: anything more would be most of the work
    that Python does for a strip.
    """

    def __init__(self, count: int) -> None:
        self._lent = [threading.Lock() for _ in range(count)]
        self._next = 0

    def take(self) -> int:
        """Wait until what the next turn filled last time is written, and return its number."""
        turn = self._next
        self._next = (turn + 1) % len(self._lent)
        self._lent[turn].acquire()
        return turn

    def give_back(self, turn: int) -> None:
        """Note that its buffers are free again."""
        self._lent[turn].release()

    def wait(self) -> None:
        """Wait until everything is written."""
        for lent in self._lent:
            with lent:
                pass
