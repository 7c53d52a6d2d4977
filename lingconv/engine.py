"""Executes a plan: threads take strips, fill files, and give each its name when it is whole.

    read strip -> decode -> encode -> write strip      transcode.py
    fsync -> rename -> note                            journal.py

Each worker keeps to one output file, because writers of one file wait for each other in the file
system; when no file is left to begin, it helps with another's. Killed anywhere, the same call goes
on where it was.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lingconv.checkpoint import RECORD_NAME
from lingconv.errors import (
    CheckpointError,
    DestinationError,
    Interrupted,
    LingconvError,
    PermissionDenied,
    ResourceError,
)
from lingconv.journal import RunFolder, replace_file, run_identity
from lingconv.plan import OutputFile, Plan
from lingconv.sidecars import last_files
from lingconv.storage import Storage
from lingconv.storage.output import OutputBlob
from lingconv.strips import RowStrip, Strip, lower, peak_memory
from lingconv.version import __version__

if TYPE_CHECKING:
    from lingconv.transcode import Transcoder

DEFAULT_MEMORY_BYTES = 1 << 30
_SAME_COMMAND = "run the same command again: it goes on where it stopped"


class Progress(Protocol):
    """Hears how a run goes on; called from several threads."""

    def begin(self, plan: Plan, done: int, jobs: int) -> None:
        """A run starts; `done` files were finished by an earlier one."""

    def file_begins(self, name: str, nbytes: int) -> None:
        """A file is opened for writing."""

    def advance(self, name: str, nbytes: int) -> None:
        """Bytes of a file were written."""

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """A file is complete under its final name."""


class Silent:
    """Progress that nobody watches."""

    def begin(self, plan: Plan, done: int, jobs: int) -> None:
        """Ignore."""

    def file_begins(self, name: str, nbytes: int) -> None:
        """Ignore."""

    def advance(self, name: str, nbytes: int) -> None:
        """Ignore."""

    def file_ends(self, name: str, nbytes: int, seconds: float) -> None:
        """Ignore."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output."""

    jobs: int = 0
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES

    @property
    def resolved_jobs(self) -> int:
        """Threads: as many as asked for, else two for each processor: half wait for the disk."""
        return self.jobs or 2 * num_processors()


def num_processors() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did."""

    destination: str
    digest: str
    files_written: int
    files_found_finished: int
    bytes_written: int
    seconds: float


def execute(
    plan: Plan,
    storage: Storage,
    destination: Path,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    headers_only: bool = False,
) -> Result:
    """Carry out `plan`, reading from `storage` and writing to the folder `destination`.

    With `headers_only` the weight files are sparse: headers and holes that read as zeros.
    Raises the errors of `lingconv.errors`; whatever was finished stays, and the same call resumes.
    """
    resources = resources or Resources()
    progress = progress or Silent()
    started = time.monotonic()
    jobs, _ = peak_memory(plan, resources.resolved_jobs, resources.max_memory_bytes)
    with (
        _explained(destination),
        RunFolder(destination, run_identity(plan, __version__), fresh=fresh) as folder,
    ):
        todo = [file for file in plan.files if not folder.is_finished(file.name, file.nbytes)]
        if not headers_only:
            check_disk(destination, sum(folder.bytes_missing(f.name, f.nbytes) for f in todo))
        progress.begin(plan, len(plan.files) - len(todo), jobs)
        _carry_side_files(plan, storage, folder)
        run = _Run(plan, storage, folder, progress, sparse=headers_only)
        run.fill(todo, jobs)
        for name, data in last_files(plan, _source_record(storage), __version__).items():
            replace_file(folder.root / name, data)
        folder.complete()
    return Result(
        destination=str(destination),
        digest=plan.digest,
        files_written=len(todo),
        files_found_finished=len(plan.files) - len(todo),
        bytes_written=sum(file.nbytes for file in todo),
        seconds=time.monotonic() - started,
    )


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """Translate what the operating system says about writing to the target."""
    try:
        yield
    except OSError as exc:
        where = exc.filename or destination
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"no space left for {where}: {exc.strerror}",
                hint=f"free some space, then {_SAME_COMMAND}",
            ) from exc
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(f"{where} cannot be written: {exc.strerror}") from exc
        raise DestinationError(
            f"{where} cannot be written: {exc.strerror}", hint=_SAME_COMMAND
        ) from exc


def check_disk(destination: Path, need_bytes: int) -> None:
    """Raise ResourceError when the file system of `destination` has no room for `need_bytes`."""
    free = free_bytes(destination)
    if need_bytes > free:
        raise ResourceError(
            f"{need_bytes:,} bytes are to be written, {free:,} are free at {destination}",
            hint="free some space or choose another disk",
        )


def free_bytes(destination: Path) -> int:
    """Return the bytes free where `destination` is, or is going to be."""
    folder = destination.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _carry_side_files(plan: Plan, storage: Storage, folder: RunFolder) -> None:
    for name, nbytes in plan.side_files.items():
        path = folder.root / name
        if not path.exists() or path.stat().st_size != nbytes:
            _check_unchanged(plan, storage, {name})
            replace_file(path, storage.read(name))


def _source_record(storage: Storage) -> dict[str, Any] | None:
    """Return the source's own lingconv.json, when it has one."""
    with suppress(LingconvError, ValueError):
        value = json.loads(storage.read(RECORD_NAME))
        return value if isinstance(value, dict) else None
    return None


