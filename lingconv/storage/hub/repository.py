"""A repository that is written to: what it holds, and commits that go on from what was seen.

Every commit names the one that it follows. When somebody else's came in between, or the answer to
one of ours was lost, the repository is looked at again: a commit that is there is not made twice,
files of others are left alone, and ours are never put in their place unseen.
"""

import hashlib
import random
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars

from lingconv.errors import (
    CheckpointError,
    DestinationError,
    LingconvError,
    PermissionDenied,
    UsageError,
)
from lingconv.storage.file_names import CARD_NAME, MARK
from lingconv.storage.hub.address import HubAddress
from lingconv.storage.hub.answers import ignored_names, refusals_of
from lingconv.storage.hub.client import Backoff, Cause, hub_api, patiently, status_of, translated
from lingconv.storage.hub.files import RemoteFile, as_listed, find_commit, list_files
from lingconv.storage.hub.storage import HubStorage
from lingconv.storage.retries import Retry, tell
from lingconv.storage.upload_target import (
    ListedFile,
    PublishedCommit,
    PublishOptions,
    refuse_different,
    refuse_foreign,
)
from lingconv.version import __version__

_MOVED = (409, 412)
# Commits of others that may come before one of ours: as many machines may write one repository.
MOVES = 200
LONGEST_TURN_S = 1.0

# https://huggingface.co/docs/hub/storage-limits: no file may be larger.
LARGEST_FILE_BYTES = 500_000_000_000


