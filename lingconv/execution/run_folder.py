"""The state of a run in its target folder: who is writing, what was planned, what is finished.

    DST/.lingconv/lock           held while a run writes (released by the system, whatever happens)
    DST/.lingconv/run.json       identity of the run: source files, options, plan digest, outputs
    DST/.lingconv/journal.jsonl  a line for each finished weight file, for each finished piece, and
                                 for each file that a repository has and that is not here any more
    DST/.lingconv/plan.json      the plan, journal.I-of-N.jsonl and lock.I-of-N, where parts do it
    DST/.lingconv/verify.json    what `--verify` said of it, for the card when it is pushed

A GGUF file OUT.gguf may lie in a folder beside others; its state is in .lingconv/OUT.gguf there.

Crash-only: a file under its final name is finished, because only a rename puts it there, after its
data is on disk. The journal adds what it looked like then, so that a later change is noticed. Once
the whole target is complete the journal goes, and run.json stays: the same command then finds
nothing to do.
"""

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from lingconv.errors import DestinationError, Locked
from lingconv.execution.run_identity import _COMMITS, _differences, _lasting
from lingconv.plans.plan import Plan
from lingconv.storage.atomic_file import replace_file, sync_folder
from lingconv.storage.file_names import PARTIAL_SUFFIX
from lingconv.storage.file_names import SUFFIX as GGUF_SUFFIX
from lingconv.storage.upload_target import ListedFile
from lingconv.version import __version__

STATE_NAME = ".lingconv"
JOURNAL_NAME = "journal.jsonl"
JOURNALS = "journal*.jsonl"
PLAN_NAME = "plan.json"
VERDICT_NAME = "verify.json"
_IDENTITY_NAME = "run.json"
_CLAIM_NAME = "claim"


class RunLocation(NamedTuple):
    """Where a run writes: a folder of its own, or the file (or files) `name` in a shared one."""

    folder: Path
    name: str = ""


def location_of(destination: Path) -> RunLocation:
    """Return where a run to `destination` writes: GGUF files are named, other targets folders."""
    if destination.suffix == GGUF_SUFFIX:
        return RunLocation(destination.parent, destination.name)
    return RunLocation(destination)


