"""The threads of a run: each takes strips, and the last one to finish a file gives it its name.

Each worker keeps to one output file, because writers of one file wait for each other in the file
system; when no file is left to begin, it helps with another's.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lingconv.errors import SAME_COMMAND, CheckpointError, Interrupted
from lingconv.journal import RunFolder
from lingconv.plan import OutputFile, Plan
from lingconv.progress import Progress
from lingconv.storage import Blob, Storage
from lingconv.storage.opened import OpenedFiles
from lingconv.storage.output import OutputBlob
from lingconv.strips import RowStrip, Strip, lower

if TYPE_CHECKING:
    from lingconv.transcode import Transcoder


def check_unchanged(plan: Plan, storage: Storage, names: set[str]) -> None:
    """Raise CheckpointError when a source file is not what it was when the plan was made."""
    for name in sorted(names):
        if storage.stat(name) != plan.source_files[name]:
            raise CheckpointError(
                f"{name} changed while it was read",
                hint="the source must stay as it is; restore it, or start over with `--fresh`",
            )


class _OpenFile:
    """An output file being filled: its strips, and how many are taken but not yet written."""

    def __init__(self, file: OutputFile, path: Path, *, sparse: bool) -> None:
        self.file = file
        self.started = time.monotonic()
        self.in_flight = 0
        self._strips = iter(lower(file))
        self._next: Strip | None = next(self._strips, None)
        self.output = OutputBlob(path, file.nbytes, sparse=sparse)
        try:
            self.output.write(memoryview(file.header()), 0)
        except BaseException:
            self.output.close()
            raise

    def sources(self) -> set[str]:
        """Return the source files that this one is made of."""
        return {
            extent.file
            for transfer in self.file.transfers
            for segment in transfer.segments
            for extent in segment.source.extents
        }

    @property
    def has_strips(self) -> bool:
        """Whether there are strips that nobody has taken."""
        return self._next is not None

    def take(self) -> Strip | None:
        """Return the next strip."""
        strip, self._next = self._next, next(self._strips, None)
        self.in_flight += strip is not None
        return strip


class _Worker:
    """What one thread needs to fill strips. numba is loaded when the first rows need it."""

    def __init__(self, blobs: Mapping[str, Blob], *, allow_nonfinite: bool) -> None:
        from lingconv.buffers import Arena

        self._blobs = blobs
        self._allow_nonfinite = allow_nonfinite
        self._arena = Arena()

    @cached_property
    def _transcoder(self) -> "Transcoder":
        from lingconv.transcode import Transcoder

        return Transcoder(self._arena, self._blobs, allow_nonfinite=self._allow_nonfinite)

    def fill(self, strip: Strip, output: OutputBlob) -> int:
        """Fill one strip of `output`; return how many bytes were written."""
        if isinstance(strip, RowStrip):
            return self._transcoder.run(strip, output)
        data = self._arena.take("read", (strip.source.nbytes,), "u1").data
        self._blobs[strip.source.file].read_into(strip.source.offset, data)
        return output.write(data, strip.offset)


class Crew:
    """The threads of one execution and what they share, guarded by one lock."""

    def __init__(
        self,
        plan: Plan,
        storage: Storage,
        folder: RunFolder,
        progress: Progress,
        *,
        sparse: bool,
    ) -> None:
        self._sparse = sparse
        self._plan = plan
        self._storage = storage
        self._folder = folder
        self._progress = progress
        self._lock = threading.Lock()
        self._waiting: Iterator[OutputFile] = iter(())
        self._open: list[_OpenFile] = []
        self._blobs = OpenedFiles(storage)
        self._error: BaseException | None = None

    def fill(self, files: list[OutputFile], jobs: int) -> None:
        """Fill `files` with `jobs` threads; raise the first error that any of them met."""
        self._waiting = iter(files)
        with self._blobs:
            try:
                if self._sparse:
                    while (begun := self._begin_file()) is not None:
                        self._finish(begun)
                elif jobs == 1:
                    self._work()
                else:
                    self._work_in_threads(jobs)
            finally:
                for file in self._open:
                    file.output.close()
        if self._error is not None:
            raise self._error

    def _work_in_threads(self, jobs: int) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        waiting = list(threads)
        while waiting:
            try:
                waiting[-1].join(0.1)  # with a time-out, so that signals are heard
                if not waiting[-1].is_alive():
                    waiting.pop()
            except KeyboardInterrupt as exc:
                self._stop(exc)

    def _work(self) -> None:
        """Take strips until there are none, or somebody failed."""
        worker = _Worker(self._blobs, allow_nonfinite=self._plan.options.allow_nonfinite)
        file: _OpenFile | None = None
        try:
            while (taken := self._take(file)) is not None:
                file, strip = taken
                written = worker.fill(strip, file.output)
                self._progress.advance(file.file.name, written)
                if self._release(file):
                    self._finish(file)
        except BaseException as exc:  # handed to the thread that waits in `fill`
            self._stop(exc)

    def _stop(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("interrupted", hint=SAME_COMMAND)
        with self._lock:
            self._error = self._error or error

    def _take(self, mine: _OpenFile | None) -> tuple[_OpenFile, Strip] | None:
        """Return a strip: of the worker's own file, of a new one, or of one that needs help."""
        with self._lock:
            if self._error is not None:
                return None
            if mine is None or not mine.has_strips:
                mine = self._begin_file() or next((f for f in self._open if f.has_strips), None)
            strip = mine.take() if mine else None
            return (mine, strip) if mine and strip else None

    def _begin_file(self) -> _OpenFile | None:
        file = next(self._waiting, None)
        if file is None:
            return None
        opened = _OpenFile(file, self._folder.partial(file.name), sparse=self._sparse)
        self._open.append(opened)
        self._progress.file_begins(file.name, file.nbytes)
        return opened

    def _release(self, file: _OpenFile) -> bool:
        """Note that a strip is written; return whether it was the last one of its file."""
        with self._lock:
            file.in_flight -= 1
            return not file.in_flight and not file.has_strips

    def _finish(self, file: _OpenFile) -> None:
        """Make the data durable, then give the file its name."""
        file.output.sync()
        check_unchanged(self._plan, self._storage, file.sources())
        with self._lock:
            self._open.remove(file)
            file.output.close()
            self._folder.finish(file.file.name)
        seconds = time.monotonic() - file.started
        self._progress.file_ends(file.file.name, file.file.nbytes, seconds)
