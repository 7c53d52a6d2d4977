"""What the files look like: names, headers and offsets, never the meaning of a tensor."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lingconv.encodings.dtypes import StoredType
from lingconv.errors import Fault


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


class HeaderError(ValueError):
    """The header as a whole cannot be used; single bad entries are faults instead."""


class CutShort(HeaderError):
    """The file ends before what it announces: it has to be fetched again."""


class BeyondEnd(Exception):
    """A sound entry of a header whose data goes on to byte `end`: the file ends before."""

    def __init__(self, end: int) -> None:
        super().__init__(end)
        self.end = end


def truncated_file(file: str, file_bytes: int, ends: Mapping[str, int]) -> Fault:
    """Return the one fault of a file whose tensors would go on to these bytes, by name."""
    last = max(ends, key=lambda name: ends[name])
    message = (
        f"truncated file: {file_bytes:,} bytes, its tensors reach to byte {ends[last]:,}"
        f" ({last[:200]})"
    )
    return Fault("truncated file", message, file, hint=FETCH_AGAIN)


FETCH_AGAIN = "fetch the file again"


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


def add_tensors(
    tensors: dict[str, StoredTensor], found: Iterable[StoredTensor], faults: list[Fault]
) -> None:
    """Add the tensors of one more file; one that is there already is a fault."""
    for tensor in found:
        twin = tensors.get(tensor.name)
        if twin is not None:
            message = f"is in {twin.file} too"
            faults.append(Fault("duplicate tensor", message, tensor.file, tensor.name))
            continue
        tensors[tensor.name] = tensor
