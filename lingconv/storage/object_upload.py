"""A folder of an object store that is written to.

Stores have no commits: files are there one by one, whole ones, and a checkpoint without an index
and a config is visibly unfinished, as in a folder.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

from lingconv.errors import CheckpointError
from lingconv.storage.object_store import (
    ObjectStorage,
    asked,
    list_objects,
    open_file_system,
    stat_of,
)
from lingconv.storage.upload_target import (
    ListedFile,
    PublishedCommit,
    refuse_different,
    refuse_foreign,
)


class ObjectUpload:
    """The folder at an address, as a Store."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._system, self._root = open_file_system(uri)
        self.files: Mapping[str, ListedFile] = {}

    def prepare(self, pull_request: int = 0, claims: Collection[str] = ()) -> int:
        """Look at what the folder holds; there are no pull requests, and no order of writers."""
        listed = list_objects(self._system, self._root, self._uri)
        self.files = {name: ListedFile(*stat) for name, stat in listed.items()}
        return 0

    def check_size(self, name: str, nbytes: int) -> None:
        """Leave that to the store: each has its own limits."""

    def make_room(self, foreign: Sequence[str], *, replace: bool) -> None:
        """Remove files of another checkpoint if they are to be replaced, else refuse to go on."""
        if not replace:
            refuse_foreign(self._uri, foreign, kinds="folder")
        for name in foreign:
            asked(f"{self._uri}/{name}", partial(self._system.rm_file, self._path(name)))

    def add_weights(
        self, files: Mapping[str, Path], before: int, total: int
    ) -> dict[str, ListedFile]:
        """Put weight files there; return what is listed of them."""
        return {name: self._put(name, path) for name, path in files.items()}

    def card_for(self) -> None:
        """Return that this is no place for model cards."""

    def check_names(self, names: Sequence[str]) -> None:
        """Take any."""

    def check_card(self, card: Path | bytes) -> None:
        """Take any: it is a file like all others."""

    def storage(self) -> ObjectStorage:
        """Return what the folder holds now."""
        return ObjectStorage(self._uri)

    def complete(
        self, small: Mapping[str, Path | bytes], sent: Mapping[str, ListedFile]
    ) -> PublishedCommit:
        """Add small files in their order, and compare all with what is listed."""
        expected = {**sent, **{name: self._put(name, content) for name, content in small.items()}}
        self.prepare()
        refuse_different(self._uri, self.files, expected)
        return PublishedCommit(self._uri)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _put(self, name: str, content: Path | bytes) -> ListedFile:
        """Put a file there, and return what is listed of it."""
        where, path = f"{self._uri}/{name}", self._path(name)
        if isinstance(content, bytes):
            size = len(content)
            asked(where, lambda: self._system.pipe_file(path, content))
        else:
            size = content.stat().st_size
            asked(where, lambda: self._system.put_file(str(content), path))
        found = ListedFile(*stat_of(asked(where, lambda: self._system.info(path))))
        if found.size != size:
            raise CheckpointError(f"{where} has {found.size:,} bytes, {size:,} were sent")
        return found