class Repository:
    """A branch or pull request of a model repository. One thread commits at a time."""

    def __init__(self, address: HubAddress, options: PublishOptions) -> None:
        disable_progress_bars()  # lingconv draws its own
        self.address = address._replace(path="")
        self.files: Mapping[str, ListedFile] = {}
        self.head = ""
        self._claims: frozenset[str] = frozenset()
        self._options = options
        self._api = hub_api()

    def prepare(self, pull_request: int = 0, claims: Collection[str] = ()) -> int:
        """Create what is to be created, make sure that it may be written, and look at it.

        `pull_request` is the number of the one that an earlier run opened; `claims` are the names
        that nobody else may write from now on. Returns the number of the one that is written to,
        or 0.
        """
        self._claims = frozenset(claims)
        name, uri = self.address.repository, str(self.address)
        if self._options.create:
            private = not self._options.public
            patiently(uri, lambda: self._api.create_repo(name, private=private, exist_ok=True))
        branch = self.address.revision
        if branch and not branch.startswith("refs/"):
            self._find()
            patiently(uri, lambda: self._api.create_branch(name, branch=branch, exist_ok=True))
        if self._options.pull_request:
            number = pull_request or self._open_pull_request()
            self.address = self.address._replace(revision=f"refs/pr/{number}")
            pull_request = number
        self.look()
        self._check_access()
        return pull_request

    def _find(self) -> None:
        """Raise PermissionDenied when there is no such repository, and say how to get one."""
        try:
            find_commit(self.address._replace(revision=""))
        except PermissionDenied as exc:
            raise PermissionDenied(exc.message, hint=f"{exc.hint}; or `create` it") from exc

    def _open_pull_request(self) -> int:
        self._find()
        name = self.address.repository

        def create() -> int:
            return self._api.create_pull_request(name, title="Upload with lingconv").num

        return patiently(str(self.address), create)

    def _check_access(self) -> None:
        """Ask the Hub how it would take a file; that is refused where nothing may be written."""
        probe = CommitOperationAdd("lingconv.txt", b"may this be written?")
        patiently(
            str(self.address),
            lambda: self._api.preupload_lfs_files(
                self.address.repository, [probe], revision=self.address.revision or None
            ),
        )

    def look(self) -> None:
        """Find out what the repository holds now."""
        if not self.head:
            self._find()
        self.head = find_commit(self.address)
        self.files = list_files(self.address.repository, self.head)

    def _look_at(self, names: list[str]) -> None:
        """Find out what the newest commit that was seen holds under some names."""
        name = self.address.repository

        def look() -> dict[str, ListedFile]:
            found = self._api.get_paths_info(name, names, revision=self.head)
            return {file.path: as_listed(file) for file in found if isinstance(file, RepoFile)}

        rest = {path: file for path, file in self.files.items() if path not in names}
        self.files = {**rest, **patiently(str(self.address), look)}

    def holds(self, name: str, content: Path | bytes) -> bool:
        """Return whether the repository has a content, that of a file or bytes, under a name."""
        held = self.files.get(name)
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if held is None or held.size != size:
            return False
        return held == described(content, is_large=held.is_large)

    def card_for(self) -> str:
        """Return the repository's name, or nothing where its card is somebody else's."""
        held = self.files.get(CARD_NAME)
        if held is None:
            return self.address.repository
        where = self.address._replace(revision=self.head, path=CARD_NAME)
        card = bytearray(held.size)
        RemoteFile(where, held).fetch(0, memoryview(card))
        return self.address.repository if MARK.encode() in card else ""

    def storage(self) -> HubStorage:
        """Return what it holds at the newest commit that was seen."""
        return HubStorage(self.address._replace(revision=self.head), self.files)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise DestinationError for names that the repository's `.gitignore` leaves out."""
        address = self.address
        ignored = patiently(
            str(address), lambda: ignored_names(address.repository, address.revision, names)
        )
        if ignored:
            raise DestinationError(
                f"{address}: its .gitignore leaves out files of the checkpoint",
                details=ignored,
                hint="take the patterns that match them out of the repository's .gitignore, then"
                " run the same command again",
            )

    def check_card(self, card: Path | bytes) -> None:
        """Raise CheckpointError for a model card that the Hub would refuse, with its reasons."""
        text = (card if isinstance(card, bytes) else card.read_bytes()).decode("utf-8", "replace")
        reasons = patiently(str(self.address), lambda: refusals_of(text))
        if reasons:
            raise CheckpointError(
                f"{self.address}: the Hub refuses the front matter of {CARD_NAME}",
                details=reasons,
                hint=f"mend the front matter of {CARD_NAME} (the lines between the two `---`), then"
                " run the same command again",
            )

    def commit(self, contents: Mapping[str, Path | bytes], message: str) -> dict[str, ListedFile]:
        """Put files into the repository in one commit; return what it has now for each of them.

        What is there already is not sent. Raises DestinationError when somebody else changed the
        same files since they were seen.
        """
        new = {name: content for name, content in contents.items() if not self.holds(name, content)}
        if CARD_NAME in new:
            self.check_card(new[CARD_NAME])
        additions = [CommitOperationAdd(name, content) for name, content in new.items()]
        if additions:
            self._commit(additions, message)
        return {name: self.files[name] for name in contents}

    def add_weights(
        self, files: Mapping[str, Path], before: int, total: int
    ) -> dict[str, ListedFile]:
        """Put weight files into the repository, which has `before` of `total`, in one commit."""
        what = next(iter(files)) if len(files) == 1 else f"{len(files)} weight files"
        return self.commit(files, f"Add {what} ({before + len(files)} of {total})")

    def complete(
        self, small: Mapping[str, Path | bytes], sent: Mapping[str, ListedFile]
    ) -> PublishedCommit:
        """Add what makes a checkpoint of the weights `sent`, and compare all with the listing."""
        there = self.commit(small, f"Complete the checkpoint (lingconv {__version__})")
        self.check({**sent, **there})
        return self.commit_now

    def check_size(self, name: str, nbytes: int) -> None:
        """Raise UsageError for a file that the Hub would refuse after all of it was sent."""
        if nbytes > LARGEST_FILE_BYTES:
            raise UsageError(
                f"{name} has {nbytes:,} bytes, the Hub takes files of {LARGEST_FILE_BYTES:,}",
                hint="make smaller ones, for example `max_shard_bytes=50GB`",
            )

    def make_room(self, foreign: Sequence[str], *, replace: bool) -> None:
        """Remove files of another checkpoint if they are to be replaced, else refuse to go on."""
        if not replace:
            refuse_foreign(self.address, foreign, kinds="repository or branch")
        self.delete(foreign, "Make room for another checkpoint")

    def delete(self, names: Sequence[str], message: str) -> None:
        """Remove files, in one commit."""
        if names:
            self._commit([CommitOperationDelete(name, is_folder=False) for name in names], message)

    def _commit(
        self, operations: "Sequence[CommitOperationAdd | CommitOperationDelete]", message: str
    ) -> None:
        names = [operation.path_in_repo for operation in operations]
        seen = {name: self.files.get(name) for name in self._claims.union(names)}
        backoff, moves = Backoff(str(self.address)), 0
        while True:
            try:
                info = self._api.create_commit(
                    self.address.repository,
                    list(operations),
                    commit_message=message,
                    revision=self.address.revision or None,
                    parent_commit=self.head,
                )
            except LingconvError:
                raise
            except Exception as exc:
                moved = status_of(exc) in _MOVED
                moves += moved
                if moves > MOVES or (not moved and not backoff.pause(exc)):
                    raise translated(exc, str(self.address)) from Cause(exc)
                self.look()
                if _is_done(operations, self.files):
                    return
                self._refuse_changed(seen)
                if moved:  # so that many who write at once do not meet again
                    wait = random.uniform(0, LONGEST_TURN_S)
                    moved_on = "somebody else committed in between"
                    tell(Retry(str(self.address), moved_on, wait, moves, MOVES))
                    time.sleep(wait)
            else:
                self.head = info.oid
                self._look_at(names)
                return

    def _refuse_changed(self, seen: Mapping[str, ListedFile | None]) -> None:
        """Raise DestinationError where files are not what they were before a commit was tried."""
        changed = sorted(name for name, file in seen.items() if self.files.get(name) != file)
        if changed:
            raise DestinationError(
                f"{self.address}: somebody else changed what was going to be written",
                details=changed,
                hint="look at its history, then run the same command again",
            )

    def check(self, expected: Mapping[str, ListedFile]) -> None:
        """Raise CheckpointError unless the repository lists these files, byte for byte."""
        self.look()
        refuse_different(self.address, self.files, expected)

    @property
    def commit_now(self) -> PublishedCommit:
        """The newest commit that was seen."""
        url = f"{self._api.endpoint}/{self.address.repository}/commit/{self.head}"
        return PublishedCommit(
            str(self.address._replace(revision=self.head)), url, str(self.address)
        )


