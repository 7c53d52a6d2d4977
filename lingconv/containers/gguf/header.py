"""The GGUF container: key-values, tensor infos, then the data, each tensor padded to an alignment.

Reads headers without trusting them and lays files out before any data exists. Format: docs/gguf.md
in github.com/ggml-org/ggml, and what ggml/src/gguf.cpp of github.com/ggml-org/llama.cpp at 0c1e5709
refuses: holes, odd alignments, keys or tensors that come twice, names of 64 bytes and more.
"""

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lingconv.containers.stored_tensor import (
    BeyondEnd,
    CutShort,
    HeaderError,
    StoredTensor,
    check_coverage,
    truncated_file,
)
from lingconv.encodings.dtypes import DTYPES, GGML_TYPES, GgmlType, StoredType
from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.errors import Fault
from lingconv.errors.value_kinds import shown
from lingconv.plans.key_values import Metadata, Value, ValueType
from lingconv.storage.file_names import SUFFIX
from lingconv.storage.records import stand_in

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
SPLIT_NO = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS = "split.tensors.count"
# A vocabulary of 160,000 tokens and its merges take 7 MB; what is far beyond is no header.
MAX_HEADER_BYTES = 128 << 20
MAX_ARRAY_ITEMS = 4_000_000
# Far beyond any real file: a model has thousands of tensors, and some fifty keys.
MAX_TENSORS = 500_000
MAX_KEYS = 100_000
MAX_FAULTS = 100
MAX_NAME_BYTES = 63
MAX_AXES = 4
_CHUNK_BYTES = 1 << 20
_PEEK_BYTES = 256
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


_FORMATS = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_UINT32 = _FORMATS[ValueType.UINT32]
_UINT64 = _FORMATS[ValueType.UINT64]
_BY_ID = {kind.id: kind for kind in GgmlType}


class Header(NamedTuple):
    """What a file says before its data: key-values, tensors by offset, and what is wrong.

    `unread` are the names of tensors that a fault speaks of, which are not among the others.
    """

    metadata: dict[str, Value]
    tensors: list[StoredTensor]
    faults: list[Fault]
    unread: list[str]


def read_header(read: Callable[[int, int], bytes], file_bytes: int, file: str) -> Header:
    """Return the header of a file; `read` returns bytes from an offset and of a size.

    Only tensors that lie inside the file and whose shape fits their type are returned. Raises
    HeaderError when the header as a whole cannot be used.
    """
    cursor = _Cursor(read, file_bytes)
    num_tensors, num_keys = _read_counts(cursor)
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = _read_text(cursor)
        if key in metadata:
            raise HeaderError(f"key {shown(key)} comes twice")
        metadata[key] = _read_value(cursor, key)
    infos = [_read_info(cursor) for _ in range(num_tensors)]
    alignment = alignment_of(metadata)
    start = _padded(cursor.position, alignment)
    tensors, faults, unread = _place(infos, start, alignment, file_bytes, file)
    if not faults:
        faults, end = check_coverage(tensors, start, alignment)
        if file_bytes > end:
            message = f"{file_bytes - end:,} bytes behind the last tensor"
            faults.append(Fault("header", message, file, fatal=False))
    return Header(metadata, tensors, faults, unread)


