"""Locks of a target: flock, which the system releases even after a kill.

.lingconv/[NAME/]lock           exclusive for a whole run, shared by the shares of a run
.lingconv/[NAME/]lock.I-of-N    exclusive for a share; shares with another N are refused
.lingconv/[NAME/]claim          exclusive, briefly, to change files that all shares have
.lingconv/claim                 the same for all runs that write into one folder
"""

import fcntl
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lingconv.errors import Locked
from lingconv.storage.local_files import read_file

IDENTITY_NAME = "run.json"
MAX_IDENTITY_BYTES = 1 << 28
_CLAIM_NAME = "claim"
_SHARE = re.compile(r"lock\.(\d+)-of-(\d+)")
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class RunLocks:
    """The locks of one run, or of one `share` of it, in its state folder."""

    def __init__(self, state: Path, share: str) -> None:
        self._state = state
        self._share = share
        self._held: list[int] = []

    def take(self, root: Path) -> None:
        """Lock the target: a whole run excludes all others, a share itself and whole runs.

        Raises Locked if another run has the lock.
        """
        try:
            self._take("lock", fcntl.LOCK_SH if self._share else fcntl.LOCK_EX)
            if self._share:
                self._take(f"lock.{self._share}", fcntl.LOCK_EX)
        except BlockingIOError as exc:
            raise Locked(
                f"another run is writing {root}", hint="wait for it, or choose another target"
            ) from exc
        self._refuse_other_division(root)

    def _take(self, name: str, mode: int) -> None:
        self._held.append(os.open(self._state / name, _FLAGS, 0o644))
        fcntl.flock(self._held[-1], mode | fcntl.LOCK_NB)

    def _refuse_other_division(self, root: Path) -> None:
        """Raise Locked if shares of a division into another N are written: their files overlap."""
        mine = _SHARE.fullmatch(f"lock.{self._share}")
        for path in self._state.glob("lock.*"):
            other = _SHARE.fullmatch(path.name)
            if mine and other and other[2] != mine[2] and is_held(path):
                raise Locked(
                    f"part {other[1]}/{other[2]} of {root} is being written, and this is one of"
                    f" {mine[2]}",
                    hint="run all parts with the same N",
                )

    def release(self) -> None:
        """Release all locks."""
        for fd in self._held:
            os.close(fd)
        self._held.clear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a lock that excludes other shares, for writing files that all shares have."""
        if not self._share:
            yield
            return
        with alone_in(self._state):
            yield


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; waits for it."""
    fd = os.open(folder / _CLAIM_NAME, _FLAGS, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def is_held(path: Path) -> bool:
    """Return whether a process has a lock on a file."""
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False


def refuse_shared_outputs(states: Path, own: Path, outputs: Collection[str]) -> None:
    """Raise Locked if a run to another name in the same folder is writing one of `outputs`.

    `states` is the folder of all state folders, `own` that of this run.
    """
    for state in states.iterdir() if states.is_dir() else ():
        if state == own or not state.is_dir() or not is_held(state / "lock"):
            continue  # no run is writing there
        shared = set(outputs) & set(_outputs_of(state))
        if shared:
            raise Locked(
                f"another run is writing {min(shared)} in {states.parent}",
                hint="wait for it, or choose another name",
            )


def _outputs_of(state: Path) -> list[str]:
    try:
        held = json.loads(read_file(state / IDENTITY_NAME, MAX_IDENTITY_BYTES) or b"")
        return [name for name in held["outputs"] if isinstance(name, str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
