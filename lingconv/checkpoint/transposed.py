"""Rows of transposed matrices (stored by columns): Megatron's fused `weight1` and `weight2`."""

from collections.abc import Mapping

import numpy as np

from lingconv.plans.lowering import RowStrip
from lingconv.plans.tensor_map import StoredMatrix
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes


def read_rows(
    arena: Arena, blobs: Mapping[str, Blob], source: StoredMatrix, first: int, into: Array
) -> None:
    """Fill `into` [rows, cols] with the stored elements of a matrix from row `first` on.

    Of a transposed matrix, all bytes between the first and the last element are read.
    """
    extent = source.extents[0]
    size = into.itemsize
    if not source.pitch:
        offset = extent.offset + first * source.cols * size
        blobs[extent.file].read_into(offset, as_bytes(into))
        return
    columns = arena.take("columns", (source.cols, source.pitch), into.dtype)
    done = 0
    while done < len(into):  # each matrix of a stack is transposed by itself
        matrix, inner = divmod(first + done, source.height)
        count = min(source.height - inner, len(into) - done)
        flat = columns.reshape(-1)[: (source.cols - 1) * source.pitch + count]
        place = matrix * source.cols * source.pitch + inner
        blobs[extent.file].read_into(extent.offset + place * size, as_bytes(flat))
        np.copyto(into[done : done + count], columns[:, :count].T)
        done += count


def transposed(arena: Arena, strip: RowStrip, rows: Array) -> Array:
    """Return rows [rows, cols] as the target stores them: transposed if it is stored by columns."""
    if not strip.transfer.target.pitch:
        return rows
    columns = arena.take("transposed", rows.shape[::-1], rows.dtype, like=strip.offset)
    np.copyto(columns, rows.T)
    return columns
