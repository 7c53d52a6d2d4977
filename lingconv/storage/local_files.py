"""Small files of this machine: written whole or not at all, read only if they are what they seem.

Names come from records that a stranger may have written: `path_inside` lets none lead out of a
folder, and nothing here follows a link or waits for a pipe.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lingconv.errors import DestinationError
from lingconv.storage.file_names import PARTIAL_SUFFIX

_NO_LINKS = os.O_NOFOLLOW | os.O_CLOEXEC


def path_inside(folder: Path, name: str) -> Path:
    """Return the path of a file below a folder.

    Raises DestinationError when the name leads out of it, by itself or by a link on the way.
    """
    parts = Path(name).parts
    is_plain = isinstance(name, str) and name and "\0" not in name and not Path(name).is_absolute()
    if not is_plain or not parts or ".." in parts:
        raise DestinationError(f"{folder}: {name!r} is no name of a file in this folder")
    path = folder
    for part in parts[:-1]:
        path = path / part
        if path.is_symlink():
            raise DestinationError(
                f"{path} is a link, and {name} would be written behind it",
                hint="remove the link, or choose another folder",
            )
    return path / parts[-1]


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with suppress(FileNotFoundError):
        partial.unlink()  # what a kill left, or a link that leads elsewhere
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINKS, 0o644)
    with os.fdopen(fd, "wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def read_file(path: Path, max_bytes: int) -> bytes | None:
    """Return the content of a regular file; None where there is none, or a larger one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _NO_LINKS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # a link (ELOOP), a socket (ENXIO)
        if path.is_symlink() or not path.is_file():
            return None
        raise
    with os.fdopen(fd, "rb") as file:
        held = os.fstat(fd)
        if not stat.S_ISREG(held.st_mode) or held.st_size > max_bytes:
            return None
        return file.read(max_bytes + 1)


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file in one write; what is no regular file is replaced by one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | _NO_LINKS
    fd = os.open(path, flags, 0o644)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
