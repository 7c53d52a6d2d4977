"""Where bytes come from: the seam between a checkpoint and the place that holds it."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from lingconv.errors import CheckpointError

# Disk blocks and pages: where data starts at a multiple, it can be written past the page cache.
BLOCK_BYTES = 4096
# More files than this are no checkpoint, or a listing that does not end.
MAX_FILES = 1_000_000
# What is read into memory at once. Pickled metadata of the largest runs has hundreds of megabytes.
MAX_WHOLE_BYTES = 2 << 30
_COMPARED_BYTES = 16 << 20


class FileStat(NamedTuple):
    """Size in bytes, and a stamp that changes when the content does (mtime in ns, an etag ...)."""

    size: int
    stamp: str


class Blob(Protocol):
    """One open file that many threads read at once."""

    @property
    def descriptor(self) -> int | None:
        """The file descriptor of a file of this machine; None for all others."""

    def expect(self, offset: int, nbytes: int) -> None:
        """Hear that bytes are going to be read soon: what is far away is fetched ahead."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raise CheckpointError when the file ends before."""

    def close(self) -> None:
        """Release the file."""


class Storage(Protocol):
    """A folder of files, wherever it is. `uri` is how the user named it.

    One that is asked over a network answers slowly, and `parallel_reads` requests at a time; on a
    disk of this machine that is 1.
    """

    uri: str
    parallel_reads: int

    def files(self) -> Mapping[str, FileStat]:
        """Return every file below the folder by its relative path, with `/` between the parts."""

    def left_out(self) -> Mapping[str, str]:
        """Return what `files` leaves out by name: links that lead elsewhere, pipes, devices.

        The reason goes on where the name ends, and says what to do.
        """

    def stat(self, name: str) -> FileStat:
        """Return size and stamp as they are now; raise CheckpointError when the file is gone."""

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return `size` bytes at `offset`, or what is left of the file when that is less.

        Raises CheckpointError when all that is left is asked for, and is over MAX_WHOLE_BYTES.
        """

    def open(self, name: str) -> Blob:
        """Open a file for strip-wise reading."""

    def release(self, name: str) -> None:
        """Hear that a file is not going to be read any more."""


def whole_size(name: str, nbytes: int) -> int:
    """Return the size of a file that is to be read at once; raise CheckpointError for a large one.

    A sparse file costs nobody anything, until it is read.
    """
    if nbytes > MAX_WHOLE_BYTES:
        raise CheckpointError(
            f"{name} has {nbytes:,} bytes, too many for what it is called",
            hint="restore the file, or remove it from the folder",
        )
    return nbytes


def same_content(one: Storage, other: Storage, name: str) -> bool:
    """Return whether a file of two storages, of the same size in both, holds the same bytes."""
    size = one.stat(name).size
    return all(
        one.read(name, start, _COMPARED_BYTES) == other.read(name, start, _COMPARED_BYTES)
        for start in range(0, size, _COMPARED_BYTES)
    )
