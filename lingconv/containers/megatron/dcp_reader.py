"""Reads torch_dist: `.metadata`, then the archive of every chunk of a weight.

Optimizer state, random states and extra state are listed and left alone: their archives are not
opened. Chunks are read where they lie, however many ranks wrote them.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import chain

from lingconv.containers.checkpoint import WITH_ITS_FILE, Absence, LeftOut
from lingconv.containers.megatron import dcp_metadata as torch_dist
from lingconv.containers.megatron.dcp_metadata import Chunk, FilePlace, ShardedTensor
from lingconv.containers.megatron.pickle_machine import MAX_BYTES
from lingconv.containers.megatron.pickle_values import TensorRef
from lingconv.containers.megatron.pickles import loads
from lingconv.containers.megatron.torch_archive import PICKLE_NAME, ArchiveReader, Elements
from lingconv.containers.stored_tensor import FETCH_AGAIN, Box, HeaderError, StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.errors import CheckpointError, Fault
from lingconv.storage import Storage
from lingconv.storage.open_files import OpenFiles
from lingconv.storage.stated_sums import StatedSum

# What belongs to a training run and not to the model, by the beginning of its key.
_STATE = {
    "optimizer state": re.compile(r"(chained_\d+\.)?optimizer\."),
    "random state": re.compile(r"rng_state|rerun_state_machine_state"),
    "extra state": re.compile(r".*\._extra_state"),
}
# FP32 weights that the optimizer works on, by the key of the weight that is their rounding.
_MAIN_PARAM = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.fp32_param\.(.+)")
# A tensor alone takes some hundred bytes.
_MAX_PICKLE = 64 << 10
_MAX_PARTS = 500_000  # parts of tensors that hold all layers
# Older Megatron stores layers that are all alike in one tensor, with the layer as its first axis.
_ALL_LAYERS = re.compile(r"(?P<prefix>decoder\.layers)\.(?P<rest>\D.*)")


class TorchDistReader:
    """Collects the weights of one checkpoint folder and every fault met on the way.

    `common` is where the object is that newer versions have in place of common.pt; None where there
    is none, and where its file has a fault.
    """

    def __init__(self, storage: Storage, folder: str, *, main_params: bool = False) -> None:
        self.storage = storage
        self.folder = folder
        self.main_params = main_params
        self.faults: list[Fault] = []
        self.left_out: dict[str, LeftOut] = {}
        self.checksums: dict[str, list[StatedSum]] = {}
        self.common: FilePlace | None = None
        self.absent: dict[str, Absence] = {}
        self._sizes: dict[str, int | None] = {}

    def read(self) -> dict[str, StoredTensor]:
        """Return all weights by name; raise CheckpointError when `.metadata` is of no use."""
        name = self.folder + torch_dist.METADATA_NAME
        try:
            size = self.storage.stat(name).size
            if size > MAX_BYTES:
                raise HeaderError(f"has {size:,} bytes, more than torch ever writes")
            directory = torch_dist.read_metadata(self.storage.read(name, 0, size))
        except HeaderError as exc:
            raise CheckpointError(
                f"{self.storage.uri}: {name} {exc}",
                hint="it is written last: without it the checkpoint is not complete",
            ) from exc
        self._set_aside(directory)
        weights = [tensor for tensor in directory.tensors if _state_of(tensor.name) is None]
        if self.main_params:
            weights = list(self._main_params(weights, directory))
        common = directory.objects.get(torch_dist.COMMON_OBJECT)
        self._check_files(weights, common)
        if common is not None and self._is_there(common):
            self.common = common._replace(file=self.folder + common.file)
        for tensor, offsets in directory.lost:
            if _state_of(tensor) is None:
                message = f"chunk at {list(offsets)} is listed, and not where it is"
                self.faults.append(Fault("missing chunk", message, name, tensor))
                self.absent[tensor] = WITH_ITS_FILE
        with OpenFiles(self.storage) as blobs:
            stored = [self._stored(tensor, blobs) for tensor in weights]
        return {tensor.name: tensor for item in self._apart(stored) for tensor in item}

    def _apart(self, stored: Iterable[StoredTensor]) -> Iterator[Iterable[StoredTensor]]:
        """Yield each tensor; of those that hold all layers, one for each layer."""
        left = _MAX_PARTS
        for tensor in stored:
            together = _ALL_LAYERS.fullmatch(tensor.name)
            if together is None or not tensor.shape or not tensor.boxes:
                yield [tensor]
                continue
            if tensor.name in self.absent:
                layers = range(min(left, tensor.shape[0]))
                names = (_layer_name(together, layer) for layer in layers)
                self.absent.update(dict.fromkeys(names, WITH_ITS_FILE))
            left -= tensor.shape[0] + sum(box.sizes[0] for box in tensor.boxes)
            if left < 0:
                message = f"holds {tensor.shape[0]:,} layers: more than {_MAX_PARTS:,} parts in all"
                self.faults.append(Fault("layers", message, tensor.file, tensor.name))
                yield [tensor]
                return
            yield _layers(tensor, together)

    def _main_params(
        self, weights: Iterable[ShardedTensor], directory: torch_dist.Directory
    ) -> Iterator[ShardedTensor]:
        """Yield the optimizer's FP32 weights in place of their roundings, where it has some."""
        mains = {
            match[1]: tensor
            for tensor in directory.tensors
            if (match := _MAIN_PARAM.fullmatch(tensor.name))
        }
        if not mains:
            raise CheckpointError(
                f"{self.storage.uri} has no optimizer state with FP32 weights",
                hint="leave `main_params` out",
            )
        for weight in weights:
            main = mains.get(weight.name, weight)
            if main.shape != weight.shape:
                message = f"FP32 weight is stored as {list(main.shape)}, not {list(weight.shape)}"
                hint = "save with `fully_sharded_model_space`, or leave `main_params` out"
                fault = Fault("main weight", message, tensor=weight.name, hint=hint)
                self.faults.append(fault)
            yield main._replace(name=weight.name)

    def files(self) -> list[str]:
        """Return the files that weights are in."""
        return [name for name, size in self._sizes.items() if size is not None]

    def _set_aside(self, directory: torch_dist.Directory) -> None:
        """Sum up what is no weight."""
        for tensor in directory.tensors:
            self._count(tensor.name, sum(chunk.place.nbytes for chunk in tensor.chunks))
        for name, place in directory.objects.items():
            if name == torch_dist.COMMON_OBJECT:
                continue  # it is read
            self._count(name, place.nbytes if place else 0, "other objects")
        for name in directory.strange:
            self._count(name, 0, "tensors of a dtype that weights never have")

    def _count(self, name: str, nbytes: int, otherwise: str = "") -> None:
        kind = _state_of(name) or otherwise
        if kind:
            held = self.left_out.get(kind, LeftOut(0, 0))
            self.left_out[kind] = LeftOut(held.entries + 1, held.nbytes + nbytes)

    def _check_files(self, weights: Iterable[ShardedTensor], common: FilePlace | None) -> None:
        """Find out which files are there, and report each one that is not, or is too short."""
        ends: dict[str, int] = {}
        places = (chunk.place for tensor in weights for chunk in tensor.chunks)
        for place in chain(places, [common] if common else []):
            ends[place.file] = max(place.offset + place.nbytes, ends.get(place.file, 0))
        for name, end in sorted(ends.items()):
            size = None
            with suppress(CheckpointError):
                size = self.storage.stat(self.folder + name).size
            self._sizes[self.folder + name] = size
            if size is None:
                message = f"is missing: {torch_dist.METADATA_NAME} places weights in it"
                hint = "fetch the missing files again"
                self.faults.append(Fault("missing file", message, self.folder + name, hint=hint))
            elif size < end:
                message = f"is cut short: {size:,} bytes, what is in it reaches to byte {end:,}"
                self.faults.append(
                    Fault("truncated file", message, self.folder + name, hint=FETCH_AGAIN)
                )

    def _is_there(self, place: FilePlace) -> bool:
        """Return whether a file reaches to the end of a place in it."""
        size = self._sizes.get(self.folder + place.file)
        return size is not None and place.offset + place.nbytes <= size

    def _stored(self, tensor: ShardedTensor, blobs: OpenFiles) -> StoredTensor:
        boxes = []
        for chunk in tensor.chunks:
            place = chunk.place._replace(file=self.folder + chunk.place.file)
            if not self._is_there(chunk.place):
                self.absent[tensor.name] = WITH_ITS_FILE
                continue
            try:
                _check_inside(tensor, chunk)
                box, held = _box(tensor.dtype, chunk, place, _archive(blobs, place))
                boxes.append(box)
                if held.crc:
                    stated = StatedSum(place.offset + held.offset, held.nbytes, held.crc)
                    self.checksums.setdefault(place.file, []).append(stated)
            except HeaderError as exc:
                message = f"chunk at {list(chunk.offsets)} (byte {place.offset:,}) {exc}"
                self.faults.append(
                    Fault("chunk", message, place.file, tensor.name, hint=FETCH_AGAIN)
                )
                self.absent[tensor.name] = WITH_ITS_FILE
        first = boxes[0].file if boxes else self.folder + torch_dist.METADATA_NAME
        nbytes = tensor.dtype.nbytes_of(tensor.shape)
        return StoredTensor(tensor.name, tensor.dtype, tensor.shape, first, 0, nbytes, tuple(boxes))