def _is_done(
    operations: "Sequence[CommitOperationAdd | CommitOperationDelete]",
    files: Mapping[str, ListedFile],
) -> bool:
    """Return whether a repository is as operations were to make it."""
    for operation in operations:
        held = files.get(operation.path_in_repo)
        if isinstance(operation, CommitOperationDelete):
            if held is not None:
                return False
        elif held is None or held != _content(operation, is_large=held.is_large):
            return False
    return True


def _content(operation: CommitOperationAdd, *, is_large: bool) -> ListedFile:
    """Return what the Hub lists of a file that was added."""
    if is_large:
        return ListedFile(operation.upload_info.size, operation.upload_info.sha256.hex())
    content = operation.path_or_fileobj
    return described(content if isinstance(content, bytes) else Path(str(content)), is_large=False)


def described(content: Path | bytes, *, is_large: bool) -> ListedFile:
    """Return what the Hub would list of a content: its size, and its hash."""
    if not is_large:
        data = content if isinstance(content, bytes) else content.read_bytes()
        return ListedFile(len(data), git_hash(data))
    if isinstance(content, bytes):
        return ListedFile(len(content), hashlib.sha256(content).hexdigest())
    with content.open("rb") as file:
        return ListedFile(content.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def git_hash(data: bytes) -> str:
    """Return the name that git has for a file of that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
