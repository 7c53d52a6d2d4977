"""Executes a plan: lock the target, fill its files, write index and config last.

    read strip -> decode -> encode -> write strip      transcode.py, by the threads of workers.py
    fsync -> rename -> note                            journal.py

Killed anywhere, the same call goes on where it was.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lingconv.checkpoint import CARD_NAME, RECORD_NAME
from lingconv.errors import LingconvError, ResourceError
from lingconv.journal import RunFolder, place_of, replace_file, run_identity
from lingconv.machine import allow_open_files, free_bytes, num_processors
from lingconv.plan import Plan
from lingconv.progress import Progress, Silent
from lingconv.sidecars import last_files
from lingconv.storage import Storage
from lingconv.storage.output import explained_writing
from lingconv.strips import peak_memory
from lingconv.version import __version__
from lingconv.workers import Crew, check_unchanged

DEFAULT_MEMORY_BYTES = 1 << 30
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output."""

    jobs: int = 0
    max_memory_bytes: int = DEFAULT_MEMORY_BYTES

    @property
    def resolved_jobs(self) -> int:
        """Threads: as many as asked for, else two for each processor: half of them write."""
        return self.jobs or 2 * num_processors()


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did; `destination` is a folder, or the first of the GGUF files."""

    destination: str
    digest: str
    files_written: int
    files_found_finished: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]


def execute(
    plan: Plan,
    storages: Sequence[Storage],
    destination: Path,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    headers_only: bool = False,
) -> Result:
    """Carry out `plan`, reading from the storages of its sources and writing to `destination`.

    That is a folder, or the name of a GGUF file, which may be split into several.
    With `headers_only` the weight files are sparse: headers and holes that read as zeros.
    Raises the errors of `lingconv.errors`; whatever was finished stays, and the same call resumes.
    """
    resources = resources or Resources()
    progress = progress or Silent()
    started = time.monotonic()
    jobs, _ = peak_memory(plan, resources.resolved_jobs, resources.max_memory_bytes)
    identity = run_identity(plan, __version__, headers_only=headers_only)
    with (
        explained_writing(destination),
        RunFolder(place_of(destination), identity, fresh=fresh) as folder,
    ):
        todo = [file for file in plan.files if not folder.is_finished(file.name, file.nbytes)]
        if not headers_only:
            check_disk(folder.root, sum(folder.bytes_missing(f.name, f.nbytes) for f in todo))
        progress.begin(plan, len(plan.files) - len(todo), jobs)
        allow_open_files(len(plan.source_files))
        _carry_side_files(plan, storages, folder)
        crew = Crew(plan, storages, folder, progress, sparse=headers_only)
        crew.fill(todo, jobs)
        record, card = _source_record(storages[-1]), _base_card(plan, storages[-1])
        for name, data in last_files(plan, record, card, __version__).items():
            replace_file(folder.root / name, [data])
        folder.complete()
    named = place_of(destination).name
    return Result(
        destination=str(folder.root / plan.files[0].name if named else destination),
        digest=plan.digest,
        files_written=len(todo),
        files_found_finished=len(plan.files) - len(todo),
        bytes_written=sum(file.nbytes for file in todo),
        seconds=time.monotonic() - started,
        warnings=plan.warnings,
    )


def check_disk(destination: Path, need_bytes: int) -> None:
    """Raise ResourceError when the file system of `destination` has no room for `need_bytes`."""
    free = free_bytes(destination)
    if need_bytes > free:
        raise ResourceError(
            f"{need_bytes:,} bytes are to be written, {free:,} are free at {destination}",
            hint="free some space or choose another disk",
        )


def _carry_side_files(plan: Plan, storages: Sequence[Storage], folder: RunFolder) -> None:
    base, storage = len(storages) - 1, storages[-1]
    for name, nbytes in plan.side_files.items():
        path = folder.root / name
        if not path.exists() or path.stat().st_size != nbytes:
            check_unchanged(plan, storages, {(base, name)})
            starts = range(0, nbytes, _CHUNK_BYTES)
            replace_file(path, (storage.read(name, start, _CHUNK_BYTES) for start in starts))


def _base_card(plan: Plan, storage: Storage) -> str:
    """Return the card of the source, where a new one is made of it."""
    if CARD_NAME in plan.sources[-1].files and plan.weighting:
        return storage.read(CARD_NAME).decode("utf-8", "replace")
    return ""


def _source_record(storage: Storage) -> dict[str, Any] | None:
    """Return the source's own lingconv.json, when it has one."""
    with suppress(LingconvError, ValueError):
        value = json.loads(storage.read(RECORD_NAME))
        return value if isinstance(value, dict) else None
    return None
