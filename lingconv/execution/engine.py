"""Execution of a plan: lock the target, fill its files, write index and config last.

    read strip -> decode -> encode -> write strip      pipeline/, by the threads of a WorkerPool
    fsync -> rename -> journal                         run_folder.py, journal.py

After a kill at any point, the same call resumes.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lingconv.containers.registry import format_for
from lingconv.errors import CheckpointError, LingconvError, ResourceError, resumable
from lingconv.execution.closing.closing_files import closing_files, record_json
from lingconv.execution.delivery import KeepLocal
from lingconv.execution.devices import gpus_of
from lingconv.execution.pipeline.prefetch import sources_of
from lingconv.execution.pipeline.worker_pool import WorkerPool, check_unchanged
from lingconv.execution.progress import Progress
from lingconv.execution.request import RunRequest
from lingconv.execution.resources import Resources
from lingconv.execution.run_folder import RunFolder, location_of
from lingconv.execution.run_identity import run_identity
from lingconv.plans.lowering import peak_memory
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage import Storage
from lingconv.storage.file_names import CARD_NAME, RECORD_NAME
from lingconv.storage.local_files import replace_file
from lingconv.storage.local_output import explained_writing
from lingconv.storage.machine import allow_open_files, free_bytes
from lingconv.storage.provenance import read_source_record
from lingconv.storage.records import read_text
from lingconv.version import __version__

if TYPE_CHECKING:
    from lingconv.execution.publishing.publisher import Publisher
    from lingconv.storage.upload_target import PublishedCommit

_CHUNK_BYTES = 4 << 20
_MOST_AHEAD_BYTES = 512 << 20
_AT_ONCE = 2  # files downloaded whole: one is read while the next is downloaded

# Opens the Publisher that uploads finished files.
Publish = Callable[[RunFolder, Progress], "Publisher"]


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a run; `destination` is a folder, the first GGUF file, or a repository.

    `commit_url` is the URL of the published commit, `branch` its branch or pull request; `state` is
    the run's state folder. `files_differing` counts finished files that were written again because
    a recheck found other bytes in them.
    """

    destination: str
    digest: str
    files_written: int
    files_found_finished: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]
    commit_url: str = ""
    branch: str = ""
    state: Path | None = None
    files_differing: int = 0


def execute(
    plan: Plan,
    storages: Sequence[Storage],
    destination: Path,
    request: RunRequest | None = None,
    *,
    headers_only: bool = False,
    commits: Mapping[str, str] | None = None,
    publish: Publish | None = None,
) -> Result:
    """Execute `plan`, reading from the storages of its sources and writing to `destination`.

    `destination` is a folder, or the name of a GGUF file, which may be split into several.
    With `headers_only` the weight files are sparse: headers and holes that read as zeros.
    `commits` are the commits of Hub addresses. With `publish`, files are uploaded to a repository,
    and `destination` has only those that are not uploaded yet.
    Raises the errors of `lingconv.errors`; finished files are kept, and the same call resumes.
    """
    request = request or RunRequest()
    part, memory = request.resources.part, memory_for(plan, request.resources)
    started = time.monotonic()
    identity = run_identity(plan, __version__, commits or {}, headers_only=headers_only)
    location = location_of(destination)
    with (
        resumable(),
        explained_writing(destination),
        RunFolder(
            location,
            identity,
            fresh=request.fresh,
            share=str(part) if part else "",
            sources=files_read(plan, storages),
            recheck=request.recheck,
        ) as folder,
        ExitStack() as stack,
    ):
        publisher = stack.enter_context(publish(folder, request.progress)) if publish else None
        run = Run(plan, storages, folder, request, memory, publisher, is_sparse=headers_only)
        done = run.write_files()
        published = None if part else run.complete()
    first = str(folder.path(plan.files[0].name) if location.name else destination)
    return Result(
        destination=published.address if published else first,
        digest=plan.digest,
        files_written=len(done.written),
        files_found_finished=done.found,
        bytes_written=sum(file.nbytes for file in done.written),
        seconds=time.monotonic() - started,
        warnings=plan.warnings,
        commit_url=published.url if published else "",
        branch=published.branch if published else "",
        state=folder.state,
        files_differing=publisher.differing if publisher else done.differing,
    )


