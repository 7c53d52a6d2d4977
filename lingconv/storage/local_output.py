"""Output files of this machine: allocated at once, filled in any order by many threads.

Whole disk blocks bypass the page cache (O_DIRECT). A conversion writes each byte once and reads
none of them back; through the cache, the same bytes cost a copy, fresh pages (dear on virtual
machines) and the whole write-back again before the rename. What is not aligned, or not supported,
goes through the cache as usual; the two never share a page, because only whole pages go direct.

What is only moved need not be written where the file system can share the blocks of two files (XFS,
Btrfs, bcachefs, ZFS, NFS 4.2 on top of them): a later write to either takes fresh ones.
"""

import ctypes
import errno
import fcntl
import os
import struct
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from isal import isal_zlib

from lingconv.errors import SAME_COMMAND, DestinationError, PermissionDenied, ResourceError
from lingconv.storage import BLOCK_BYTES


@contextmanager
def explained_writing(destination: Path) -> Iterator[None]:
    """Translate what the operating system says about writing to `destination`."""
    try:
        yield
    except OSError as exc:
        where = exc.filename or destination
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceError(
                f"no space left for {where}: {exc.strerror}",
                hint=f"free some space, then {SAME_COMMAND}",
            ) from exc
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(f"{where} cannot be written: {exc.strerror}") from exc
        raise DestinationError(
            f"{where} cannot be written: {exc.strerror}", hint=SAME_COMMAND
        ) from exc


_ZEROS = bytes(1 << 20)
# struct file_clone_range of linux/fs.h: descriptor, start, bytes, place.
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
# What writing would not do better. File systems that share no blocks say so in many ways.
_DISK_IS_TO_BLAME = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Checksums:
    """The CRC-32 of everything that was written to a file, write by write."""

    def __init__(self, known: Mapping[int, tuple[int, int]]) -> None:
        self._writes = dict(known)
        self._new: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()

    def add(self, offset: int, data: memoryview) -> None:
        """Sum up what is written at `offset`."""
        crc = isal_zlib.crc32(data)
        with self._lock:
            self._writes[offset] = len(data), crc
            self._new.append((offset, len(data), crc))

    def take_new(self) -> list[tuple[int, int, int]]:
        """Return what was added since the last call, as (offset, bytes, CRC-32)."""
        with self._lock:
            new, self._new = self._new, []
        return new

    def of(self, offset: int, nbytes: int) -> int:
        """Return the CRC-32 of a run of bytes that whole writes filled; what is behind is zeros."""
        crc, position = 0, offset
        while position in self._writes and position < offset + nbytes:
            count, part = self._writes[position]
            crc = isal_zlib.crc32_combine(crc, part, count)
            position += count
        while position < offset + nbytes:
            count = min(len(_ZEROS), offset + nbytes - position)
            zeros = isal_zlib.crc32(memoryview(_ZEROS)[:count])
            crc = isal_zlib.crc32_combine(crc, zeros, count)
            position += count
        return crc


class WritableBlob(Protocol):
    """What a strip is written to."""

    def write(self, data: memoryview, offset: int) -> int:
        """Write bytes at `offset`; return how many they are."""


class LocalOutput:
    """A file of a known size that is being filled.

    Its disk space can be reserved, so that a full disk shows before the work and not in its midst.
    """

    def __init__(
        self,
        path: Path,
        nbytes: int,
        *,
        checksums: "Checksums | None" = None,
    ) -> None:
        self._nbytes = nbytes
        self._open = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._checksums = checksums
        # Who knows no bytes has no checksums of them.
        self._can_clone = sys.platform == "linux" and checksums is None
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = _open_own(path, flags)
        self._direct_fd = -1
        try:
            os.ftruncate(self._fd, nbytes)
            with suppress(OSError):
                self._direct_fd = os.open(path, flags | getattr(os, "O_DIRECT", 0))
        except BaseException:
            self.close()
            raise

    def reserve(self) -> None:
        """Take the disk space of the whole file now; raise OSError where there is not enough.

        Others may write meanwhile, and even close the file: then there is nothing left to reserve.
        """
        fallocate = _libc_fallocate()
        with self._open:
            if fallocate is None or self._fd < 0:
                return
            if fallocate(self._fd, 0, 0, self._nbytes) != 0:
                code = ctypes.get_errno()
                if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise OSError(code, os.strerror(code))

    def write(self, data: memoryview, offset: int) -> int:
        """Write all of `data` (bytes) at `offset`; return its size.

        Its whole blocks bypass the cache if they lie at page boundaries in memory too.
        """
        if self._checksums is not None:
            self._checksums.add(offset, data)
        first = -offset % BLOCK_BYTES
        last = len(data) - (offset + len(data)) % BLOCK_BYTES
        if self._direct_fd < 0 or last <= first:
            self._write_cached(data, offset)
        else:
            self._write_cached(data[:first], offset)
            done = first + self._write_direct(data[first:last], offset + first)
            self._write_cached(data[done:], offset + done)
        return len(data)

    def _write_cached(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, data[done:], offset + done)

    def _write_direct(self, data: memoryview, offset: int) -> int:
        """Return how much was written past the cache: all, or less where the system balks."""
        try:
            return os.pwrite(self._direct_fd, data, offset)
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return 0  # a buffer that is not aligned, or a file system without direct I/O

    def clone(self, source: int, start: int, nbytes: int, offset: int) -> bool:
        """Share whole blocks of the file that is open as `source`; return whether that was done.

        Where it cannot be, nothing is tried again for this file.
        """
        if not self._can_clone:
            return False
        try:
            wanted = _CLONE_RANGE.pack(source, start, nbytes, offset)
            fcntl.ioctl(self._fd, _FICLONERANGE, wanted)
        except OSError as exc:
            if exc.errno in _DISK_IS_TO_BLAME:
                raise
            self._can_clone = False
        return self._can_clone

    def sync(self) -> None:
        """Return when everything is on disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        with self._open:
            for fd in (self._fd, self._direct_fd):
                if fd >= 0:
                    os.close(fd)
            self._fd = self._direct_fd = -1


def _open_own(path: Path, flags: int) -> int:
    """Return a descriptor of a regular file, which may be new.

    Raises DestinationError for a link or a pipe of that name: what is behind it is not ours to
    write to.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DestinationError(
            f"{path} is a link or no regular file; nothing is written through it",
            hint="remove it, and run the same command again",
        )
    return os.open(path, flags, 0o644)


@cache
def _libc_fallocate() -> Any:
    """Return fallocate(2), which Python lacks: posix_fallocate writes zeros where it must."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function
