"""Which version of a checkpoint is that? What is said about it where it lies."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lingconv.errors import LingconvError
from lingconv.errors.value_kinds import Field, Kind, Schema, checked
from lingconv.storage import Storage
from lingconv.storage.file_names import RECORD_NAME
from lingconv.storage.records import read_record

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


RECORD_FIELDS: Schema = {
    "source": Field((Kind.TEXT,)),
    "revision": Field((Kind.TEXT,)),
    "sources": Field((Kind.LIST,), items=(Kind.OBJECT,)),
    "source_record": Field((Kind.OBJECT,)),
    "options": Field((Kind.OBJECT,)),
    "encodings": Field((Kind.OBJECT,), items=(Kind.INT,)),
    "dropped": Field((Kind.OBJECT,), items=(Kind.OBJECT,)),
}


def read_source_record(storage: Storage) -> dict[str, Any] | None:
    """Return the lingconv.json of a source, or None when it has none that says anything.

    It is what others wrote: what is of no use in it is left out, and nothing else depends on it.
    """
    with suppress(LingconvError):
        return _usable(read_record(storage, RECORD_NAME)) or None
    return None


def _usable(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record, and those that it was made from, without what is of another type."""
    good, _ = checked(record, RECORD_FIELDS, RECORD_NAME)
    good["sources"] = [one for one in good.get("sources", ()) if isinstance(one.get("uri"), str)]
    if not good["sources"]:
        del good["sources"]
    if "source_record" in good:
        good["source_record"] = _usable(good["source_record"])
    return good


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a lingconv.json that may be published: repositories are named, folders by name alone.

    Where a checkpoint lay on somebody's disk is nobody's business.
    """
    found = _usable(record)
    if "source" in found:
        found["source"] = _told(found["source"])
    if "sources" in found:
        found["sources"] = [{**source, "uri": _told(source["uri"])} for source in found["sources"]]
    if "source_record" in found:
        found["source_record"] = without_paths(found["source_record"])
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
