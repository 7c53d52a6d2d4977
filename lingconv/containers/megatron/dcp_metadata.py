"""torch_dist: torch.distributed.checkpoint's files, as Megatron writes them.

    .metadata        a pickle: every tensor with its chunks, and where each chunk is
    __R_I.distcp     chunks one behind the other, each an archive of torch.save of its own
    common.pt        what all ranks share: Megatron's arguments, iteration ...
    metadata.json    the name of this format

megatron-core 0.19 writes no common.pt: what was in it is the object COMMON_OBJECT among the chunks.

Sources: torch/distributed/checkpoint/metadata.py and filesystem.py of PyTorch 2.13;
core/dist_checkpointing/serialization.py of megatron-core 0.16.1, 0.18.2 and 0.19.2.
"""

import gc
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from lingconv.containers.megatron.pickle_values import (
    MAX_AXES,
    TORCH_NAMES,
    GlobalRef,
    OpaqueObject,
    is_count,
    is_shape,
    is_sizes,
    shown,
)
from lingconv.containers.megatron.pickles import Call, Global, Instance, Pairs, dumps, loads
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.dtypes import DType

METADATA_NAME = ".metadata"
FORMAT_NAME = "metadata.json"
COMMON_NAME = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
SUFFIX = ".distcp"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_MAX_NAME = 4_096
_MAX_FILE_NAME = 255  # bytes, as file systems have it
_MAX_LOST = 100_000  # chunks without a place that are still worth a list


class FilePlace(NamedTuple):
    """Where the archive of a chunk or an object is."""

    file: str
    offset: int
    nbytes: int


class Chunk(NamedTuple):
    """A box of a tensor: where it begins on each axis, its sizes, and its archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: FilePlace


class ShardedTensor(NamedTuple):
    """A tensor of the whole model, and the chunks that it is cut into."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Directory(NamedTuple):
    """What `.metadata` lists: tensors, and objects that are no tensors.

    `lost` are chunks that are listed and have no place, as (tensor, offsets); `strange` are tensors
    of a dtype that torch alone has.
    """

    tensors: tuple[ShardedTensor, ...]
    objects: Mapping[str, FilePlace | None]
    lost: tuple[tuple[str, tuple[int, ...]], ...]
    strange: tuple[str, ...]


def read_metadata(data: bytes) -> Directory:
    """Return what `.metadata` lists; raise HeaderError when it cannot be understood."""
    with _collection_paused():  # millions of objects, none of them garbage
        root = loads(data)
        if type(root) is not OpaqueObject or root.name != f"{_MODULE}.Metadata":
            raise HeaderError("is not the metadata of a distributed checkpoint")
        listed, stored = root.get("state_dict_metadata"), root.get("storage_data")
        if type(listed) is not dict or type(stored) is not dict:
            raise HeaderError("lists no tensors, or not where they are")
        return _directory(listed, _places(stored))


@contextmanager
def _collection_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


# The places of a tensor's chunks by where these begin, None for what is whole. Bytes and texts are
# keys whose hash nobody can choose; that of a tuple of numbers can be.
_Places = Mapping[str, Mapping[bytes | None, FilePlace]]
_PACKERS = [struct.Struct(f"<{count}Q").pack for count in range(MAX_AXES + 1)]


def _packed(offsets: Any, name: str) -> bytes:
    """Return where a chunk of a tensor begins as a key; raise HeaderError for what is no place."""
    if type(offsets) is not tuple or len(offsets) > MAX_AXES:
        raise HeaderError(f"has a chunk of {shown(name)} at {shown(offsets)}")
    try:
        return _PACKERS[len(offsets)](*offsets)
    except struct.error:
        raise HeaderError(f"has a chunk of {shown(name)} at {shown(offsets)}") from None


def _places(stored: Mapping[Any, Any]) -> _Places:
    places: dict[str, dict[bytes | None, FilePlace]] = {}
    names: dict[str, str] = {}
    for key, value in stored.items():
        state = _state(key)
        name, offsets = state.get("fqn"), state.get("offset")
        if type(name) is not str:
            raise HeaderError(f"has an entry whose name is {shown(name)}")
        box = None if offsets is None else _packed(offsets, name)
        own = places.get(name)
        if own is None:
            own = places[name] = {}
        own[box] = _place(value, names)
    return places


def _state(entry: Any) -> Any:
    """Return the dictionary of an object's attributes; raise HeaderError for what has none."""
    state = entry.state if type(entry) is OpaqueObject else None
    if type(state) is not dict:
        raise HeaderError(f"has an entry that is {shown(entry)}, without attributes")
    return state


def _place(info: Any, names: dict[str, str]) -> FilePlace:
    state = _state(info)
    name, offset, length = state.get("relative_path"), state.get("offset"), state.get("length")
    if type(name) is not str or name not in names:
        names[name] = _checked_name(name)
    if not (is_count(offset) and is_count(length)):
        raise HeaderError(
            f"has an entry at byte {shown(offset)} of {name}, {shown(length)} bytes long"
        )
    if state.get("transform_descriptors"):
        raise HeaderError(f"has transformed (compressed) entries in {name}, which are not read")
    return FilePlace(names[name], offset, length)


