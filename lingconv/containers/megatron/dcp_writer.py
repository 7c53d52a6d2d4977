"""Writes torch_dist: tensors cut into chunks, chunks placed in .distcp files."""

from collections.abc import Iterable, Iterator

from lingconv.containers.megatron import dcp_metadata as torch_dist
from lingconv.containers.megatron.archives import chunk_archive
from lingconv.containers.placement import Unplaced, cut_specs
from lingconv.encodings.dtypes import DTYPES, DType
from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.plans.plan import OutputFile, Transfer, in_term_runs
from lingconv.plans.tensor_map import ByteRange, StoredMatrix

# A chunk of torch_dist is read whole by whoever loads a part of it: one expert of Ling-1T.
CHUNK_BYTES = 64 << 20
CONTAINER = "torch_dist"


def pack_torch_dist(
    transfers: Iterable[Transfer], max_shard_bytes: int, folder: str
) -> tuple[OutputFile, ...]:
    """Cut transfers into chunks, and these into `.distcp` files of about `max_shard_bytes`."""
    chunks = [chunk for transfer in transfers for chunk in _chunks(transfer)]
    files = []
    for index, shard in enumerate(cut_specs(chunks, max_shard_bytes, max_tensors=0)):
        name = f"{folder}__0_{index}{torch_dist.SUFFIX}"
        position, placed = 0, []
        for transfer, (spec,) in shard:
            archive = chunk_archive(position, _plain(spec), spec.shape)
            extent = ByteRange(name, archive.offsets()[0], spec.nbytes)
            target = transfer.target._replace(extents=(extent,))
            placed.append(transfer._replace(target=target))
            position = archive.end
        specs = tuple(spec for _, (spec,) in shard)
        files.append(OutputFile(name, position, specs, tuple(placed), CONTAINER))
    return tuple(files)


def _plain(spec: TensorSpec) -> DType:
    return DTYPES[spec.dtype.value]


def _chunks(transfer: Transfer) -> Iterator[Unplaced]:
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
        chunk = StoredMatrix(target.name, matrix, target.encoding, (), count if stack else 0)
        (whole,) = target.encoding.tensors(target.name, shape)
        spec = whole._replace(offsets=offsets)
        yield transfer._replace(target=chunk, terms=terms), (spec,)