class RunFolder:
    """The target folder, locked. Use as a context manager.

    A `share` is the name of a part of the run that writes beside others, with its own journal.
    """

    def __init__(
        self,
        place: RunLocation,
        identity: Mapping[str, Any],
        *,
        fresh: bool,
        share: str = "",
    ) -> None:
        self._share = share
        self._journal_name = f"journal.{share}.jsonl" if share else JOURNAL_NAME
        self.root = place.folder
        self._shared = bool(place.name)
        self.state = place.folder / STATE_NAME / place.name
        self._identity = identity
        self._fresh = fresh
        self._locks: list[int] = []
        self.sent: dict[str, ListedFile] = {}
        self._finished: dict[str, list[int]] = {}
        self._pieces: dict[str, set[int]] = {}
        self._checksums: dict[str, dict[int, tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        """Take the folder: create it, or check that it holds this very run.

        Raises DestinationError when somebody else is writing it or it holds something else.
        """
        self._refuse_foreign()
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            self._take_locks()
            with self.alone():
                self._claim()
        except BaseException:
            self._let_go()
            raise
        return self

    def _take_locks(self) -> None:
        """Keep others out: a whole run everybody, a share the same share and whole runs."""
        try:
            self._take("lock", fcntl.LOCK_SH if self._share else fcntl.LOCK_EX)
            if self._share:
                self._take(f"lock.{self._share}", fcntl.LOCK_EX)
        except BlockingIOError as exc:
            raise Locked(
                f"another run is writing {self.root}", hint="wait for it, or choose another target"
            ) from exc

    def _take(self, name: str, mode: int) -> None:
        self._locks.append(os.open(self.state / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
        fcntl.flock(self._locks[-1], mode | fcntl.LOCK_NB)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for a moment in which no other share writes what is everybody's."""
        if not self._share:
            yield
            return
        fd = os.open(self.state / _CLAIM_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _let_go(self) -> None:
        for fd in self._locks:
            os.close(fd)
        self._locks.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the locks."""
        self._let_go()

    def _refuse_foreign(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise DestinationError(f"{self.root} is not a folder")
        if self.state.is_dir():
            return
        if self._shared:
            for name in self._identity["outputs"]:
                if (self.root / name).exists():
                    raise DestinationError(
                        f"{self.root / name} is there, and not from a run that can go on",
                        hint="choose another name, or remove it",
                    )
        elif self.root.is_dir() and any(p.name != STATE_NAME for p in self.root.iterdir()):
            raise DestinationError(
                f"{self.root} is not empty and was not written by lingconv",
                hint="choose a new folder",
            )

    def _claim(self) -> None:
        held = _read_json(self.state / _IDENTITY_NAME)
        if self._fresh:
            self._clear((held or self._identity).get("outputs", []))
            held = None
        if held is None:
            self._refuse_unclaimed()
            replace_file(
                self.state / _IDENTITY_NAME, [json.dumps(self._identity, indent=1).encode()]
            )
        elif _lasting(held) != _lasting(self._identity):
            raise DestinationError(
                f"{self.root} holds another conversion",
                details=list(_differences(held, self._identity)),
                hint="choose another folder, or start over with `--fresh`",
            )
        self._read_journal()

    def _refuse_unclaimed(self) -> None:
        """Refuse a folder whose record is lost: nobody knows what its files belong to."""
        for name in self._identity["outputs"]:
            if (self.root / name).exists():
                raise DestinationError(
                    f"{self.root} has lost its record (in {STATE_NAME}), and holds {name}",
                    hint="choose another folder, or start over with `--fresh`",
                )

    def _clear(self, outputs: Iterable[str]) -> None:
        """Remove what the earlier run wrote, and nothing else."""
        for name in outputs:
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if inside:  # the record may have come with a folder from a stranger
                (self.root / name).unlink(missing_ok=True)
                (self.root / (name + PARTIAL_SUFFIX)).unlink(missing_ok=True)
        (self.state / _IDENTITY_NAME).unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        """Remove what serves only to go on: journals, and what parts have left."""
        for pattern in (JOURNALS, "lock.*", _CLAIM_NAME, PLAN_NAME):
            for path in self.state.glob(pattern):
                path.unlink(missing_ok=True)

    def _read_journal(self) -> None:
        paths = sorted(self.state.glob(JOURNALS))
        for line in (line for path in paths for line in path.read_text("utf-8").splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that a kill cut short; its file is found under its final name
            if "stat" in entry:
                self._finished[entry["file"]] = entry["stat"]
            elif "sent" in entry:
                self.sent[entry["file"]] = ListedFile(*entry["sent"])
            elif entry["lingconv"] == __version__:  # another one may cut files differently
                self._pieces.setdefault(entry["file"], set()).add(entry["piece"])
                sums = self._checksums.setdefault(entry["file"], {})
                sums.update({offset: (count, crc) for offset, count, crc in entry["crc"]})

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Return whether a weight file stands complete under its final name.

        Raises DestinationError when it was changed since it was finished.
        """
        path = self.root / name
        if not path.exists():
            return False
        stat = _stat(path)
        if stat[0] == nbytes and self._finished.get(name, stat) == stat:
            return True
        raise DestinationError(
            f"{path} was changed after it was finished",
            hint="remove it to have it written again, or start over with `--fresh`",
        )

    def bytes_missing(self, name: str, nbytes: int) -> int:
        """Return how much disk a file still needs, beyond what its partial file holds already."""
        path = self.partial(name)
        held = path.stat().st_blocks * 512 if path.exists() else 0
        return max(0, nbytes - held)

    def pieces(self, name: str, nbytes: int) -> Collection[int]:
        """Return the pieces of a file that are on disk already, if it is still there."""
        path = self.partial(name)
        there = path.exists() and path.stat().st_size == nbytes
        return self._pieces.get(name, ()) if there else ()

    def checksums(self, name: str) -> Mapping[int, tuple[int, int]]:
        """Return bytes and CRC-32 of what was written to a file, by offset."""
        return self._checksums.get(name, {})

    def finish_piece(self, name: str, piece: int, checksums: Iterable[tuple[int, ...]]) -> None:
        """Note that a piece of a file, whose data is on disk, is complete."""
        sums = [list(each) for each in checksums]
        self._note({"file": name, "piece": piece, "lingconv": __version__, "crc": sums})

    def partial(self, name: str) -> Path:
        """Return where a file is written until it is finished."""
        return self.root / (name + PARTIAL_SUFFIX)

    def finish(self, name: str) -> None:
        """Give a file, whose data is on disk, its final name, and note it."""
        self.partial(name).replace(self.root / name)
        sync_folder((self.root / name).parent)
        self._note({"file": name, "stat": _stat(self.root / name)})

    def finish_sending(self, name: str, sent: ListedFile) -> None:
        """Note that a repository has a finished file, and remove it here."""
        self._note({"file": name, "sent": list(sent)})
        self.sent[name] = sent
        self.remove(name)

    def remove(self, name: str) -> None:
        """Remove a finished file."""
        (self.root / name).unlink(missing_ok=True)

    def _note(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry) + "\n"
        journal = os.open(
            self.state / self._journal_name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
        )
        try:
            os.write(journal, line.encode())
        finally:
            os.close(journal)

    def complete(self) -> None:
        """Note that everything is there: the journal has served its purpose."""
        self._forget()

    def keep_plan(self, plan: Plan) -> None:
        """Keep the plan of a run in parts, for who finishes what they have written."""
        path = self.state / PLAN_NAME
        if self._share and not path.exists():
            replace_file(path, [json.dumps(plan.to_json()).encode()])


def kept_plan(destination: Path) -> Plan:
    """Return the plan that parts of a run have left; raise DestinationError when there is none."""
    place = location_of(destination)
    held = _read_json(place.folder / STATE_NAME / place.name / PLAN_NAME)
    if held is None:
        raise DestinationError(
            f"{destination} has no plan of a run in parts",
            hint="parts are run with `--part I/N`; a whole run finishes itself",
        )
    return Plan.from_json(held)


def pinned_commits(destination: Path) -> dict[str, str]:
    """Return the commits that an earlier run read, by the addresses that the user wrote."""
    place = location_of(destination)
    held = _read_json(place.folder / STATE_NAME / place.name / _IDENTITY_NAME) or {}
    commits = held.get(_COMMITS, {})
    return dict(commits) if isinstance(commits, dict) else {}


def _stat(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None
