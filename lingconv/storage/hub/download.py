"""Whole files of a repository, fetched just ahead of the work and deleted right after it.

The order in which files are going to be needed is known. As many are fetched ahead as there is room
for; what has no room when it is needed is read by byte ranges instead, so that nothing ever waits
for disk that it holds itself. A file that was fetched whole is checked against its SHA-256.
"""

import hashlib
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from lingconv.storage import Blob, FileStat
from lingconv.storage.hub.client import Unfinished, hub_api, patiently, status_of
from lingconv.storage.hub.storage import HubStorage
from lingconv.storage.local import LocalBlob
from lingconv.storage.upload_target import ListedFile

_AT_ONCE = 2


class Downloader:
    """A HubStorage whose files `order` are fetched into `folder`, at most `max_bytes` at a time."""

    parallel_reads = HubStorage.parallel_reads

    def __init__(
        self, storage: HubStorage, folder: Path, order: Sequence[str], max_bytes: int
    ) -> None:
        self.uri = storage.uri
        self._storage = storage
        self._folder = folder
        self._room = max_bytes
        self._coming: dict[str, Future[Path]] = {}
        self._ahead = [name for name in order if storage.cached(name) is None]
        self._given_up: set[str] = set()
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(_AT_ONCE)
        with self._lock:
            self._fetch_ahead()

    def files(self) -> Mapping[str, FileStat]:
        """Return every file."""
        return self._storage.files()

    def left_out(self) -> Mapping[str, str]:
        """Return what the storage leaves out."""
        return self._storage.left_out()

    def stat(self, name: str) -> FileStat:
        """Return what the storage says of a file."""
        return self._storage.stat(name)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        return self._storage.read(name, offset, size)

    def open(self, name: str) -> Blob:
        """Open a file; nothing is waited for before it is read."""
        if self._storage.cached(name) is not None:
            return self._storage.open(name)
        return DownloadedBlob(self, name)

    def open_ranges(self, name: str) -> Blob:
        """Open a file that there is no room for."""
        return self._storage.open(name)

    def expect(self, name: str) -> bool:
        """Fetch a file that is going to be read, if there is room; return whether it is coming."""
        with self._lock:
            wanted = name not in self._coming and name not in self._given_up
            if wanted and self._fits(name):
                self._fetch(name)
            return name in self._coming

    def want(self, name: str) -> "Future[Path] | None":
        """Return where a file is or is going to be; None when there is no room for it, for good."""
        if not self.expect(name):
            with self._lock:
                self._given_up.add(name)
        return self._coming.get(name)

    def release(self, name: str) -> None:
        """Delete a file, and fetch what there is room for now."""
        with self._lock:
            self._given_up.add(name)
            coming = self._coming.pop(name, None)
        if coming is not None:
            coming.cancel()
            coming.add_done_callback(lambda done: self._delete(name, done))

    def _delete(self, name: str, done: "Future[Path]") -> None:
        if not done.cancelled() and done.exception() is None:
            done.result().unlink(missing_ok=True)
        with self._lock:
            self._room += self.stat(name).size
            self._fetch_ahead()

    def _fits(self, name: str) -> bool:
        return self.stat(name).size <= self._room

    def _fetch_ahead(self) -> None:
        while self._ahead:
            name = self._ahead[0]
            if name not in self._coming and name not in self._given_up:
                if not self._fits(name):
                    return
                self._fetch(name)
            self._ahead.pop(0)

    def _fetch(self, name: str) -> None:
        self._room -= self.stat(name).size
        coming: Future[Path] = Future()
        self._coming[name] = coming
        # No thread of a pool: whoever interrupts a run does not want to wait for the download.
        threading.Thread(target=self._run, args=(name, coming), daemon=True).start()

    def _run(self, name: str, coming: "Future[Path]") -> None:
        with self._turns:
            if coming.set_running_or_notify_cancel():
                try:
                    coming.set_result(self._download(name))
                except BaseException as exc:  # raised by whoever reads the file
                    coming.set_exception(exc)

    def _download(self, name: str) -> Path:
        where = self._storage.remote(name).address

        def once() -> Path:
            try:
                found = hub_api().hf_hub_download(
                    where.repository, where.path, revision=where.revision, local_dir=self._folder
                )
            except OSError as exc:
                if status_of(exc) or exc.errno is not None:
                    raise
                raise Unfinished("what arrived has another size") from exc
            path = Path(found)
            if not _is_whole(path, ListedFile(*self.stat(name))):
                path.unlink()
                raise Unfinished("what arrived is not what the listing says")
            return path

        return patiently(str(where), once)

    def close(self) -> None:
        """Stop fetching; what was begun stays, to be gone on with."""
        with self._lock:
            self._ahead.clear()
            for coming in self._coming.values():
                coming.cancel()
            if not self._coming:
                shutil.rmtree(self._folder, ignore_errors=True)


class DownloadedBlob:
    """An open file of a Downloader."""

    descriptor = None

    def __init__(self, downloader: Downloader, name: str) -> None:
        self._downloader = downloader
        self._name = name
        self._blob: Blob | None = None
        self._lock = threading.Lock()

    def expect(self, offset: int, nbytes: int) -> None:
        """Have the file fetched; or those bytes, when it is read by ranges already."""
        if not self._downloader.expect(self._name) and self._blob is not None:
            self._blob.expect(offset, nbytes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        self._opened().read_into(offset, buffer)

    def _opened(self) -> Blob:
        with self._lock:
            if self._blob is None:
                coming = self._downloader.want(self._name)
                if coming is None:
                    self._blob = self._downloader.open_ranges(self._name)
                else:
                    self._blob = LocalBlob(coming.result())
            return self._blob

    def close(self) -> None:
        """Close the file."""
        if self._blob is not None:
            self._blob.close()


def _is_whole(path: Path, file: ListedFile) -> bool:
    """Return whether a file has the size and, if it is a large one, the SHA-256 of the listing."""
    if path.stat().st_size != file.size:
        return False
    if not file.is_large:
        return True
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.digest
