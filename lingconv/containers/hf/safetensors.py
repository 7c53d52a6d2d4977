"""The safetensors container: an 8-byte length, a JSON header, the data.

Reads headers without trusting them and lays files out before any data exists. Format:
https://github.com/huggingface/safetensors#format. No holes, no overlaps, header at most 100 MB.
The real library's writer needs a whole shard in memory, which is why this module exists.
"""

import json
import math
import re
import struct
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from lingconv.containers.stored_tensor import (
    BeyondEnd,
    CutShort,
    HeaderError,
    StoredTensor,
    check_coverage,
    truncated_file,
)
from lingconv.encodings.dtypes import DTYPES
from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.errors import Fault
from lingconv.errors.value_kinds import shown
from lingconv.storage import BLOCK_BYTES

MAX_HEADER_BYTES = 100_000_000  # safetensors/src/tensor.rs: MAX_HEADER_SIZE
MAX_TENSORS = 500_000  # in one file; Ling-1T has 125,000 in FP8, scales counted
MAX_AXES = 64
MAX_SIZE = (1 << 63) - 1  # safetensors counts in 64 bits
MAX_NAME = 1000  # letters of a name that are shown
MAX_FAULTS = 100  # of one header: more of the same help nobody
METADATA_KEY = "__metadata__"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_FIELDS = {"dtype", "shape", "data_offsets"}
_FIELD_SPELLINGS = tuple(f'"{field}"'.encode() for field in sorted(_FIELDS))
_OFFSETS = b'"data_offsets"'
# What an entry is spelled with, and at most how often; some more are in the metadata's texts.
_MARKS = {b"{": 2, b"[": 3, b":": 6, b",": 5 + MAX_AXES}
_MARKS_OF_METADATA = 100_000


class Header(NamedTuple):
    """The tensors of a file by offset, what is wrong with it, and what it lists besides.

    `unread` are the names of tensors that a fault speaks of, which are not among the others.
    """

    tensors: list[StoredTensor]
    faults: list[Fault]
    unread: list[str]


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Return the length of the JSON header, from the first 8 bytes of a file.

    Raises HeaderError when the file is too short for the header that it announces.
    """
    if len(prefix) < 8:
        raise CutShort(f"file of {file_bytes} bytes is too short for a safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"header length {length:,} is over the format's limit of 100 MB")
    if length > file_bytes - 8:
        raise CutShort(
            f"truncated: header says {length:,} bytes, the file holds {file_bytes - 8:,} after it"
        )
    return int(length)


def parse_header(header: bytes, file_bytes: int, file: str) -> Header:
    """Return the tensors that a header describes, sorted by offset, and what is wrong with it.

    Only entries that lie inside the file and whose size fits dtype and shape are returned; a file
    that ends before its tensors do is one fault. Raises HeaderError when the JSON itself is
    unusable.
    """
    entries: list[StoredTensor] = []
    faults: list[Fault] = []
    start = 8 + len(header)
    seen: set[str] = set()
    unread: list[str] = []
    ends: dict[str, int] = {}
    for name, value in _load_entries(header):
        if name == METADATA_KEY:
            continue
        if len(faults) == MAX_FAULTS:
            faults.append(Fault("header", "has more faults than these", file))
            break
        if name in seen:
            faults.append(Fault("header", "tensor is listed twice in one header", file, name))
            continue
        seen.add(name)
        try:
            entries.append(_parse_entry(name, value, file, start, file_bytes))
        except BeyondEnd as exc:
            unread.append(name)
            ends[name] = exc.end
        except HeaderError as exc:
            unread.append(name)
            faults.append(Fault("header", str(exc), file, name[:MAX_NAME]))
    if ends:
        faults.append(truncated_file(file, file_bytes, ends))
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    if not faults:
        faults, end = check_coverage(entries, start)
        if end != file_bytes:
            message = f"{file_bytes - end:,} bytes behind the last tensor"
            faults.append(Fault("header", message, file))
    return Header(entries, faults, unread)


def _load_entries(header: bytes) -> Iterable[tuple[str, Any]]:
    """Parse the JSON object; keys that occur twice come twice."""
    _check_counts(header)
    try:
        text = header.decode("utf-8")
        entries = json.loads(text)
        if isinstance(entries, dict) and not _may_repeat_keys(header, entries):
            return entries.items()
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as exc:
        raise HeaderError(f"header is not JSON in UTF-8: {str(exc)[:100]}") from exc
    if not isinstance(pairs, _Pairs):
        raise HeaderError("header is not a JSON object")
    return [(name, _unique(value)) for name, value in pairs]


def _check_counts(header: bytes) -> None:
    """Raise HeaderError for a header that is no list of tensors, before anything is made of it.

    Parsed, 90 MB of empty entries take gigabytes.
    """
    count = header.count(_OFFSETS)
    if count > MAX_TENSORS:
        raise HeaderError(f"header lists {count:,} tensors, at most {MAX_TENSORS:,} are read")
    for mark, most in _MARKS.items():
        found = header.count(mark)
        if found > most * count + _MARKS_OF_METADATA:
            raise HeaderError(
                f"header is no list of tensors: {found:,} times `{mark.decode()}` for the"
                f" data_offsets of {count:,}"
            )


def _may_repeat_keys(header: bytes, entries: dict[str, Any]) -> bool:
    """Return whether a key may occur twice, which json.loads passes over: then look closely.

    Every entry spells its three fields once, so more of them than entries means repeats.
    """
    count = len(entries) - (METADATA_KEY in entries)
    return any(header.count(field) != count for field in _FIELD_SPELLINGS)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its key-value pairs."""


