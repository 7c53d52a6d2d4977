"""A model repository on the Hub, pinned to a commit, read by byte ranges.

    read_into(offset, buffer)
      small   -> a block of the file, kept for its neighbours: headers, norms, scales
      coming  -> a range that was expected, and is fetched by a thread already
      else    -> a request of its own

A file is first asked for at the Hub, which names a signed link to its bytes; that link is used
until it runs out. Every answer says which bytes it holds and of how many: what does not add up is
asked for again. Files that are in the local cache already are read from there.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

from lingconv.errors import CheckpointError, LingconvError, NetworkError
from lingconv.hub.address import HubAddress, HubFile, parse_address
from lingconv.hub.client import Backoff, Unfinished, hub_api, patiently, translated
from lingconv.storage import Blob, FileStat, Storage
from lingconv.storage.local import LocalBlob, LocalStorage

PARALLEL = 16
REQUEST_BYTES = 16 << 20
BLOCK_BYTES = 256 << 10
SMALL_BYTES = 64 << 10
_MAX_BLOCKS = 128
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_REFUSED = (400, 401, 403, 404, 410)  # what stores answer to a link that ran out


def list_files(repository: str, commit: str) -> dict[str, HubFile]:
    """Return every file of a repository at a commit.

    Raises CheckpointError when a name leads out of the repository.
    """
    where = str(HubAddress(repository, commit))

    def listing() -> dict[str, HubFile]:
        tree = hub_api().list_repo_tree(repository, recursive=True, revision=commit)
        files = [entry for entry in tree if isinstance(entry, RepoFile)]
        return {file.path: as_listed(file) for file in files}

    found = patiently(where, listing)
    for name in found:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{where} lists a file that leads out of it: {name!r}")
    return found


def as_listed(file: RepoFile) -> HubFile:
    """Return what the Hub says of a file."""
    return HubFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id)


def find_commit(address: HubAddress) -> str:
    """Return the commit that a revision stands for now."""

    def look() -> str:
        info = hub_api().model_info(address.repository, revision=address.revision or None)
        return info.sha or ""

    return patiently(str(address), look)


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

    def remote(self, name: str) -> "RemoteFile":
        """Return the file on the Hub."""
        if name not in self._remotes:
            where = self.address._replace(path=self._full_name(name))
            self._remotes[name] = RemoteFile(where, HubFile(*self.stat(name)))
        return self._remotes[name]

    def _fetch_block(self, remote: "RemoteFile", offset: int) -> bytes:
        buffer = bytearray(min(BLOCK_BYTES, remote.file.size - offset))
        remote.fetch(offset, memoryview(buffer))
        return bytes(buffer)


class _Link(NamedTuple):
    """Where the bytes of a file are served, and with which headers."""

    url: str
    headers: dict[str, str]


class RemoteFile:
    """One file on the Hub: bytes in, or an error that says why not. Many threads share it."""

    def __init__(self, address: HubAddress, file: HubFile) -> None:
        self.address = address
        self.file = file
        self._lock = threading.Lock()
        self._link: _Link | None = None

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`; what arrived before a failure stays."""
        end = offset + len(buffer)
        if end > self.file.size:
            raise CheckpointError(f"{self.address} ends at byte {self.file.size:,}, before {end:,}")
        backoff = Backoff()
        done = 0
        while done < len(buffer):
            failure: Exception | None = None
            try:
                for chunk in self._request(offset + done, len(buffer) - done):
                    buffer[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    backoff.reset()
                if done < len(buffer):
                    failure = Unfinished(f"the answer was {len(buffer) - done:,} bytes too short")
            except LingconvError:
                raise
            except Exception as exc:
                failure = exc
            if failure is not None and not backoff.pause(failure):
                raise translated(failure, str(self.address)) from failure

    def _request(self, offset: int, count: int) -> Iterator[bytes]:
        """Yield the bytes of one answer, at most `count` of them."""
        link = self._current_link()
        headers = {**link.headers, "Range": f"bytes={offset}-{offset + count - 1}"}
        with get_session().stream(
            "GET", link.url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code in _REFUSED:
                self._forget(link)
                raise Unfinished(f"the link was refused with {response.status_code}")
            if response.status_code == 416:
                raise CheckpointError(f"{self.address} is shorter than its listing says")
            hf_raise_for_status(response)
            self._check_range(response, offset)
            for chunk in response.iter_raw():
                if count <= 0:
                    return
                yield chunk[:count]
                count -= len(chunk)

    def _check_range(self, response: "httpx.Response", offset: int) -> None:
        """Make sure that an answer holds the bytes that were asked for."""
        if response.status_code != 206:
            if offset == 0:
                return  # the whole file, of which the beginning is wanted
            raise NetworkError(
                f"{self.address}: the server does not answer byte ranges",
                hint="fetch whole files: `--download`",
            )
        stated = response.headers.get("Content-Range", "")
        place, _, total = stated.removeprefix("bytes ").partition("/")
        if total != "*" and total != str(self.file.size):
            raise CheckpointError(
                f"{self.address} has {total} bytes, its listing says {self.file.size}",
                hint="the repository is inconsistent: report it to its owner",
            )
        if place.partition("-")[0] != str(offset):
            raise Unfinished(f"bytes from {offset} were asked for, the answer has {stated!r}")

    def _current_link(self) -> _Link:
        with self._lock:
            if self._link is None:
                self._link = self._find_link()
            return self._link

    def _forget(self, link: _Link) -> None:
        with self._lock:
            if self._link is link:
                self._link = None

    def _find_link(self) -> _Link:
        """Ask the Hub where the bytes are; raises what the client raises, and Unfinished."""
        repository, commit, path = self.address
        url = hf_hub_url(repository, path, revision=commit)
        headers: dict[str, str] = build_hf_headers(library_name="lingconv")
        found = get_hf_file_metadata(url, headers=headers, timeout=30.0)
        if found.etag is not None and found.etag != self.file.digest:
            raise Unfinished(f"the Hub serves {found.etag} in place of {self.file.digest}")
        if found.size is not None and found.size != self.file.size:
            raise CheckpointError(
                f"{self.address} has {found.size:,} bytes, its listing says {self.file.size:,}",
                hint="the repository is inconsistent: report it to its owner",
            )
        same_host = urlsplit(found.location)[:2] == urlsplit(url)[:2]
        own = headers if same_host else {}
        return _Link(found.location, {**own, "Accept-Encoding": "identity"})


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
    if constants.HF_HUB_OFFLINE:
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
