"""Unfinished files: each has a random id in a tail after its last byte, until it is complete.

Journal entries name the id. A file that was removed, replaced or swapped for another has another
id, or none, so that no entry is ever applied to a different file.
"""

import os
import stat
from pathlib import Path
from typing import NamedTuple

_MAGIC = b"lingconv-partial"
_ID_BYTES = 16
TAIL_BYTES = len(_MAGIC) + _ID_BYTES


class PartialFile(NamedTuple):
    """An unfinished file, of `nbytes` when complete; `is_new` if none of it is on disk."""

    path: Path
    nbytes: int
    id: str
    is_new: bool

    @property
    def tail(self) -> bytes:
        """The bytes after the file's last byte, which carry its id."""
        return _MAGIC + bytes.fromhex(self.id)


def id_of(path: Path, nbytes: int) -> str:
    """Return the id in the tail of an unfinished file; empty if it is none of this size.

    Symbolic links, files with several hard links, and all but regular files have none.
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
