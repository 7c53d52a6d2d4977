"""Addresses on the Hub: `hf://org/name[@rev][/path]`, or the URL of a page of it.

Whatever does not begin like one is a local path; nothing is guessed.
"""

import os
from pathlib import Path
from typing import NamedTuple

from lingconv.errors import UsageError

SCHEME = "hf://"
_FORM = "write it as `hf://org/name`, `hf://org/name@revision` or `hf://org/name@revision/path`"


class HubAddress(NamedTuple):
    """A model repository, a revision of it ("" is its main branch), and a path inside it."""

    repository: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        """Return the address as it is written."""
        revision = f"@{self.revision}" if self.revision else ""
        path = f"/{self.path}" if self.path else ""
        return f"{SCHEME}{self.repository}{revision}{path}"


def is_hub(place: object) -> bool:
    """Return whether a place is meant to be on the Hub."""
    return str(place).startswith((SCHEME, "https://", "http://"))


def parse_address(text: str) -> HubAddress:
    """Return the address that `text` writes; raise UsageError when it is none of a model."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        found = parse_hf_uri(text)
    except HfUriError as exc:
        raise UsageError(f"{text} is no address on the Hub: {exc}", hint=_FORM) from exc
    if found.type != "model":
        raise UsageError(f"{text} is a {found.type}, not a model", hint=_FORM)
    return HubAddress(found.id, found.revision or "", found.path_in_repo.rstrip("/"))


def staging_folder(address: HubAddress, staging: Path | None) -> Path:
    """Return where files are kept until a repository has them: the same for the same address.

    Below `staging`, or the user's cache. An address may end with the name of a GGUF file.
    """
    revision = address.revision.replace("/", "--")
    name = address.repository.replace("/", "--") + (f"@{revision}" if revision else "")
    if address.path and (not address.path.endswith(".gguf") or "/" in address.path):
        raise UsageError(
            f"{address}: only whole repositories are written",
            hint="leave the path out, or name a GGUF file",
        )
    return staging_base(staging) / name / address.path


def staging_base(staging: Path | None) -> Path:
    """Return the folder of all such folders: `staging`, or one in the user's cache."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lingconv"
    return staging or base / "staging"
