"""What a pickle that is read consists of: plain values, and inert stand-ins for everything else.

Stand-ins do nothing, belong to the pickle that they came from, and are compared and hashed by
identity, so that neither a comparison nor a hash ever walks through what a stranger has built.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from lingconv.encodings.dtypes import DType

# What torch calls its storages and dtypes; the others hold no weights.
STORAGES = {
    "BFloat16Storage": DType.BF16,
    "HalfStorage": DType.F16,
    "FloatStorage": DType.F32,
    "DoubleStorage": DType.F64,
    "ByteStorage": DType.U8,
    "CharStorage": DType.I8,
    "ShortStorage": DType.I16,
    "IntStorage": DType.I32,
    "LongStorage": DType.I64,
    "BoolStorage": DType.BOOL,
    "Float8_e4m3fnStorage": DType.F8_E4M3,
    "Float8_e5m2Storage": DType.F8_E5M2,
}
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
TORCH_DTYPES = {
    "bfloat16": DType.BF16,
    "float16": DType.F16,
    "float32": DType.F32,
    "float64": DType.F64,
    "uint8": DType.U8,
    "int8": DType.I8,
    "int16": DType.I16,
    "int32": DType.I32,
    "int64": DType.I64,
    "bool": DType.BOOL,
    "float8_e4m3fn": DType.F8_E4M3,
    "float8_e5m2": DType.F8_E5M2,
}
TORCH_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# torch counts axes, sizes and elements no further (c10/core/TensorImpl.h, int64_t).
MAX_AXES = 64
MAX_SIZE = 2**63 - 1
_SHOWN = 60  # characters of a value in a message


class GlobalRef:
    """A class or a function by its full name; it is never looked up, let alone called."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class OpaqueObject:
    """An object of a class that stays unknown: its name, its arguments and what it was given.

    `state` is what `__setstate__` would have got: most often the attributes by name. `items` are
    what it was given as a list, a set or a dictionary (as pairs).
    """

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str = "", args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: Sequence[Any] = ()

    def get(self, field: str) -> Any:
        """Return an attribute, or None when there is none of that name."""
        return self.state.get(field) if type(self.state) is dict else None


class OpaqueKey:
    """A dictionary's key that is no plain value, such as a tuple: nobody looks it up."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class StorageRef(NamedTuple):
    """A tensor's storage: the record `data/KEY` of its archive, with `numel` elements."""

    key: str
    dtype: DType | None
    numel: int


class TensorRef(NamedTuple):
    """A tensor: which elements of which storage."""

    storage: StorageRef
    first: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one behind the other, row by row."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number that torch can count to; True and False are none."""
    return type(value) is int and 0 <= value <= MAX_SIZE


def is_sizes(value: Any) -> bool:
    """Return whether a value is a tuple of sizes that a tensor may have."""
    if type(value) is not tuple or len(value) > MAX_AXES:
        return False
    return all(type(size) is int and 0 <= size <= MAX_SIZE for size in value)


def is_shape(value: Any) -> bool:
    """Return whether a value is a shape: sizes whose product is one that torch can count to."""
    return is_sizes(value) and prod(value) <= MAX_SIZE


def shown(value: Any) -> str:
    """Return a value for a message, in a few words however large or deep it is."""
    kind = type(value)
    if kind in (str, bytes):
        return repr(value[:_SHOWN]) + ("..." if len(value) > _SHOWN else "")
    if kind is int and value.bit_length() > 64:
        return f"a number of {value.bit_length():,} bits"
    if kind in (tuple, list) and len(value) <= 8 and all(type(item) is int for item in value):
        return f"[{', '.join(map(shown, value))}]"
    if kind in (tuple, list, dict):
        return f"a {kind.__name__} of {len(value):,}"
    if kind in (OpaqueObject, GlobalRef):
        return f"<{value.name[:_SHOWN]}>"
    if value is None or kind in (bool, int, float):
        return repr(value)
    return f"a {kind.__name__}"