class _Cursor:
    """Walks through a file's bytes, reading as much as it comes to need."""

    def __init__(self, read: Callable[[int, int], bytes], file_bytes: int) -> None:
        self.position = 0
        self.items = 0
        self._read = read
        self._file_bytes = file_bytes
        self._data = b""

    @property
    def left(self) -> int:
        """Bytes from here to the end of what may be a header."""
        return min(self._file_bytes, MAX_HEADER_BYTES) - self.position

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        end = self.position + count
        if end > len(self._data):
            self._fetch(end)
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def peek(self, count: int) -> bytes:
        """Return the next `count` bytes, or what there is of them, and stay where it is."""
        return self._read(self.position, min(count, self._file_bytes - self.position))

    def expect(self, nbytes: int, what: str) -> None:
        """Raise HeaderError when `what` of at least `nbytes` cannot be in what is left."""
        if nbytes > self.left:
            limit = "" if self._file_bytes <= MAX_HEADER_BYTES else " (or the header is too large)"
            raise CutShort(
                f"{what} at byte {self.position:,} takes at least {nbytes:,} bytes, the file ends"
                f" {max(self.left, 0):,} bytes on: truncated or damaged{limit}"
            )

    def _fetch(self, end: int) -> None:
        self.expect(end - self.position, "the header")
        size = max(end - len(self._data), _CHUNK_BYTES, len(self._data))
        self._data += self._read(len(self._data), size)
        if end > len(self._data):
            raise CutShort(f"file ends at byte {len(self._data):,}, within the header")


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Read what a file begins with; return how many tensors and key-values follow."""
    if instead := stand_in(cursor.peek(_PEEK_BYTES)):
        raise HeaderError(instead)
    cursor.expect(24, "a GGUF header")
    if cursor.take(4) != MAGIC:
        raise HeaderError("does not begin with `GGUF`")
    (version,) = _UINT32.unpack(cursor.take(4))
    if version not in (2, VERSION):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = " in big-endian byte order" if swapped in (1, 2, VERSION) else ""
        raise HeaderError(f"GGUF version {swapped if order else version}{order} is not read")
    (num_tensors,) = _UINT64.unpack(cursor.take(8))
    (num_keys,) = _UINT64.unpack(cursor.take(8))
    cursor.expect(
        num_keys * 13 + num_tensors * 24, f"{num_keys:,} keys and {num_tensors:,} tensors"
    )
    if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
        raise HeaderError(
            f"header announces {num_keys:,} keys and {num_tensors:,} tensors, at most"
            f" {MAX_KEYS:,} and {MAX_TENSORS:,} are read"
        )
    return num_tensors, num_keys


def _read_text(cursor: _Cursor) -> str:
    """Read a string; bytes that are no UTF-8 survive as surrogates."""
    (length,) = _UINT64.unpack(cursor.take(8))
    if length > cursor.left:
        cursor.expect(length, "a string")
    return cursor.take(length).decode("utf-8", "surrogateescape")


def _read_type(cursor: _Cursor, key: str) -> ValueType:
    (number,) = _UINT32.unpack(cursor.take(4))
    try:
        return ValueType(number)
    except ValueError as exc:
        raise HeaderError(f"key {shown(key)} has the unknown value type {number}") from exc


def _read_value(cursor: _Cursor, key: str) -> Value:
    kind = _read_type(cursor, key)
    if kind == ValueType.STRING:
        return Value(kind, _read_text(cursor))
    if kind == ValueType.ARRAY:
        return _read_array(cursor, key)
    layout = _FORMATS[kind]
    return Value(kind, layout.unpack(cursor.take(layout.size))[0])


def _read_array(cursor: _Cursor, key: str) -> Value:
    item = _read_type(cursor, key)
    (count,) = _UINT64.unpack(cursor.take(8))
    cursor.items += count
    if cursor.items > MAX_ARRAY_ITEMS:
        raise HeaderError(f"key {shown(key)} brings the arrays to {cursor.items:,} items, too many")
    if item == ValueType.STRING:
        cursor.expect(8 * count, f"{shown(key)} with {count:,} strings")
        return Value(ValueType.ARRAY, [_read_text(cursor) for _ in range(count)], item)
    if item == ValueType.ARRAY:
        raise HeaderError(f"key {shown(key)} is an array of arrays, which is not read")
    size = _FORMATS[item].size
    cursor.expect(size * count, f"{shown(key)} with {count:,} numbers")
    found = struct.unpack(f"<{count}{_FORMATS[item].format[1:]}", cursor.take(size * count))
    return Value(ValueType.ARRAY, list(found), item)


class _Info(NamedTuple):
    """A tensor as the header lists it; `shape` as numpy counts, `offset` from the data's start."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _read_info(cursor: _Cursor) -> _Info:
    name = _read_text(cursor)
    (num_axes,) = _UINT32.unpack(cursor.take(4))
    if num_axes > MAX_AXES:
        raise HeaderError(f"tensor {shown(name)} has {num_axes:,} axes, at most 4 are possible")
    sizes = struct.unpack(f"<{num_axes}Q", cursor.take(8 * num_axes))
    kind, offset = struct.unpack("<IQ", cursor.take(12))
    return _Info(name, sizes[::-1], kind, offset)


def alignment_of(metadata: Metadata) -> int:
    """Return the alignment of a file's data in bytes; raise HeaderError for an impossible one."""
    alignment = metadata[ALIGNMENT_KEY].data if ALIGNMENT_KEY in metadata else DEFAULT_ALIGNMENT
    # A power of two, and no larger than a huge page: padding is written too.
    if type(alignment) is not int or not 0 < alignment <= 1 << 21 or alignment & (alignment - 1):
        raise HeaderError(f"`{ALIGNMENT_KEY}` is {shown(alignment)}, not a power of two")
    return alignment


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _place(
    infos: Sequence[_Info], start: int, alignment: int, file_bytes: int, file: str
) -> tuple[list[StoredTensor], list[Fault], list[str]]:
    """Return the tensors in the order of their bytes, a fault for each impossible one, and these.

    A file that ends before its tensors do is one fault.
    """
    tensors: list[StoredTensor] = []
    faults: list[Fault] = []
    unread: list[str] = []
    ends: dict[str, int] = {}
    seen: set[str] = set()
    for info in infos:
        if len(faults) == MAX_FAULTS:
            faults.append(Fault("header", "has more faults than these", file))
            break
        try:
            if info.name in seen:
                raise HeaderError("tensor is listed twice in one header")
            seen.add(info.name)
            tensors.append(_place_one(info, start, alignment, file_bytes, file))
        except BeyondEnd as exc:
            unread.append(info.name)
            ends[info.name] = exc.end
        except HeaderError as exc:
            unread.append(info.name)
            faults.append(Fault("header", str(exc), file, info.name[:200]))
    if ends:
        faults.append(truncated_file(file, file_bytes, ends))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    return tensors, faults, unread


