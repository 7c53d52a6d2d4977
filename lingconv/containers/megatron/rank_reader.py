"""Reads the files of Megatron's ranks: `mp_rank_*/model_optim_rng.pt`."""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from lingconv.containers.checkpoint import Absence, LeftOut
from lingconv.containers.megatron.args import args_of
from lingconv.containers.megatron.pickle_machine import MAX_BYTES
from lingconv.containers.megatron.pickle_values import TensorRef, shown
from lingconv.containers.megatron.pickles import loads
from lingconv.containers.megatron.torch_archive import PICKLE_NAME, ArchiveReader, Elements
from lingconv.containers.stored_tensor import FETCH_AGAIN, CutShort, HeaderError, StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.errors import Fault
from lingconv.model.parallelism import FILE_NAME
from lingconv.storage import Storage
from lingconv.storage.open_files import OpenFiles
from lingconv.storage.stated_sums import StatedSum

# The key of a model, or of one of its chunks on a virtual stage.
_CHUNK = re.compile(r"model[0-9]{0,4}")
_MAX_NAME = 4_096


class RanksReader:
    """Collects the tensors of all ranks, `FOLDER/CHUNK/NAME`, and every fault met on the way."""

    def __init__(self, storage: Storage, folder: str, ranks: Iterable[str]) -> None:
        self.storage = storage
        self.files = {rank: f"{folder}{rank}/{FILE_NAME}" for rank in sorted(ranks)}
        self.faults: list[Fault] = []
        self.left_out: dict[str, LeftOut] = {}
        self.args: Mapping[str, Any] = {}
        self.checksums: dict[str, set[StatedSum]] = {}
        self.absent: Mapping[str, Absence] = {}  # which tensors a rank has, `identify` finds out

    def read(self) -> dict[str, StoredTensor]:
        """Return the tensors of all ranks whose files can be read."""
        tensors: dict[str, StoredTensor] = {}
        with OpenFiles(self.storage) as blobs:
            for rank, file in self.files.items():
                try:
                    size = self.storage.stat(file).size
                    archive = ArchiveReader(partial(blobs.read, file), size)
                    state = loads(archive.record(PICKLE_NAME, MAX_BYTES))
                    found = [*self._read_state(rank, file, archive, state)]
                    if not found:
                        raise HeaderError("holds a model without tensors")
                    tensors.update((tensor.name, tensor) for tensor in found)
                except HeaderError as exc:
                    hint = FETCH_AGAIN if isinstance(exc, CutShort) else ""
                    self.faults.append(Fault("file", str(exc), file, hint=hint))
        return tensors

    def _read_state(
        self, rank: str, file: str, archive: ArchiveReader, state: Any
    ) -> Iterator[StoredTensor]:
        if type(state) is not dict:
            raise HeaderError("is not the state of a rank of Megatron")
        self.args = self.args or args_of(state)
        chunks = {key: value for key, value in state.items() if _is_chunk(key)}
        if not chunks:
            raise HeaderError("holds no model")
        for key, names in chunks.items():
            if type(names) is not dict:
                raise HeaderError(f"holds {shown(names)} as `{key}`, not tensors by name")
            for name, ref in names.items():
                if isinstance(ref, TensorRef) and not _checked(name).endswith("_extra_state"):
                    tensor, held = _stored(f"{rank}/{key}/{name}", file, archive, ref)
                    if held.crc:
                        self.checksums.setdefault(file, set()).add(StatedSum(*held))
                    yield tensor
        for key in state.keys() - chunks.keys():
            word = key if type(key) is str and len(key) <= _MAX_NAME else shown(key)
            for ref in _tensors_in(state[key]):
                left = self.left_out.get(word, LeftOut(0, 0))
                nbytes = left.nbytes + ref.storage.numel * _itemsize(ref)
                self.left_out[word] = LeftOut(left.entries + 1, nbytes)


def _is_chunk(key: Any) -> bool:
    return type(key) is str and _CHUNK.fullmatch(key) is not None


def _checked(name: Any) -> str:
    """Return the name of a tensor; raise HeaderError when it is none."""
    if type(name) is not str or not 0 < len(name) <= _MAX_NAME:
        raise HeaderError(f"holds a tensor under the name {shown(name)}")
    return name


def _stored(
    name: str, file: str, archive: ArchiveReader, ref: TensorRef
) -> tuple[StoredTensor, Elements]:
    dtype = ref.storage.dtype
    if dtype is None or not ref.is_contiguous:
        raise HeaderError(f"holds {name}, of a dtype or in an order that is not read")
    elements = archive.elements(ref.storage.key)
    offset, held, crc = elements
    first, nbytes = ref.first * dtype.itemsize, dtype.nbytes_of(ref.shape)
    if first + nbytes > held:
        raise HeaderError(f"holds {held:,} bytes of {name}, {first + nbytes:,} are needed")
    whole = crc if nbytes == held else 0
    stored = StoredTensor(name, dtype, ref.shape, file, offset + first, nbytes, (), whole)
    return stored, elements


def _tensors_in(value: Any) -> Iterator[TensorRef]:
    """Yield the tensors in dictionaries and lists in one another, each object once."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, TensorRef):
            yield item
        elif type(item) in (dict, list) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if type(item) is dict else item


def _itemsize(ref: TensorRef) -> int:
    return ref.storage.dtype.itemsize if isinstance(ref.storage.dtype, DType) else 1
