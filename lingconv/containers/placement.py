"""Cuts transfers into files, and gives every byte its place."""

from collections.abc import Callable, Iterable, Iterator

from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.plans.plan import OutputFile, Transfer
from lingconv.plans.tensor_map import ByteRange

# A transfer whose target has no place yet, and the tensors that it fills.
Unplaced = tuple[Transfer, tuple[TensorSpec, ...]]


def cut(
    transfers: Iterable[Transfer], max_bytes: int | None, max_tensors: int
) -> Iterator[list[Unplaced]]:
    """Yield what goes into each file: never nothing, even if there are no transfers at all."""
    unplaced = ((transfer, transfer.target.specs()) for transfer in transfers)
    return cut_specs(unplaced, max_bytes, max_tensors)


def cut_specs(
    unplaced: Iterable[Unplaced], max_bytes: int | None, max_tensors: int
) -> Iterator[list[Unplaced]]:
    """Yield what goes into each file: as much as fits into `max_bytes` and `max_tensors`, or 0."""
    shard: list[Unplaced] = []
    filled = 0
    for transfer, specs in unplaced:
        nbytes = sum(spec.nbytes for spec in specs)
        too_large = max_bytes and filled + nbytes > max_bytes
        if shard and (too_large or len(shard) == max_tensors):
            yield shard
            shard, filled = [], 0
        shard.append((transfer, specs))
        filled += nbytes
    yield shard


def place(
    name: str,
    shard: list[Unplaced],
    ordered: list[TensorSpec],
    start: int,
    space_of: Callable[[TensorSpec], int],
) -> OutputFile:
    """Return a file that holds `ordered` from byte `start` on, each in the space that it needs."""
    position = start
    extents: dict[str, ByteRange] = {}
    for spec in ordered:
        extents[spec.name] = ByteRange(name, position, spec.nbytes)
        position += space_of(spec)
    transfers = []
    for transfer, specs in shard:
        placed = tuple(extents[spec.name] for spec in specs)
        target = transfer.target._replace(extents=placed)
        transfers.append(transfer._replace(target=target))
    return OutputFile(name, position, tuple(ordered), tuple(transfers))
