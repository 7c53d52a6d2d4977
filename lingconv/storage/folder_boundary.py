"""What belongs to a folder of this machine: regular files inside it, and nothing that leads out.

A checkpoint comes by git, tar or a copy, and each of them carries links. One to another file of
the folder is followed. So is one from a snapshot of the Hub's cache to its blobs, which is how
huggingface_hub stores every file: models--ORG--NAME/snapshots/COMMIT/file -> ../../blobs/HASH.
Whatever leads elsewhere is somebody else's file, and is named instead of read.
"""

import errno
import os
import stat
from pathlib import Path

from lingconv.errors import CheckpointError

_COPY = "copy the file itself into the folder to take it"
LEADS_OUT = f"is a link that leads out of the folder: {_COPY}"
LEADS_NOWHERE = "is a link that leads nowhere: fetch the file again, or copy it into the folder"
LEADS_BACK = f"is a link that leads back to itself: {_COPY}"
_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a named pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
    stat.S_IFLNK: "is a link",
}


class OutsideError(Exception):
    """A name of a folder that stands for no regular file of it; the text says what it is."""


class FolderBoundary:
    """A folder, and the places that links in it may lead to.

    `named` is a file of it that the user named: that one is followed wherever it leads.
    """

    def __init__(self, root: Path, named: str = "") -> None:
        self.root = Path(os.path.realpath(root))
        self._places = (self.root, *_blobs_of(self.root))
        self._named = Path(os.path.realpath(root / named)) if named else None

    def real_path(self, name: str) -> Path:
        """Return where the file or folder `name` is, with no link left in its path.

        Raises OutsideError for what leads out, FileNotFoundError for what is not there, and
        OSError or ValueError for a name that the system does not take.
        """
        path = self.root / name
        try:
            real = Path(os.path.realpath(path, strict=True))
        except OSError as exc:
            if path.is_symlink():
                raise OutsideError(_broken_link(exc)) from exc
            raise
        if real != self._named and not any(real.is_relative_to(place) for place in self._places):
            raise OutsideError(LEADS_OUT)
        return real


def _broken_link(error: OSError) -> str:
    return LEADS_BACK if error.errno == errno.ELOOP else LEADS_NOWHERE


def _blobs_of(root: Path) -> list[Path]:
    """Return the blobs that a snapshot of the Hub's cache is made of; none for another folder."""
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return [folder.parent / "blobs"]
    return []


def kind_of(mode: int) -> str:
    """Return what a file that is not regular is, in words; empty for a regular one."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "is no file")


def open_regular(path: Path) -> int:
    """Return a descriptor of the regular file at a path without links.

    Raises CheckpointError for anything else, which is neither opened nor waited for, and OSError.
    """
    _refuse_special(path, os.lstat(path).st_mode)
    # Whoever swaps the file for a pipe just now does not make us wait either.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY
    descriptor = os.open(path, flags)
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_special(path: Path, mode: int) -> None:
    kind = kind_of(mode)
    if kind:
        raise CheckpointError(f"{path} {kind}, not a regular file", hint="remove it, or restore it")
