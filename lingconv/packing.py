"""Cuts transfers into files, and gives every byte its place."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lingconv.containers import TensorSpec, gguf, safetensors, torch_dist
from lingconv.dtypes import DTYPES, DType
from lingconv.framing import chunk_archive, rank_archive
from lingconv.plans import Container, OutputFile, Transfer, in_term_runs
from lingconv.stored import Extent, Stored

# A chunk of torch_dist is read whole by whoever loads a part of it: one expert of Ling-1T.
CHUNK_BYTES = 64 << 20

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
        files.append(file._replace(container=Container.GGUF, metadata=own))
    return tuple(files)


def pack_torch_dist(
    transfers: Iterable[Transfer], max_shard_bytes: int, folder: str
) -> tuple[OutputFile, ...]:
    """Cut transfers into chunks, and these into `.distcp` files of about `max_shard_bytes`."""
    chunks = [chunk for transfer in transfers for chunk in _chunks(transfer)]
    files = []
    for index, shard in enumerate(_cut_specs(chunks, max_shard_bytes, max_tensors=0)):
        name = f"{folder}__0_{index}{torch_dist.SUFFIX}"
        position, placed = 0, []
        for transfer, (spec,) in shard:
            archive = chunk_archive(position, _plain(spec), spec.shape)
            extent = Extent(name, archive.offsets()[0], spec.nbytes)
            target = transfer.target._replace(extents=(extent,))
            placed.append(transfer._replace(target=target))
            position = archive.end
        specs = tuple(spec for _, (spec,) in shard)
        files.append(OutputFile(name, position, specs, tuple(placed), Container.TORCH_DIST))
    return tuple(files)


def pack_rank(name: str, transfers: Iterable[Transfer], state: Mapping[str, Any]) -> OutputFile:
    """Put what one rank of Megatron holds into its file."""
    transfers = list(transfers)
    specs = tuple(spec for transfer in transfers for spec in transfer.target.specs())
    archive = rank_archive(specs, state)
    placed = []
    for transfer, spec, offset in zip(transfers, specs, archive.offsets(), strict=True):
        extent = Extent(name, offset, spec.nbytes)
        target = transfer.target._replace(extents=(extent,))
        placed.append(transfer._replace(target=target))
    return OutputFile(name, archive.end, specs, tuple(placed), Container.TORCH, state=state)


def _plain(spec: TensorSpec) -> DType:
    return DTYPES[spec.dtype.value]


def _chunks(transfer: Transfer) -> Iterator[_Unplaced]:
    """Yield a transfer in chunks of whole rows, or of whole experts where some are stacked."""
    target, cols = transfer.target, transfer.cols
    stack, height = target.stack, transfer.rows // (target.stack or 1)
    row_bytes = target.encoding.row_bytes(cols)
    steps, size = (stack, height * row_bytes) if stack else (transfer.rows, row_bytes)
    step = max(1, CHUNK_BYTES // max(size, 1))
    while stack and steps % step:
        step -= 1  # so that no chunk straddles the experts of two ranks
    unit = height if stack else 1
    firsts = range(0, steps, step)
    counts = [min(step, steps - first) for first in firsts]
    runs = in_term_runs(transfer, [count * unit for count in counts])
    for first, count, terms in zip(firsts, counts, runs, strict=True):
        inner = (height, *target.shape[1:]) if stack else target.shape[1:]
        shape, offsets = (count, *inner), (first, *(0 for _ in inner))
        matrix = (count * unit, *target.shape[1:])
        chunk = Stored(target.name, matrix, target.encoding, (), count if stack else 0)
        (whole,) = target.encoding.tensors(target.name, shape)
        spec = whole._replace(offsets=offsets)
        yield transfer._replace(target=chunk, terms=terms), (spec,)


def _cut(
    transfers: Iterable[Transfer], max_bytes: int | None, max_tensors: int
) -> Iterator[list[_Unplaced]]:
    """Yield what goes into each file: never nothing, even if there are no transfers at all."""
    unplaced = ((transfer, transfer.target.specs()) for transfer in transfers)
    return _cut_specs(unplaced, max_bytes, max_tensors)


def _cut_specs(
    unplaced: Iterable[_Unplaced], max_bytes: int | None, max_tensors: int
) -> Iterator[list[_Unplaced]]:
    shard: list[_Unplaced] = []
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
