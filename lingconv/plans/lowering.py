"""Lowering: a plan's transfers become strips, the units of work of the execution.

A strip is a few whole rows of one matrix, about 4 MiB, so that memory depends neither on the size
of a tensor, nor of a shard, nor of the model. No I/O, as in the plan.
"""

from collections.abc import Iterator
from typing import NamedTuple

from lingconv.encodings import Encoding
from lingconv.encodings.dtypes import DType
from lingconv.encodings.plain import PLAIN
from lingconv.errors import ResourceError
from lingconv.plans.plan import OutputFile, Plan, Term, Transfer, in_term_runs
from lingconv.plans.tensor_map import ByteRange, MatrixSlice, StoredMatrix

# Large enough that calls cost nothing, small enough that a strip stays in the processor's cache.
STRIP_BYTES = 4 << 20
_F32_BYTES = 4
_SUM_BYTES = 8  # averages are added in float64
_AT_ONCE = 8  # checkpoints that are added in one pass
_SCATTERED = 8


class _Move(NamedTuple):
    """A byte range of a source, and its offset in the target's file."""

    source: ByteRange
    offset: int


class CopyStrip(NamedTuple):
    """Bytes that are copied unchanged: `sources`, concatenated, to `offset`."""

    sources: tuple[ByteRange, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Number of bytes in all sources."""
        return sum(source.nbytes for source in self.sources)


class RowStrip(NamedTuple):
    """Rows `first` to `last` (excluded) of a target matrix, and the `terms` that fill them.

    They are decoded and encoded, or assembled unchanged if the transfer copies.
    """

    transfer: Transfer
    first: int
    last: int
    terms: tuple[Term, ...]

    @property
    def segments(self) -> tuple[MatrixSlice, ...]:
        """The segments that hold the rows in the last source."""
        return self.terms[-1].segments

    @property
    def offset(self) -> int:
        """Offset of the strip's elements in the target's file."""
        return offset_of(self.transfer.target, 0, self.first, self.last - self.first)


Strip = CopyStrip | RowStrip


def offset_of(stored: StoredMatrix, part: int, first: int, num_rows: int) -> int:
    """Return the file offset of rows in tensor `part` of a matrix (0 elements, 1 scales)."""
    return rows_of(MatrixSlice(stored, first, num_rows, 0, stored.cols), part).offset


def lower(file: OutputFile) -> Iterator[Strip]:
    """Yield the strips that fill a file, each byte of its tensors exactly once."""
    moving = [transfer for transfer in file.transfers if _moves_bytes(transfer)]
    yield from _cut([move for transfer in moving for move in _moves(transfer)])
    for transfer in file.transfers:
        if not _moves_bytes(transfer):
            yield from row_strips(transfer)


def _moves_bytes(transfer: Transfer) -> bool:
    """Return whether a transfer is byte copies alone: whole rows, unchanged and not transposed."""
    by_columns = transfer.target.pitch or any(s.source.pitch for s in transfer.segments)
    return (
        transfer.copies
        and not by_columns
        and all(
            segment.is_whole_rows and segment.num_cols == transfer.cols
            for segment in transfer.segments
        )
    )


def written_bytes(strip: Strip) -> int:
    """Return the number of bytes that a strip fills, without scales that are stored apart."""
    if isinstance(strip, CopyStrip):
        return strip.nbytes
    target = strip.transfer.target
    return (strip.last - strip.first) * target.encoding.row_bytes(target.cols)


def row_strips(transfer: Transfer) -> Iterator[RowStrip]:
    """Yield the strips of a transfer, each with the source rows that fill it."""
    rows = transfer.filled_rows
    if not transfer.target.stack and 0 < rows <= rows_per_strip(transfer):
        yield RowStrip(transfer, 0, rows, transfer.terms)
        return
    bounds = list(_bounds(transfer))
    runs = in_term_runs(transfer, [last - first for first, last in bounds])
    for (first, last), terms in zip(bounds, runs, strict=True):
        yield RowStrip(transfer, first, last, terms)


def _bounds(transfer: Transfer) -> Iterator[tuple[int, int]]:
    """Yield first and last row of strips; they end with each stacked matrix if blocks would not."""
    target, step, rows = transfer.target, rows_per_strip(transfer), transfer.filled_rows
    straddles = target.encoding.row_multiple > 1 and target.height % target.encoding.row_multiple
    height = target.height if straddles else rows
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        for first in range(top, bottom, step):
            yield first, min(first + step, bottom)


def _moves(transfer: Transfer) -> Iterator[_Move]:
    """Yield the byte moves of a transfer: elements, and scales if any."""
    for part, target in enumerate(transfer.target.extents):
        offset = target.offset
        for segment in transfer.segments:
            extent = rows_of(segment, part)
            yield _Move(extent, offset)
            offset += extent.nbytes


def rows_of(segment: MatrixSlice, part: int) -> ByteRange:
    """Return the bytes of a segment in tensor `part` of its source (0 elements, 1 scales)."""
    source = segment.source
    extent = source.extents[part]
    if segment.num_rows == source.rows:
        return extent
    rows = segment.first_row, segment.num_rows
    encoding = source.encoding
    first, end = encoding.part_rows(part, *rows, source.height)
    _, total = encoding.part_rows(part, 0, source.rows, source.height)
    unit_bytes = extent.nbytes // total
    return ByteRange(extent.file, extent.offset + first * unit_bytes, (end - first) * unit_bytes)


def _cut(moves: list[_Move]) -> Iterator[CopyStrip]:
    """Cut moves into strips that end at multiples of STRIP_BYTES of the target's file.

    Neighbours in the target share a strip, so that writes are large and aligned, however small and
    scattered the sources are.
    """
    sources: list[ByteRange] = []
    start = end = 0
    for source, offset in sorted(moves, key=lambda move: move.offset):
        if sources and offset != end:
            yield CopyStrip(tuple(sources), start)
            sources = []
        if not sources:
            start = end = offset
        done = 0
        while done < source.nbytes:
            count = min(STRIP_BYTES - end % STRIP_BYTES, source.nbytes - done)
            _append(sources, ByteRange(source.file, source.offset + done, count))
            done += count
            end += count
            if end % STRIP_BYTES == 0:
                yield CopyStrip(tuple(sources), start)
                sources, start = [], end
    if sources:
        yield CopyStrip(tuple(sources), start)


def _append(sources: list[ByteRange], extent: ByteRange) -> None:
    """Append an extent, or lengthen the last one if the two are adjacent."""
    last = sources[-1] if sources else None
    if last and last.file == extent.file and last.offset + last.nbytes == extent.offset:
        sources[-1] = last._replace(nbytes=last.nbytes + extent.nbytes)
    else:
        sources.append(extent)


def rows_per_strip(transfer: Transfer) -> int:
    """Return the number of rows of a strip: whole blocks, about STRIP_BYTES, at least one block."""
    if transfer.target.pitch:
        return transfer.target.pitch  # a transposed matrix is written at once
    multiple = transfer.target.encoding.row_multiple
    block_bytes = multiple * max(1, transfer.cols) * _widest(transfer)
    # Reading any rows of a transposed matrix means reading all of its columns, for every strip.
    scattered = any(segment.source.pitch for segment in transfer.segments)
    return multiple * max(1, (_SCATTERED if scattered else 1) * STRIP_BYTES // block_bytes)


def _widest(transfer: Transfer) -> int:
    """Return the largest size of an element in bytes: in a source, decoded, or in the target."""
    if transfer.copies:
        return transfer.target.encoding.element_bytes
    if transfer.is_average:
        return _SUM_BYTES
    encodings = [transfer.target.encoding, *_sources(transfer)]
    in_f32 = works_in_f32(transfer) or transfer.target.encoding.encodes_from_f32
    return max(_F32_BYTES if in_f32 else 2, *(each.element_bytes for each in encodings))


def works_in_f32(transfer: Transfer) -> bool:
    """Return whether rows are decoded to float32; else to BF16, which is enough to lose nothing."""
    if transfer.is_average:
        return transfer.target.encoding != PLAIN[DType.BF16]
    return transfer.target.encoding.works_in_f32(set(_sources(transfer)))


def strip_memory(strip: Strip) -> int:
    """Return the buffer memory of a strip in bytes: as read, as decoded, as written."""
    if isinstance(strip, CopyStrip):
        return strip.nbytes
    transfer = strip.transfer
    elements = (strip.last - strip.first) * max(1, transfer.cols)
    segments = [segment for term in transfer.terms for segment in term.segments]
    columns = max((segment.source.pitch * segment.source.cols for segment in segments), default=0)
    if not transfer.is_average:
        return 3 * (elements + columns) * _widest(transfer)
    bf16 = all(segment.source.encoding == PLAIN[DType.BF16] for segment in segments)
    term_bytes = 2 if bf16 else 2 * _F32_BYTES  # float32 and the bytes that it is decoded from
    per_element = _AT_ONCE * term_bytes + _SUM_BYTES + 3 * _F32_BYTES
    return per_element * elements + columns * _F32_BYTES


def _sources(transfer: Transfer) -> tuple[Encoding, ...]:
    return tuple(segment.source.encoding for segment in transfer.segments)


def _transfer_memory(transfer: Transfer) -> int:
    if _moves_bytes(transfer):
        return STRIP_BYTES
    rows = min(rows_per_strip(transfer), transfer.rows)
    return strip_memory(RowStrip(transfer, 0, rows, ()))


def peak_memory(plan: Plan, jobs: int, max_memory_bytes: int) -> tuple[int, int]:
    """Return the number of jobs that fit the budget, and the buffer memory of all in bytes.

    Raises ResourceError if the budget is too small for a single strip.
    """
    kinds = {
        (t.target.shape, t.target.encoding, t.copies, t.is_average, _sources(t)): t
        for t in plan.transfers()
    }
    largest, name = max((_transfer_memory(t), t.target.name) for t in kinds.values())
    fitting = min(jobs, max_memory_bytes // max(largest, 1))
    if fitting < 1:
        raise ResourceError(
            f"{name} needs buffers of {largest:,} bytes, the budget is {max_memory_bytes:,}",
            hint="raise `max_memory_bytes`",
        )
    return fitting, fitting * largest
