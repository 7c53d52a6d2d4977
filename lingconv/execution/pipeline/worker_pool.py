"""The worker pool of a run: each thread takes strips, and the last one of a file finishes the file.

Each worker keeps to one output file, because writers of one file wait for each other in the file
system; when no file is left to open, it takes strips of another worker's. A file is synced piece by
piece, so that a run resumes within a file, even one of a terabyte, after a kill.
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
from lingconv.execution.pipeline.peaks import Peaks
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
    """Raise CheckpointError if a source file has changed since the plan was made.

    `files` are pairs of a source's number and the name of one of its files.
    """
    for number, name in sorted(files):
        source = plan.sources[number]
        if storages[number].stat(name) != source.files[name]:
            raise CheckpointError(
                f"{source.uri}/{name} changed while it was read",
                hint="the source must stay as it is; restore it, or start over with `fresh`",
            )


# Bytes between two syncs of a file: as many may have to be written again after a kill.
PIECE_BYTES = 256 << 20


class _Task(NamedTuple):
    """A strip, and the number of the piece of the file to which it belongs."""

    strip: Strip
    piece: int


def _tasks(file: OutputFile) -> Iterator[_Task]:
    """Yield the strips of a file, each with the number of its piece."""
    position = 0
    for strip in lower(file):
        yield _Task(strip, position // PIECE_BYTES)
        position += written_bytes(strip)


def _sealed(frames: Iterable[FileBytes], seals: Iterable[FileBytes]) -> Iterator[FileBytes]:
    """Yield the frames of a file with its seals (checksums) filled in."""
    waiting = sorted(seals, reverse=True)
    for frame in frames:
        data, end = bytearray(frame.data), frame.offset + len(frame.data)
        while waiting and waiting[-1].offset < end:
            seal = waiting.pop()
            first = seal.offset - frame.offset
            data[first : first + len(seal.data)] = seal.data
        yield FileBytes(frame.offset, bytes(data))


class _OpenFile:
    """An output file that is being written: strips not yet taken, and the number in flight.

    A piece is a run of strips that write about PIECE_BYTES; pieces in `done` are left out. The lock
    is the file's own, so that workers on other files do not contend for it.
    """

    def __init__(
        self,
        file: OutputFile,
        output: "LocalOutput | ComparedOutput",
        file_id: str,
        done: Collection[int],
        prefetcher: Prefetcher,
    ) -> None:
        self.file = file
        self.started = time.monotonic()
        self.writer = WriterThread()
        self.held_bytes = 0
        self.id = file_id
        self.output = output
        self._lock = threading.Lock()
        self._in_flight: Counter[int] = Counter()
        prefetcher.open(file, lambda: (t.strip for t in _tasks(file) if t.piece not in done))
        self._tasks = prefetcher.ahead(self._missing(done), lambda task: task.strip)
        self._next = next(self._tasks, None)
        self._format = format_of(file)
        try:
            if isinstance(output, LocalOutput):
                self._write(self._format.frames(file))
        except BaseException:
            self.output.close()
            raise

    def seal(self) -> None:
        """Write the checksums of the written bytes, if the format states any."""
        sums = self.output.checksums
        seals = self._format.seals(self.file, sums.of) if sums is not None else ()
        if isinstance(self.output, LocalOutput):
            self._write(seals)
        else:  # frames are compared whole, so the checksums within them have to be filled in
            self._write(_sealed(self._format.frames(self.file), seals))

    def _write(self, parts: Iterable[FileBytes]) -> None:
        for part in parts:
            self.output.write(memoryview(part.data), part.offset)

    @cached_property
    def sources(self) -> set[tuple[int, str]]:
        """Return the source files that this file reads, each with its source's number."""
        return sources_of(self.file)

    @property
    def has_strips(self) -> bool:
        """Whether there are strips that no worker has taken."""
        return self._next is not None

    def _missing(self, done: Collection[int]) -> Iterator[_Task]:
        """Yield the strips of all pieces except those in `done`."""
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
        """Note that a strip is written; return whether that completes its piece, and the file."""
        with self._lock:
            self._in_flight[piece] -= 1
            if self._in_flight[piece] or (self._next is not None and self._next.piece == piece):
                return False, False
            del self._in_flight[piece]
            return True, self._next is None and not self._in_flight

    def close(self) -> None:
        """Close the file and end its writer thread, which may itself be the caller."""
        self.writer.end()
        self.output.close()