def _unique(value: Any) -> Any:
    """Return an object as a dict, or as nothing usable when it repeats a key."""
    if not isinstance(value, _Pairs):
        return value
    return dict(value) if len(dict(value)) == len(value) else None


def _parse_entry(name: str, value: Any, file: str, start: int, file_bytes: int) -> StoredTensor:
    if not _is_text(name):
        raise HeaderError("name has half a character (a lone surrogate)")
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise HeaderError("entry must be an object with exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise HeaderError(f"unknown dtype {shown(value['dtype'])}")
    shape = _sizes(value["shape"], "shape")
    offsets = _sizes(value["data_offsets"], "data_offsets")
    if len(offsets) != 2:
        raise HeaderError("data_offsets must have two numbers")
    begin, end = offsets
    if len(shape) > MAX_AXES:
        raise HeaderError(f"shape has {len(shape):,} axes, at most {MAX_AXES} are read")
    bits = math.prod(shape) * dtype.bits
    fits = bits % 8 == 0 and bits // 8 == end - begin
    if fits and end > file_bytes - start:
        raise BeyondEnd(start + end)
    if not begin <= end <= file_bytes - start:
        raise HeaderError(
            f"data_offsets [{begin}, {end}] are outside the {file_bytes - start:,} bytes of data"
        )
    if not fits:
        raise HeaderError(f"{dtype} {list(shape)} does not take {end - begin:,} bytes")
    return StoredTensor(name, dtype, shape, file, start + begin, end - begin)


def _is_text(name: str) -> bool:
    """Return whether a name can be written: JSON may escape half a character."""
    return name.isascii() or name.encode("utf-8", "replace").decode() == name


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise HeaderError(f"{what} is not a list")
    for size in value:
        if type(size) is not int or not 0 <= size <= MAX_SIZE:
            raise HeaderError(f"{what} has {shown(size)} where a size must be")
    return tuple(value)


def storage_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return the order in which a file holds its tensors: whole blocks first, then the rest.

    Readers map a file and view it as a dtype, which needs aligned offsets, and the format has no
    padding. Tensors of whole blocks keep each other aligned, to any dtype and to the disk; behind
    them, falling item size aligns whatever is left.
    """
    return sorted(specs, key=_storage_rank)


def _storage_rank(spec: TensorSpec) -> tuple[bool, int]:
    if spec.nbytes % BLOCK_BYTES == 0:
        return False, 0
    return True, -spec.dtype.itemsize


def build_header(specs: Iterable[TensorSpec]) -> bytes:
    """Return the length prefix and header of a file that holds `specs` in that order.

    Padded with spaces to whole blocks, so that the data starts aligned.
    """
    entries: dict[str, Any] = {METADATA_KEY: {"format": "pt"}}
    position = 0
    for spec in specs:
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % BLOCK_BYTES)
    if len(header) > MAX_HEADER_BYTES:
        raise HeaderError(f"header of {len(header):,} bytes is over the format's limit of 100 MB")
    return struct.pack("<Q", len(header)) + header


def shard_name(index: int, count: int) -> str:
    """Return the name of shard `index` (from 0) of `count`, as transformers spells it."""
    return SINGLE_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def siblings(names: Collection[str]) -> list[str]:
    """Return the names of all shards of a model, of which some are called `names`.

    They are numbered `-00001-of-00003`; empty where the names do not agree in what they count.
    """
    matches = [match for name in names if (match := _NUMBERED.fullmatch(name))]
    found = {(match["stem"], int(match["count"])) for match in matches}
    if len(found) != 1:
        return []
    ((stem, count),) = found
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
