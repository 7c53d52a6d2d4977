"""Places to read from or to send to, from what the user typed."""

import re
from pathlib import Path

from lingconv.errors import UsageError
from lingconv.storage import Storage
from lingconv.storage.file_names import SUFFIX
from lingconv.storage.hub.address import SCHEME, is_hub, parse_address, staging_base, staging_folder
from lingconv.storage.local import LocalStorage
from lingconv.storage.upload_target import PublishOptions, UploadTarget


def is_object(place: object) -> bool:
    """Return whether a place is meant to be in an object store: `scheme://`, but not the Hub's."""
    return bool(re.match(r"[a-z][a-z0-9+.-]*://", str(place))) and not is_hub(place)


def is_remote(place: object) -> bool:
    """Return whether a place is not on this machine."""
    return is_hub(place) or is_object(place)


def open_upload_target(uri: str, options: PublishOptions) -> UploadTarget:
    """Return the store that an address names; nothing is asked yet."""
    if is_hub(uri):
        from lingconv.storage.hub.repository import Repository  # with huggingface_hub

        return Repository(parse_address(uri), options)
    from lingconv.storage.object_upload import ObjectUpload  # with fsspec

    folder = uri.rpartition("/")[0] if uri.endswith(SUFFIX) else uri
    return ObjectUpload(folder.rstrip("/"))


def staging_folder_of(uri: str, staging: Path | None) -> Path:
    """Return where files are kept until a store has them: the same for the same address."""
    if is_hub(uri):
        return staging_folder(parse_address(uri), staging)
    folder, _, name = uri.rpartition("/") if uri.endswith(SUFFIX) else (uri, "", "")
    return staging_base(staging) / re.sub(r"[^A-Za-z0-9.]+", "--", folder.rstrip("/")) / name


def open_storage(source: str | Path) -> tuple[Storage, str]:
    """Return the folder that `source` is or lies in, and its name there where it is a GGUF file.

    Raises UsageError when there is none.
    """
    if is_hub(source):
        from lingconv.storage.hub import (
            storage as hub,  # with huggingface_hub, which local work does not need
        )

        return hub.open_address(str(source), SUFFIX)
    if is_object(source):
        from lingconv.storage.object_store import ObjectStorage  # with fsspec and its client

        folder, _, name = str(source).rpartition("/")
        is_file = name.endswith(SUFFIX)
        return ObjectStorage(folder if is_file else str(source)), name if is_file else ""
    root = Path(source)
    if root.is_file() and root.suffix == SUFFIX:
        return LocalStorage(root.parent, str(source), root.name), root.name
    if not root.is_dir():
        hint = ""
        if not root.is_absolute() and str(source).count("/") == 1:
            hint = f"for the Hub, write `{SCHEME}{source}`"
        raise UsageError(f"{source} is neither a folder nor a GGUF file", hint=hint)
    return LocalStorage(root), ""
