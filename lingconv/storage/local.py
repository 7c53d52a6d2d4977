"""Files of this machine, read with positional reads.

pread into reused buffers beats mmap here: it takes no page fault per 4 KiB and does not count as
resident memory.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from lingconv.errors import CheckpointError, PermissionDenied
from lingconv.storage import FileStat, whole_size
from lingconv.storage.folder_boundary import FolderBoundary, OutsideError, kind_of, open_regular
from lingconv.storage.folder_listing import Listing, list_folder


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
    except OutsideError as exc:
        raise CheckpointError(f"{name} {exc}") from exc
    except ValueError as exc:  # a zero byte, or what is no text at all
        raise CheckpointError(f"{name!r} is no name of a file") from exc


class LocalBlob:
    """An open regular file of this machine; `path` has no link in its last part."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _explained(str(path)):
            self.descriptor = open_regular(path)

    def expect(self, offset: int, nbytes: int) -> None:
        """Do nothing: the system reads ahead by itself."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        done = self.read_some(offset, buffer)
        if done < len(buffer):
            raise CheckpointError(
                f"{self._path} ends at byte {offset + done:,}, {len(buffer) - done:,} bytes"
                " too early: it was changed while it was read",
                hint="restore the source and run the same command again",
            )

    def read_some(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` as far as the file goes; return how many bytes that were."""
        done = 0
        while done < len(buffer):
            with _explained(str(self._path)):
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class LocalStorage:
    """A folder on this machine. `named` is a file of it that the user named, who may name a link.

    Only regular files of the folder are read (`FolderBoundary`).
    """

    parallel_reads = 1

    def __init__(self, root: Path, uri: str = "", named: str = "") -> None:
        self.root = root
        self.uri = uri or str(root)
        self._boundary = FolderBoundary(root, named)

    def files(self) -> Mapping[str, FileStat]:
        """Return every file, hidden ones left out; links to files of the folder count as files."""
        return self._listing().files

    def left_out(self) -> Mapping[str, str]:
        """Return what `files` leaves out: links that lead elsewhere, pipes, devices."""
        return self._listing().left_out

    def _listing(self) -> Listing:
        with _explained(self.uri):
            return list_folder(self._boundary)

    def stat(self, name: str) -> FileStat:
        """Return the file's size and mtime as they are now."""
        with _explained(str(self.root / name)):
            stat = os.lstat(self._boundary.real_path(name))
            if kind := kind_of(stat.st_mode):
                raise OutsideError(f"{kind}, not a regular file")
        return FileStat(stat.st_size, str(stat.st_mtime_ns))

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        with closing(self.open(name)) as blob:
            left = max(0, os.fstat(blob.descriptor).st_size - offset)
            buffer = bytearray(whole_size(name, left) if size is None else min(size, left))
            done = blob.read_some(offset, memoryview(buffer))
        return bytes(memoryview(buffer)[:done])

    def open(self, name: str) -> LocalBlob:
        """Open a file."""
        with _explained(str(self.root / name)):
            return LocalBlob(self._boundary.real_path(name))

    def release(self, name: str) -> None:
        """Do nothing: the files are the user's."""