def _checked_name(name: Any) -> str:
    """Return the name of a file; raise HeaderError for one that is none, or leads elsewhere."""
    if type(name) is not str or not 0 < len(name.encode()) <= _MAX_FILE_NAME:
        raise HeaderError(f"places entries in {shown(name)}, which is no file")
    if name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise HeaderError(f"points outside the folder: {shown(name)}")
    return name


def _directory(listed: Mapping[Any, Any], places: _Places) -> Directory:
    tensors, objects, strange = [], {}, []
    lost: list[tuple[str, tuple[int, ...]]] = []
    # Boxes may be shared by many tensors of a hostile file, as no place of theirs ever is.
    left = 2 * sum(map(len, places.values())) + _MAX_LOST
    for name, item in listed.items():
        if type(name) is not str or len(name) > _MAX_NAME or type(item) is not OpaqueObject:
            raise HeaderError(f"lists {shown(name)}, which is no name of a tensor")
        own = places.get(name, {})
        if not item.name.endswith("TensorStorageMetadata"):
            objects[name] = own.get(None)
            continue
        shape, boxes = item.get("size"), item.get("chunks")
        if not is_shape(shape) or type(boxes) is not list:
            raise HeaderError(f"has {name} of size {shown(shape)} in chunks of {shown(boxes)}")
        left -= len(boxes)
        if left < 0:
            raise HeaderError("lists far more chunks than it has places for")
        chunks = tuple(_chunks(name, boxes, own, lost))
        dtype = _dtype(name, item.get("properties"))
        if dtype is None:
            strange.append(name)
        else:
            tensors.append(ShardedTensor(name, dtype, shape, chunks))
    return Directory(tuple(tensors), objects, tuple(lost), tuple(strange))


def _chunks(
    name: str,
    boxes: list[Any],
    places: Mapping[bytes | None, FilePlace],
    lost: list[tuple[str, tuple[int, ...]]],
) -> Iterator[Chunk]:
    """Yield the chunks that have a place, and add the others to `lost`."""
    for box in boxes:
        state = _state(box)
        offsets, sizes = state.get("offsets"), state.get("sizes")
        place = places.get(_packed(offsets, name))
        if not is_sizes(sizes):
            raise HeaderError(f"has {name} with a chunk of {shown(sizes)}, which are no sizes")
        if place is None and len(boxes) == 1:
            place = places.get(None)
        if place is None:
            lost.append((name, offsets))
        else:
            yield Chunk(offsets, sizes, place)


def _dtype(name: str, properties: Any) -> DType | None:
    """Return the dtype that a tensor's properties begin with; None for one that torch alone has."""
    state = properties.state if type(properties) is OpaqueObject else None
    if type(state) is dict:
        found = state.get("dtype")
    elif type(state) is tuple and state:
        found = state[0]
    else:
        raise HeaderError(f"has {name} without a dtype")
    if isinstance(found, DType):
        return found
    if type(found) not in (GlobalRef, OpaqueObject):
        raise HeaderError(f"has {name} of dtype {shown(found)}")
    return None


def write_metadata(
    tensors: Iterable[ShardedTensor], objects: Iterable[tuple[str, FilePlace]] = ()
) -> bytes:
    """Return `.metadata` for tensors that are complete, and for objects that are no tensors."""
    listed, stored = [], []
    for tensor in tensors:
        fields = {
            "properties": _properties(tensor.dtype),
            "size": _size(tensor.shape),
            "chunks": [_box(chunk) for chunk in tensor.chunks],
        }
        listed.append((tensor.name, Instance(Global(_MODULE, "TensorStorageMetadata"), fields)))
        stored += [
            (_key(tensor.name, _size(chunk.offsets)), _info(chunk.place)) for chunk in tensor.chunks
        ]
    for name, place in objects:
        listed.append((name, Instance(Global(_MODULE, "BytesStorageMetadata"), {})))
        stored.append((_key(name, None), _info(place)))
    state = {
        "state_dict_metadata": Pairs(tuple(listed)),
        "planner_data": None,
        "storage_data": Pairs(tuple(stored)),
        "storage_meta": None,
    }
    return dumps(Instance(Global(_MODULE, "Metadata"), state))


def _properties(dtype: DType) -> Instance:
    """Return TensorProperties: dtype, layout, requires_grad, memory format, pin_memory."""
    strided = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    state = Global("torch", TORCH_NAMES[dtype]), strided, False, contiguous, False
    return Instance(Global(_MODULE, "TensorProperties"), state)


def _box(chunk: Chunk) -> Instance:
    fields = {"offsets": _size(chunk.offsets), "sizes": _size(chunk.sizes)}
    return Instance(Global(_MODULE, "ChunkStorageMetadata"), fields)


def _key(name: str, offset: Call | None) -> Instance:
    fields = {"fqn": name, "offset": offset, "index": None}
    return Instance(Global(_MODULE, "MetadataIndex"), fields)


def _info(place: FilePlace) -> Instance:
    fields = {"relative_path": place.file, "offset": place.offset, "length": place.nbytes}
    return Instance(_STORAGE_INFO, fields)


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(_SIZE, (sizes,))
