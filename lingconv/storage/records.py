"""JSON objects that a checkpoint's files hold: bounded, unambiguous, and of the types they must be.

A key that comes twice, a lone surrogate, a number of 5,000 digits and an object nested a thousand
deep are all JSON to one reader or another; what lingconv goes by has to be the same to everybody.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from lingconv.errors import CheckpointError
from lingconv.errors.value_kinds import Schema, checked, shown
from lingconv.storage import Storage

MAX_DEPTH = 100
# Real ones: an index of a trillion parameters 12 MB, a tokenizer 35 MB, a config.json that lists
# every expert that is not quantized 6 MB.
MAX_RECORD_BYTES = 64 << 20
MAX_INDEX_BYTES = 250_000_000  # the Hub's own limit for an index (huggingface.js)
MAX_TOKENIZER_BYTES = 250_000_000
MAX_TEXT_BYTES = 16 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# github.com/git-lfs/git-lfs, docs/spec.md: a version, an oid, a size, and few keys more.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_POINTER_BYTES = range(100, 1024)
_PAGES = (b"<!doctype html", b"<html")


class RecordError(ValueError):
    """Bytes are no JSON object that everybody reads alike; the text goes on where a name ends."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object that bytes hold; raise RecordError for anything else."""
    if pointer := lfs_pointer(data):
        raise RecordError(pointer)
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError as exc:
        raise RecordError(f"is no UTF-8: byte {exc.start:,} is {data[exc.start]:#04x}") from exc
    except RecursionError as exc:
        raise RecordError(f"is nested more than {MAX_DEPTH} deep") from exc
    except RecordError:
        raise
    except ValueError as exc:
        raise RecordError(f"is not JSON: {_reason(exc)}") from exc
    if not isinstance(value, dict):
        raise RecordError("is not a JSON object")
    _check_depth(value, data)
    _check_text(value, data)
    return value


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        mark = "a byte order mark stands before it" if "BOM" in error.msg else error.msg
        return f"{mark} (line {error.lineno}, column {error.colno})"
    return "a number has more than 4,300 digits"  # sys.get_int_max_str_digits


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise RecordError(f"has the key {shown(twice)} twice")
    return found


def _check_depth(value: Any, data: bytes) -> None:
    if data.count(b"{") + data.count(b"[") <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for held in level for item in _items(held) if isinstance(item, (dict, list))]
        if not level:
            return
    raise RecordError(f"is nested more than {MAX_DEPTH} deep")


def _items(value: dict[str, Any] | list[Any]) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


def _check_text(value: Any, data: bytes) -> None:
    """Raise RecordError for half a character, which no file can be written with."""
    if _SURROGATE.search(data) is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        near = str(exc.object)[max(0, exc.start - 30) : exc.start]
        raise RecordError(f"has half a character (a lone surrogate) behind {near!r}") from exc


def lfs_pointer(data: bytes) -> str:
    """Return what is said of a file that Git LFS has not fetched; empty for every other."""
    if not data.startswith(_LFS_POINTER):
        return ""
    return "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"


def stand_in(beginning: bytes) -> str:
    """Return what stands in place of a weight file that was never fetched; empty for any other."""
    if beginning[:20].lstrip().lower().startswith(_PAGES):
        return "is an HTML page, not the file itself: fetch it again"
    return lfs_pointer(beginning)


def read_bytes(storage: Storage, name: str, most: int = MAX_RECORD_BYTES) -> bytes:
    """Return a whole small file; raise CheckpointError when it has more than `most` bytes."""
    size = storage.stat(name).size
    if size > most:
        raise CheckpointError(
            f"{name} has {size:,} bytes, at most {most:,} are read",
            hint="restore the file, or remove it from the folder",
        )
    return storage.read(name, 0, most)


def read_text(storage: Storage, name: str, most: int = MAX_TEXT_BYTES) -> str:
    """Return a small text file; what is no UTF-8 in it becomes a replacement character."""
    return read_bytes(storage, name, most).decode("utf-8", "replace")


def read_record(storage: Storage, name: str, most: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises CheckpointError that names the file when it is not there, too large, or no such object.
    """
    try:
        return parse_object(read_bytes(storage, name, most))
    except RecordError as exc:
        raise CheckpointError(f"{name} {exc}") from exc


def read_checked(
    storage: Storage, name: str, schema: Schema, most: int = MAX_RECORD_BYTES
) -> dict[str, Any]:
    """Return the JSON object in a file, checked; raise CheckpointError with every wrong key."""
    record, faults = checked(read_record(storage, name, most), schema, name)
    if faults:
        raise CheckpointError(f"{name} cannot be used", faults=faults, hint="mend these keys")
    return record
