"""Values that others wrote: what kind they are, and whether that is the kind that is needed.

JSON, YAML, GGUF and pickles all give plain Python values. A schema says as data what may stand
under which key, and every misfit becomes a fault: the key, what is needed and what is there.
"""

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from lingconv.errors import Fault


class Kind(StrEnum):
    """What stands under a key. A whole number is a number too; a switch is neither."""

    INT = "a whole number"
    FLOAT = "a number"
    BOOL = "true or false"
    TEXT = "a text"
    LIST = "a list"
    OBJECT = "an object"


class Field(NamedTuple):
    """What may stand under a key: one of `kinds`, and within the bounds where it is a number.

    `items` are the kinds of a list's or an object's values. null is the same as no key.
    """

    kinds: tuple[Kind, ...]
    required: bool = False
    least: float = -math.inf
    most: float = math.inf
    items: tuple[Kind, ...] = ()


Schema = Mapping[str, Field]


def shown(value: Any) -> str:
    """Return a value for a message: short, whatever it is."""
    if isinstance(value, (dict, list)):
        what = "an object" if isinstance(value, dict) else "a list"
        return f"{what} of {len(value):,}" if value else f"an empty {what.split()[1]}"
    if type(value) is int and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if type(value) is int:
        return f"{value:,}"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_kind(value: Any, kind: Kind) -> bool:
    """Return whether a value is of a kind; numbers have to be finite."""
    if kind == Kind.FLOAT:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    types = {Kind.INT: int, Kind.BOOL: bool, Kind.TEXT: str, Kind.LIST: list, Kind.OBJECT: dict}
    return type(value) is types[kind]


def what_is_wrong(value: Any, field: Field) -> str:
    """Return why a value may not stand under a key, `is '8', not a whole number`; else nothing."""
    if not any(is_kind(value, kind) for kind in field.kinds):
        return f"is {shown(value)}, not {' or '.join(field.kinds)}"
    if type(value) in (int, float) and not field.least <= value <= field.most:
        low, high = (f"{bound:,.15g}" for bound in (field.least, field.most))
        allowed = f"at most {high}" if math.isinf(field.least) else f"{low} to {high}"
        return f"is {shown(value)}, not {f'at least {low}' if math.isinf(field.most) else allowed}"
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in values if field.items else ():
        if not any(is_kind(item, kind) for kind in field.items):
            return f"holds {shown(item)}, not {' or '.join(field.items)}"
    return ""


def checked(
    record: Mapping[str, Any], schema: Schema, file: str
) -> tuple[dict[str, Any], list[Fault]]:
    """Return a record without what is not of its type, and a fault for each such key.

    Keys that the schema does not know stay as they are.
    """
    good = dict(record)
    faults = []
    for key, field in schema.items():
        value = record.get(key)
        if value is None:
            wrong = "is missing" if field.required else ""
        else:
            wrong = what_is_wrong(value, field)
        if wrong:
            good.pop(key, None)
            faults.append(Fault("json", f"`{key}` {wrong}", file))
    return good, faults
