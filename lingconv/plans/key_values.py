"""Typed key-values, as a GGUF file's metadata has them, with a JSON form."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple


class ValueType(IntEnum):
    """The type of a value, with the number that GGUF gives it (`gguf_metadata_value_type`)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class Value(NamedTuple):
    """A typed value; an array is a list of `item` values."""

    type: ValueType
    data: Any
    item: ValueType | None = None


Metadata = Mapping[str, Value]


def value_to_json(value: Value) -> list[Any]:
    """Return a value as a JSON list: type, data, type of an array's items."""
    return [value.type, value.data, value.item]


def value_from_json(fields: Sequence[Any]) -> Value:
    """Build a value from what `value_to_json` returned."""
    kind, data, item = fields
    return Value(ValueType(kind), data, None if item is None else ValueType(item))