def write_share(
    plan: Plan,
    identity: Mapping[str, Any],
    storages: Sequence[Storage],
    destination: Path,
    share: str,
    resources: Resources,
) -> None:
    """Write the files of `plan`, which is one share of the run with this `identity`."""
    memory = memory_for(plan, resources)
    with (
        explained_writing(destination),
        RunFolder(location_of(destination), identity, fresh=False, share=share) as folder,
    ):
        run = Run(plan, storages, folder, RunRequest(resources), memory)
        run.fill(unfinished(plan.files, folder))


class Written(NamedTuple):
    """The files that a run wrote, the number found finished, and how many of these differed."""

    written: list[OutputFile]
    found: int
    differing: int = 0


class Run:
    """One execution of a plan in a locked folder: weight files first, closing files last."""

    def __init__(
        self,
        plan: Plan,
        storages: Sequence[Storage],
        folder: RunFolder,
        request: RunRequest,
        memory: tuple[int, int],
        publisher: "Publisher | None" = None,
        *,
        is_sparse: bool = False,
    ) -> None:
        self._plan = plan
        self._storages = storages
        self._folder = folder
        self._request = request
        self._publisher = publisher
        self._is_sparse = is_sparse
        self._jobs, self._buffer_bytes = memory

    def write_files(self) -> Written:
        """Write the unfinished weight files of the run's share; copy the small files."""
        part = self._request.resources.part
        mine = part.of(self._plan.files) if part else self._plan.files
        todo = self._publisher.begin() if self._publisher else unfinished(mine, self._folder)
        differing = self._differing([file for file in mine if file not in todo])
        found = len(mine) - len(todo)
        todo = [*differing, *todo]
        self._check_disk(todo)
        self._request.progress.begin(self._plan, found, self._jobs)
        with self._folder.alone():
            self._folder.keep_plan(self._plan)
            carry_side_files(self._plan, self._storages, self._folder)
        self.fill(todo)
        return Written(todo, found, len(differing))

    def _differing(self, finished: list[OutputFile]) -> list[OutputFile]:
        """Return the finished files whose bytes differ from the plan's; none without `recheck`.

        A publisher has its own way: it has all files written anew, and compares their digests.
        """
        if not self._request.recheck or self._publisher or not finished:
            return []
        pool = self._pool(self._storages, compares=True)
        pool.fill(finished, self._jobs)
        return pool.differing

    def _check_disk(self, todo: Sequence[OutputFile]) -> None:
        """Raise ResourceError if there is too little free disk for the files to be written."""
        if self._is_sparse:
            return
        missing = sum(self._folder.bytes_missing(file.name, file.nbytes) for file in todo)
        room = min(missing, self._publisher.room) if self._publisher else missing
        check_disk(self._folder.root, room)

    def fill(self, todo: Sequence[OutputFile]) -> None:
        """Write the files `todo`, which are some of the plan's."""
        allow_open_files(len(self._plan.source_files))
        with ExitStack() as stack:
            storages = _with_downloads(
                self._plan,
                todo,
                self._storages,
                self._folder,
                self._request.resources,
                stack,
                publishes=self._publisher is not None,
            )
            self._pool(storages).fill(list(todo), self._jobs)

    def _pool(self, storages: Sequence[Storage], *, compares: bool = False) -> WorkerPool:
        resources = self._request.resources
        return WorkerPool(
            self._plan,
            storages,
            self._folder,
            self._request.progress,
            self._publisher or KeepLocal(),
            sparse=self._is_sparse,
            compares=compares,
            ahead_bytes=_ahead_bytes(resources.max_memory_bytes - self._buffer_bytes, self._jobs),
            gpus=gpus_of(resources.device),
        )

    def complete(self) -> "PublishedCommit | None":
        """Write the closing files (index, config, record); return the commit if published."""
        plan, folder, base = self._plan, self._folder, self._storages[-1]
        record, card = read_source_record(base), base_card(plan, base)
        last = closing_files(plan, record, card if plan.weighting else "", __version__)
        if self._publisher:
            return self._publisher.finish(last)
        for name, data in last.items():
            replace_file(folder.path(name), [data])
        if format_for(plan.options.layout).is_self_contained:  # it has no files beside it
            replace_file(folder.state / RECORD_NAME, [record_json(plan, record, __version__)])
        folder.complete()
        return None


def memory_for(plan: Plan, resources: Resources) -> tuple[int, int]:
    """Return the number of threads that fit the memory budget, and the bytes of their buffers.

    Raises ResourceError if the budget is too small for one.
    """
    return peak_memory(plan, resources.resolved_jobs, resources.max_memory_bytes)


