"""Writes legacy per-rank checkpoints: the model cut up for `mp_rank_*` files."""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import Any

from lingconv.containers.megatron.archives import rank_archive
from lingconv.containers.megatron.args import VOCABULARY, rank_modules
from lingconv.containers.megatron.closing_files import ITERATION_FOLDER
from lingconv.model.family import Family, LogicalName, PhysicalName
from lingconv.model.layout import PhysicalTensor, build_layout
from lingconv.model.parallelism import FILE_NAME, all_ranks, parts
from lingconv.plans.options import MegatronOptions, Spec
from lingconv.plans.plan import OutputFile, Transfer
from lingconv.plans.tensor_map import ByteRange

CONTAINER = "torch"
TransferOf = Callable[[PhysicalTensor], Transfer]


def pack_rank(name: str, transfers: Iterable[Transfer], state: Mapping[str, Any]) -> OutputFile:
    """Put what one rank of Megatron holds into its file."""
    transfers = list(transfers)
    specs = tuple(spec for transfer in transfers for spec in transfer.target.specs())
    archive = rank_archive(specs, state)
    placed = []
    for transfer, spec, offset in zip(transfers, specs, archive.offsets(), strict=True):
        extent = ByteRange(name, offset, spec.nbytes)
        target = transfer.target._replace(extents=(extent,))
        placed.append(transfer._replace(target=target))
    return OutputFile(name, archive.end, specs, tuple(placed), CONTAINER, state=state)


def place_on_ranks(
    family: Family,
    symbols: Mapping[str, Any],
    options: MegatronOptions,
    args: Mapping[str, Any],
    transfer_of: TransferOf,
) -> tuple[OutputFile, ...]:
    """Return the file of every rank; what several ranks hold is in the file of each of them.

    Raises UsageError when the model cannot be spread like that.
    """
    spreader = _RankPlacement(family, symbols, options, transfer_of)
    files = tuple(spreader.files(args))
    spreader.check()
    return files


class _RankPlacement:
    def __init__(
        self,
        family: Family,
        symbols: Mapping[str, Any],
        options: MegatronOptions,
        transfer_of: TransferOf,
    ) -> None:
        self._family = family
        self._symbols = symbols
        self._options = options
        self._transfer_of = transfer_of
        megatron = family.megatron
        te = megatron is not None and options.spec == Spec.TE
        self._beside = megatron.state_beside if megatron and te else {}
        self._held: dict[LogicalName, set[tuple[int, ...]]] = {}

    def files(self, args: Mapping[str, Any]) -> Iterable[OutputFile]:
        parallel = self._options.parallel
        for rank in all_ranks(parallel):
            transfers: list[Transfer] = []
            modules = {}
            for key, part in parts(parallel, rank, self._symbols, args[VOCABULARY]):
                layout = build_layout(self._family, self._symbols, self._options.rank_layout, part)
                modules[key] = rank_modules(layout, self._beside)
                transfers += (self._transfer(key, t) for t in layout.tensors.values())
            name = f"{ITERATION_FOLDER}{rank.folder(parallel)}/{FILE_NAME}"
            yield pack_rank(name, transfers, {"args": dict(args), "modules": modules})

    def _transfer(self, key: str, tensor: PhysicalTensor) -> Transfer:
        cols = prod(tensor.shape[1:])
        for rows in tensor.rows:
            window = rows.first, rows.num_rows, tensor.first_col, cols
            self._held.setdefault(rows.logical, set()).add(window)
        return self._transfer_of(tensor._replace(name=PhysicalName(f"{key}/{tensor.name}")))

    def check(self) -> None:
        """Make sure that the ranks together hold all of every tensor."""
        for logical in self._family.expand(self._symbols, self._options.rank_layout):
            held = sum(rows * cols for _, rows, _, cols in self._held.get(logical.name, ()))
            if held != prod(logical.shape):
                raise AssertionError(f"{logical.name} is not spread completely over the ranks")
