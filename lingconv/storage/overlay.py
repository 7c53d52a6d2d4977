"""Some files of a storage, and small ones made up beside them."""

from collections.abc import Collection, Mapping

from lingconv.errors import CheckpointError
from lingconv.storage import Blob, FileStat, Storage


class Overlay:
    """The files `names` of another storage, and `made`, which exist in memory alone."""

    def __init__(self, storage: Storage, names: Collection[str], made: Mapping[str, bytes]) -> None:
        self.uri = storage.uri
        self.parallel_reads = storage.parallel_reads
        self._storage = storage
        self._names = names
        self._made = made

    def files(self) -> Mapping[str, FileStat]:
        """Return all files, real and made."""
        held = self._storage.files()  # without hidden ones, which may be among the names
        real = {name: held.get(name) or self._storage.stat(name) for name in self._names}
        return {**real, **{name: self.stat(name) for name in self._made}}

    def left_out(self) -> Mapping[str, str]:
        """Return nothing: the names were chosen."""
        return {}

    def stat(self, name: str) -> FileStat:
        """Return what the storage says of a file; what was made never changes."""
        if name in self._made:
            return FileStat(len(self._made[name]), "made")
        if name not in self._names:
            raise CheckpointError(f"{name} is no part of {self.uri}")
        return self._storage.stat(name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        if name in self._made:
            return self._made[name][offset : None if size is None else offset + size]
        if name not in self._names:
            raise CheckpointError(f"{name} is no part of {self.uri}")
        return self._storage.read(name, offset, size)

    def open(self, name: str) -> Blob:
        """Open a file, real or made."""
        if name in self._made:
            return MadeBlob(name, self._made[name])
        if name not in self._names:
            raise CheckpointError(f"{name} is no part of {self.uri}")
        return self._storage.open(name)

    def release(self, name: str) -> None:
        """Tell the storage."""
        self._storage.release(name)


class MadeBlob:
    """A file that was made, open."""

    descriptor = None

    def __init__(self, name: str, data: bytes) -> None:
        self._name = name
        self._data = data

    def expect(self, offset: int, nbytes: int) -> None:
        """Do nothing: it is in memory."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`; raise CheckpointError when the file ends before."""
        part = self._data[offset : offset + len(buffer)]
        if len(part) < len(buffer):
            raise CheckpointError(f"{self._name} ends at byte {len(self._data):,}")
        buffer[:] = part

    def close(self) -> None:
        """Do nothing."""
