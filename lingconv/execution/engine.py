"""Executes a plan: lock the target, fill its files, write index and config last.

    read strip -> decode -> encode -> write strip      transcode.py, by the threads of workers.py
    fsync -> rename -> note                            journal.py

Killed anywhere, the same call goes on where it was.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lingconv.errors import LingconvError, ResourceError, resumable
from lingconv.execution.closing.closing_files import closing_files, record_json
from lingconv.execution.delivery import KeepLocal
from lingconv.execution.devices import gpus_of
from lingconv.execution.pipeline.prefetch import sources_of
from lingconv.execution.pipeline.worker_pool import WorkerPool, check_unchanged
from lingconv.execution.progress import Progress, Silent
from lingconv.execution.resources import Resources
from lingconv.execution.run_folder import RunFolder, location_of
from lingconv.execution.run_identity import run_identity
from lingconv.plans.lowering import peak_memory
from lingconv.plans.options import Target
from lingconv.plans.plan import OutputFile, Plan
from lingconv.storage import Storage
from lingconv.storage.atomic_file import replace_file
from lingconv.storage.file_names import CARD_NAME, RECORD_NAME
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
_AT_ONCE = 2  # files that are fetched whole: one is read while the next one comes

Publish = Callable[[RunFolder, Progress], "Publisher"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did; `destination` is a folder, the first of the GGUF files, or a repository.

    `commit_url` is where to look at what was published, `branch` the branch or pull request that it
    is in; `state` is the folder of what a run keeps for itself.
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


def execute(
    plan: Plan,
    storages: Sequence[Storage],
    destination: Path,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    headers_only: bool = False,
    commits: Mapping[str, str] | None = None,
    publish: Publish | None = None,
) -> Result:
    """Carry out `plan`, reading from the storages of its sources and writing to `destination`.

    That is a folder, or the name of a GGUF file, which may be split into several.
    With `headers_only` the weight files are sparse: headers and holes that read as zeros.
    `commits` are what addresses on the Hub stood for. With `publish`, files are sent to a
    repository, and `destination` holds only what it has not got yet.
    Raises the errors of `lingconv.errors`; whatever was finished stays, and the same call resumes.
    """
    resources = resources or Resources()
    part = resources.part
    mine, share = (part.of(plan.files), str(part)) if part else (plan.files, "")
    progress = progress or Silent()
    started = time.monotonic()
    memory = peak_memory(plan, resources.resolved_jobs, resources.max_memory_bytes)
    identity = run_identity(plan, __version__, commits or {}, headers_only=headers_only)
    published: PublishedCommit | None = None
    with (
        resumable(),
        explained_writing(destination),
        RunFolder(location_of(destination), identity, fresh=fresh, share=share) as folder,
        ExitStack() as stack,
    ):
        publisher = stack.enter_context(publish(folder, progress)) if publish else None
        todo = publisher.begin() if publisher else unfinished(mine, folder)
        if not headers_only:
            missing = sum(folder.bytes_missing(file.name, file.nbytes) for file in todo)
            check_disk(folder.root, min(missing, publisher.room) if publisher else missing)
        progress.begin(plan, len(mine) - len(todo), memory[0])
        with folder.alone():
            folder.keep_plan(plan)
            carry_side_files(plan, storages, folder)
        _fill(
            plan,
            todo,
            storages,
            folder,
            resources,
            memory,
            progress,
            publisher,
            sparse=headers_only,
        )
        if not part:
            published = _complete(plan, storages[-1], folder, publisher)
    named = location_of(destination).name
    where = str(folder.root / plan.files[0].name if named else destination)
    return Result(
        destination=published.address if published else where,
        digest=plan.digest,
        files_written=len(todo),
        files_found_finished=len(mine) - len(todo),
        bytes_written=sum(file.nbytes for file in todo),
        seconds=time.monotonic() - started,
        warnings=plan.warnings,
        commit_url=published.url if published else "",
        branch=published.branch if published else "",
        state=folder.state,
    )


def unfinished(files: Sequence[OutputFile], folder: RunFolder) -> list[OutputFile]:
    """Return the weight files that do not stand complete under their names."""
    return [file for file in files if not folder.is_finished(file.name, file.nbytes)]


def write_share(
    plan: Plan,
    identity: Mapping[str, Any],
    storages: Sequence[Storage],
    destination: Path,
    share: str,
    resources: Resources,
) -> None:
    """Write the files of `plan`, which are those of one share of the run that `identity` names."""
    memory = peak_memory(plan, resources.resolved_jobs, resources.max_memory_bytes)
    with (
        explained_writing(destination),
        RunFolder(location_of(destination), identity, fresh=False, share=share) as folder,
    ):
        todo = unfinished(plan.files, folder)
        _fill(plan, todo, storages, folder, resources, memory, Silent(), None, sparse=False)


def _fill(
    plan: Plan,
    todo: list[OutputFile],
    storages: Sequence[Storage],
    folder: RunFolder,
    resources: Resources,
    memory: tuple[int, int],
    progress: Progress,
    publisher: "Publisher | None",
    *,
    sparse: bool,
) -> None:
    """Have the crew fill files; `memory` is what `peak_memory` said of the plan."""
    jobs, buffer_bytes = memory
    allow_open_files(len(plan.source_files))
    with ExitStack() as stack:
        publishes = publisher is not None
        crew = WorkerPool(
            plan,
            _fetched(plan, todo, storages, folder, resources, stack, publishes=publishes),
            folder,
            progress,
            publisher or KeepLocal(),
            sparse=sparse,
            ahead_bytes=_ahead_bytes(resources.max_memory_bytes - buffer_bytes, jobs),
            gpus=gpus_of(resources.device),
        )
        crew.fill(todo, jobs)


def _complete(
    plan: Plan, base: Storage, folder: RunFolder, publisher: "Publisher | None"
) -> "PublishedCommit | None":
    """Write what makes a checkpoint of the weights; return the commit where it was published."""
    record, card = read_source_record(base), _base_card(plan, base)
    last = closing_files(plan, record, card if plan.weighting else "", __version__)
    if publisher:
        return publisher.finish(record, card, last)
    for name, data in last.items():
        replace_file(folder.root / name, [data])
    if plan.options.layout == Target.GGUF:  # nothing beside the file tells what it is
        replace_file(folder.state / RECORD_NAME, [record_json(plan, record, __version__)])
    folder.complete()
    return None


def _ahead_bytes(spare_bytes: int, jobs: int) -> int:
    """Return how much each file may have read ahead, of the memory that buffers leave."""
    return min(_MOST_AHEAD_BYTES, max(0, spare_bytes)) // max(1, jobs // 2)


def _fetched(
    plan: Plan,
    todo: Sequence[OutputFile],
    storages: Sequence[Storage],
    folder: RunFolder,
    resources: Resources,
    stack: ExitStack,
    *,
    publishes: bool,
) -> list[Storage]:
    """Return the storages, with those that are far away fetched file by file if that is asked."""
    if not resources.download:
        return list(storages)
    from lingconv.storage.hub.download import Downloader
    from lingconv.storage.hub.storage import (
        HubStorage,  # with huggingface_hub, for those who need it
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
        spool = Downloader(storage, folder.state / f"fetched-{number}", names, room)
        stack.callback(spool.close)
        found.append(spool)
    return found


def disk_needed(plan: Plan, resources: Resources, *, publishes: bool) -> int:
    """Return the most bytes that a run has on disk, of what it writes and of what it fetches."""
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
    """Raise ResourceError when the file system of `destination` has no room for `need_bytes`."""
    free = free_bytes(destination)
    if need_bytes > free:
        raise ResourceError(
            f"{need_bytes:,} bytes are to be written, {free:,} are free at {destination}",
            hint="free some space or choose another disk",
        )


def carry_side_files(plan: Plan, storages: Sequence[Storage], folder: RunFolder) -> None:
    """Copy the small files of the base, those that are not there yet."""
    base, storage = len(storages) - 1, storages[-1]
    for name, nbytes in plan.side_files.items():
        path = folder.root / name
        if not path.exists() or path.stat().st_size != nbytes:
            check_unchanged(plan, storages, {(base, name)})
            starts = range(0, nbytes, _CHUNK_BYTES)
            replace_file(path, (storage.read(name, start, _CHUNK_BYTES) for start in starts))


def _base_card(plan: Plan, storage: Storage) -> str:
    """Return the card of the source, if it has one that can be read."""
    if CARD_NAME in plan.sources[-1].files:
        with suppress(LingconvError):
            return read_text(storage, CARD_NAME)
    return ""
