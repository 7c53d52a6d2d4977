"""Cuts transfers into files, and gives every byte its place."""

from collections.abc import Callable, Iterable, Iterator

from lingconv.containers import TensorSpec, gguf, safetensors
from lingconv.plan import OutputFile, Transfer
from lingconv.stored import Extent

_Unplaced = tuple[Transfer, tuple[TensorSpec, ...]]


def pack_safetensors(transfers: Iterable[Transfer], max_shard_bytes: int) -> tuple[OutputFile, ...]:
    """Cut transfers into safetensors files of at most `max_shard_bytes` of data.

    A tensor is never split, so one that is larger gets a file of its own.
    """
    shards = list(_cut(transfers, max_shard_bytes, max_tensors=0))
    files = []
    for index, shard in enumerate(shards):
        name = safetensors.shard_name(index, len(shards))
        ordered = safetensors.storage_order(spec for _, specs in shard for spec in specs)
        start = len(safetensors.build_header(ordered))
        files.append(_place(name, shard, ordered, start, lambda spec: spec.nbytes))
    return tuple(files)


def pack_gguf(
    transfers: Iterable[Transfer],
    metadata: gguf.Metadata,
    stem: str,
    *,
    max_shard_bytes: int | None,
    max_tensors: int,
) -> tuple[OutputFile, ...]:
    """Cut transfers into GGUF files called `stem`; a limit of None or 0 is none.

    The first file carries `metadata`, the others only what makes them part of it.
    """
    shards = list(_cut(transfers, max_shard_bytes, max_tensors))
    num_tensors = sum(len(specs) for shard in shards for _, specs in shard)
    alignment = gguf.alignment_of(metadata)
    files = []
    for index, shard in enumerate(shards):
        name = gguf.shard_name(stem, index, len(shards))
        own = gguf.with_split(metadata, index, len(shards), num_tensors)
        ordered = [spec for _, specs in shard for spec in specs]
        start = len(gguf.build_header(own, ordered))
        file = _place(name, shard, ordered, start, lambda spec: gguf.padded_bytes(spec, alignment))
        files.append(file._replace(metadata=own))
    return tuple(files)


def _cut(
    transfers: Iterable[Transfer], max_bytes: int | None, max_tensors: int
) -> Iterator[list[_Unplaced]]:
    """Yield what goes into each file: never nothing, even if there are no transfers at all."""
    shard: list[_Unplaced] = []
    filled = 0
    for transfer in transfers:
        specs = transfer.target.specs()
        nbytes = sum(spec.nbytes for spec in specs)
        too_large = max_bytes and filled + nbytes > max_bytes
        if shard and (too_large or len(shard) == max_tensors):
            yield shard
            shard, filled = [], 0
        shard.append((transfer, specs))
        filled += nbytes
    yield shard


def _place(
    name: str,
    shard: list[_Unplaced],
    ordered: list[TensorSpec],
    start: int,
    space_of: Callable[[TensorSpec], int],
) -> OutputFile:
    """Return a file that holds `ordered` from byte `start` on, each in the space that it needs."""
    position = start
    extents: dict[str, Extent] = {}
    for spec in ordered:
        extents[spec.name] = Extent(name, position, spec.nbytes)
        position += space_of(spec)
    transfers = []
    for transfer, specs in shard:
        placed = tuple(extents[spec.name] for spec in specs)
        target = transfer.target._replace(extents=placed)
        transfers.append(transfer._replace(target=target))
    return OutputFile(name, position, tuple(ordered), tuple(transfers))