class WorkerPool:
    """The threads of one execution and their shared state; its lock is taken once a file or piece.

    A strip is taken, filled, pending in a slot, written, released (`_take` ... `_release`).
    """

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
        self._prefetcher = Prefetcher(storages, self._opened, ahead_bytes)
        self._peaks = Peaks()
        self._error: BaseException | None = None

    def fill(self, files: list[OutputFile], jobs: int) -> None:
        """Fill `files` with `jobs` threads, half of which write the strips that the others fill.

        Raises the first error that any of them met.
        """
        if not self._sparse:
            for each in files:
                self._ranges_left.update(self._ranges_of(each))
        self._waiting.extend(files)
        self._prefetcher.begin(files)
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
                for file in [*self._open]:  # a copy: a writer thread may finish its file meanwhile
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
                waiting[-1].join(0.1)  # with a time-out, so that signals are handled
                if not waiting[-1].is_alive():
                    waiting.pop()
            except KeyboardInterrupt as exc:
                self.stop(exc)

    def _load_transcoder(self) -> None:
        """Import numba while the first bytes are copied, if the plan transcodes any rows."""
        if not all(transfer.copies for transfer in self._plan.transfers()):
            import_module("lingconv.execution.pipeline.transcoder")

    def _work(self, number: int = 0, behind: int = 0) -> None:
        """Fill strips until none is left or a thread failed; workers are dealt to GPUs round-robin.

        At most `behind` filled strips wait for the file's writer thread; with 0, this thread
        writes each one itself.
        """
        from lingconv.execution.pipeline.strip_executor import (
            StripExecutor,  # imports numpy: planning does not
        )

        allow_nonfinite = self._plan.options.allow_nonfinite
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else ""
        executor = StripExecutor(
            self._opened,
            self._plan.sources,
            allow_nonfinite=allow_nonfinite,
            gpu=gpu,
            peaks=self._peaks,
        )
        slots = BufferSlots(max(1, behind))
        file: _OpenFile | None = None
        try:
            while (taken := self._take(file)) is not None:
                file, task = taken
                pending, slot = PendingWrites(file.output), slots.take()
                executor.fill(task.strip, pending, slot)
                write = partial(self._write, file, task, pending, slots, slot)
                if behind:
                    file.writer.submit(write)
                else:
                    write()
            slots.wait()
        except BaseException as exc:  # raised by `fill`, in the thread that called it
            self.stop(exc)

    def _write(
        self, file: _OpenFile, task: _Task, pending: PendingWrites, slots: BufferSlots, slot: int
    ) -> None:
        """Write a filled strip, then free the worker's slot that holds it."""
        try:
            written = sum(file.output.write(data, offset) for data, offset in pending.parts())
            self._progress.advance(file.file.name, written + pending.cloned_bytes)
            self._prefetcher.done(file.file.name, task.strip)
            self._release(file, task.piece)
        except BaseException as exc:  # raised by `fill`, in the thread that called it
            self.stop(exc)
        finally:
            slots.give_back(slot)

    def stop(self, error: BaseException) -> None:
        """Stop all workers; `fill` raises the first error that was passed here."""
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("interrupted", hint=SAME_COMMAND)
        with self._lock:
            self._error = self._error or error

    def _take(self, mine: _OpenFile | None) -> tuple[_OpenFile, _Task] | None:
        """Return a strip of the worker's own file, else of a new one, else of another worker's.

        Waits while the next file has no room on disk until others are delivered.
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
        """Open the next file; None if there is none or no room for it."""
        with self._lock:
            if not self._waiting or not self._delivery.has_room(self._waiting[0]):
                return None
            opened = self._open_file(self._waiting.popleft())
            # Before another worker may help with it, and tell of its bytes.
            self._progress.file_begins(opened.file.name, opened.file.nbytes, opened.held_bytes)
            self._open.append(opened)
        if not self._sparse:
            opened.output.reserve()  # outside the lock: other workers may write to it already
        return opened

    def _open_file(self, file: OutputFile) -> _OpenFile:
        if self._compares:
            finished = ComparedOutput(self._folder.path(file.name))
            return _OpenFile(file, finished, "", set(), self._prefetcher)
        held, pieces = self._folder.partial(file.name, file.nbytes)
        summed = format_of(file).sums_elements and not self._sparse
        output = LocalOutput(
            held.path,
            file.nbytes,
            checksums=Checksums(pieces.checksums) if summed else None,
            tail=held.tail,
            goes_on=not held.is_new,
        )
        return _OpenFile(file, output, held.id, pieces.numbers, self._prefetcher)

    def _release(self, file: _OpenFile, piece: int) -> None:
        """Note that a strip is written; sync and journal the piece or file that it completes."""
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
        """Write the checksums, sync the file, rename it, journal it and deliver it."""
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
        """Record whether a finished file holds the bytes that the plan gives."""
        with self._lock:
            self._open.remove(file)
            file.close()
            if output.differs:
                self.differing.append(file.file)
            else:
                self._folder.note_finished(file.file.name)
        self._progress.file_ends(file.file.name, file.file.nbytes, time.monotonic() - file.started)
