"""A model repository on the Hub, pinned to a commit, as a folder to read from.

Files that are in the local cache already are read from there, others by byte ranges
(`byte_ranges.py`). The requests are `hub/files.py`'s.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lingconv.errors import CheckpointError, LingconvError
from lingconv.storage import Blob, FileStat, Storage, whole_size
from lingconv.storage.byte_ranges import PARALLEL, Ranges
from lingconv.storage.hub.address import HubAddress, parse_address
from lingconv.storage.hub.client import hub_api, patiently
from lingconv.storage.hub.files import RemoteFile, find_commit, is_offline, list_files
from lingconv.storage.local import LocalStorage
from lingconv.storage.upload_target import ListedFile


class HubStorage:
    """The files of a repository at one commit, below `address.path`."""

    parallel_reads = PARALLEL

    def __init__(self, address: HubAddress, files: Mapping[str, ListedFile]) -> None:
        self.address = address
        self.uri = str(address)
        self._files = files
        self._ranges = Ranges()
        self._remotes: dict[str, RemoteFile] = {}

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

    def left_out(self) -> Mapping[str, str]:
        """Return nothing: the Hub follows no links."""
        return {}

    def stat(self, name: str) -> FileStat:
        """Return size and digest; at one commit they stay what they are."""
        if name not in self._files:
            raise CheckpointError(f"{self.uri} has no file {name}")
        return FileStat(*self._files[name])

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        cached = self.cached(name)
        if cached is not None:
            return LocalStorage(cached.parent, self.uri).read(cached.name, offset, size)
        left = whole_size(name, self.stat(name).size - offset) if size is None else size
        return self._ranges.read(self.remote(name), offset, left)

    def open(self, name: str) -> Blob:
        """Open a file: its copy in the local cache, or the one on the Hub."""
        cached = self.cached(name)
        if cached is not None:
            return LocalStorage(cached.parent, self.uri).open(cached.name)
        return self._ranges.open(self.remote(name))

    def release(self, name: str) -> None:
        """Do nothing: what was read is not kept."""

    def cached(self, name: str) -> Path | None:
        """Return where a file is in the local cache, if it is.

        Raises CheckpointError for a file that is not listed: the cache is asked for no other name.
        """
        size = self.stat(name).size
        path = try_to_load_from_cache(
            self.address.repository, self._full_name(name), revision=self.address.revision
        )
        if isinstance(path, str) and _has_size(Path(path), size):
            return Path(path)
        return None

    def _full_name(self, name: str) -> str:
        return f"{self.address.path}/{name}" if self.address.path else name

    def remote(self, name: str) -> RemoteFile:
        """Return the file on the Hub."""
        if name not in self._remotes:
            where = self.address._replace(path=self._full_name(name))
            self._remotes[name] = RemoteFile(where, ListedFile(*self.stat(name)))
        return self._remotes[name]


def _has_size(path: Path, size: int) -> bool:
    """Return whether a file of the local cache is there, is its own, and is whole."""
    with suppress(LingconvError):
        return LocalStorage(path.parent).stat(path.name).size == size
    return False


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