def _state_of(name: str) -> str | None:
    """Return what part of a training run a key belongs to, or None for the model's weights."""
    return next((kind for kind, pattern in _STATE.items() if pattern.match(name)), None)


def _archive(blobs: OpenFiles, place: FilePlace) -> ArchiveReader:
    """Open an archive that lies among others in a file."""
    return ArchiveReader(
        lambda offset, count: blobs.read(place.file, place.offset + offset, count), place.nbytes
    )


def _check_inside(tensor: ShardedTensor, chunk: Chunk) -> None:
    """Raise HeaderError for a chunk that is no part of its tensor."""
    axes = (chunk.offsets, chunk.sizes, tensor.shape)
    if len({*map(len, axes)}) != 1 or not all(
        size > 0 and first + size <= whole for first, size, whole in zip(*axes, strict=True)
    ):
        raise HeaderError(f"{list(chunk.sizes)} is no part of {list(tensor.shape)}")


def _box(
    dtype: DType, chunk: Chunk, place: FilePlace, archive: ArchiveReader
) -> tuple[Box, Elements]:
    """Return where the elements of a chunk are, and those of its storage.

    Raises HeaderError when it holds others.
    """
    ref = _load(archive.record(PICKLE_NAME, _MAX_PICKLE))
    if ref.storage.dtype != dtype or ref.shape != chunk.sizes:
        raise HeaderError(
            f"holds {ref.storage.dtype} {list(ref.shape)},"
            f" {torch_dist.METADATA_NAME} says {dtype} {list(chunk.sizes)}"
        )
    if not ref.is_contiguous:
        raise HeaderError(f"is not stored row by row (strides {list(ref.stride)})")
    elements = archive.elements(ref.storage.key)
    first, nbytes = ref.first * dtype.itemsize, dtype.nbytes_of(chunk.sizes)
    if first + nbytes > elements.nbytes:
        held = elements.nbytes
        raise HeaderError(f"has {held:,} bytes of elements, {first + nbytes:,} are needed")
    offset = place.offset + elements.offset + first
    return Box(chunk.offsets, chunk.sizes, place.file, offset, nbytes), elements


