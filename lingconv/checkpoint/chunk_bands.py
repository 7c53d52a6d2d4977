"""Bands of a tensor that is stored in chunks, as torch_dist checkpoints store it.

Each of Megatron's ranks writes its own box of a tensor: any rows and columns, some of them twice. A
band is a run of rows that are covered by the same chunks from left to right.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from lingconv.containers.stored_tensor import Box, StoredTensor
from lingconv.encodings import Encoding
from lingconv.plans.tensor_map import ByteRange, ChunkBand, MatrixSlice, StoredMatrix


class Gap(ValueError):
    """A part of a tensor is in no chunk; the message says which."""


class ColumnRun(NamedTuple):
    """A run of whole rows of a chunk, and its position in the tensor's matrix."""

    row: int
    num_rows: int
    col: int
    chunk: StoredMatrix
    chunk_row: int


def stored_in_boxes(
    tensor: StoredTensor, encoding: Encoding
) -> tuple[StoredMatrix, list[ColumnRun]]:
    """Return a tensor as a matrix without bands yet, and the runs for `with_bands`.

    The last axis is the matrix's columns, all others are its rows; a vector is one column.
    """
    vector = len(tensor.shape) == 1
    shape = tensor.shape if vector else (prod(tensor.shape[:-1]), tensor.shape[-1])
    stack = tensor.shape[0] if len(tensor.shape) > 2 else 0
    runs = [run for box in tensor.boxes for run in _runs(tensor, box, encoding)]
    return StoredMatrix(tensor.name, shape, encoding, (), stack), runs


def _runs(tensor: StoredTensor, box: Box, encoding: Encoding) -> Iterator[ColumnRun]:
    """Yield the runs of whole rows of a box."""
    vector = len(tensor.shape) == 1
    shape = (*tensor.shape, 1) if vector else tensor.shape
    offsets = (*box.offsets, 0) if vector else box.offsets
    sizes = (*box.sizes, 1) if vector else box.sizes
    rows = prod(sizes[:-1])
    chunk_shape = (rows,) if vector else (rows, sizes[-1])
    extent = ByteRange(box.file, box.offset, box.nbytes)
    chunk = StoredMatrix(tensor.name, chunk_shape, encoding, (extent,), pitch=box.pitch)
    outer, height = shape[:-2], sizes[-2]
    steps = product(
        *(range(first, first + size) for first, size in zip(offsets, sizes[:-2], strict=False))
    )
    for number, place in enumerate(steps):
        row = 0
        for index, size in zip(place, outer, strict=True):
            row = row * size + index
        row = row * shape[-2] + offsets[-2]
        yield ColumnRun(row, height, offsets[-1], chunk, number * height)


def with_bands(stored: StoredMatrix, runs: Sequence[ColumnRun]) -> StoredMatrix:
    """Return a matrix with its bands, made of `runs`.

    Rows that are stored twice are read once, rows beyond the matrix (padding) not at all. Raises
    Gap if any are missing.
    """
    return stored._replace(bands=tuple(_join(_bands(stored, runs))))


def _bands(stored: StoredMatrix, runs: Sequence[ColumnRun]) -> Iterator[ChunkBand]:
    runs = [run for run in runs if run.row < stored.rows]
    ordered = sorted(runs, key=lambda run: run[:3])
    ends = {min(run.row + run.num_rows, stored.rows) for run in runs}
    borders = sorted({0, stored.rows, *(run.row for run in runs), *ends})
    open_runs: list[ColumnRun] = []
    waiting = iter(ordered)
    following = next(waiting, None)
    for top, bottom in pairwise(borders):
        open_runs = [run for run in open_runs if run.row + run.num_rows > top]
        while following is not None and following.row <= top:
            open_runs.append(following)
            following = next(waiting, None)
        yield ChunkBand(top, bottom - top, tuple(_across(stored, open_runs, top, bottom)))


def _across(
    stored: StoredMatrix, runs: Sequence[ColumnRun], top: int, bottom: int
) -> Iterator[MatrixSlice]:
    """Yield the slices that cover rows `top` to `bottom`, from left to right."""
    col = 0
    while col < stored.cols:
        covering = [run for run in runs if run.col <= col < run.col + run.chunk.cols]
        if not covering:
            raise Gap(f"rows {top:,} to {bottom:,}, column {col:,} are in no chunk")
        run = max(covering, key=lambda run: run.col + run.chunk.cols)
        first = col - run.col
        yield MatrixSlice(
            run.chunk, run.chunk_row + top - run.row, bottom - top, first, run.chunk.cols - first
        )
        col = run.col + run.chunk.cols


def _join(bands: Iterator[ChunkBand]) -> Iterator[ChunkBand]:
    """Yield the bands, with adjacent ones joined if they continue in the same chunks."""
    held: ChunkBand | None = None
    for band in bands:
        if held is not None and _goes_on(held, band):
            chunks = tuple(
                segment._replace(num_rows=segment.num_rows + band.num_rows)
                for segment in held.chunks
            )
            held = ChunkBand(held.start, held.num_rows + band.num_rows, chunks)
            continue
        if held is not None:
            yield held
        held = band
    if held is not None:
        yield held


def _goes_on(held: ChunkBand, band: ChunkBand) -> bool:
    return len(held.chunks) == len(band.chunks) and all(
        one.source is other.source
        and one.first_row + one.num_rows == other.first_row
        and (one.first_col, one.num_cols) == (other.first_col, other.num_cols)
        for one, other in zip(held.chunks, band.chunks, strict=True)
    )
