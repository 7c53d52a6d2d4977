"""The threads of a run: each takes strips, and the last one to finish a file gives it its name.

Each worker keeps to one output file, because writers of one file wait for each other in the file
system; when no file is left to begin, it helps with another's. A file is made durable piece by
piece, so that even one of a terabyte goes on where a kill left it.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from importlib import import_module
from typing import NamedTuple

from lingconv.containers.base import FileBytes
from lingconv.containers.registry import format_of
from lingconv.errors import SAME_COMMAND, CheckpointError, Interrupted
from lingconv.execution.delivery import Delivery
from lingconv.execution.pipeline.prefetch import Prefetcher, extents_of, sources_of
from lingconv.execution.pipeline.write_behind import BufferSlots, PendingWrites, WriterThread
from lingconv.execution.progress import Progress
from lingconv.execution.run_folder import RunFolder
from lingconv.plans.lowering import Strip, lower, written_bytes
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage import Storage
from lingconv.storage.local_output import Checksums, ComparedOutput, LocalOutput
from lingconv.storage.open_files import OpenFiles
from lingconv.storage.stated_sums import StatedSum


def check_unchanged(
    plan: Plan, storages: Sequence[Storage], files: Collection[tuple[int, str]]
) -> None:
    """Raise CheckpointError when a file is not what it was when the plan was made.

    `files` are numbers of sources, each with a file's name.
    """
    for number, name in sorted(files):
        source = plan.sources[number]
        if storages[number].stat(name) != source.files[name]:
            raise CheckpointError(
                f"{source.uri}/{name} changed while it was read",
                hint="the source must stay as it is; restore it, or start over with `--fresh`",
            )


# What a kill may cost of a file, and how often a worker waits for the disk.
PIECE_BYTES = 256 << 20


class _Task(NamedTuple):
    """A strip, and the number of the piece of its file that it belongs to."""

    strip: Strip
    piece: int


def _tasks(file: OutputFile) -> Iterator[_Task]:
    """Yield the strips of a file, each with its piece."""
    position = 0
    for strip in lower(file):
        yield _Task(strip, position // PIECE_BYTES)
        position += written_bytes(strip)


def _sealed(frames: Iterable[FileBytes], seals: Iterable[FileBytes]) -> Iterator[FileBytes]:
    """Yield frames with the seals in their places."""
    waiting = sorted(seals, reverse=True)
    for frame in frames:
        data, end = bytearray(frame.data), frame.offset + len(frame.data)
        while waiting and waiting[-1].offset < end:
            seal = waiting.pop()
            first = seal.offset - frame.offset
            data[first : first + len(seal.data)] = seal.data
        yield FileBytes(frame.offset, bytes(data))


class _OpenFile:
    """An output file being filled: its strips, and how many are taken but not yet written.

    A piece is a run of strips that write about PIECE_BYTES; those in `done` are left out. The lock
    is the file's own, so that workers with other files do not meet here.
    """

    def __init__(
        self,
        file: OutputFile,
        output: "LocalOutput | ComparedOutput",
        file_id: str,
        done: Collection[int],
        feed: Prefetcher,
    ) -> None:
        self.file = file
        self.started = time.monotonic()
        self.writer = WriterThread()
        self.held_bytes = 0
        self.id = file_id
        self.output = output
        self._lock = threading.Lock()
        self._in_flight: Counter[int] = Counter()
        feed.open(file, lambda: (t.strip for t in _tasks(file) if t.piece not in done))
        self._tasks = feed.ahead(self._missing(done), lambda task: task.strip)
        self._next = next(self._tasks, None)
        self._format = format_of(file)
        try:
            if isinstance(output, LocalOutput):
                self._write(self._format.frames(file))
        except BaseException:
            self.output.close()
            raise

    def seal(self) -> None:
        """Write the checksums of what has been written, where the format states them."""
        sums = self.output.checksums
        seals = self._format.seals(self.file, sums.of) if sums is not None else ()
        if isinstance(self.output, LocalOutput):
            self._write(seals)
        else:  # checksums stand in the midst of frames
            self._write(_sealed(self._format.frames(self.file), seals))

    def _write(self, parts: Iterable[FileBytes]) -> None:
        for part in parts:
            self.output.write(memoryview(part.data), part.offset)

    @cached_property
    def sources(self) -> set[tuple[int, str]]:
        """Return the files that this one is made of, each with its source's number."""
        return sources_of(self.file)

    @property
    def has_strips(self) -> bool:
        """Whether there are strips that nobody has taken."""
        return self._next is not None

    def _missing(self, done: Collection[int]) -> Iterator[_Task]:
        """Yield the strips of all pieces but those in `done`."""
        for task in _tasks(self.file):
            if task.piece in done:
                self.held_bytes += written_bytes(task.strip)
            else:
                yield task

    def take(self) -> _Task | None:
        """Return the next strip, or None when all are taken."""
        with self._lock:
            task, self._next = self._next, next(self._tasks, None)
            if task is not None:
                self._in_flight[task.piece] += 1
            return task

    def release(self, piece: int) -> tuple[bool, bool]:
        """Note that a strip is written; return whether its piece is whole now, and the file."""
        with self._lock:
            self._in_flight[piece] -= 1
            if self._in_flight[piece] or (self._next is not None and self._next.piece == piece):
                return False, False
            del self._in_flight[piece]
            return True, self._next is None and not self._in_flight

    def close(self) -> None:
        """Close the file, which may be the last thing that its thread does."""
        self.writer.end()
        self.output.close()


