"""Folders of object stores and whatever else fsspec opens: `s3://bucket/folder`, `gs://`, `az://`.

The client is the one that fsspec names for the scheme (s3fs, gcsfs, adlfs ...), installed and
configured as its own documentation says; it finds credentials and tries again by itself, which is
told as far as it logs it (S3).
"""

import logging
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from fsspec.core import url_to_fs

from lingconv.errors import (
    SAME_COMMAND,
    CheckpointError,
    LingconvError,
    NetworkError,
    PermissionDenied,
    UsageError,
)
from lingconv.storage import MAX_FILES, Blob, FileStat, whole_size
from lingconv.storage.byte_ranges import PARALLEL, Ranges
from lingconv.storage.client_logs import Overheard, listen
from lingconv.storage.folder_listing import too_many_files

T = TypeVar("T")

# What stores call the stamp of a content, the most telling first; a time is better than nothing.
_STAMPS = ("ETag", "etag", "generation", "md5Hash", "version_id", "LastModified", "mtime")
_REFUSED = re.compile(
    r"credential|forbidden|access.?denied|unauthori[sz]ed|\b40[13]\b", re.IGNORECASE
)


# What clients log of their own tries: botocore's endpoint.py and retryhandler.py, and s3fs.
_CLIENT_LOGS = (
    Overheard(
        ("botocore.endpoint", "botocore.retryhandler"),
        "S3",
        re.compile(
            r"(?s)^(?:Exception received when sending HTTP request\.|retry needed[:,])"
            r"(?P<reason>.*)"
        ),
        re.compile(r"^Response received to retry, sleeping for (?P<wait>[\d.]+) seconds"),
    ),
    Overheard(
        ("s3fs",),
        "S3",
        re.compile(r"(?s)^Retryable error: (?P<reason>.*)"),
        re.compile(r"^Retryable error: "),
    ),
)
_LINK = re.compile(r"(?P<host>[A-Za-z][A-Za-z0-9+.-]{0,20}://[^/?\s\"']+)[^\s\"']*")
_CONNECT_S = 10.0
_answered: set[str] = set()


def open_file_system(uri: str) -> tuple[Any, str]:
    """Return the client for an address, and the path that it knows the folder by.

    Raises UsageError where the client is not installed, NetworkError where the store's host has no
    address or refuses the connection: the client itself would try for long.
    """
    try:
        system, root = url_to_fs(uri)
    except (ImportError, ValueError) as exc:
        raise UsageError(f"{uri} cannot be opened: {exc}", hint="install what it names") from exc
    system.use_listings_cache = False
    for overheard in _CLIENT_LOGS:
        listen(overheard, logging.DEBUG, _without_paths)
    _check_contact(uri, system)
    return system, str(root).rstrip("/")


def _without_paths(text: str) -> str:
    """Return what a client said with no more of its links than their hosts."""
    return _LINK.sub(r"\g<host>", " ".join(text.split()))


def _check_contact(uri: str, system: Any) -> None:
    """Raise NetworkError where a host that never answered in this process cannot be reached."""
    endpoint = asked(uri, lambda: _endpoint_of(system))
    parts = urlsplit(endpoint)
    if not parts.hostname or endpoint in _answered or getproxies():
        return
    try:
        place = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection(place, _CONNECT_S).close()
    except (socket.gaierror, ConnectionRefusedError) as exc:
        raise NetworkError(
            f"{uri}: {parts.netloc} cannot be reached: {exc}",
            hint="check the network and the endpoint that the store's client is told"
            " (S3: `AWS_ENDPOINT_URL`), then run the same command again",
        ) from exc
    except OSError:  # may be over in a moment: the client finds out, and says so
        return
    _answered.add(endpoint)


def _endpoint_of(system: Any) -> str:
    """Return the URL of a store, for the clients that tell it (s3fs); else nothing."""
    if "s3" not in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        return ""
    return str(system.s3.meta.endpoint_url or "")


