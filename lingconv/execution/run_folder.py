"""The state of a run in its target folder: lock, identity, journal of finished files.

    DST/.lingconv/lock           held while a run writes (`run_locks.py`)
    DST/.lingconv/run.json       identity of the run (`run_identity.py`)
    DST/.lingconv/files.json     the folder's own inode, and the states of finished files
    DST/.lingconv/journal.jsonl  pieces and files that are on disk (`journal.py`)
    DST/.lingconv/plan.json      the plan, with journal.I-of-N.jsonl and lock.I-of-N, for `--part`
    DST/.lingconv/verify.json    the verdict of `--verify`, for the card when it is pushed

A GGUF file OUT.gguf may lie in a folder beside others; its state is in .lingconv/OUT.gguf there.

Crash-only: a file under its final name is finished, because only a rename puts it there, after its
data is synced. The journal adds its FileState, so that a later change is noticed. When the whole
target is complete, the journal is removed and run.json kept: the same command then finds nothing to
do. docs/architecture.md has the table of all states and of what a kill leaves.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lingconv.errors import DestinationError
from lingconv.execution.journal import JOURNAL_NAME, FileState, Journal, Pieces, forget, new_id
from lingconv.execution.partial_file import PartialFile, id_of
from lingconv.execution.run_identity import COMMITS, differences, is_same_run
from lingconv.execution.run_locks import (
    IDENTITY_NAME,
    MAX_IDENTITY_BYTES,
    RunLocks,
    alone_in,
    refuse_shared_outputs,
)
from lingconv.plans.plan import Plan
from lingconv.storage.file_names import PARTIAL_SUFFIX
from lingconv.storage.file_names import SUFFIX as GGUF_SUFFIX
from lingconv.storage.local_files import path_inside, read_file, replace_file, sync_folder
from lingconv.storage.upload_target import ListedFile

STATE_NAME = ".lingconv"
PLAN_NAME = "plan.json"
VERDICT_NAME = "verify.json"
_FILES_NAME = "files.json"
_FINISHED, _ROOT = "finished", "root"
_MAX_PLAN_BYTES = 4 << 30
# Files that are needed only to resume, besides journals.
_PASSING = ("lock.*", "claim", PLAN_NAME)


class RunLocation(NamedTuple):
    """The place of a run's output: a folder of its own, or the file(s) `name` in a shared one."""

    folder: Path
    name: str = ""

    @property
    def state(self) -> Path:
        """The run's state folder."""
        return self.folder / STATE_NAME / self.name


def location_of(destination: Path) -> RunLocation:
    """Return the location for `destination`: the name of a GGUF file, or a folder."""
    if destination.suffix == GGUF_SUFFIX:
        return RunLocation(destination.parent, destination.name)
    return RunLocation(destination)


