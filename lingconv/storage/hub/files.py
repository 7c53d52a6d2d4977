"""Files of a repository: listed, and read by byte ranges.

A file is first asked for at the Hub, which names a signed link to its bytes; that link is used
until it runs out. Every answer says which bytes it holds and of how many: what does not add up is
asked for again.
"""

import threading
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, httpx

from lingconv.errors import CheckpointError, LingconvError, NetworkError
from lingconv.storage.hub.address import HubAddress
from lingconv.storage.hub.answers import TIMEOUT, commit_of, files_of
from lingconv.storage.hub.client import (
    REFUSED,
    Backoff,
    Cause,
    Unfinished,
    patiently,
    translated,
)
from lingconv.storage.hub.contact import watched_session
from lingconv.storage.upload_target import ListedFile


def list_files(repository: str, commit: str) -> dict[str, ListedFile]:
    """Return every file of a repository at a commit.

    Raises CheckpointError when a name leads out of the repository.
    """
    where = str(HubAddress(repository, commit))

    found = patiently(where, lambda: files_of(repository, commit))
    for name in found:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{where} lists a file that leads out of it: {name!r}")
    return found


def as_listed(file: RepoFile) -> ListedFile:
    """Return what the Hub says of a file."""
    return ListedFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id)


def is_offline() -> bool:
    """Return whether the user wants no network (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def find_commit(address: HubAddress) -> str:
    """Return the commit that a revision stands for now."""
    return patiently(str(address), lambda: commit_of(address.repository, address.revision))


class _Link(NamedTuple):
    """Where the bytes of a file are served, and with which headers."""

    url: str
    headers: dict[str, str]


class RemoteFile:
    """One file on the Hub: bytes in, or an error that says why not. Many threads share it."""

    def __init__(self, address: HubAddress, file: ListedFile) -> None:
        self.address = address
        self.file = file
        self._lock = threading.Lock()
        self._link: _Link | None = None

    @property
    def uri(self) -> str:
        """Its address."""
        return str(self.address)

    @property
    def size(self) -> int:
        """Its bytes, as they were listed."""
        return self.file.size

    def fetch(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`; what arrived before a failure stays."""
        end = offset + len(buffer)
        if end > self.file.size:
            raise CheckpointError(f"{self.address} ends at byte {self.file.size:,}, before {end:,}")
        backoff = Backoff(self.uri)
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
                raise translated(failure, str(self.address)) from Cause(failure)

    def _request(self, offset: int, count: int) -> Iterator[bytes]:
        """Yield the bytes of one answer, at most `count` of them."""
        link = self._current_link()
        headers = {**link.headers, "Range": f"bytes={offset}-{offset + count - 1}"}
        with watched_session().stream(
            "GET", link.url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as response:
            if response.status_code in REFUSED:
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
                hint="fetch whole files: `download`",
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
