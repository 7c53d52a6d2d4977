"""Decoded rows of stored matrices: the reading half of every conversion and of every proof.

Rows are decoded to BF16 bits (uint16) if that loses nothing, else to float32; the caller chooses by
the dtype of the array that it passes, and the codec of each encoding fills it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lingconv.checkpoint.transposed import read_rows
from lingconv.encodings.codec import BF16_BITS, F32
from lingconv.encodings.dtypes import DType
from lingconv.encodings.plain import PLAIN
from lingconv.plans.tensor_map import MatrixSlice, StoredMatrix, side_by_side
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes

__all__ = ["BF16_BITS", "F32", "Decoder", "Nonfinite", "source_of"]


class Nonfinite(NamedTuple):
    """NaN or Inf met while decoding: in `source`, at or below `row`."""

    source: StoredMatrix
    row: int


def source_of(segments: Sequence[MatrixSlice], cols: int, row: int) -> Nonfinite:
    """Return the stored matrix, and the row in it, of row `row` of the rows in `segments`."""
    for segment, *_ in side_by_side(segments, cols):
        if row < segment.num_rows:
            return Nonfinite(segment.source, segment.first_row + row)
        row -= segment.num_rows
    raise AssertionError(f"the segments have no row {row} more")


class Decoder:
    """Reads and decodes rows; one Decoder per thread, because it reuses its buffers."""

    def __init__(self, arena: Arena, blobs: Mapping[str, Blob]) -> None:
        self.arena = arena
        self._blobs = blobs
        # Whether float64 becomes float32 by rounding to odd: what is going to be rounded to fewer
        # bits is then rounded as if there had been no float32 in between.
        self.rounds_to_odd = False

    def fill(self, segments: Sequence[MatrixSlice], first: int, values: Array) -> Nonfinite | None:
        """Fill `values` with the rows from `first` of all `segments`, concatenated.

        Returns the first NaN or Inf, or None; only decoding that computes looks for them.
        """
        found = None
        last, top = first + values.shape[0], 0
        for beside in side_by_side(segments, values.shape[1]):
            begin, end = max(first, top), min(last, top + beside[0].num_rows)
            if begin < end:
                into = values[begin - first : end - first]
                left = 0
                for segment in beside:
                    window = segment.cut(begin - top, end - begin)
                    met = self._fill_window(window, into[:, left : left + segment.num_cols])
                    left += segment.num_cols
                    found = found or met
            top += beside[0].num_rows
        return found

    def run_in_file(self, segments: Sequence[MatrixSlice]) -> tuple[int, int] | None:
        """Return the file descriptor and the offset of rows that are one run of plain numbers.

        None if they are several runs, or not BF16 or F32, or not in a local file.
        """
        first, *others = segments
        source = first.source
        bare = source.encoding in _BARE and not source.pitch and first.is_whole_rows
        if others or not bare:
            return None
        extent = source.extents[0]
        row_bytes = source.encoding.row_bytes(source.cols)
        descriptor = self._blobs[extent.file].descriptor
        return (
            None
            if descriptor is None
            else (descriptor, extent.offset + first.first_row * row_bytes)
        )

    def _fill_window(self, segment: MatrixSlice, into: Array) -> Nonfinite | None:
        """Fill `into`, which may be a view of wider rows, with the decoded numbers of a segment."""
        source = segment.source
        if segment.is_whole_rows and into.flags.c_contiguous:
            return self._decode(source, segment.first_row, into)
        whole = self.arena.take("window", (segment.num_rows, source.cols), into.dtype)
        met = self._decode(source, segment.first_row, whole)
        left = segment.first_col
        into[...] = whole[:, left : left + segment.num_cols]
        return met

    def read(self, source: StoredMatrix, part: int, offset: int, into: Array) -> None:
        """Fill `into` with stored bytes of `part` (0 elements, 1 scales) from byte `offset`."""
        extent = source.extents[part]
        self._blobs[extent.file].read_into(extent.offset + offset, as_bytes(into))

    def scales(self, source: StoredMatrix, first: int, num_rows: int) -> Array:
        """Return the scales of `num_rows` rows of a matrix from `first` on, as float32."""
        return source.encoding.codec.scales(_Rows(self, source), first, num_rows)

    def _decode(self, source: StoredMatrix, row: int, values: Array) -> Nonfinite | None:
        met = source.encoding.codec.decode(_Rows(self, source), row, values)
        return Nonfinite(source, row) if met else None

    def read_rows(self, source: StoredMatrix, row: int, into: Array) -> None:
        """Fill `into` with the stored elements of rows from `row` on."""
        read_rows(self.arena, self._blobs, source, row, into)


class _Rows:
    """One stored matrix, with the interface through which its codec reads it."""

    __slots__ = ("_decoder", "_source", "buffers", "cols", "height", "rounds_to_odd")

    def __init__(self, decoder: Decoder, source: StoredMatrix) -> None:
        self._decoder = decoder
        self._source = source
        self.height = source.height
        self.cols = source.cols
        self.buffers = decoder.arena
        self.rounds_to_odd = decoder.rounds_to_odd

    def read_rows(self, first: int, into: Array) -> None:
        self._decoder.read_rows(self._source, first, into)

    def read(self, part: int, offset: int, into: Array) -> None:
        self._decoder.read(self._source, part, offset, into)


_BARE = (PLAIN[DType.BF16], PLAIN[DType.F32])
