"""What the files look like: names, headers and offsets, never the meaning of a tensor."""

from collections.abc import Iterable
from typing import NamedTuple

from lingconv.dtypes import StoredType
from lingconv.errors import Fault

# Disk blocks and pages: where data starts at a multiple, it can be written past the page cache.
BLOCK_BYTES = 4096


class Box(NamedTuple):
    """A part of a tensor in its file: where it begins on each axis, its sizes, and its bytes.

    Where there is a `pitch`, its columns begin so many elements apart, instead of its rows.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    pitch: int = 0


class StoredTensor(NamedTuple):
    """A tensor in its file: `offset` counts from the start of the file, sizes are in bytes.

    One that is cut into `boxes` has no place of its own; `file` is where its first part is. `crc`
    is the CRC-32 that the file states, or 0.
    """

    name: str
    dtype: StoredType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    boxes: tuple[Box, ...] = ()
    crc: int = 0


class TensorSpec(NamedTuple):
    """A tensor that a file is going to hold; `nbytes` follows from dtype and shape.

    `offsets` say where it begins in a larger tensor of which it is a chunk; a whole one has none.
    """

    name: str
    dtype: StoredType
    shape: tuple[int, ...]
    nbytes: int
    offsets: tuple[int, ...] = ()


def tensor_spec(
    name: str, dtype: StoredType, shape: tuple[int, ...], offsets: tuple[int, ...] = ()
) -> TensorSpec:
    """Return the spec of a tensor, with its size in bytes."""
    return TensorSpec(name, dtype, shape, dtype.nbytes_of(shape), offsets)


class HeaderError(ValueError):
    """The header as a whole cannot be used; single bad entries are faults instead."""


def check_coverage(
    tensors: Iterable[StoredTensor], start: int, alignment: int = 1
) -> tuple[list[Fault], int]:
    """Return the overlaps and holes between tensors in the order of their bytes, and their end.

    The first one has to be at `start`, each other one at the next multiple of `alignment`.
    """
    faults = []
    position = start
    for tensor in tensors:
        if tensor.offset < position:
            message = "data overlaps the tensor before it"
            faults.append(Fault("header", message, tensor.file, tensor.name))
        elif tensor.offset > position:
            message = f"hole of {tensor.offset - position:,} bytes before it"
            faults.append(Fault("header", message, tensor.file, tensor.name))
        end = tensor.offset + tensor.nbytes
        position = max(position, -(-end // alignment) * alignment)
    return faults, position
