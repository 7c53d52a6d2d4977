"""The files below a folder of this machine, and what of it is left out."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lingconv.errors import CheckpointError
from lingconv.storage import MAX_FILES, FileStat
from lingconv.storage.folder_boundary import LEADS_BACK, FolderBoundary, OutsideError, kind_of

MAX_DEPTH = 64


class Listing(NamedTuple):
    """Regular files by relative path, and what is left out with the reason why."""

    files: dict[str, FileStat]
    left_out: dict[str, str]


class _Folder(NamedTuple):
    """A folder on the way: its name below the root, where it is, and the links that led there."""

    name: str
    real: Path
    entered: tuple[Path, ...]
    depth: int


def list_folder(boundary: FolderBoundary) -> Listing:
    """Return every file below a folder, hidden ones left out.

    Links are followed as far as the boundary allows. Raises CheckpointError when there are more
    than MAX_FILES names, and OSError when the folder itself cannot be read.
    """
    return _Walk(boundary).walk()


class _Walk:
    def __init__(self, boundary: FolderBoundary) -> None:
        self.boundary = boundary
        self.found = Listing({}, {})
        self.num_names = 0

    def walk(self) -> Listing:
        """Look into one folder after the other: a tree may be deeper than Python may recurse."""
        waiting = [_Folder("", self.boundary.root, (), 0)]
        while waiting:
            waiting += reversed(list(self._look_into(waiting.pop())))
        return self.found

    def _look_into(self, folder: _Folder) -> Iterator[_Folder]:
        """Add the files of a folder, and yield the folders in it, by name."""
        for entry in self._entries(folder):
            if entry.name.startswith("."):
                continue
            name = f"{folder.name}{entry.name}"
            try:
                if entry.is_symlink():
                    yield from self._follow(name, folder)
                elif entry.is_dir(follow_symlinks=False):
                    yield from self._enter(name, folder, folder.real / entry.name, folder.entered)
                else:
                    self._add(name, entry.stat(follow_symlinks=False))
            except OutsideError as exc:
                self.found.left_out[name] = str(exc)
            except FileNotFoundError:
                continue  # removed while we looked
            except OSError as exc:
                self.found.left_out[name] = f"cannot be read: {exc.strerror}"

    def _entries(self, folder: _Folder) -> list[os.DirEntry[str]]:
        room = MAX_FILES - self.num_names
        try:
            with os.scandir(folder.real) as entries:
                found = sorted(islice(entries, room + 1), key=lambda entry: entry.name)
        except OSError as exc:
            if not folder.name:
                raise
            self.found.left_out[folder.name.rstrip("/")] = f"cannot be read: {exc.strerror}"
            return []
        if len(found) > room:
            raise too_many_files(str(self.boundary.root))
        self.num_names += len(found)
        return found

    def _follow(self, name: str, folder: _Folder) -> Iterator[_Folder]:
        real = self.boundary.real_path(name)
        if not real.is_dir():
            self._add(name, real.stat())
            return
        on_the_way = (folder.real, *folder.entered)
        if any(place.is_relative_to(real) for place in on_the_way):
            raise OutsideError(LEADS_BACK)
        yield from self._enter(name, folder, real, on_the_way)

    def _enter(
        self, name: str, folder: _Folder, real: Path, entered: tuple[Path, ...]
    ) -> Iterator[_Folder]:
        if folder.depth == MAX_DEPTH:
            raise OutsideError(f"is more than {MAX_DEPTH} folders deep")
        yield _Folder(f"{name}/", real, entered, folder.depth + 1)

    def _add(self, name: str, stat: os.stat_result) -> None:
        kind = kind_of(stat.st_mode)
        if kind:
            raise OutsideError(f"{kind}, not a regular file")
        self.found.files[name] = FileStat(stat.st_size, str(stat.st_mtime_ns))


def too_many_files(uri: str) -> CheckpointError:
    """Return the error for a place that holds more files than any checkpoint has."""
    return CheckpointError(
        f"{uri} holds more than {MAX_FILES:,} files", hint="name the folder of the checkpoint alone"
    )
