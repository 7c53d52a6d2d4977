"""Pickles without their danger: read with stand-ins for every class, written without importing one.

Loading never imports anything. A few names that tensors and their metadata are made of have a
meaning (`_KNOWN`); every other one becomes an inert Record that remembers what it was called with.
Dumping emits protocol 2, with classes and functions by name, so that neither torch nor Megatron is
needed to write what they read.

Source of the opcodes: CPython's Lib/pickletools.py; of the tensors: torch/serialization.py and
torch/_utils.py of PyTorch 2.13.
"""

import io
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from lingconv.containers.stored_tensor import HeaderError
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


class OpaqueObject:
    """An object of a class that stays unknown: its name, its arguments and what it was given.

    `state` is what `__setstate__` would have got: most often the attributes by name.
    """

    name = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}
        self.items: list[Any] = []

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __call__(self, *args: Any) -> "OpaqueObject":
        """Return another Record: what calling the unknown thing would give is unknown as well."""
        return OpaqueObject(*args)

    def append(self, value: Any) -> None:
        """Take an item, as a list does."""
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        """Take several items."""
        self.items.extend(values)

    def get(self, field: str) -> Any:
        """Return an attribute, or None when there is none of that name."""
        return self.state.get(field) if isinstance(self.state, dict) else None

    def __repr__(self) -> str:
        return f"<{self.name}>"


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


def _tensor(storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    ref = TensorRef(StorageRef(*storage), int(first), _sizes(shape), _sizes(stride))
    if ref.first < 0 or len(ref.shape) != len(ref.stride):
        raise ValueError(f"a tensor of shape {ref.shape} and strides {ref.stride}")
    return ref


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{sizes} are no sizes")
    return sizes


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _mapping(items: Iterable[Any] = ()) -> dict[Any, Any]:
    return dict(items)


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _mapping,
    "torch.Size": _sizes,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{name}": dtype for name, dtype in {**STORAGES, **TORCH_DTYPES}.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._records: dict[str, type[OpaqueObject]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in; nothing is ever imported."""
        full = f"{module}.{name}"
        if full in _KNOWN:
            return _KNOWN[full]
        if full not in self._records:
            self._records[full] = type("OpaqueObject", (OpaqueObject,), {"name": full})
        return self._records[full]

    def persistent_load(self, pid: Any) -> StorageRef:
        """Return a reference to a storage; torch writes no other persistent ids."""
        word, dtype, key, _, numel = pid
        if word != "storage" or not isinstance(key, str):
            raise ValueError(f"{word!r} is no storage")
        return StorageRef(key, dtype if isinstance(dtype, DType) else None, int(numel))


def loads(data: bytes) -> Any:
    """Return what a pickle holds, unknown objects as Records.

    Raises HeaderError when it is damaged, or wants what only running somebody's code could give.
    """
    try:
        return _Unpickler(data).load()
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
