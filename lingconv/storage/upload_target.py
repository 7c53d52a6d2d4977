"""Where finished files are sent: a repository on the Hub, or a folder of an object store."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from lingconv.errors import CheckpointError, DestinationError, UsageError
from lingconv.storage import Storage


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """How a repository is written to: what may be created, who may see it, what has to go."""

    create: bool = False
    public: bool = False
    pull_request: bool = False
    replace: bool = False

    def check(self) -> None:
        """Raise UsageError for what contradicts itself."""
        if self.public and not self.create:
            raise UsageError("`public` is for a repository that is created: add `create`")
        if self.pull_request and self.replace:
            raise UsageError("`replace` is for a branch, `pull_request` asks for somebody's review")


class ListedFile(NamedTuple):
    """A file as the Hub lists it; `digest` is the SHA-256 of a large one, else its git blob id."""

    size: int
    digest: str

    @property
    def is_large(self) -> bool:
        """Whether it lies in large-file storage."""
        return len(self.digest) == 64


class PublishedCommit(NamedTuple):
    """What was published: its address, where to look at it, and the branch that it is in.

    The last two are empty where a store has no such thing.
    """

    address: str
    url: str = ""
    branch: str = ""


class UploadTarget(Protocol):
    """A place that is written to. One thread at a time asks it for something."""

    files: Mapping[str, ListedFile]

    def prepare(self, pull_request: int = 0, claims: Collection[str] = ()) -> int:
        """Make sure that it may be written, and look at what it holds.

        `pull_request` is the number of the one that an earlier run opened; returns that of the one
        that is written to, or 0. `claims` are the names that nobody else is to write meanwhile; a
        store that can tell refuses to go on when somebody did.
        """

    def check_size(self, name: str, nbytes: int) -> None:
        """Raise UsageError for a file that would be refused after all of it was sent."""

    def make_room(self, foreign: Sequence[str], *, replace: bool) -> None:
        """Remove files of another checkpoint if they are to be replaced, else refuse to go on."""

    def add_weights(
        self, files: Mapping[str, Path], before: int, total: int
    ) -> dict[str, ListedFile]:
        """Put weight files there, beside `before` of `total`; return what is listed of them."""

    def card_for(self) -> str | None:
        """Return the name of the repository that a model card is written for.

        Empty where somebody else wrote one; None where a store is no place for model cards.
        """

    def check_names(self, names: Sequence[str]) -> None:
        """Raise DestinationError for names that would not be taken, before anything is sent."""

    def check_card(self, card: Path | bytes) -> None:
        """Raise CheckpointError for a model card that would be refused, before anything is sent."""

    def storage(self) -> Storage:
        """Return what it holds now, to be read."""

    def complete(
        self, small: Mapping[str, Path | bytes], sent: Mapping[str, ListedFile]
    ) -> PublishedCommit:
        """Add small files in their order, and compare all with what is listed."""


def refuse_foreign(place: object, foreign: Sequence[str], *, kinds: str) -> None:
    """Raise DestinationError for files of another checkpoint; `kinds` are places to choose from."""
    if foreign:
        raise DestinationError(
            f"{place} holds another checkpoint",
            details=foreign,
            hint=f"choose another {kinds}, or remove what it holds: `replace`",
        )


def refuse_different(
    place: object, listed: Mapping[str, ListedFile], expected: Mapping[str, ListedFile]
) -> None:
    """Raise CheckpointError unless these files are listed, byte for byte."""
    wrong = [
        f"{name}: {listed.get(name, 'not there')}, expected {file}"
        for name, file in expected.items()
        if listed.get(name) != file
    ]
    if wrong:
        raise CheckpointError(
            f"{place} does not hold what was sent", details=wrong,
            hint="somebody else may be writing it; run the same command again",
        )  # fmt: skip
