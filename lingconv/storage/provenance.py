"""Which version of a checkpoint is that? What is said about it where it lies."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lingconv.errors import LingconvError
from lingconv.storage import Storage

_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")
_ADDRESS = re.compile(r"hf://(?:models/)?([^/@]+)/([^/@]+)(?:@([0-9a-f]{40})(?:/|$))?")
_ITERATION = re.compile(r"(?:^|/)iter_(\d+)/?$")
_TRACKER = "latest_checkpointed_iteration.txt"
# huggingface_hub notes there which commit a file was downloaded from: `hf download --local-dir`.
_DOWNLOADED = ".cache/huggingface/download/config.json.metadata"


def repository_of(uri: str) -> str:
    """Return the Hub repository that `uri` names or whose cached snapshot it is; empty if none."""
    found = _ADDRESS.match(uri) or _SNAPSHOT.search(uri)
    return f"{found[1]}/{found[2]}" if found else ""


def name_of(uri: str) -> str:
    """Return what a checkpoint is called: its repository's name, or its folder's."""
    return repository_of(uri).rpartition("/")[2] or Path(uri).absolute().name


def public_name(uri: str) -> str:
    """Return what everybody may read of a checkpoint's place: its repository, or its own name."""
    return repository_of(uri) or uri.rstrip("/").rpartition("/")[2]


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a lingconv.json that may be published: repositories are named, folders by name alone.

    Where a checkpoint lay on somebody's disk is nobody's business.
    """
    found = dict(record)
    found["source"] = _told(record["source"])
    if "sources" in record:
        found["sources"] = [{**source, "uri": _told(source["uri"])} for source in record["sources"]]
    if isinstance(record.get("source_record"), dict) and "source" in record["source_record"]:
        found["source_record"] = without_paths(record["source_record"])
    return found


def _told(uri: str) -> str:
    return uri if _ADDRESS.match(uri) else public_name(uri)


def find_revision(storage: Storage) -> str:
    """Return the commit or the training iteration of a checkpoint; empty when nothing says so."""
    found = _ADDRESS.match(storage.uri) or _SNAPSHOT.search(storage.uri)
    if found and found[3]:
        return f"commit {found[3]}"
    if found := _ITERATION.search(storage.uri):
        return f"iteration {int(found[1])}"
    commit = _first_line(storage, _DOWNLOADED)
    if re.fullmatch(r"[0-9a-f]{40}", commit):
        return f"commit {commit}"
    iteration = _first_line(storage, _TRACKER)
    return f"iteration {int(iteration)}" if re.fullmatch(r"\d{1,12}", iteration) else ""


def _first_line(storage: Storage, name: str) -> str:
    with suppress(LingconvError, UnicodeDecodeError, IndexError):
        return storage.read(name, 0, 256).decode().splitlines()[0].strip()
    return ""
