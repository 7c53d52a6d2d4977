"""Cuts transfers into safetensors files, and gives every byte its place."""

from collections.abc import Iterable

from lingconv.containers.safetensors import TensorSpec, build_header, shard_name, storage_order
from lingconv.model import Extent, Stored
from lingconv.plan import OutputFile, Transfer

_Unplaced = tuple[Transfer, tuple[TensorSpec, ...]]


def pack(transfers: Iterable[Transfer], max_shard_bytes: int) -> tuple[OutputFile, ...]:
    """Cut transfers into files of at most `max_shard_bytes` of data, and give every byte a place.

    A tensor is never split, so one that is larger gets a file of its own.
    """
    shards: list[list[_Unplaced]] = [[]]
    filled = 0
    for transfer in transfers:
        target = transfer.target
        specs = target.encoding.tensors(target.name, target.shape)
        nbytes = sum(spec.nbytes for spec in specs)
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((transfer, specs))
        filled += nbytes
    return tuple(
        _place(shard_name(index, len(shards)), shard) for index, shard in enumerate(shards)
    )


def _place(name: str, shard: list[_Unplaced]) -> OutputFile:
    ordered = storage_order(spec for _, specs in shard for spec in specs)
    position = len(build_header(ordered))
    extents: dict[str, Extent] = {}
    for spec in ordered:
        extents[spec.name] = Extent(name, position, spec.nbytes)
        position += spec.nbytes
    transfers = []
    for transfer, specs in shard:
        target = transfer.target
        placed = tuple(extents[spec.name] for spec in specs)
        at_place = Stored(target.name, target.shape, target.encoding, placed)
        transfers.append(Transfer(at_place, transfer.segments, transfer.scaling, transfer.copies))
    return OutputFile(name, position, tuple(ordered), tuple(transfers))
