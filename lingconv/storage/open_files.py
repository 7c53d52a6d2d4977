"""The files of a storage, each opened once, when it is first needed, for all threads."""

import threading
from collections.abc import Iterator, Mapping
from typing import Self

from lingconv.storage import Blob, Storage


class OpenFiles(Mapping[str, Blob]):
    """File name -> open file. A context manager: closes what it opened."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._blobs: dict[str, Blob] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Blob:
        """Return the open file `name`."""
        blob = self._blobs.get(name)
        if blob is None:
            with self._lock:
                if name not in self._blobs:
                    self._blobs[name] = self._storage.open(name)
                blob = self._blobs[name]
        return blob

    def read(self, name: str, offset: int, count: int) -> bytes:
        """Return `count` bytes at `offset` of a file."""
        buffer = bytearray(count)
        self[name].read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def __iter__(self) -> Iterator[str]:
        """Return the names of the files that are open."""
        return iter(self._blobs)

    def __len__(self) -> int:
        """Return how many files are open."""
        return len(self._blobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for blob in self._blobs.values():
            blob.close()
        self._blobs.clear()
