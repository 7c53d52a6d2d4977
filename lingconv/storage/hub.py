"""A model repository on the Hub, pinned to a commit, as a folder to read from.

    read_into(offset, buffer)
      small   -> a block of the file, kept for its neighbours: headers, norms, scales
      coming  -> a range that was expected, and is fetched by a thread already
      else    -> a request of its own

Files that are in the local cache already are read from there. The requests are `hub/remote.py`'s.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lingconv.errors import CheckpointError
from lingconv.hub.address import HubAddress, HubFile, parse_address
from lingconv.hub.client import hub_api, patiently
from lingconv.hub.remote import RemoteFile, find_commit, is_offline, list_files
from lingconv.storage import Blob, FileStat, Storage
from lingconv.storage.local import LocalBlob, LocalStorage

PARALLEL = 16
REQUEST_BYTES = 16 << 20
BLOCK_BYTES = 256 << 10
SMALL_BYTES = 64 << 10
_MAX_BLOCKS = 128


class HubStorage:
    """The files of a repository at one commit, below `address.path`."""

    parallel_reads = PARALLEL

    def __init__(self, address: HubAddress, files: Mapping[str, HubFile]) -> None:
        self.address = address
        self.uri = str(address)
        self._files = files
        self._blocks = _Blocks(self._fetch_block)
        self._remotes: dict[str, RemoteFile] = {}
        self._threads = ThreadPoolExecutor(PARALLEL, "fetch")

    @classmethod
    def at(cls, address: HubAddress) -> "HubStorage":
        """Look up the commit of an address and list its files; raises an error that says why."""
        pinned = address._replace(revision=find_commit(address))
        prefix = f"{address.path}/" if address.path else ""
        files = {
            name.removeprefix(prefix): file
            for name, file in list_files(address.repository, pinned.revision).items()
            if name.startswith(prefix)
        }
        if not files:
            raise CheckpointError(f"{address} holds no files")
        return cls(pinned, files)

    def files(self) -> Mapping[str, FileStat]:
        """Return every file, hidden ones left out."""
        return {
            name: FileStat(file.size, file.digest)
            for name, file in self._files.items()
            if not any(part.startswith(".") for part in name.split("/"))
        }

    def stat(self, name: str) -> FileStat:
        """Return size and digest; at one commit they stay what they are."""
        if name not in self._files:
            raise CheckpointError(f"{self.uri} has no file {name}")
        return FileStat(*self._files[name])

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        left = max(0, self.stat(name).size - offset)
        count = left if size is None else min(size, left)
        buffer = bytearray(count)
        blob = self.open(name)
        try:
            blob.read_into(offset, memoryview(buffer))
        finally:
            blob.close()
        return bytes(buffer)

    def open(self, name: str) -> Blob:
        """Open a file: its copy in the local cache, or the one on the Hub."""
        cached = self.cached(name)
        if cached is not None:
            return LocalBlob(cached)
        return HubBlob(self.remote(name), self._blocks, self._threads)

    def release(self, name: str) -> None:
        """Do nothing: what was read is not kept."""

    def cached(self, name: str) -> Path | None:
        """Return where a file is in the local cache, if it is."""
        path = try_to_load_from_cache(
            self.address.repository, self._full_name(name), revision=self.address.revision
        )
        if isinstance(path, str) and Path(path).stat().st_size == self.stat(name).size:
            return Path(path)
        return None

    def _full_name(self, name: str) -> str:
        return f"{self.address.path}/{name}" if self.address.path else name

    def remote(self, name: str) -> RemoteFile:
        """Return the file on the Hub."""
        if name not in self._remotes:
            where = self.address._replace(path=self._full_name(name))
            self._remotes[name] = RemoteFile(where, HubFile(*self.stat(name)))
        return self._remotes[name]

    def _fetch_block(self, remote: RemoteFile, offset: int) -> bytes:
        buffer = bytearray(min(BLOCK_BYTES, remote.file.size - offset))
        remote.fetch(offset, memoryview(buffer))
        return bytes(buffer)


class _Blocks:
    """Blocks of files, kept for small reads; those that were not used for longest go first."""

    def __init__(self, fetch: Callable[[RemoteFile, int], bytes]) -> None:
        self._fetch = fetch
        self._held: OrderedDict[tuple[RemoteFile, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, remote: RemoteFile, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset` of a file."""
        done = 0
        while done < len(buffer):
            start = (offset + done) // BLOCK_BYTES * BLOCK_BYTES
            block = self._block(remote, start)
            part = block[offset + done - start :][: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _block(self, remote: RemoteFile, start: int) -> bytes:
        key = remote, start
        with self._lock:
            held = self._held.get(key)
            mine = held is None
            if held is None:
                held = self._held[key] = Future()
            self._held.move_to_end(key)
            if len(self._held) > _MAX_BLOCKS:
                self._held.popitem(last=False)
        if mine:
            try:
                held.set_result(self._fetch(remote, start))
            except BaseException as exc:
                with self._lock:
                    self._held.pop(key, None)
                held.set_exception(exc)
                raise
        return held.result()


class _Coming:
    """A range of a file that is going to be read, and as many of its bytes as were not yet."""

    def __init__(self, offset: int, nbytes: int) -> None:
        self.offset = offset
        self.nbytes = nbytes
        self.unread = nbytes
        self.data: Future[bytearray] | None = None

    def covers(self, offset: int, nbytes: int) -> bool:
        return self.offset <= offset and offset + nbytes <= self.offset + self.nbytes


class HubBlob:
    """An open file on the Hub."""

    descriptor = None

    def __init__(self, remote: RemoteFile, blocks: _Blocks, threads: ThreadPoolExecutor) -> None:
        self._remote = remote
        self._blocks = blocks
        self._threads = threads
        self._coming: list[_Coming] = []
        self._lock = threading.Lock()

    def expect(self, offset: int, nbytes: int) -> None:
        """Fetch bytes that are going to be read, neighbours together, in large requests."""
        if nbytes < SMALL_BYTES:
            return
        with self._lock:
            last = self._coming[-1] if self._coming else None
            if last and last.data is None:
                goes_on = last.offset + last.nbytes == offset
                if goes_on and last.nbytes + nbytes <= REQUEST_BYTES:
                    last.nbytes += nbytes
                    last.unread += nbytes
                    return
                self._begin(last)
            self._coming.append(_Coming(offset, nbytes))

    def _begin(self, coming: _Coming) -> None:
        if coming.data is None:
            coming.data = self._threads.submit(self._fetch, coming.offset, coming.nbytes)

    def _fetch(self, offset: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        self._remote.fetch(offset, memoryview(data))
        return data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`."""
        if len(buffer) < SMALL_BYTES:
            self._blocks.read_into(self._remote, offset, buffer)
            return
        with self._take(offset, len(buffer)) as coming:
            if coming is None or coming.data is None:
                self._remote.fetch(offset, buffer)
            else:
                start = offset - coming.offset
                with memoryview(coming.data.result()) as data:
                    buffer[:] = data[start : start + len(buffer)]

    @contextmanager
    def _take(self, offset: int, nbytes: int) -> Iterator[_Coming | None]:
        """Give the range that holds some bytes, if one is coming; drop it once all were read."""
        with self._lock:
            found = next((each for each in self._coming if each.covers(offset, nbytes)), None)
            if found is not None:
                self._begin(found)
        yield found
        if found is not None:
            with self._lock:
                found.unread -= nbytes
                if found.unread <= 0 and found in self._coming:
                    self._coming.remove(found)

    def close(self) -> None:
        """Stop fetching."""
        with self._lock:
            for coming in self._coming:
                if coming.data is not None:
                    coming.data.cancel()
            self._coming.clear()


def open_address(text: str, suffix: str) -> tuple[Storage, str]:
    """Return the folder that an address names, and its file there if it ends with `suffix`.

    Without a network (HF_HUB_OFFLINE) that is the folder in the local cache.
    """
    address = parse_address(text)
    name = ""
    if address.path.endswith(suffix):
        folder, _, name = address.path.rpartition("/")
        address = address._replace(path=folder)
    if is_offline():
        return LocalStorage(_cached_snapshot(address), str(address)), name
    return HubStorage.at(address), name


def _cached_snapshot(address: HubAddress) -> Path:
    """Return the folder of a repository in the local cache."""

    def look() -> str:
        revision = address.revision or None
        return str(
            hub_api().snapshot_download(
                address.repository, revision=revision, local_files_only=True
            )
        )

    return Path(patiently(str(address), look), address.path)
