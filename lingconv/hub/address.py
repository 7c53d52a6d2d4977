"""Addresses on the Hub: `hf://org/name[@rev][/path]`, or the URL of a page of it.

Whatever does not begin like one is a local path; nothing is guessed.
"""

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
