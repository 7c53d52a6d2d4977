"""Files of this machine, read with positional reads.

pread into reused buffers beats mmap here: it takes no page fault per 4 KiB and does not count as
resident memory.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lingconv.errors import CheckpointError, PermissionDenied
from lingconv.storage import FileStat


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Translate what the operating system says about reading `name`."""
    try:
        yield
    except FileNotFoundError as exc:
        raise CheckpointError(
            f"{name} is not there any more",
            hint="restore the source and run the same command again",
        ) from exc
    except PermissionError as exc:
        raise PermissionDenied(f"{name} cannot be read: {exc.strerror}") from exc
    except OSError as exc:
        raise CheckpointError(f"{name} cannot be read: {exc.strerror}") from exc


class LocalBlob:
    """An open local file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _explained(str(path)):
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def expect(self, offset: int, nbytes: int) -> None:
        """Do nothing: the system reads ahead by itself."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        done = 0
        while done < len(buffer):
            with _explained(str(self._path)):
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self._path} ends at byte {offset + done:,}, {len(buffer) - done:,} bytes"
                    " too early: it was changed while it was read",
                    hint="restore the source and run the same command again",
                )
            done += count

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class LocalStorage:
    """A folder on this machine."""

    parallel_reads = 1

    def __init__(self, root: Path, uri: str = "") -> None:
        self.root = root
        self.uri = uri or str(root)

    def files(self) -> Mapping[str, FileStat]:
        """Return every file, hidden ones left out; links to files count as files."""
        found: dict[str, FileStat] = {}
        with _explained(self.uri):
            for folder, folders, names in os.walk(self.root):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(name for name in names if not name.startswith(".")):
                    path = Path(folder, name)
                    if path.is_file():
                        found[path.relative_to(self.root).as_posix()] = _stat(path)
        return found

    def stat(self, name: str) -> FileStat:
        """Return the file's size and mtime as they are now."""
        return _stat(self.root / name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        with _explained(str(self.root / name)), (self.root / name).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)

    def open(self, name: str) -> LocalBlob:
        """Open a file."""
        return LocalBlob(self.root / name)

    def release(self, name: str) -> None:
        """Do nothing: the files are the user's."""


def _stat(path: Path) -> FileStat:
    with _explained(str(path)):
        stat = path.stat()
    return FileStat(stat.st_size, str(stat.st_mtime_ns))
