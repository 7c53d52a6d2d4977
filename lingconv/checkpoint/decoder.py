"""Stored rows -> numbers: the reading half of every conversion and of every proof.

Rows come as BF16 bits (uint16) where nothing is lost by it, else as float32; the caller chooses by
the array that it wants filled, and one table says how to get there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from lingconv.checkpoint.transposed import read_rows
from lingconv.encodings import Fp8, Ggml, Plain
from lingconv.encodings.dtypes import DType
from lingconv.encodings.kernels import fp8_decode, ggml_decode, numeric
from lingconv.encodings.plain import PLAIN
from lingconv.plans.tensor_map import MatrixSlice, StoredMatrix, side_by_side
from lingconv.storage import Blob
from lingconv.storage.aligned_buffers import Arena, Array, as_bytes

BF16_BITS = np.dtype(np.uint16)
F32 = np.dtype(np.float32)


class Nonfinite(NamedTuple):
    """NaN or Inf met while decoding: in `source`, at or below `row`."""

    source: StoredMatrix
    row: int


def source_of(segments: Sequence[MatrixSlice], cols: int, row: int) -> Nonfinite:
    """Return where row `row` of what segments hold comes from."""
    for segment, *_ in side_by_side(segments, cols):
        if row < segment.num_rows:
            return Nonfinite(segment.source, segment.first_row + row)
        row -= segment.num_rows
    raise AssertionError(f"the segments have no row {row} more")


class Decoder:
    """Reads and decodes rows; one Decoder per thread, because it reuses its buffers."""

    def __init__(self, arena: Arena, blobs: Mapping[str, Blob]) -> None:
        self._arena = arena
        self._blobs = blobs
        # Whether float64 becomes float32 by rounding to odd: what is going to be rounded to fewer
        # bits is then rounded as if there had been no float32 in between.
        self.rounds_to_odd = False

    def fill(self, segments: Sequence[MatrixSlice], first: int, values: Array) -> Nonfinite | None:
        """Fill `values` with the rows from `first` of all `segments`, one behind the other.

        Returns where NaN or Inf was met, as far as decoding had to look at the numbers.
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
        """Return the file descriptor and the offset of numbers that lie in a row as they are.

        None where they do not, or are no BF16 or F32 in a file that is open on this machine.
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
        """Fill `into`, which may be a part of wider rows, with the numbers of a segment."""
        source = segment.source
        if segment.is_whole_rows and into.flags.c_contiguous:
            return self._decode(source, segment.first_row, into)
        whole = self._arena.take("window", (segment.num_rows, source.cols), into.dtype)
        met = self._decode(source, segment.first_row, whole)
        left = segment.first_col
        into[...] = whole[:, left : left + segment.num_cols]
        return met

    def read(self, source: StoredMatrix, part: int, offset: int, into: Array) -> None:
        """Fill `into` with stored bytes: `part` 0 holds elements, 1 scales; from byte `offset`."""
        extent = source.extents[part]
        self._blobs[extent.file].read_into(extent.offset + offset, as_bytes(into))

    def scales(self, source: StoredMatrix, first: int, num_rows: int) -> Array:
        """Return the scales of `num_rows` rows of an FP8 matrix from `first` on, as float32."""
        encoding = cast("Fp8", source.encoding)
        top, bottom = encoding.scale_rows(first, num_rows, source.height)
        width = encoding.grid(source.height, source.cols)[1]
        stored = _SCALE_STORAGE[encoding.scale_dtype]
        raw = self._arena.take("scales in", (bottom - top, width), stored)
        self.read(source, 1, top * width * raw.itemsize, raw)
        return decode_scales(raw, encoding.scale_dtype)

    def _decode(self, source: StoredMatrix, row: int, values: Array) -> Nonfinite | None:
        encoding = source.encoding
        kind = encoding.dtype if isinstance(encoding, Plain) else encoding.kind
        nonfinite = _DECODERS[kind, values.dtype](self, source, row, values)
        return Nonfinite(source, row) if nonfinite else None

    def _read_elements(self, source: StoredMatrix, row: int, into: Array) -> None:
        read_rows(self._arena, self._blobs, source, row, into)

    def _plain(self, source: StoredMatrix, row: int, values: Array) -> int:
        self._read_elements(source, row, values)
        return 0  # nobody has to look at the values to read them

    def _bf16_to_f32(self, source: StoredMatrix, row: int, values: Array) -> int:
        stored = self._arena.take("read", values.shape, np.uint16)
        self._read_elements(source, row, stored)
        return numeric.bf16_to_f32(stored.reshape(-1), values.reshape(-1))

    def _f16_to_f32(self, source: StoredMatrix, row: int, values: Array) -> int:
        stored = self._arena.take("read", values.shape, np.float16)
        self._read_elements(source, row, stored)
        np.copyto(values, stored)
        return not np.isfinite(stored).all()

    def _f64_to_f32(self, source: StoredMatrix, row: int, values: Array) -> int:
        stored = self._arena.take("read", values.shape, np.float64)
        self._read_elements(source, row, stored)
        with np.errstate(over="ignore"):
            np.copyto(values, stored, casting="same_kind")
        nonfinite = not np.isfinite(values).all()
        if self.rounds_to_odd:
            _to_odd(stored, values)
        return nonfinite

    def _fp8(self, source: StoredMatrix, row: int, values: Array) -> int:
        codes = self._arena.take("read", values.shape, np.uint8)
        self._read_elements(source, row, codes)
        encoding = cast("Fp8", source.encoding)
        height = source.height
        block_rows, block_cols = encoding.block(height, source.cols)
        nonfinite = 0
        for done, count, inner in encoding.by_matrix(row, len(values), height):
            part = slice(done, done + count)
            nonfinite += fp8_decode.dequantize(
                codes[part],
                self.scales(source, row + done, count),
                values[part],
                block_rows,
                block_cols,
                inner % block_rows,
            )
        return nonfinite

    def _ggml(self, source: StoredMatrix, row: int, values: Array) -> int:
        kind = cast("Ggml", source.encoding).type
        count = values.size // kind.elements
        blocks = self._arena.take("read", (count, kind.nbytes), np.uint8)
        self.read(source, 0, row * values.shape[1] // kind.elements * kind.nbytes, blocks)
        ggml_decode.dequantize(kind, blocks, values.reshape(count, kind.elements))
        return numeric.count_beyond(values.reshape(-1), 128)


_DECODERS: dict[tuple[str, np.dtype[Any]], Callable[..., int]] = {
    (DType.BF16, BF16_BITS): Decoder._plain,
    (DType.BF16, F32): Decoder._bf16_to_f32,
    (DType.F16, F32): Decoder._f16_to_f32,
    (DType.F32, F32): Decoder._plain,
    (DType.F64, F32): Decoder._f64_to_f32,
    ("fp8", BF16_BITS): Decoder._fp8,
    ("fp8", F32): Decoder._fp8,
    ("ggml", F32): Decoder._ggml,
}
_BARE = (PLAIN[DType.BF16], PLAIN[DType.F32])
_SCALE_STORAGE = {DType.F32: np.float32, DType.BF16: np.uint16, DType.F8_E8M0: np.uint8}


def _to_odd(exact: Array, rounded: Array) -> None:
    """Make float32 `rounded` the neighbour of float64 `exact` whose last bit is 1, if not equal.

    Boldo and Melquiond, "When double rounding is odd" (2005): rounding that to nearest in two bits
    less or fewer gives what rounding `exact` gives.
    """
    bits = rounded.view(np.uint32)
    bits -= np.abs(rounded) > np.abs(exact)  # towards zero
    bits |= (rounded != exact) & ~np.isnan(exact)


def decode_scales(raw: Array, dtype: DType) -> Array:
    """Return stored scales as float32. E8M0 code e is 2^(e - 127), 255 is NaN (OCP MX v1.0)."""
    if dtype == DType.BF16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if dtype == DType.F8_E8M0:
        bits = raw.astype(np.uint32) << 23
        bits[raw == 0] = 0x00400000  # 2^-127 is subnormal in float32
        bits[raw == 255] = 0x7FC00000
        return bits.view(np.float32)
    return raw
