"""Where finished files are sent: a repository on the Hub, or a folder of an object store."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from lingconv.containers.gguf import SUFFIX
from lingconv.errors import CheckpointError, DestinationError
from lingconv.hub.address import HubFile, is_hub, parse_address, staging_base, staging_folder
from lingconv.options import PublishOptions


class Commit(NamedTuple):
    """What was published: its address, where to look at it, and the branch that it is in.

    The last two are empty where a store has no such thing.
    """

    address: str
    url: str = ""
    branch: str = ""


class Store(Protocol):
    """A place that is written to. One thread at a time asks it for something."""

    files: Mapping[str, HubFile]

    def prepare(self, pull_request: int = 0) -> int:
        """Make sure that it may be written, and look at what it holds.

        `pull_request` is the number of the one that an earlier run opened; returns that of the one
        that is written to, or 0.
        """

    def check_size(self, name: str, nbytes: int) -> None:
        """Raise UsageError for a file that would be refused after all of it was sent."""

    def make_room(self, foreign: Sequence[str], *, replace: bool) -> None:
        """Remove files of another checkpoint if they are to be replaced, else refuse to go on."""

    def add_weights(self, files: Mapping[str, Path], before: int, total: int) -> dict[str, HubFile]:
        """Put weight files there, beside `before` of `total`; return what is listed of them."""

    def card_for(self) -> str | None:
        """Return the name of the repository that a model card is written for.

        Empty where somebody else wrote one; None where a store is no place for model cards.
        """

    def complete(self, small: Mapping[str, Path | bytes], sent: Mapping[str, HubFile]) -> Commit:
        """Add small files in their order, and compare all with what is listed."""


def refuse_foreign(place: object, foreign: Sequence[str], *, kinds: str) -> None:
    """Raise DestinationError for files of another checkpoint; `kinds` are places to choose from."""
    if foreign:
        raise DestinationError(
            f"{place} holds another checkpoint",
            details=foreign,
            hint=f"choose another {kinds}, or remove what it holds: `--replace`",
        )


def refuse_different(
    place: object, listed: Mapping[str, HubFile], expected: Mapping[str, HubFile]
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


def is_object(place: object) -> bool:
    """Return whether a place is meant to be in an object store: `scheme://`, but not the Hub's."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", str(place))) and not is_hub(place)


def is_far(place: object) -> bool:
    """Return whether a place is not on this machine."""
    return is_hub(place) or is_object(place)


def open_store(uri: str, options: PublishOptions) -> Store:
    """Return the store that an address names; nothing is asked yet."""
    if is_hub(uri):
        from lingconv.hub.repository import Repository  # with huggingface_hub

        return Repository(parse_address(uri), options)
    from lingconv.bucket import Bucket  # with fsspec

    folder = uri.rpartition("/")[0] if uri.endswith(SUFFIX) else uri
    return Bucket(folder.rstrip("/"))


def staging_of(uri: str, staging: Path | None) -> Path:
    """Return where files are kept until a store has them: the same for the same address."""
    if is_hub(uri):
        return staging_folder(parse_address(uri), staging)
    folder, _, name = uri.rpartition("/") if uri.endswith(SUFFIX) else (uri, "", "")
    return staging_base(staging) / re.sub(r"[^A-Za-z0-9.]+", "--", folder.rstrip("/")) / name
