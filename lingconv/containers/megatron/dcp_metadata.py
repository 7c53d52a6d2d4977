"""torch_dist: torch.distributed.checkpoint's files, as Megatron writes them.

    .metadata        a pickle: every tensor with its chunks, and where each chunk is
    __R_I.distcp     chunks one behind the other, each an archive of torch.save of its own
    common.pt        what all ranks share: Megatron's arguments, iteration ...
    metadata.json    the name of this format

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of PyTorch 2.13.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lingconv.containers.megatron.pickles import (
    TORCH_NAMES,
    Call,
    Global,
    Instance,
    OpaqueObject,
    Pairs,
    dumps,
    loads,
)
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.dtypes import DType

METADATA_NAME = ".metadata"
FORMAT_NAME = "metadata.json"
COMMON_NAME = "common.pt"
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
    root = loads(data)
    if not isinstance(root, OpaqueObject) or root.name != f"{_MODULE}.Metadata":
        raise HeaderError("is not the metadata of a distributed checkpoint")
    listed, stored = root.get("state_dict_metadata"), root.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(stored, dict):
        raise HeaderError("lists no tensors, or not where they are")
    try:
        places = {_index(key): _place(value) for key, value in stored.items()}
        return _directory(listed, places)
    except (TypeError, ValueError, AttributeError, KeyError) as exc:
        raise HeaderError(f"has an entry that cannot be understood: {exc}") from exc


def _index(key: Any) -> tuple[str, tuple[int, ...] | None]:
    fqn, offset = key.get("fqn"), key.get("offset")
    if not isinstance(fqn, str):
        raise HeaderError(f"has an entry without a name: {key!r}")
    return fqn, offset


def _place(info: Any) -> FilePlace:
    name, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
    if not isinstance(name, str) or name in (".", "..") or any(mark in name for mark in "/\\\0"):
        raise HeaderError(f"points outside the folder: {name!r}")
    if not (isinstance(offset, int) and isinstance(length, int) and min(offset, length) >= 0):
        raise HeaderError(f"has an entry at byte {offset!r} of {name}, {length!r} bytes long")
    if info.get("transform_descriptors"):
        raise HeaderError(f"has transformed (compressed) entries in {name}, which are not read")
    return FilePlace(name, offset, length)


def _directory(
    listed: Mapping[str, Any], places: Mapping[tuple[str, tuple[int, ...] | None], FilePlace]
) -> Directory:
    tensors, objects, lost, strange = [], {}, [], []
    for name, item in listed.items():
        if not item.name.endswith("TensorStorageMetadata"):
            objects[name] = places.get((name, None))
            continue
        boxes = item.get("chunks")
        chunks = []
        for box in boxes:
            offsets, sizes = box.get("offsets"), box.get("sizes")
            place = places.get((name, offsets))
            if place is None and len(boxes) == 1:
                place = places.get((name, None))
            if place is None:
                lost.append((name, offsets))
            else:
                chunks.append(Chunk(offsets, sizes, place))
        dtype = _dtype(item.get("properties"))
        if dtype is None:
            strange.append(name)
        else:
            tensors.append(ShardedTensor(name, dtype, item.get("size"), tuple(chunks)))
    return Directory(tuple(tensors), objects, tuple(lost), tuple(strange))


def _dtype(properties: Any) -> DType | None:
    """Return the dtype that a tensor's properties begin with; None for one that torch alone has."""
    state = properties.state
    found = state.get("dtype") if isinstance(state, dict) else state[0]
    return found if isinstance(found, DType) else None


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
