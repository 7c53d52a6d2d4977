"""Puts the parts that Megatron's ranks hold together again: the inverse of `rank_writer.py`.

Every tensor of a rank's file is one or several boxes of a tensor of the whole model. What several
ranks hold has to be the same everywhere, by the checksums that their files state.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import lcm, prod
from typing import Any, NamedTuple

from lingconv.containers.checkpoint import WITH_ITS_FILE, Absence, Checkpoint
from lingconv.containers.megatron.pickle_values import MAX_SIZE, shown
from lingconv.containers.stored_tensor import Box, StoredTensor
from lingconv.encodings.dtypes import StoredType
from lingconv.errors import Fault, UsageError
from lingconv.model.family import Family, PhysicalName, Role
from lingconv.model.layout import MEGATRON, Layout, PhysicalTensor, build_layout
from lingconv.model.layout_detection import refined
from lingconv.model.parallelism import FILE_NAME, Parallel, RankShard, all_ranks, parts
from lingconv.plans.tensor_map import within

_FOLDER = re.compile(r"mp_rank_([0-9]{2,18})(?:_([0-9]{3,18}))?(?:_([0-9]{3,18}))?")
_LAYER = re.compile(r"decoder\.layers\.([0-9]{1,6})\.")
# How many ranks may be missing before they are no longer listed one by one.
_MAX_MISSING, _MAX_TIMES = 4_096, 64


class Whole(NamedTuple):
    """The tensors of the whole model, in boxes; everything that does not fit; what is not read.

    `absent` are the tensors of which a part is in a file that has a fault.
    """

    tensors: Mapping[str, StoredTensor]
    faults: Sequence[Fault]
    absent: Mapping[str, Absence]


def assemble_ranks(family: Family, symbols: Mapping[str, Any], checkpoint: Checkpoint) -> Whole:
    """Return what the ranks of a checkpoint hold together.

    Its tensors are those of ranks by name, `FOLDER/CHUNK/NAME`.
    """
    args = checkpoint.args or {}
    folders = {_folder_of(name) for name in checkpoint.shards}
    broken = {
        _folder_of(fault.file) for fault in checkpoint.faults if fault.file in checkpoint.shards
    }
    try:
        parallel = find_parallel(checkpoint.tensors, args, folders)
    except UsageError as exc:
        return Whole({}, [Fault("ranks", str(exc))], {})
    if sum(parallel.layers) != symbols["layers"]:
        parallel = parallel._replace(layers=())
    try:
        assembler = _RankAssembler(family, symbols, parallel, checkpoint.tensors)
        return assembler.assemble(folders, broken)
    except UsageError as exc:
        return Whole({}, [Fault("ranks", f"{parallel.describe()}: {exc}")], {})


def find_parallel(
    names: Iterable[str], args: Mapping[str, Any], folders: Collection[str] = ()
) -> Parallel:
    """Return how a model is spread, by its folders, what lies in them, and the arguments.

    Raises UsageError for more ranks than the folders that are there could be some of.
    """
    names = list(names)
    tp = pp = ep = vpp = 1
    for folder in folders:
        tensor_rank, pipeline, expert = _numbers(folder, args)
        tp, pp, ep = max(tp, tensor_rank + 1), max(pp, pipeline + 1), max(ep, expert + 1)
    layers: dict[tuple[int, int], int] = {}
    for name in names:
        folder, key, tensor = name.split("/", 2)
        tensor_rank, pipeline, expert = _numbers(folder, args)
        virtual = int(key.removeprefix("model") or 0)
        tp, pp, ep = max(tp, tensor_rank + 1), max(pp, pipeline + 1), max(ep, expert + 1)
        vpp = max(vpp, virtual + 1)
        layer = _LAYER.match(tensor)
        if layer:
            chunk = virtual, pipeline
            layers[chunk] = max(layers.get(chunk, 0), int(layer[1]) + 1)
    tp = max(tp, _stated(args, "tensor_model_parallel_size") or 1)
    pp = max(pp, _stated(args, "pipeline_model_parallel_size") or 1)
    ep = max(ep, _stated(args, "expert_model_parallel_size") or 1)
    etp = _stated(args, "expert_tensor_parallel_size") or tp
    _check_there(Parallel(tp, pp, ep, etp, vpp), {name.split("/", 1)[0] for name in names})
    chunks = [(virtual, stage) for virtual in range(vpp) for stage in range(pp)]
    return Parallel(tp, pp, ep, etp, vpp, tuple(layers.get(chunk, 0) for chunk in chunks))


def _folder_of(file: str) -> str:
    """Return the folder that the file of a rank is in, without those above."""
    return file.split("/")[-2]


def _stated(args: Mapping[str, Any], key: str) -> int:
    """Return a number of ranks; 0 where the arguments say none, UsageError where it is odd."""
    value = args.get(key)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise UsageError(f"Megatron's arguments: `{key}` is {shown(value)}, which counts no ranks")
    return value


def _check_there(parallel: Parallel, folders: Collection[str]) -> None:
    """Raise UsageError when so many ranks are asked for that most of them cannot be missing."""
    ranks = parallel.pp * lcm(parallel.tp, parallel.etp * parallel.ep)
    if max(ranks, parallel.vpp * parallel.pp) > _MAX_MISSING + _MAX_TIMES * len(folders):
        raise UsageError(
            f"{parallel.describe()}, with {shown(parallel.vpp)} model chunks on each;"
            f" {len(folders):,} folders are there",
            hint="fetch the files of all ranks",
        )


def _numbers(folder: str, args: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the ranks in a folder's name; a lone second number is what the arguments say it is."""
    match = _FOLDER.fullmatch(folder)
    if match is None:
        return 0, 0, 0
    first, second, third = match.groups()
    if (
        third is None
        and second is not None
        and (_stated(args, "pipeline_model_parallel_size") or 1) == 1
    ):
        return int(first), 0, int(second)
    return int(first), int(second or 0), int(third or 0)