def asked(uri: str, action: Callable[[], T]) -> T:
    """Return what `action` returns; raise an error of `lingconv.errors` that names `uri`."""
    try:
        return action()
    except LingconvError:
        raise
    except FileNotFoundError as exc:
        raise CheckpointError(f"{uri} is not there (any more)", hint=SAME_COMMAND) from exc
    except PermissionError as exc:
        raise PermissionDenied(f"{uri}: the store refuses it: {exc}") from exc
    except Exception as exc:  # each client has its own
        text = f"{type(exc).__name__}: {exc}".splitlines()[0]
        if _REFUSED.search(text):
            raise PermissionDenied(
                f"{uri}: the store refuses it: {text}", hint="give its client credentials"
            ) from exc
        raise NetworkError(f"{uri}: {text}", hint=SAME_COMMAND) from exc


def list_objects(system: Any, root: str, uri: str) -> dict[str, FileStat]:
    """Return every file below `root` by its relative path.

    Folders are left out; where there is no file yet, s3fs lists `root` itself as one. Raises
    CheckpointError when a name leads out of the folder.
    """

    def listing() -> dict[str, Any]:
        try:
            found: dict[str, Any] = system.find(root, detail=True)
        except FileNotFoundError:
            return {}
        return found

    found = asked(uri, listing)
    if len(found) > MAX_FILES:
        raise too_many_files(uri)
    stats = {}
    for path, info in found.items():
        if info.get("type") == "directory":
            continue
        name = str(path).removeprefix(root).lstrip("/")
        if not name or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{uri} lists a file that leads out of it: {path!r}")
        stats[name] = stat_of(info)
    return stats


def stat_of(info: Mapping[str, Any]) -> FileStat:
    """Return size and stamp of a file, from what a client tells of it."""
    stamp = next((str(info[key]).strip('"') for key in _STAMPS if info.get(key)), "")
    return FileStat(int(info["size"] or 0), stamp)


class ObjectFile:
    """One file of a store: bytes in, or an error that says why not. Many threads share it."""

    def __init__(self, system: Any, path: str, uri: str, size: int) -> None:
        self._system = system
        self._path = path
        self.uri = uri
        self.size = size

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`."""
        end = offset + len(buffer)
        data = asked(self.uri, lambda: self._system.cat_file(self._path, start=offset, end=end))
        if len(data) != len(buffer):
            raise CheckpointError(
                f"{self.uri} ends at byte {offset + len(data):,}, before {end:,}: it was changed"
                " while it was read",
                hint="restore the source and run the same command again",
            )
        buffer[:] = data


class ObjectStorage:
    """The files below an address."""

    parallel_reads = PARALLEL

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._system, self._root = open_file_system(self.uri)
        self._files = list_objects(self._system, self._root, self.uri)
        if not self._files:
            raise UsageError(f"{self.uri} holds no files", hint="check its name")
        self._ranges = Ranges()
        self._objects: dict[str, ObjectFile] = {}

    def files(self) -> Mapping[str, FileStat]:
        """Return every file, hidden ones left out."""
        return {
            name: stat
            for name, stat in self._files.items()
            if not any(part.startswith(".") for part in name.split("/"))
        }

    def left_out(self) -> Mapping[str, str]:
        """Return nothing: stores have no links."""
        return {}

    def stat(self, name: str) -> FileStat:
        """Return size and stamp as they are now."""
        where = f"{self.uri}/{name}"
        info = asked(where, lambda: self._system.info(f"{self._root}/{name}"))
        if info.get("type") == "directory":
            raise CheckpointError(f"{self.uri} has no file {name}, but a folder of that name")
        return stat_of(info)

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """Return bytes of a file."""
        file = self._object(name)
        left = whole_size(name, file.size - offset) if size is None else size
        return self._ranges.read(file, offset, left)

    def open(self, name: str) -> Blob:
        """Open a file for reading by ranges."""
        return self._ranges.open(self._object(name))

    def release(self, name: str) -> None:
        """Do nothing: what was read is not kept."""

    def _object(self, name: str) -> ObjectFile:
        if name not in self._files:
            raise CheckpointError(f"{self.uri} has no file {name}")
        if name not in self._objects:
            where, size = f"{self.uri}/{name}", self._files[name].size
            self._objects[name] = ObjectFile(self._system, f"{self._root}/{name}", where, size)
        return self._objects[name]