def _place_one(info: _Info, start: int, alignment: int, file_bytes: int, file: str) -> StoredTensor:
    if len(info.name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise HeaderError(f"name is longer than {MAX_NAME_BYTES} bytes")
    kind = _BY_ID.get(info.type)
    if kind is None:
        raise HeaderError(f"has the unknown ggml type {info.type}")
    cols = info.shape[-1] if info.shape else 1
    if cols % kind.elements:
        raise HeaderError(f"has rows of {cols:,} elements, {kind} needs blocks of {kind.elements}")
    if info.offset % alignment:
        raise HeaderError(f"starts at byte {info.offset:,} of the data, no multiple of {alignment}")
    nbytes = kind.nbytes_of(info.shape)
    if start + info.offset + nbytes > file_bytes:
        raise BeyondEnd(start + info.offset + nbytes)
    return StoredTensor(
        info.name, _stored_type(kind), info.shape, file, start + info.offset, nbytes
    )


def _stored_type(kind: GgmlType) -> StoredType:
    return kind if kind.is_quantized else DTYPES[kind]


def build_header(metadata: Metadata, specs: Sequence[TensorSpec]) -> bytes:
    """Return the bytes before the data of a file that holds `specs` in that order.

    Padded to the alignment, so that the data begins right behind.
    """
    alignment = alignment_of(metadata)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(specs), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _UINT32.pack(value.type), *_value(value)]
    offset = 0
    for spec in specs:
        kind = GGML_TYPES[spec.dtype]
        if len(spec.name.encode()) > MAX_NAME_BYTES:
            raise HeaderError(f"{spec.name}: name is longer than {MAX_NAME_BYTES} bytes")
        sizes = spec.shape[::-1]
        parts += [
            _text(spec.name),
            struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind.id, offset),
        ]
        offset += padded_bytes(spec, alignment)
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def padded_bytes(spec: TensorSpec, alignment: int) -> int:
    """Return the bytes of a tensor and of the padding behind it."""
    return _padded(spec.nbytes, alignment)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return _UINT64.pack(len(data)) + data


def _value(value: Value) -> Iterable[bytes]:
    if value.type == ValueType.STRING:
        return [_text(value.data)]
    if value.type != ValueType.ARRAY:
        return [_FORMATS[value.type].pack(value.data)]
    assert value.item is not None  # noqa: S101
    prefix = struct.pack("<IQ", value.item, len(value.data))
    if value.item == ValueType.STRING:
        return [prefix, *map(_text, value.data)]
    layout = f"<{len(value.data)}{_FORMATS[value.item].format[1:]}"
    return [prefix, struct.pack(layout, *value.data)]


def check_value(key: str, value: Value) -> None:
    """Raise HeaderError for a value that cannot be written as the type that it is said to be."""
    try:
        list(_value(value))
    except (struct.error, OverflowError, TypeError, AttributeError, UnicodeError) as exc:
        kind = value.type.name.lower() + (f" of {value.item.name.lower()}s" if value.item else "")
        raise HeaderError(f"`{key}` is {shown(value.data)}, no {kind} of GGUF") from exc


def shard_name(stem: str, index: int, count: int) -> str:
    """Return the name of file `index` (from 0) of `count`, as llama.cpp's gguf-split spells it."""
    return f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}{SUFFIX}"


def first_sibling(name: str) -> str:
    """Return the name of the first of the files that belong to the one called `name`."""
    match = _SPLIT_NAME.fullmatch(name)
    if match is None or int(match["count"]) < 2:
        return name
    return shard_name(match["stem"], 0, int(match["count"]))


def siblings(name: str) -> list[str]:
    """Return the names of all files that belong to the one called `name`, in their order."""
    match = _SPLIT_NAME.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    return (
        [shard_name(match["stem"], index, count) for index in range(count)] if count > 1 else [name]
    )


def with_split(metadata: Metadata, index: int, count: int, num_tensors: int) -> dict[str, Value]:
    """Return the key-values of file `index` of `count`: the first one carries the model's own."""
    if count == 1:
        return dict(metadata)
    split = {
        SPLIT_NO: Value(ValueType.UINT16, index),
        SPLIT_COUNT: Value(ValueType.UINT16, count),
        SPLIT_TENSORS: Value(ValueType.INT32, num_tensors),
    }
    return {**(metadata if index == 0 else _shared(metadata)), **split}


def _shared(metadata: Metadata) -> dict[str, Value]:
    """Return what every file of a split must repeat: where its tensors are depends on it."""
    return {ALIGNMENT_KEY: metadata[ALIGNMENT_KEY]} if ALIGNMENT_KEY in metadata else {}
