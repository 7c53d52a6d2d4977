"""A Checkpoint from a path or an address; reads headers only.

Opening never fails on a broken file: every error or warning is a Fault, so that `inspect` can show
all of them and `plan` can refuse with the whole list.
"""

from dataclasses import replace
from pathlib import Path

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.registry import detect
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.errors import UsageError
from lingconv.storage import Storage
from lingconv.storage.locations import open_storage
from lingconv.storage.provenance import find_revision


def open_checkpoint(source: str | Path, overrides: SourceOverrides | None = None) -> Checkpoint:
    """Return the checkpoint at a local path, on the Hub or in an object store.

    Raises UsageError if there is no such folder, or if it has several checkpoints, and
    CheckpointError if it has none.
    """
    storage, file = open_storage(source)
    checkpoint = read_checkpoint(storage, file, overrides)
    return replace(checkpoint, revision=find_revision(storage))


def read_checkpoint(
    storage: Storage, file: str = "", overrides: SourceOverrides | None = None
) -> Checkpoint:
    """Return the only checkpoint in a storage, or the one to which `file` belongs."""
    form, places = detect(storage, file)
    if len(places) > 1:
        raise UsageError(
            f"{storage.uri} holds {len(places)} models in {form.name} format",
            details=places[:10],
            hint="name the one to read",
        )
    return form.read(storage, places[0], overrides or SourceOverrides())


def read_all(storage: Storage) -> list[Checkpoint]:
    """Return every checkpoint in a folder; there may be several models side by side in it."""
    form, places = detect(storage)
    return [form.read(storage, place, SourceOverrides()) for place in places]
