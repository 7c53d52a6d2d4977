"""The journal of a run: pieces and files that are safely on disk, so that a later run resumes.

An entry is a line of JSON, appended after the data is synced. An entry only ever adds trust: a line
that is truncated or invalid is ignored, and the piece or file is written again.

    {"file", "id", "piece", "lingconv", "crc"}   a piece of the unfinished file with this id
    {"file", "stat"}                             a finished file: its FileState at that time
    {"file", "sent"}                             an uploaded file: its size and digest
"""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lingconv.storage.local_files import append_line, read_file
from lingconv.storage.upload_target import ListedFile
from lingconv.version import __version__

JOURNAL_NAME = "journal.jsonl"
JOURNALS = "journal*.jsonl"
_MAX_BYTES = 1 << 30


class FileState(NamedTuple):
    """A finished file's size, times and inode; older journals have two numbers only."""

    size: int
    mtime_ns: int
    ctime_ns: int = 0
    inode: int = 0

    @classmethod
    def of(cls, path: Path) -> "FileState":
        """Return the state of a file now."""
        held = path.stat()
        return cls(held.st_size, held.st_mtime_ns, held.st_ctime_ns, held.st_ino)

    def agrees(self, now: "FileState", *, is_moved: bool) -> bool:
        """Return whether a file with the state `now` can be the one of this state.

        mtime can be set back; the inode and its ctime cannot. In a folder that was copied or moved
        (`is_moved`) both are new and are not compared.
        """
        if self[:2] != now[:2]:
            return False
        return is_moved or not self.ctime_ns or self[2:] == now[2:]


class Pieces(NamedTuple):
    """The journaled pieces of one unfinished file: their numbers, and checksums by offset."""

    numbers: set[int]
    checksums: dict[int, tuple[int, int]]


class Journal:
    """All journals of a state folder; entries are appended to the one called `name`."""

    def __init__(self, state: Path, name: str) -> None:
        self._state = state
        self._name = name
        self.finished: dict[str, FileState] = {}
        self.sent: dict[str, ListedFile] = {}
        self._pieces: dict[tuple[str, str], Pieces] = {}

    def read(self) -> None:
        """Read the entries of all journals."""
        for path in sorted(self._state.glob(JOURNALS)):
            for line in (read_file(path, _MAX_BYTES) or b"").splitlines():
                self._take_in(_parsed(line))

    def _take_in(self, entry: Mapping[str, Any]) -> None:
        name, ids = entry.get("file"), entry.get("id")
        if not isinstance(name, str):
            return
        if _is_numbers(entry.get("stat"), (2, 4)):
            self.finished[name] = FileState(*entry["stat"])
        elif isinstance(ids, str) and entry.get("lingconv") == __version__:
            self._take_in_piece(name, ids, entry)
        elif _is_sent(entry.get("sent")):
            self.sent[name] = ListedFile(*entry["sent"])

    def _take_in_piece(self, name: str, file_id: str, entry: Mapping[str, Any]) -> None:
        """Add a piece, unless the entry is invalid. Other versions may cut pieces differently."""
        number, crc = entry.get("piece"), entry.get("crc")
        if type(number) is not int or not isinstance(crc, list):
            return
        if not all(_is_numbers(each, (3,)) for each in crc):
            return
        pieces = self._pieces.setdefault((name, file_id), Pieces(set(), {}))
        pieces.numbers.add(number)
        pieces.checksums.update({offset: (count, sum_) for offset, count, sum_ in crc})

    def pieces(self, name: str, file_id: str) -> Pieces:
        """Return the journaled pieces of the unfinished file with this id."""
        return self._pieces.get((name, file_id), Pieces(set(), {}))

    def note_piece(
        self, name: str, file_id: str, piece: int, checksums: Iterable[tuple[int, ...]]
    ) -> None:
        """Append that a piece of a file is on disk."""
        sums = [list(each) for each in checksums]
        self._note(
            {"file": name, "id": file_id, "piece": piece, "lingconv": __version__, "crc": sums}
        )

    def note_finished(self, name: str, state: FileState) -> None:
        """Append that a file is complete under its final name."""
        self.finished[name] = state
        self._note({"file": name, "stat": list(state)})

    def note_sent(self, name: str, sent: ListedFile) -> None:
        """Append that a file is uploaded."""
        self.sent[name] = sent
        self._note({"file": name, "sent": list(sent)})

    def _note(self, entry: Mapping[str, Any]) -> None:
        append_line(self._state / self._name, (json.dumps(entry) + "\n").encode())


def forget(state: Path, names: Collection[str] = ()) -> None:
    """Remove all journals of a state folder, and its files that match the patterns `names`."""
    for pattern in (JOURNALS, *names):
        for path in state.glob(pattern):
            path.unlink(missing_ok=True)


def new_id() -> str:
    """Return a new random id for an unfinished file."""
    return os.urandom(16).hex()


def _parsed(line: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_numbers(value: Any, counts: Collection[int]) -> bool:
    """Return whether a value is a list of 64-bit integers whose length is in `counts`."""
    return (
        isinstance(value, list)
        and len(value) in counts
        and all(type(each) is int and 0 <= each < 1 << 64 for each in value)
    )


def _is_sent(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == len(ListedFile._fields)
        and type(value[0]) is int
        and isinstance(value[1], str)
    )
