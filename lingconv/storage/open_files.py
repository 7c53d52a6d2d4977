"""The files of a storage, each opened once, when it is first needed, for all threads."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from lingconv.storage import Blob, Storage
from lingconv.storage.stated_sums import CheckedBlob, StatedSum


class OpenFiles(Mapping[str, Blob]):
    """File name -> open file. A context manager: closes what it opened.

    `checksums` are what files state of their bytes; those are compared while they are read.
    """

    def __init__(
        self, storage: Storage, checksums: Mapping[str, Sequence[StatedSum]] | None = None
    ) -> None:
        self._storage = storage
        self._checksums = checksums or {}
        self._blobs: dict[str, Blob] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> Blob:
        """Return the open file `name`."""
        blob = self._blobs.get(name)
        if blob is None:
            with self._lock:
                if name not in self._blobs:
                    self._blobs[name] = self._opened(name)
                blob = self._blobs[name]
        return blob

    def _opened(self, name: str) -> Blob:
        blob, stated = self._storage.open(name), self._checksums.get(name)
        return CheckedBlob(blob, f"{self._storage.uri}/{name}", stated) if stated else blob

    def stated_at(self, name: str, offset: int) -> StatedSum | None:
        """Return the range with a checksum that a byte of a file lies in, or None."""
        blob = self[name] if name in self._checksums else None
        return blob.stated_at(offset) if isinstance(blob, CheckedBlob) else None

    def complete(self, name: str, item: StatedSum) -> None:
        """Read what has not been read of a range; raise CheckpointError when it is damaged."""
        blob = self[name]
        if isinstance(blob, CheckedBlob):
            blob.complete(item)

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