@lru_cache(maxsize=1024)
def _load(pickled: bytes) -> TensorRef:
    """Return the tensor that a chunk's pickle holds: chunks of the same shape have the same one."""
    ref = loads(pickled)
    if not isinstance(ref, TensorRef):
        raise HeaderError("holds no tensor")
    return ref


def _layer_name(together: re.Match[str], layer: int) -> str:
    return f"{together['prefix']}.{layer}.{together['rest']}"


def _layers(tensor: StoredTensor, together: re.Match[str]) -> Iterator[StoredTensor]:
    """Yield the tensor of each layer, by its usual name, of one that holds all of them."""
    boxes: list[list[Box]] = [[] for _ in range(tensor.shape[0])]
    for box in tensor.boxes:
        nbytes = box.nbytes // box.sizes[0]
        for row in range(box.sizes[0]):
            place = box.offset + row * nbytes
            part = Box(box.offsets[1:], box.sizes[1:], box.file, place, nbytes)
            boxes[box.offsets[0] + row].append(part)
    nbytes = tensor.nbytes // tensor.shape[0]
    for layer, parts in enumerate(boxes):
        name = _layer_name(together, layer)
        yield tensor._replace(name=name, shape=tensor.shape[1:], nbytes=nbytes, boxes=tuple(parts))
