"""Places of tensors: encoded matrices in files, windows of them, and how these fill a matrix.

No I/O: names, shapes and byte ranges only.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from lingconv.encodings import Encoding
from lingconv.encodings.tensor_spec import TensorSpec
from lingconv.model.family import LogicalName, PhysicalName
from lingconv.model.layout import Address, Rows, stacked_shape


class ByteRange(NamedTuple):
    """A run of bytes in a file."""

    file: str
    offset: int
    nbytes: int


class StoredMatrix(NamedTuple):
    """An encoded matrix in its files: one extent for each tensor of its encoding.

    `shape` is that of all rows; `stack` is 0, or the number of matrices that are stacked in it.
    A matrix that is stored in chunks has no extents but `bands`, from its first row on. With a
    `pitch` it is transposed: stored by columns that begin `pitch` elements apart, each matrix of a
    stack by itself; `stored_as` is then the shape that its file states.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    extents: tuple[ByteRange, ...]
    stack: int = 0
    bands: "tuple[ChunkBand, ...]" = ()
    pitch: int = 0
    stored_as: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows; a vector has one element per row, a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Number of elements in a row."""
        return prod(self.shape[1:])

    @property
    def height(self) -> int:
        """Number of rows of one stacked matrix; without a stack, of the matrix itself."""
        return self.rows // (self.stack or 1)

    @property
    def first_extent(self) -> "ByteRange":
        """The first byte range of its elements."""
        return self.bands[0].chunks[0].source.extents[0] if self.bands else self.extents[0]

    def specs(self) -> tuple[TensorSpec, ...]:
        """Return the tensors that store the matrix, with the shapes that files state."""
        shape = self.stored_as or stacked_shape(self.shape, self.stack)
        return self.encoding.tensors(self.name, shape)

    def segments(self, first: int, num_rows: int) -> "tuple[MatrixSlice, ...]":
        """Return the segments that hold `num_rows` rows from `first` on, in reading order."""
        if not self.bands:
            return (MatrixSlice(self, first, num_rows, 0, self.cols),)
        found = []
        at = bisect_right(self.bands, first, key=lambda band: band.start) - 1
        while num_rows > 0:
            band = self.bands[at]
            skip = first - band.start
            count = min(num_rows, band.num_rows - skip)
            found += [chunk.cut(skip, count) for chunk in band.chunks]
            at, first, num_rows = at + 1, first + count, num_rows - count
        return tuple(found)


class ChunkBand(NamedTuple):
    """Rows of a matrix from `start` on, and the windows of chunks that hold them, left to right."""

    start: int
    num_rows: int
    chunks: "tuple[MatrixSlice, ...]"


class MatrixSlice(NamedTuple):
    """A window of the stored matrix `source` (a segment): a run of rows, and of columns in them.

    Segments fill a matrix in reading order. Segments narrower than the matrix lie side by side, all
    of the same height, until their widths add up to its width (`side_by_side`).
    """

    source: StoredMatrix
    first_row: int
    num_rows: int
    first_col: int
    num_cols: int

    @property
    def nbytes(self) -> int:
        """Number of bytes of the window in its files, scales included."""
        held = sum(extent.nbytes for extent in self.source.extents)
        return held * self.num_rows * self.num_cols // (self.source.rows * self.source.cols)

    @property
    def is_whole_rows(self) -> bool:
        """Whether the window has all columns of its source."""
        return self.num_cols == self.source.cols

    def cut(self, first: int, num_rows: int) -> "MatrixSlice":
        """Return the window's rows from `first` on, `num_rows` of them."""
        return self._replace(first_row=self.first_row + first, num_rows=num_rows)


def in_runs(
    segments: Iterable[MatrixSlice], cols: int, counts: Iterable[int]
) -> Iterator[tuple[MatrixSlice, ...]]:
    """Yield the segments of consecutive runs of rows of a matrix, `counts` rows each."""
    rest = list(side_by_side(segments, cols))[::-1]
    for missing in counts:
        run: list[MatrixSlice] = []
        while missing:
            beside = rest.pop()
            count = beside[0].num_rows
            if count > missing:
                rest.append(tuple(each.cut(missing, count - missing) for each in beside))
                beside = tuple(each.cut(0, missing) for each in beside)
            run += beside
            missing -= beside[0].num_rows
        yield tuple(run)


