"""`TensorSpec`: name, type and shape of a tensor in an output file."""

from typing import NamedTuple

from lingconv.encodings.dtypes import StoredType


class TensorSpec(NamedTuple):
    """A tensor in an output file; `nbytes` follows from dtype and shape.

    `offsets` are the position of a chunk in the larger tensor; a whole tensor has none.
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
