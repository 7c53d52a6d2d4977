"""Writing behind: a worker fills the next strip while the last one goes to the disk.

Direct writes wait for the disk, and writers of one file for each other; whoever computes had
better not. Each file has a thread that writes it; a worker takes turns with the buffers that wait.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import NamedTuple

from lingconv.containers import BLOCK_BYTES
from lingconv.storage.output import OutputBlob


class Clone(NamedTuple):
    """Bytes of an open file that need not be read to be in the target: `nbytes` from `start` on."""

    source: int
    start: int
    nbytes: int
    offset: int

    @property
    def is_whole_blocks(self) -> bool:
        """Whether disk blocks hold nothing else, here and there."""
        return not (self.start | self.nbytes | self.offset) % BLOCK_BYTES


class Part(NamedTuple):
    """Bytes to be written, which their buffer holds until that is done."""

    data: memoryview
    offset: int


class Filled:
    """Stands in for a file while a strip is filled, and remembers what is to be written."""

    def __init__(self, file: OutputBlob) -> None:
        self.cloned_bytes = 0
        self._file = file
        self._parts: list[Part] = []
        self._later: Callable[[Filled], object] | None = None

    def write(self, data: memoryview, offset: int) -> int:
        """Remember bytes for later; return how many they are."""
        self._parts.append(Part(data, offset))
        return data.nbytes

    def clone(self, clones: Sequence[Clone]) -> bool:
        """Have the file share what others have on disk, at once; return whether all of it does."""
        whole = bool(clones) and all(clone.is_whole_blocks for clone in clones)
        if not whole or not all(self._file.clone(*clone) for clone in clones):
            return False
        self.cloned_bytes += sum(clone.nbytes for clone in clones)
        return True

    def later(self, fill: "Callable[[Filled], object]") -> None:
        """Have `fill` write to this, as soon as somebody asks for the parts."""
        self._later = fill

    def parts(self) -> list[Part]:
        """Return what is to be written; waits for what is still to come."""
        if self._later is not None:
            self._later(self)
            self._later = None
        return self._parts


class Writer:
    """A thread that does what it is handed, one after the other, begun with the first of it.

    An executor of the standard library would do, but all of them share one lock, where dozens of
    threads meet for every strip.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        """Have `work` done; what is returned ends with it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="write", daemon=True)
            self._thread.start()
        done: Future[None] = Future()
        self._queue.put((done, work))
        return done

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
        while (item := self._queue.get()) is not None:
            done, work = item
            if self._is_stopped:
                done.cancel()
                continue
            try:
                work()
            except BaseException as exc:  # handed to the worker that waits for it
                done.set_exception(exc)
            else:
                done.set_result(None)


class Turns:
    """Which of `count` turns comes next, and what is still to be written of the last time."""

    def __init__(self, count: int) -> None:
        self._pending: list[Future[None] | None] = [None] * count
        self._next = 0

    def free(self) -> int:
        """Wait until what the next turn filled last time is written, and return its number.

        Raises what writing it raised.
        """
        pending = self._pending[self._next]
        if pending is not None:
            pending.result()
        return self._next

    def hand_over(self, writing: Future[None]) -> None:
        """Go on to the next turn: `writing` ends when this one's buffers are free again."""
        self._pending[self._next] = writing
        self._next = (self._next + 1) % len(self._pending)

    def wait(self) -> None:
        """Wait until everything is written; raise what that raised."""
        for pending in self._pending:
            if pending is not None:
                pending.result()