def side_by_side(segments: Iterable[MatrixSlice], cols: int) -> Iterator[tuple[MatrixSlice, ...]]:
    """Yield the segments that fill the same rows of a matrix of `cols` columns, top to bottom."""
    beside: list[MatrixSlice] = []
    width = 0
    for segment in segments:
        beside.append(segment)
        width += segment.num_cols
        if width == cols:
            yield tuple(beside)
            beside, width = [], 0


@dataclass(frozen=True, slots=True)
class Locator:
    """Maps each logical tensor of a checkpoint to the segments that store it."""

    addresses: Mapping[LogicalName, tuple[Address, ...]]
    stored: Mapping[PhysicalName, StoredMatrix]

    def holds(self, name: LogicalName) -> bool:
        """Return whether the checkpoint has all rows of a logical tensor."""
        addresses = self.addresses.get(name, ())
        return bool(addresses) and all(address.name in self.stored for address in addresses)

    def shape(self, name: LogicalName) -> tuple[int, int]:
        """Return rows and columns of a logical tensor."""
        addresses = self.addresses[name]
        num_rows = sum(address.num_rows for address in addresses)
        return num_rows, self.stored[addresses[0].name].cols

    def whole(self, name: LogicalName) -> tuple[MatrixSlice, ...]:
        """Return the segments that hold all rows of a logical tensor."""
        return self.segments([Rows(name, 0, self.shape(name)[0])])

    def window(self, wanted: Iterable[Rows], first_col: int, cols: int) -> tuple[MatrixSlice, ...]:
        """Return the segments that hold `cols` columns of logical rows, in reading order."""
        wanted = list(wanted)
        whole = self.stored[self.addresses[wanted[0].logical][0].name].cols
        segments = self.segments(wanted)
        if cols == whole:
            return segments
        bands = side_by_side(segments, whole)
        return tuple(cut for beside in bands for cut in _columns(beside, first_col, cols))

    def segments(self, wanted: Iterable[Rows]) -> tuple[MatrixSlice, ...]:
        """Return the segments that hold logical rows, in order; adjacent ones are joined."""
        segments: list[MatrixSlice] = []
        for rows in wanted:
            for address in within(self.addresses[rows.logical], rows.first, rows.num_rows):
                for segment in self.stored[address.name].segments(address.start, address.num_rows):
                    _lengthen(segments, segment)
        return tuple(segments)


def _columns(beside: Iterable[MatrixSlice], first: int, cols: int) -> Iterator[MatrixSlice]:
    """Yield the parts with columns from `first`, `cols` of them, of segments side by side."""
    left = 0
    for segment in beside:
        begin = max(first - left, 0)
        end = min(first + cols - left, segment.num_cols)
        if begin < end:
            yield segment._replace(first_col=segment.first_col + begin, num_cols=end - begin)
        left += segment.num_cols


def within(addresses: Iterable[Address], first: int, num_rows: int) -> Iterator[Address]:
    """Yield the parts of `addresses` with `num_rows` logical rows from `first` on."""
    top = 0
    for address in addresses:
        begin, end = max(first - top, 0), min(first + num_rows - top, address.num_rows)
        if end - begin == address.num_rows:
            yield address
        elif begin < end:
            yield address._replace(start=address.start + begin, num_rows=end - begin)
        top += address.num_rows


def _lengthen(segments: list[MatrixSlice], segment: MatrixSlice) -> None:
    """Append a segment, or lengthen the last one if the two are adjacent in the same matrix."""
    last = segments[-1] if segments else None
    if (
        last
        and last.source is segment.source
        and segment.is_whole_rows
        and last.first_row + last.num_rows == segment.first_row
    ):
        segments[-1] = last._replace(num_rows=last.num_rows + segment.num_rows)
    else:
        segments.append(segment)