class RunFolder:
    """The target folder, locked. Use as a context manager.

    `share` names a share of the run, which writes beside others and has its own journal. `sources`
    are device and inode of all files that are read: none of them is ever an output.
    """

    def __init__(
        self,
        place: RunLocation,
        identity: Mapping[str, Any],
        *,
        fresh: bool,
        share: str = "",
        sources: Collection[tuple[int, int]] = (),
        recheck: bool = False,
    ) -> None:
        self.root = place.folder
        self.state = place.state
        self._is_shared = bool(place.name)
        self._share = share
        self._identity = identity
        self._fresh = fresh
        self._sources = sources
        self.rechecks = recheck
        self._is_moved = False
        self._locks = RunLocks(self.state, share)
        self._journal = Journal(self.state, f"journal.{share}.jsonl" if share else JOURNAL_NAME)

    @property
    def sent(self) -> dict[str, ListedFile]:
        """The uploaded files, as the repository lists them."""
        return self._journal.sent

    def __enter__(self) -> Self:
        """Lock the folder: create it, or check that it has the same run.

        Raises DestinationError if another run is writing it, or if it has other content.
        """
        self._refuse_foreign()
        self._refuse_sources()
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with self._among_others(), self.alone():
                self._locks.take(self.root)
                self._claim()
        except BaseException:
            self._locks.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the locks."""
        self._locks.release()

    def alone(self) -> AbstractContextManager[None]:
        """Return a lock that excludes other shares, for writing files that all shares have."""
        return self._locks.alone()

    def _among_others(self) -> AbstractContextManager[None]:
        """Return a lock that excludes other runs that write into a shared folder."""
        return alone_in(self.root / STATE_NAME) if self._is_shared else nullcontext()

    def _refuse_foreign(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise DestinationError(f"{self.root} is not a folder")
        for path in (self.root / STATE_NAME, self.state):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise DestinationError(f"{path} is not a folder", hint="choose another target")
        if self.state.is_dir():
            return
        if self._is_shared:
            for path in self._outputs():
                if path.exists():
                    raise DestinationError(
                        f"{path} is there, and not from a run that can go on",
                        hint="choose another name, or move it away",
                    )
        elif self.root.is_dir() and any(p.name != STATE_NAME for p in self.root.iterdir()):
            raise DestinationError(
                f"{self.root} is not empty and was not written by lingconv",
                hint="choose a new folder",
            )

    def _outputs(self) -> Iterator[Path]:
        """Yield every file that this run writes."""
        for name in self._identity["outputs"]:
            yield path_inside(self.root, name)

    def _refuse_sources(self) -> None:
        """Raise DestinationError if an output is a source's file, under any name."""
        for path in self._outputs() if self._sources else ():
            for each in (path, path.with_name(path.name + PARTIAL_SUFFIX)):
                try:
                    held = each.lstat() if each.is_symlink() else each.stat()
                except OSError:
                    continue
                if (held.st_dev, held.st_ino) in self._sources:
                    raise DestinationError(
                        f"{each} is a file of the source, and would be written",
                        hint="choose another folder, or another name",
                    )

    def _claim(self) -> None:
        """Record this run in the folder, or check that it is recorded; then read the journals."""
        if self._is_shared:
            outputs = self._identity["outputs"]
            refuse_shared_outputs(self.root / STATE_NAME, self.state, outputs)
        held = read_record(self.state / IDENTITY_NAME)
        if self._fresh:
            self._clear(_names(held) if held else self._identity["outputs"])
            held = None
        if held is None:
            self._refuse_unclaimed()
            forget(self.state, (PLAN_NAME, _FILES_NAME))  # entries of a lost run must not count
            self._note_files({})
            replace_file(
                self.state / IDENTITY_NAME, [json.dumps(self._identity, indent=1).encode()]
            )
        elif not is_same_run(held, self._identity):
            raise DestinationError(
                f"{self.root} holds another conversion",
                details=list(differences(held, self._identity)),
                hint="choose another folder, or start over with `fresh`",
            )
        self._read_notes()

    def _read_notes(self) -> None:
        """Read the states of finished files, and the journals of earlier runs."""
        held = read_record(self.state / _FILES_NAME) or {}
        root = self.root.stat()
        self._is_moved = held.get(_ROOT) != [root.st_dev, root.st_ino]
        finished = held.get(_FINISHED)
        for name, state in finished.items() if isinstance(finished, dict) else ():
            if isinstance(state, list) and len(state) == len(FileState._fields):
                self._journal.finished[name] = FileState(*state)
        self._journal.read()

    def _note_files(self, finished: Mapping[str, FileState]) -> None:
        root = self.root.stat()
        record = {
            _ROOT: [root.st_dev, root.st_ino],
            _FINISHED: {name: list(state) for name, state in finished.items()},
        }
        replace_file(self.state / _FILES_NAME, [json.dumps(record, indent=1).encode()])

    def _refuse_unclaimed(self) -> None:
        """Raise DestinationError if there are outputs but no record of the run that wrote them."""
        for path in self._outputs():
            if path.exists():
                raise DestinationError(
                    f"{self.root} has lost its record (in {STATE_NAME}), and holds {path.name}",
                    hint="choose another folder, or start over with `fresh`",
                )

    def _clear(self, outputs: Iterable[str]) -> None:
        """Remove the files of the earlier run, and no others: journals first, run.json last."""
        paths = []
        for name in outputs:
            with suppress(DestinationError):  # the record may be forged: names outside are skipped
                paths.append(path_inside(self.root, name))
        for path in paths:
            self._refuse_to_remove_source(path)
        forget(self.state, _PASSING)
        for path in paths:
            for each in (path.with_name(path.name + PARTIAL_SUFFIX), path):
                if each.is_symlink() or not each.is_dir():
                    each.unlink(missing_ok=True)
        (self.state / IDENTITY_NAME).unlink(missing_ok=True)

    def _refuse_to_remove_source(self, path: Path) -> None:
        held = path.lstat() if path.exists() or path.is_symlink() else None
        if held is not None and (held.st_dev, held.st_ino) in self._sources:
            raise DestinationError(
                f"{path} is a file of the source, and would be removed",
                hint="choose another folder, or another name",
            )

    def path(self, name: str) -> Path:
        """Return the path of a target's file; raises DestinationError for names outside of it."""
        return path_inside(self.root, name)

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Return whether a weight file is complete under its final name.

        Raises DestinationError if it was changed since it was finished.
        """
        path = self.path(name)
        if path.is_symlink() or not path.is_file():
            if path.is_symlink() or path.exists():
                raise DestinationError(f"{path} is no regular file", hint="move it away")
            return False
        now = FileState.of(path)
        noted = self._journal.finished.get(name, now)
        if now.size == nbytes and noted.agrees(now, is_moved=self._is_moved or self.rechecks):
            return True
        raise DestinationError(
            f"{path} was changed after it was finished",
            hint="move it away to have it written again, or compare it with `recheck`",
        )

    def bytes_missing(self, name: str, nbytes: int) -> int:
        """Return the bytes of disk that a file still needs, besides its partial file's."""
        path = self._partial_path(name)
        held = path.lstat().st_blocks * 512 if path.exists() else 0
        return max(0, nbytes - held)

    def partial(self, name: str, nbytes: int) -> tuple[PartialFile, Pieces]:
        """Return the unfinished file, a new one if there is none, and its journaled pieces."""
        path = self._partial_path(name)
        held = "" if self.rechecks else id_of(path, nbytes)
        if not held:
            return PartialFile(path, nbytes, new_id(), is_new=True), Pieces(set(), {})
        return PartialFile(path, nbytes, held, is_new=False), self._journal.pieces(name, held)

    def _partial_path(self, name: str) -> Path:
        return self.path(name + PARTIAL_SUFFIX)

    def finish_piece(
        self, name: str, file_id: str, piece: int, checksums: Iterable[tuple[int, ...]]
    ) -> None:
        """Journal a complete piece of a file; its data must be synced."""
        self._journal.note_piece(name, file_id, piece, checksums)

    def finish(self, name: str) -> None:
        """Rename a partial file to its final name and journal it; its data must be synced."""
        path = self.path(name)
        self._partial_path(name).replace(path)
        sync_folder(path.parent)
        self._journal.note_finished(name, FileState.of(path))

    def note_finished(self, name: str) -> None:
        """Journal a finished file whose bytes are right, with its present FileState."""
        self._journal.note_finished(name, FileState.of(self.path(name)))

    def finish_sending(self, name: str, sent: ListedFile) -> None:
        """Journal that a finished file is uploaded, and remove it here."""
        self._journal.note_sent(name, sent)
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a finished file."""
        self.path(name).unlink(missing_ok=True)

    def complete(self) -> None:
        """Record the states of all finished files, then remove the journal: the run is complete."""
        self._note_files(self._journal.finished)
        forget(self.state, _PASSING)

    def keep_plan(self, plan: Plan) -> None:
        """Save the plan of a run in parts, for `lingconv finish`."""
        path = self.state / PLAN_NAME
        if self._share and not path.exists():
            replace_file(path, [json.dumps(plan.to_json()).encode()])


def kept_plan(destination: Path) -> Plan:
    """Return the plan that a run in parts has saved; raises DestinationError if there is none."""
    path = location_of(destination).state / PLAN_NAME
    held = read_record(path, _MAX_PLAN_BYTES)
    if held is None:
        raise DestinationError(
            f"{destination} has no plan of a run in parts",
            hint="parts are run with `part=I/N`; a whole run finishes itself",
        )
    try:
        return Plan.from_json(held)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as exc:
        raise DestinationError(
            f"{path} is no plan of this version of lingconv: {exc!r}"[:300],
            hint="run a part again with `part=I/N`: it writes the plan anew",
        ) from exc


def pinned_commits(destination: Path) -> dict[str, str]:
    """Return the commits that an earlier run read, by address as the user gave it."""
    held = read_record(location_of(destination).state / IDENTITY_NAME) or {}
    commits = held.get(COMMITS, {})
    if not isinstance(commits, dict):
        return {}
    return {key: value for key, value in commits.items() if isinstance(value, str)}


def read_record(path: Path, max_bytes: int = MAX_IDENTITY_BYTES) -> dict[str, Any] | None:
    """Return the JSON object in a file of a run's state; None if it cannot be read."""
    try:
        value = json.loads(read_file(path, max_bytes) or b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _names(held: Mapping[str, Any]) -> list[str]:
    """Return the output names in a record; values that are not texts are skipped."""
    outputs = held.get("outputs")
    return [n for n in outputs if isinstance(n, str)] if isinstance(outputs, list) else []