def _check_unchanged(plan: Plan, storage: Storage, names: set[str]) -> None:
    for name in sorted(names):
        if storage.stat(name) != plan.source_files[name]:
            raise CheckpointError(
                f"{name} changed while it was read",
                hint="the source must stay as it is; restore it, or start over with `--fresh`",
            )


class _OpenFile:
    """An output file being filled: its strips, and how many are taken but not yet written."""

    def __init__(self, file: OutputFile, path: Path, storage: Storage, *, sparse: bool) -> None:
        self.file = file
        self.sources = {
            extent.file
            for transfer in file.transfers
            for segment in transfer.segments
            for extent in segment.source.extents
        }
        self.started = time.monotonic()
        self.in_flight = 0
        self._strips = iter(lower(file))
        self._next: Strip | None = next(self._strips, None)
        self._resources = ExitStack()
        with ExitStack() as opening:
            self.blobs = {name: storage.open(name) for name in sorted(self.sources)}
            for blob in self.blobs.values():
                opening.callback(blob.close)
            self.output = OutputBlob(path, file.nbytes, sparse=sparse)
            opening.callback(self.output.close)
            self.output.write(memoryview(file.header()), 0)
            self._resources = opening.pop_all()

    @property
    def has_strips(self) -> bool:
        """Whether there are strips that nobody has taken."""
        return self._next is not None

    def take(self) -> Strip | None:
        """Return the next strip."""
        strip, self._next = self._next, next(self._strips, None)
        self.in_flight += strip is not None
        return strip

    def close(self) -> None:
        """Close the file and its sources."""
        self._resources.close()


class _Worker:
    """What one thread needs to fill strips. numba is loaded when the first rows need it."""

    def __init__(self, *, allow_nonfinite: bool) -> None:
        from lingconv.buffers import Arena

        self._allow_nonfinite = allow_nonfinite
        self._arena = Arena()

    @cached_property
    def _transcoder(self) -> "Transcoder":
        from lingconv.transcode import Transcoder

        return Transcoder(self._arena, allow_nonfinite=self._allow_nonfinite)

    def fill(self, strip: Strip, file: _OpenFile) -> int:
        """Fill one strip; return how many bytes were written."""
        if isinstance(strip, RowStrip):
            return self._transcoder.run(strip, file.blobs, file.output)
        data = self._arena.take("read", (strip.source.nbytes,), "u1").data
        file.blobs[strip.source.file].read_into(strip.source.offset, data)
        return file.output.write(data, strip.offset)


class _Run:
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
        self._error: BaseException | None = None

    def fill(self, files: list[OutputFile], jobs: int) -> None:
        """Fill `files` with `jobs` threads; raise the first error that any of them met."""
        self._waiting = iter(files)
        try:
            if self._sparse:
                while (file := self._begin_file()) is not None:
                    self._finish(file)
            elif jobs == 1:
                self._work()
            else:
                self._work_in_threads(jobs)
        finally:
            for file in self._open:
                file.close()
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
        worker = _Worker(allow_nonfinite=self._plan.options.allow_nonfinite)
        file: _OpenFile | None = None
        try:
            while (taken := self._take(file)) is not None:
                file, strip = taken
                written = worker.fill(strip, file)
                self._progress.advance(file.file.name, written)
                if self._release(file):
                    self._finish(file)
        except BaseException as exc:  # handed to the thread that waits in `fill`
            self._stop(exc)

    def _stop(self, error: BaseException) -> None:
        if isinstance(error, KeyboardInterrupt):
            error = Interrupted("interrupted", hint=_SAME_COMMAND)
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
        path = self._folder.partial(file.name)
        opened = _OpenFile(file, path, self._storage, sparse=self._sparse)
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
        _check_unchanged(self._plan, self._storage, file.sources)
        with self._lock:
            self._open.remove(file)
            file.close()
            self._folder.finish(file.file.name)
        seconds = time.monotonic() - file.started
        self._progress.file_ends(file.file.name, file.file.nbytes, seconds)
