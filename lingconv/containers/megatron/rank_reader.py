"""Reads the files of Megatron's ranks: `mp_rank_*/model_optim_rng.pt`."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from lingconv.containers.checkpoint import LeftOut
from lingconv.containers.megatron.args import args_of
from lingconv.containers.megatron.pickles import TensorRef, loads
from lingconv.containers.megatron.torch_archive import PICKLE_NAME, ArchiveReader
from lingconv.containers.stored_tensor import HeaderError, StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.errors import Fault
from lingconv.model.parallelism import FILE_NAME
from lingconv.storage import Storage
from lingconv.storage.open_files import OpenFiles


class RanksReader:
    """Collects the tensors of all ranks, `FOLDER/CHUNK/NAME`, and every fault met on the way."""

    def __init__(self, storage: Storage, folder: str, ranks: Iterable[str]) -> None:
        self.storage = storage
        self.files = {rank: f"{folder}{rank}/{FILE_NAME}" for rank in sorted(ranks)}
        self.faults: list[Fault] = []
        self.left_out: dict[str, LeftOut] = {}
        self.args: Mapping[str, Any] = {}

    def read(self) -> dict[str, StoredTensor]:
        """Return the tensors of all ranks whose files can be read."""
        tensors: dict[str, StoredTensor] = {}
        with OpenFiles(self.storage) as blobs:
            for rank, file in self.files.items():
                try:
                    size = self.storage.stat(file).size
                    archive = ArchiveReader(partial(blobs.read, file), size)
                    state = loads(archive.record(PICKLE_NAME))
                    found = self._read_state(rank, file, archive, state)
                    tensors.update((tensor.name, tensor) for tensor in found)
                except HeaderError as exc:
                    self.faults.append(Fault("file", str(exc), file))
        return tensors

    def _read_state(
        self, rank: str, file: str, archive: ArchiveReader, state: Any
    ) -> Iterator[StoredTensor]:
        if not isinstance(state, dict):
            raise HeaderError("is not the state of a rank of Megatron")
        self.args = self.args or args_of(state)
        chunks = {key: value for key, value in state.items() if str(key).startswith("model")}
        if not chunks:
            raise HeaderError("holds no model")
        for key, names in chunks.items():
            for name, ref in names.items():
                if isinstance(ref, TensorRef) and not name.endswith("_extra_state"):
                    yield _stored(f"{rank}/{key}/{name}", file, archive, ref)
        for key in state.keys() - chunks.keys():
            refs = list(_tensors_in(state[key]))
            if refs:
                held = self.left_out.get(str(key), LeftOut(0, 0))
                nbytes = sum(ref.storage.numel * _itemsize(ref) for ref in refs)
                self.left_out[str(key)] = LeftOut(held.entries + len(refs), held.nbytes + nbytes)


def _stored(name: str, file: str, archive: ArchiveReader, ref: TensorRef) -> StoredTensor:
    dtype = ref.storage.dtype
    if dtype is None or not ref.is_contiguous:
        raise HeaderError(f"holds {name}, of a dtype or in an order that is not read")
    offset, held, crc = archive.elements(ref.storage.key)
    first, nbytes = ref.first * dtype.itemsize, dtype.nbytes_of(ref.shape)
    if first + nbytes > held:
        raise HeaderError(f"holds {held:,} bytes of {name}, {first + nbytes:,} are needed")
    whole = crc if nbytes == held else 0
    return StoredTensor(name, dtype, ref.shape, file, offset + first, nbytes, (), whole)


def _tensors_in(value: Any) -> Iterator[TensorRef]:
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _tensors_in(item)


def _itemsize(ref: TensorRef) -> int:
    return ref.storage.dtype.itemsize if isinstance(ref.storage.dtype, DType) else 1
