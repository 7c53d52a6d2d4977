"""Differences between two folders of safetensors, as stored: no model family is involved.

Names, shapes, dtypes and values of tensors, keys of config.json, and the other files.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lingconv.checkpoint.decoder import F32, Decoder
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.stored_tensor import StoredTensor
from lingconv.encodings import encoding_of
from lingconv.encodings.plain import FLOATS
from lingconv.errors import CheckpointError
from lingconv.plans.tensor_map import ByteRange, StoredMatrix
from lingconv.storage import same_content
from lingconv.storage.aligned_buffers import Arena
from lingconv.storage.open_files import OpenFiles
from lingconv.verification.progress import Watcher

SCHEMA = "lingconv.diff/1"
_CHUNK_BYTES = 8 << 20
_MISSING = object()


class Difference(NamedTuple):
    """One difference.

    `kind` is only-in-a, only-in-b, shape, dtype, values, config or file.
    """

    kind: str
    name: str
    message: str


@dataclass(frozen=True, slots=True, repr=False)
class Diff:
    """All differences of two checkpoints."""

    a: str
    b: str
    tensors: int
    bytes_read: int
    differences: tuple[Difference, ...]

    def __repr__(self) -> str:
        return f"<Diff {self.a!r} and {self.b!r}: {len(self.differences)} differences>"

    def to_json(self) -> dict[str, Any]:
        """Return the differences as JSON values."""
        return {
            "schema": SCHEMA,
            "same": not self.differences,
            "a": self.a,
            "b": self.b,
            "tensors": self.tensors,
            "bytes_read": self.bytes_read,
            "differences": [difference._asdict() for difference in self.differences],
        }


def diff(a: Checkpoint, b: Checkpoint, *, values: bool, jobs: int, watcher: Watcher) -> Diff:
    """Return all differences; with `values` every tensor that both have is read.

    Raises CheckpointError if a shard cannot be read at all.
    """
    for checkpoint in (a, b):
        broken = [fault for fault in checkpoint.faults if fault.fatal]
        if broken:
            raise CheckpointError(f"{checkpoint.storage.uri} is broken", faults=broken)
    common = [name for name in a.tensors if name in b.tensors]
    found = [*_headers(a.tensors, b.tensors), *_config("", a.config, b.config), *_files(a, b)]
    nbytes = 0
    if values:
        alike = [name for name in common if _comparable(a.tensors[name], b.tensors[name])]
        nbytes = sum(a.tensors[name].nbytes + b.tensors[name].nbytes for name in alike)
        watcher.stage("values", nbytes)
        found += _values(a, b, alike, jobs, watcher)
    return Diff(a.storage.uri, b.storage.uri, len(common), nbytes, tuple(found))


def _headers(a: Mapping[str, StoredTensor], b: Mapping[str, StoredTensor]) -> Iterator[Difference]:
    """Yield the differences between headers: names, shapes, dtypes."""
    for name in sorted(a.keys() | b.keys()):
        one, other = a.get(name), b.get(name)
        if one is None or other is None:
            held = one or other
            kind = "only-in-a" if one else "only-in-b"
            yield Difference(kind, name, f"{held.dtype} {list(held.shape)}" if held else "")
            continue
        if one.shape != other.shape:
            yield Difference("shape", name, f"{list(one.shape)} and {list(other.shape)}")
        if one.dtype != other.dtype:
            yield Difference("dtype", name, f"{one.dtype} and {other.dtype}")


def _config(path: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the keys of config.json that differ, nested ones by their path."""
    for key in [*a, *(key for key in b if key not in a)]:
        one, other = a.get(key, _MISSING), b.get(key, _MISSING)
        name = f"{path}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _config(f"{name}.", one, other)
        elif one != other:
            yield Difference("config", name, f"{_show(one)} and {_show(other)}")


def _show(value: Any) -> str:
    text = "not there" if value is _MISSING else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _files(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    """Yield the files beside the weights that differ."""
    for name in sorted(a.side_files.keys() | b.side_files.keys()):
        if name not in b.side_files:
            yield Difference("file", name, "only in A")
        elif name not in a.side_files:
            yield Difference("file", name, "only in B")
        elif a.side_files[name].size != b.side_files[name].size:
            sizes = f"{a.side_files[name].size:,} and {b.side_files[name].size:,} bytes"
            yield Difference("file", name, sizes)
        elif not same_content(a.storage, b.storage, name):
            yield Difference("file", name, "other content of the same size")


def _comparable(one: StoredTensor, other: StoredTensor) -> bool:
    """Return whether values can be compared: as bytes, or both as numbers."""
    numbers = one.dtype in FLOATS and other.dtype in FLOATS
    return one.shape == other.shape and (one.dtype == other.dtype or numbers)


def _values(
    a: Checkpoint, b: Checkpoint, names: list[str], jobs: int, watcher: Watcher
) -> list[Difference]:
    """Return the tensors whose values differ; each is read by one thread, in chunks."""
    with (
        OpenFiles(a.storage) as a_files,
        OpenFiles(b.storage) as b_files,
        ThreadPoolExecutor(jobs, "diff") as threads,
    ):

        def compare(name: str) -> Difference | None:
            one, other = a.tensors[name], b.tensors[name]
            arena = Arena()
            message = _compare(one, other, Decoder(arena, a_files), Decoder(arena, b_files))
            watcher.advance(one.nbytes + other.nbytes)
            return Difference("values", name, message) if message else None

        return [difference for difference in threads.map(compare, names) if difference]


def _compare(one: StoredTensor, other: StoredTensor, left: Decoder, right: Decoder) -> str:
    """Return a text on how the values of two tensors of one shape differ, or ''."""
    if one.dtype == other.dtype and _same_bytes(one, other, left, right):
        return ""
    if one.dtype not in FLOATS:
        return "other bytes"
    differing, largest, total = 0, 0.0, 0
    for first, count in _chunks(_flat(one).shape[0], 4):
        a, b = (np.empty((count, 1), F32) for _ in range(2))
        left.fill(_flat(one).segments(first, count), 0, a)
        right.fill(_flat(other).segments(first, count), 0, b)
        unlike = a.view(np.uint32) != b.view(np.uint32)
        differing += int(np.count_nonzero(unlike))
        total += count
        with np.errstate(invalid="ignore", over="ignore"):
            gaps = np.abs(a - b)[unlike]
        largest = max(largest, float(np.nanmax(gaps, initial=0.0)))
    if not differing:
        return ""
    return f"{differing:,} of {total:,} elements, by up to {largest:.4g}"


def _same_bytes(one: StoredTensor, other: StoredTensor, left: Decoder, right: Decoder) -> bool:
    for first, count in _chunks(one.nbytes, 1):
        a, b = (np.empty(count, np.uint8) for _ in range(2))
        left.read(_flat(one), 0, first, a)
        right.read(_flat(other), 0, first, b)
        if not np.array_equal(a, b):
            return False
    return True


def _chunks(size: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of runs that are small enough to be read at once."""
    step = _CHUNK_BYTES // itemsize
    for first in range(0, size, step):
        yield first, min(step, size - first)


def _flat(tensor: StoredTensor) -> StoredMatrix:
    """Return a tensor as a vector of plain numbers, or of blocks if only bytes are compared."""
    extent = ByteRange(tensor.file, tensor.offset, tensor.nbytes)
    size = tensor.nbytes // tensor.dtype.itemsize
    return StoredMatrix(tensor.name, (size,), encoding_of(tensor.dtype), (extent,))
