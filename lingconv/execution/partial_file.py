"""Unfinished files: each carries an id in its tail, behind its last byte, until it is whole.

Notes of what is on disk name the id. A file that was removed, replaced or swapped for another has
another id, or none, and so no note is ever believed of a file that it does not speak of.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"lingconv-partial"
_ID_BYTES = 16
TAIL_BYTES = len(_MAGIC) + _ID_BYTES


class PartialFile(NamedTuple):
    """An unfinished file of `nbytes` when it is whole; `is_new` where nothing of it is on disk."""

    path: Path
    nbytes: int
    id: str
    is_new: bool

    @property
    def tail(self) -> bytes:
        """The bytes behind its last one."""
        return _MAGIC + bytes.fromhex(self.id)


def id_of(path: Path, nbytes: int) -> str:
    """Return the id in the tail of an unfinished file; empty where it is not one of this size.

    A link, a file that has another name too, or anything but a regular file is none.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        held = os.fstat(fd)
        is_own = stat.S_ISREG(held.st_mode) and held.st_nlink == 1
        if not is_own or held.st_size != nbytes + TAIL_BYTES:
            return ""
        tail = os.pread(fd, TAIL_BYTES, nbytes)
    finally:
        os.close(fd)
    return tail[len(_MAGIC) :].hex() if tail.startswith(_MAGIC) else ""
