"""Small files that are there whole or not at all, and folders whose renames are on disk."""

import os
from collections.abc import Iterable
from pathlib import Path

from lingconv.storage.file_names import PARTIAL_SUFFIX


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file so that it is there whole or not at all.

    What was left under its temporary name, a link to another file for one, is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
