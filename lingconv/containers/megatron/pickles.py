"""Pickles without their danger: read with stand-ins for every class, written without importing one.

Dumping emits protocol 2, with classes and functions by name, so that neither torch nor Megatron is
needed to write what they read.

Source of the opcodes: CPython's Lib/pickletools.py; of the tensors: torch/serialization.py and
torch/_utils.py of PyTorch 2.13.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lingconv.containers.megatron import pickle_opcodes
from lingconv.containers.megatron.pickle_values import STORAGE_NAMES
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.dtypes import DType


def loads(data: bytes) -> Any:
    """Return what a pickle holds: plain values, and stand-ins for objects (`pickle_values`).

    Sets and frozen sets are OpaqueObjects, too. Raises HeaderError when it is damaged, is larger
    than any that torch writes, or wants what only running somebody's code could give.
    """
    try:
        return pickle_opcodes.run(data)
    except Exception as exc:  # a pickle may fail in any way at all
        raise HeaderError(f"is no pickle of plain data: {type(exc).__name__}: {exc}") from exc


class Global(NamedTuple):
    """A class or a function by name."""

    module: str
    name: str


class Call(NamedTuple):
    """What calling `function` with `args` gives."""

    function: Global
    args: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of class `kind` with the attributes `state`."""

    kind: Global
    state: Mapping[str, Any] | tuple[Any, ...]


class Pairs(NamedTuple):
    """A dictionary whose keys are objects."""

    items: tuple[tuple[Any, Any], ...]


class Persistent(NamedTuple):
    """An object that only its reader knows: torch's storages."""

    pid: tuple[Any, ...]


def dumps(value: Any) -> bytes:
    """Return a pickle (protocol 2) of plain values and of the objects above."""
    pickler = _Pickler()
    pickler.put(value)
    return b"\x80\x02" + b"".join(pickler.parts) + b"."


class _Pickler:
    """Emits opcodes; texts and globals that come again are taken from the memo."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._memo: dict[Any, bytes] = {}

    def put(self, value: Any) -> None:
        _PUTTERS[type(value)](self, value)

    def _constant(self, value: bool | None) -> None:
        self.parts.append({None: b"N", True: b"\x88", False: b"\x89"}[value])

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self.parts.append(b"K" + value.to_bytes(1, "little"))
        elif -(2**31) <= value < 2**31:
            self.parts.append(struct.pack("<ci", b"J", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.parts.append(b"\x8a" + bytes([len(raw)]) + raw)

    def _float(self, value: float) -> None:
        self.parts.append(struct.pack(">cd", b"G", value))

    def _remembered(self, key: Any, opcodes: bytes) -> None:
        held = self._memo.get(key)
        if held is not None:
            self.parts.append(held)
            return
        number = struct.pack("<I", len(self._memo))
        self._memo[key] = b"j" + number
        self.parts.append(opcodes + b"r" + number)

    def _text(self, value: str) -> None:
        raw = value.encode()
        self._remembered(value, b"X" + struct.pack("<I", len(raw)) + raw)

    def _global(self, value: Global) -> None:
        self._remembered(value, f"c{value.module}\n{value.name}\n".encode())

    def _tuple(self, value: tuple[Any, ...]) -> None:
        self.parts.append(b"(")
        for item in value:
            self.put(item)
        self.parts.append(b"t")

    def _list(self, value: list[Any]) -> None:
        self.parts.append(b"](")
        for item in value:
            self.put(item)
        self.parts.append(b"e")

    def _dict(self, value: Mapping[Any, Any]) -> None:
        self._pairs(Pairs(tuple(value.items())))

    def _pairs(self, value: Pairs) -> None:
        self.parts.append(b"}(")
        for key, item in value.items:
            self.put(key)
            self.put(item)
        self.parts.append(b"u")

    def _call(self, value: Call) -> None:
        self._global(value.function)
        self._tuple(value.args)
        self.parts.append(b"R")

    def _instance(self, value: Instance) -> None:
        self._global(value.kind)
        self.parts.append(b")\x81")
        self.put(value.state)
        self.parts.append(b"b")

    def _persistent(self, value: Persistent) -> None:
        self._tuple(value.pid)
        self.parts.append(b"Q")


_PUTTERS: dict[type, Callable[[_Pickler, Any], None]] = {
    type(None): _Pickler._constant,
    bool: _Pickler._constant,
    int: _Pickler._int,
    float: _Pickler._float,
    str: _Pickler._text,
    tuple: _Pickler._tuple,
    list: _Pickler._list,
    dict: _Pickler._dict,
    Global: _Pickler._global,
    Call: _Pickler._call,
    Instance: _Pickler._instance,
    Pairs: _Pickler._pairs,
    Persistent: _Pickler._persistent,
}


def tensor(dtype: DType, shape: tuple[int, ...], key: str) -> Call:
    """Return a contiguous tensor whose elements are the record `data/KEY` of its archive."""
    stride = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        stride[axis - 1] = stride[axis] * shape[axis]
    numel = stride[0] * shape[0] if shape else 1
    storage = Persistent(
        ("storage", Global("torch", STORAGE_NAMES[dtype]), key, "cpu", numel),
    )
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (storage, 0, shape, tuple(stride), False, hooks),
    )