class _RankAssembler:
    def __init__(
        self,
        family: Family,
        symbols: Mapping[str, Any],
        parallel: Parallel,
        found: Mapping[str, StoredTensor],
    ) -> None:
        self._family = family
        self._symbols = symbols
        self._parallel = parallel
        self._found = found
        self._absent: dict[str, Absence] = {}
        self._whole = build_layout(family, symbols, MEGATRON)
        self._addresses = self._whole.addresses()
        names = {name.split("/", 2)[2] for name in found}
        self._layout_name = refined(family, MEGATRON, names)
        self._boxes: dict[PhysicalName, list[Box]] = {}
        self._dtypes: dict[PhysicalName, StoredType] = {}
        self._rows: dict[PhysicalName, int] = {}
        self._copies: dict[tuple[PhysicalName, int, int], StoredTensor] = {}
        self._faults: list[Fault] = []
        self._used: set[str] = set()

    def assemble(self, folders: Collection[str], broken: Collection[str]) -> Whole:
        """Return the whole; `folders` are there, the files in those that are `broken` not read."""
        # Whatever a vocabulary was padded to, a rank's own file tells.
        rows = self._parallel.padded(self._symbols["vocab_size"], 1)
        for rank in all_ranks(self._parallel):
            folder = rank.folder(self._parallel)
            if folder not in folders:
                hint = "fetch the files of all ranks"
                message = f"is missing: {self._parallel.describe()}"
                self._faults.append(
                    Fault("missing rank", message, f"{folder}/{FILE_NAME}", hint=hint)
                )
            for key, part in parts(self._parallel, rank, self._symbols, rows):
                layout = build_layout(self._family, self._symbols, self._layout_name, part)
                if folder in folders and folder not in broken:
                    self._take(f"{folder}/{key}/", layout, part)
                else:
                    self._miss(layout)
        self._sort_rest()
        tensors = {str(name): self._tensor(name) for name in self._boxes}
        return Whole(tensors, self._faults, self._absent)

    def _miss(self, layout: Layout) -> None:
        """Note the tensors of which a rank would hold a part whose file is not read."""
        for tensor in layout.tensors.values():
            for rows in tensor.rows:
                for address in within(self._addresses[rows.logical], rows.first, rows.num_rows):
                    self._absent[address.name] = WITH_ITS_FILE

    def _take(self, prefix: str, layout: Layout, part: RankShard) -> None:
        """Add the boxes of one model chunk of one rank."""
        for tensor in layout.tensors.values():
            held = self._found.get(prefix + tensor.name)
            if held is None:
                message = f"is missing, expected {list(tensor.stored_shape)}"
                self._faults.append(Fault("missing tensor", message, tensor=prefix + tensor.name))
                self._miss(Layout(layout.name, {tensor.name: tensor}))
                continue
            self._used.add(held.name)
            vocabulary = tensor.role in (Role.EMBEDDING, Role.HEAD)
            if vocabulary and held.shape[1:] == tensor.shape[1:]:
                self._add_vocabulary(tensor, held, part)
            elif held.shape != tensor.stored_shape:
                message = f"has shape {list(held.shape)}, {list(tensor.stored_shape)} is expected"
                self._faults.append(Fault("shape", message, held.file, held.name))
                self._miss(Layout(layout.name, {tensor.name: tensor}))
            else:
                self._add(tensor, held)

    def _add(self, tensor: PhysicalTensor, held: StoredTensor) -> None:
        cols = prod(tensor.shape[1:])
        row_bytes = cols * held.dtype.itemsize
        for rows in tensor.rows:
            top = rows.start
            for address in within(self._addresses[rows.logical], rows.first, rows.num_rows):
                place = (address.start, tensor.first_col)
                offset, pitch = held.offset + top * row_bytes, 0
                if tensor.transposition:
                    pitch = tensor.height
                    offset = held.offset + top // pitch * pitch * row_bytes
                    offset += top % pitch * held.dtype.itemsize
                sizes = (address.num_rows, cols)
                self._put(address.name, place, sizes, held, offset, pitch)
                top += address.num_rows

    def _add_vocabulary(self, tensor: PhysicalTensor, held: StoredTensor, part: RankShard) -> None:
        """Add rows of a vocabulary, which Megatron may have made longer than the model's own."""
        (address,) = self._addresses[tensor.rows[0].logical]
        self._rows[address.name] = held.shape[0] * part.dense.size
        place = part.dense.rank * held.shape[0], 0
        self._put(address.name, place, (held.shape[0], held.shape[1]), held, held.offset)

    def _put(
        self,
        name: PhysicalName,
        place: tuple[int, int],
        sizes: tuple[int, int],
        held: StoredTensor,
        offset: int,
        pitch: int = 0,
    ) -> None:
        """Add a box of whole rows, in the axes of the tensor that it is a part of."""
        twin = self._copies.setdefault((name, *place), held)
        if twin is not held and twin.crc and held.crc and twin.crc != held.crc:
            message = f"is not the same in {twin.file}: replicas disagree"
            self._faults.append(Fault("replica", message, held.file, held.name))
        whole = self._whole.tensors[name]
        shape = whole.stored_shape
        elements = (sizes[1] - 1) * pitch + sizes[0] if pitch else sizes[0] * sizes[1]
        nbytes = elements * held.dtype.itemsize
        offsets, box = _in_axes(place, sizes, shape)
        self._boxes.setdefault(name, []).append(Box(offsets, box, held.file, offset, nbytes, pitch))
        dtype = self._dtypes.setdefault(name, held.dtype)
        if dtype != held.dtype:
            message = f"is {held.dtype}, other ranks hold {dtype}"
            self._faults.append(Fault("dtype", message, held.file, held.name))

    def _tensor(self, name: PhysicalName) -> StoredTensor:
        boxes, dtype = self._boxes[name], self._dtypes[name]
        shape = self._whole.tensors[name].stored_shape
        shape = (self._rows.get(name, shape[0]), *shape[1:])
        return StoredTensor(
            name, dtype, shape, boxes[0].file, 0, dtype.nbytes_of(shape), tuple(boxes)
        )

    def _sort_rest(self) -> None:
        for name in sorted(self._found.keys() - self._used):
            held = self._found[name]
            hint = "pass `drop=PATTERN` to leave tensors out knowingly"
            message = f"is no tensor of {self._family.title} that this rank holds"
            self._faults.append(Fault("extra tensor", message, held.file, name, hint=hint))


def _in_axes(
    place: tuple[int, int], sizes: tuple[int, int], shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return where rows of a matrix are in the axes of the tensor that it stands for."""
    row, col = place
    if len(shape) == 1:
        return (row,), sizes[:1]
    if len(shape) == 2:
        return place, sizes
    return (row // shape[1], row % shape[1], col), (1, *sizes)


def names_of_ranks(names: Iterable[str]) -> Iterator[str]:
    """Yield the folders of ranks among the files of a checkpoint."""
    for name in names:
        folder, _, file = name.partition("/")
        if file == FILE_NAME and _FOLDER.fullmatch(folder):
            yield folder