class WorkerPool:
    """The threads of one execution, and what they share: its lock is for whole files only."""

    def __init__(
        self,
        plan: Plan,
        storages: Sequence[Storage],
        folder: RunFolder,
        progress: Progress,
        delivery: Delivery,
        *,
        sparse: bool,
        compares: bool = False,
        ahead_bytes: int = 0,
        gpus: Sequence[str] = (),
    ) -> None:
        self._gpus = gpus
        self._sparse = sparse
        self._compares = compares
        self.differing: list[OutputFile] = []
        self._plan = plan
        self._storages = storages
        self._folder = folder
        self._progress = progress
        self._lock = threading.Lock()
        self._delivery = delivery
        self._waiting: deque[OutputFile] = deque()
        self._open: list[_OpenFile] = []
        self._opened = [
            OpenFiles(storage, source.checksums)
            for storage, source in zip(storages, plan.sources, strict=True)
        ]
        self._ranges_left: Counter[tuple[int, str, StatedSum]] = Counter()
        self._feed = Prefetcher(storages, self._opened, ahead_bytes)
        self._error: BaseException | None = None

    def fill(self, files: list[OutputFile], jobs: int) -> None:
        """Fill `files` with `jobs` threads, half of which write what the others filled.

        Raises the first error that any of them met.
        """
        if not self._sparse:
            for each in files:
                self._ranges_left.update(self._ranges_of(each))
        self._waiting.extend(files)
        self._feed.begin(files)
        with ExitStack() as stack:
            for opened in self._opened:
                stack.enter_context(opened)
            try:
                if self._sparse:
                    while (begun := self._begin_file()) is not None:
                        self._finish(begun)
                elif jobs == 1:
                    self._work()
                else:
                    self._work_in_threads(jobs)
            finally:
                for file in [*self._open]:  # what its thread is at may be its last
                    file.writer.stop()
                for file in self._open:
                    file.close()
        if self._error is not None:
            raise self._error

    def _work_in_threads(self, jobs: int) -> None:
        workers = range(jobs // 2)
        threads = [threading.Thread(target=self._work, args=(n, 2), daemon=True) for n in workers]
        threads.append(threading.Thread(target=self._load_transcoder, daemon=True))
        for thread in threads:
            thread.start()
        waiting = list(threads)
        while waiting:
            try:
                waiting[-1].join(0.1)  # with a time-out, so that signals are heard
                if not waiting[-1].is_alive():
                    waiting.pop()
            except KeyboardInterrupt as exc:
                self.stop(exc)

    def _load_transcoder(self) -> None:
        """Import numba while the first bytes are copied, if rows are to follow."""
        if not all(transfer.copies for transfer in self._plan.transfers()):
            import_module("lingconv.execution.pipeline.transcoder")

    def _work(self, number: int = 0, behind: int = 0) -> None:
        """Take strips until there are none, or somebody failed; the GPUs have as many workers each.

        While the next one is filled, `behind` of them may wait to be written; with none, all is
        done here.
        """
        from lingconv.execution.pipeline.strip_executor import (
            StripExecutor,  # with numpy, which nobody who only plans needs
        )

        allow_nonfinite = self._plan.options.allow_nonfinite
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else ""
        filler = StripExecutor(
            self._opened, self._plan.sources, allow_nonfinite=allow_nonfinite, gpu=gpu
        )
        turns = BufferSlots(max(1, behind))
        file: _OpenFile | None = None
        try:
            while (taken := self._take(file)) is not None:
                file, task = taken
                filled, turn = PendingWrites(file.output), turns.take()
                filler.fill(task.strip, filled, turn)
                write = partial(self._write, file, task, filled, turns, turn)
                if behind:
                    file.writer.submit(write)
                else:
                    write()
            turns.wait()
        except BaseException as exc:  # handed to the thread that waits in `fill`
            self.stop(exc)

    def _write(
        self, file: _OpenFile, task: _Task, filled: PendingWrites, turns: BufferSlots, turn: int
    ) -> None:
        """Write what a worker filled of a strip in one of its turns."""
        try:
            written = sum(file.output.write(data, offset) for data, offset in filled.parts())
            self._progress.advance(file.file.name, written + filled.cloned_bytes)
            self._feed.done(file.file.name, task.strip)
            self._release(file, task.piece)
        except BaseException as exc:  # handed to the thread that waits in `fill`
            self.stop(exc)
        finally:
            turns.give_back(turn)

    def stop(self, error: BaseException) -> None:
        """Have everybody stop, for the first of the errors that were met."""
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("interrupted", hint=SAME_COMMAND)
        with self._lock:
            self._error = self._error or error

    def _take(self, mine: _OpenFile | None) -> tuple[_OpenFile, _Task] | None:
        """Return a strip: of the worker's own file, of a new one, or of one that needs help.

        Waits where the next file has no room before others are delivered.
        """
        while self._error is None:
            task = mine.take() if mine else None
            if mine and task:
                return mine, task
            mine = self._begin_file() or self._file_to_help_with()
            if mine is None:
                if not self._waiting:
                    return None
                self._delivery.wait()
        return None

    def _file_to_help_with(self) -> _OpenFile | None:
        with self._lock:
            return next((file for file in self._open if file.has_strips), None)

    def _begin_file(self) -> _OpenFile | None:
        """Open the next file, if there is one and there is room for it."""
        with self._lock:
            if not self._waiting or not self._delivery.has_room(self._waiting[0]):
                return None
            opened = self._open_file(self._waiting.popleft())
            self._open.append(opened)
        self._progress.file_begins(opened.file.name, opened.file.nbytes, opened.held_bytes)
        if not self._sparse:
            opened.output.reserve()  # others may help already
        return opened

    def _open_file(self, file: OutputFile) -> _OpenFile:
        if self._compares:
            finished = ComparedOutput(self._folder.path(file.name))
            return _OpenFile(file, finished, "", set(), self._feed)
        held, pieces = self._folder.partial(file.name, file.nbytes)
        summed = format_of(file).sums_elements and not self._sparse
        output = LocalOutput(
            held.path,
            file.nbytes,
            checksums=Checksums(pieces.checksums) if summed else None,
            tail=held.tail,
            goes_on=not held.is_new,
        )
        return _OpenFile(file, output, held.id, pieces.numbers, self._feed)

    def _release(self, file: _OpenFile, piece: int) -> None:
        """Note that a strip is written; make what it completes durable."""
        whole_piece, whole_file = file.release(piece)
        if whole_file:
            self._finish(file)
        elif whole_piece and isinstance(file.output, LocalOutput):
            file.output.sync()
            check_unchanged(self._plan, self._storages, file.sources)
            with self._lock:
                sums = file.output.checksums.take_new() if file.output.checksums else []
                self._folder.finish_piece(file.file.name, file.id, piece, sums)

    def _ranges_of(self, file: OutputFile) -> set[tuple[int, str, StatedSum]]:
        """Return the ranges with checksums that a file is made of, each with its source."""
        found = set()
        for number, extent in extents_of(file):
            stated = self._opened[number].stated_at(extent.file, extent.offset)
            if stated is not None:
                found.add((number, extent.file, stated))
        return found

    def _complete_ranges(self, file: OutputFile) -> None:
        """Compare the checksums of what this file is the last one to be made of.

        What was left out, or written before a kill, is read now: a damaged source must never leave
        a finished file behind that the next run takes as it is.
        """
        for key in self._ranges_of(file):
            with self._lock:
                self._ranges_left[key] -= 1
                is_last = not self._ranges_left[key]
            if is_last:
                number, name, stated = key
                self._opened[number].complete(name, stated)

    def _finish(self, file: _OpenFile) -> None:
        """Make the data durable, then give the file its name."""
        if not self._sparse:
            self._complete_ranges(file.file)
        file.seal()
        if isinstance(file.output, ComparedOutput):
            self._finish_comparison(file, file.output)
            return
        file.output.sync()
        check_unchanged(self._plan, self._storages, file.sources)
        file.output.finish()
        file.output.sync()
        with self._lock:
            self._open.remove(file)
            file.close()
            self._folder.finish(file.file.name)
        seconds = time.monotonic() - file.started
        self._progress.file_ends(file.file.name, file.file.nbytes, seconds)
        self._delivery.deliver(file.file)

    def _finish_comparison(self, file: _OpenFile, output: ComparedOutput) -> None:
        """Keep in mind whether a finished file holds the bytes that it should."""
        with self._lock:
            self._open.remove(file)
            file.close()
            if output.differs:
                self.differing.append(file.file)
            else:
                self._folder.note_finished(file.file.name)
        self._progress.file_ends(file.file.name, file.file.nbytes, time.monotonic() - file.started)