def unfinished(files: Sequence[OutputFile], folder: RunFolder) -> list[OutputFile]:
    """Return the weight files that are not complete under their final names."""
    return [file for file in files if not folder.is_finished(file.name, file.nbytes)]


def files_read(plan: Plan, storages: Sequence[Storage]) -> set[tuple[int, int]]:
    """Return device and inode of every local file that a plan reads."""
    found: set[tuple[int, int]] = set()
    for source, storage in zip(plan.sources, storages, strict=True):
        for name in source.files:
            with suppress(CheckpointError):  # small files may be computed, not stored
                found.update(_inode_of(storage, name))
    return found


def _inode_of(storage: Storage, name: str) -> Iterator[tuple[int, int]]:
    """Yield device and inode of a file, if it is a local one."""
    blob = storage.open(name)
    try:
        if blob.descriptor is not None:
            held = os.fstat(blob.descriptor)
            yield held.st_dev, held.st_ino
    finally:
        blob.close()


def _ahead_bytes(spare_bytes: int, jobs: int) -> int:
    """Return the bytes that each file may prefetch, of the memory that buffers leave."""
    return min(_MOST_AHEAD_BYTES, max(0, spare_bytes)) // max(1, jobs // 2)


def _with_downloads(
    plan: Plan,
    todo: Sequence[OutputFile],
    storages: Sequence[Storage],
    folder: RunFolder,
    resources: Resources,
    stack: ExitStack,
    *,
    publishes: bool,
) -> list[Storage]:
    """Return the storages; with `download`, those on the Hub wrapped in a Downloader each."""
    if not resources.download:
        return list(storages)
    from lingconv.storage.hub.download import Downloader
    from lingconv.storage.hub.storage import (
        HubStorage,  # imports huggingface_hub
    )

    order = list(dict.fromkeys(key for file in todo for key in sorted(sources_of(file))))
    far = {number for number, storage in enumerate(storages) if isinstance(storage, HubStorage)}
    found: list[Storage] = []
    for number, storage in enumerate(storages):
        if not isinstance(storage, HubStorage):
            found.append(storage)
            continue
        names = [name for source, name in order if source == number]
        largest = max((storage.stat(name).size for name in names), default=0)
        room = resources.disk_share(publishes=publishes) // len(far) or _AT_ONCE * largest
        downloader = Downloader(storage, folder.state / f"fetched-{number}", names, room)
        stack.callback(downloader.close)
        found.append(downloader)
    return found


def disk_needed(plan: Plan, resources: Resources, *, publishes: bool) -> int:
    """Return the most bytes that a run has on disk, of written and of downloaded files."""
    share = resources.disk_share(publishes=publishes)
    largest = max(file.nbytes for file in plan.files)
    written = share or _AT_ONCE * largest
    fetched = 0
    if resources.download:
        read = {key for file in plan.files for key in sources_of(file)}
        sizes = [plan.sources[number].files[name].size for number, name in read]
        fetched = min(sum(sizes), share or _AT_ONCE * max(sizes))
    return fetched + (min(plan.write_bytes, written) if publishes else plan.write_bytes)


def check_disk(destination: Path, need_bytes: int) -> None:
    """Raise ResourceError if the file system of `destination` has less than `need_bytes` free."""
    free = free_bytes(destination)
    if need_bytes > free:
        raise ResourceError(
            f"{need_bytes:,} bytes are to be written, {free:,} are free at {destination}",
            hint="free some space or choose another disk",
        )


def carry_side_files(plan: Plan, storages: Sequence[Storage], folder: RunFolder) -> None:
    """Copy the small files of the base that are not in the target yet."""
    base, storage = len(storages) - 1, storages[-1]
    for name, nbytes in plan.side_files.items():
        path = folder.path(name)
        if path.is_symlink() or not path.exists() or path.stat().st_size != nbytes:
            check_unchanged(plan, storages, {(base, name)})
            starts = range(0, nbytes, _CHUNK_BYTES)
            replace_file(path, (storage.read(name, start, _CHUNK_BYTES) for start in starts))


def base_card(plan: Plan, storage: Storage) -> str:
    """Return the model card of the source; empty if it has none that can be read."""
    if CARD_NAME in plan.sources[-1].files:
        with suppress(LingconvError):
            return read_text(storage, CARD_NAME)
    return ""
