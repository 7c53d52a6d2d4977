"""`TensorSpec`: name, type and shape of a tensor that a file is going to hold."""

from typing import NamedTuple

from lingconv.encodings.dtypes import StoredType


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
