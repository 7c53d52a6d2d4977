"""Comparison of the tensors of two checkpoints, strip by strip.

The unit of work is a few rows of a stored tensor of DST, and the rows of SRC that they come from.
If no difference is allowed and both sides store the same bytes, bytes are compared; else both sides
are decoded and `kernels/compare.py` accumulates the differences of the numbers.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from lingconv.checkpoint.decoder import BF16_BITS, F32, Decoder
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.encodings import Encoding
from lingconv.encodings.base import EXACT, ErrorUnit, Limit
from lingconv.encodings.dtypes import DType
from lingconv.encodings.ggml import LOST_WITH_SCALE
from lingconv.encodings.kernels import compare as kernel
from lingconv.encodings.plain import PLAIN
from lingconv.plans.tensor_map import StoredMatrix
from lingconv.storage.aligned_buffers import Arena
from lingconv.storage.open_files import OpenFiles
from lingconv.verification import scales
from lingconv.verification.limits import limit_for
from lingconv.verification.pairing import Pair
from lingconv.verification.progress import Watcher
from lingconv.verification.scales import ScaleCounts
from lingconv.verification.totals import (
    Total,
    blocks,
    matrix,
    scale_figures,
    tensor_figures,
    worst_block,
)
from lingconv.verification.verdict import ScaleFigures, TensorFigures

Array = np.ndarray[Any, Any]

STRIP_ELEMENTS = 1 << 20


class _ComparedRows(NamedTuple):
    """Rows `first` to `last` of a pair's target."""

    pair: int
    first: int
    last: int


class Comparison:
    """Compares pairs with several threads; `figures` and `scale_figures` are the results."""

    def __init__(
        self, source: Model, target: Model, pairs: Sequence[Pair], *, only_exact: bool
    ) -> None:
        self.scale_histogram: dict[int, int] = {}
        self.bytes_read = 0
        self._pairs = pairs
        self._limits = [_limit(pair, only_exact=only_exact) for pair in pairs]
        self._judged = [
            number for number, limit in enumerate(self._limits) if limit.exact or not only_exact
        ]
        self._totals = [{name: Total() for name in pair.num_rows} for pair in pairs]
        self._scales: dict[int, list[ScaleCounts]] = {}
        self._source_files = OpenFiles(source.checkpoint.storage, source.checkpoint.checksums)
        self._target_files = OpenFiles(target.checkpoint.storage)
        self._lock = threading.Lock()
        self._stop = False

    @property
    def nbytes(self) -> int:
        """Number of bytes that `run` reads, of both sides together."""
        return sum(_stored_bytes(self._pairs[number]) for number in self._judged)

    def run(self, jobs: int, watcher: Watcher) -> None:
        """Read and compare everything."""
        strips = iter(self._strips())
        with (
            self._source_files,
            self._target_files,
            ThreadPoolExecutor(jobs, "compare") as threads,
        ):
            futures = [threads.submit(self._work, strips, watcher) for _ in range(jobs)]
            try:
                for future in futures:
                    future.result()
            finally:
                self._stop = True

    def figures(self) -> list[TensorFigures]:
        """Return the figures of every logical tensor that was compared."""
        return [
            tensor_figures(self._pairs[number], name, total, self._limits[number])
            for number in self._judged
            for name, total in self._totals[number].items()
        ]

    def scale_figures(self) -> list[ScaleFigures]:
        """Return the figures of every FP8 tensor's scales."""
        return [
            scale_figures(self._pairs[number].target.name, counts)
            for number, counts in sorted(self._scales.items())
        ]

    def _strips(self) -> Iterator[_ComparedRows]:
        """Yield the strips to compare, in the order of DST's files."""
        for number in sorted(self._judged, key=lambda n: self._pairs[n].target.first_extent):
            target = self._pairs[number].target
            rows, cols = matrix(target)
            multiple = blocks(target)[0] if cols > 1 else 1
            step = multiple * max(1, STRIP_ELEMENTS // (multiple * cols))
            height = target.height if target.height % multiple else rows
            for top in range(0, rows, height):  # blocks start again with each matrix of a stack
                bottom = min(top + height, rows)
                for first in range(top, bottom, step):
                    yield _ComparedRows(number, first, min(first + step, bottom))

    def _work(self, strips: Iterator[_ComparedRows], watcher: Watcher) -> None:
        arena = Arena()
        source = Decoder(arena, self._source_files)
        target = Decoder(arena, self._target_files)
        while not self._stop:
            with self._lock:
                strip = next(strips, None)
            if strip is None:
                return
            try:
                self._compare(strip, arena, source, target)
            except BaseException:
                self._stop = True
                raise
            pair = self._pairs[strip.pair]
            nbytes = _stored_bytes(pair) * (strip.last - strip.first) // matrix(pair.target)[0]
            with self._lock:
                self.bytes_read += nbytes
                watcher.advance(nbytes)

    def _compare(
        self, strip: _ComparedRows, arena: Arena, source: Decoder, target: Decoder
    ) -> None:
        pair, exact = self._pairs[strip.pair], self._limits[strip.pair].exact
        encoding = pair.target.encoding
        stored = _read_scales(pair, strip, target)
        if exact and _same_bytes(pair, strip, arena, source, target):
            self._check_scales(strip, stored, None)
            self._count_nonfinite(strip, arena, target)
            return
        rows, cols = strip.last - strip.first, matrix(pair.target)[1]
        left = arena.take("left", (rows, cols), _working(pair))
        source.fill(pair.segments, strip.first, left)
        if encoding.is_e4m3 and encoding.has_block_scales and not exact:
            right = arena.take("right", (rows, cols), np.uint8)  # the kernel applies the scales
            target.read(pair.target, 0, strip.first * cols, right)
        else:
            right = arena.take("right", (rows, cols), _decoded(pair.target.encoding))
            target.fill(pair.target.segments(strip.first, rows), 0, right)
        if encoding.error_unit == ErrorUnit.PEAK and not exact:
            scale_grid = _peaks(left, encoding.col_multiple, self._limits[strip.pair])
        else:
            scale_grid = _per_block(pair.target, strip, stored)
        peaks = np.zeros(scale_grid.shape, np.float64)
        for rows_of in pair.rows:
            first = max(strip.first, rows_of.start)
            last = min(strip.last, rows_of.start + rows_of.num_rows)
            if first < last:
                part = slice(first - strip.first, last - strip.first)
                sums = self._piece(strip, left[part], right[part], part.start, scale_grid)
                np.maximum(peaks, sums[:, :, kernel.PEAK], out=peaks)
                top = strip.first + (part.start if cols == 1 else 0)
                worst = worst_block(pair.target, top, sums)
                with self._lock:
                    self._totals[strip.pair][rows_of.logical].add(sums, worst)
        self._check_scales(strip, stored, peaks)

    def _count_nonfinite(self, strip: _ComparedRows, arena: Arena, target: Decoder) -> None:
        """Count NaN and Inf in rows whose bytes are the same on both sides."""
        pair = self._pairs[strip.pair]
        rows, cols = strip.last - strip.first, matrix(pair.target)[1]
        values = arena.take("right", (rows, cols), _decoded(pair.target.encoding))
        target.fill(pair.target.segments(strip.first, rows), 0, values)
        for rows_of in pair.rows:
            first = max(strip.first, rows_of.start) - strip.first
            last = min(strip.last, rows_of.start + rows_of.num_rows) - strip.first
            count = kernel.count_nonfinite(values[first:last]) if first < last else 0
            if count:
                sums = kernel.new_sums(1, 1)
                sums[0, 0, kernel.SHARED_NONFINITE] = count
                with self._lock:
                    self._totals[strip.pair][rows_of.logical].add(sums, None)

    def _piece(
        self, strip: _ComparedRows, left: Array, right: Array, first_row: int, scale_grid: Array
    ) -> Array:
        """Return the sums [block rows, block cols, NUM_SUMS] of one logical tensor in a strip."""
        target, limit = self._pairs[strip.pair].target, self._limits[strip.pair]
        sums = kernel.new_sums(*scale_grid.shape)
        if left.shape[1] == 1:  # a vector: one line of blocks
            left, right, first_row = left.reshape(1, -1), right.reshape(1, -1), 0
        kernel.compare(
            left,
            right,
            *blocks(target),
            first_row,
            limit.relative,
            limit.floor,
            target.encoding.saturation,
            scale_grid,
            sums,
        )
        if limit.exact:  # compared by bits: -0 differs from 0
            sums[:, :, kernel.BEYOND] = 0
            sums[0, 0, kernel.BEYOND] = kernel.count_different(left, right)
        return sums

    def _check_scales(
        self, strip: _ComparedRows, stored: Array | None, peaks: Array | None
    ) -> None:
        """Check the scales of a strip against their label and the source's largest magnitudes."""
        pair = self._pairs[strip.pair]
        encoding = pair.target.encoding
        if not encoding.has_scales or stored is None:
            return
        rounded = any(segment.source.encoding.has_scales for segment in pair.segments)
        if not encoding.is_e4m3 or rounded or (peaks is not None and stored.shape != peaks.shape):
            peaks = None  # the right value of such a scale is unknown
        row, _ = encoding.part_rows(1, strip.first, strip.last - strip.first, pair.target.height)
        counts = scales.check(stored, peaks, encoding, row)
        octaves = scales.histogram(stored)
        with self._lock:
            self._scales.setdefault(strip.pair, []).append(counts)
            for octave, count in octaves.items():
                self.scale_histogram[octave] = self.scale_histogram.get(octave, 0) + count


def _read_scales(pair: Pair, strip: _ComparedRows, target: Decoder) -> Array | None:
    """Return the stored FP8 scales of a strip's rows, or None without scales."""
    if not pair.target.encoding.has_scales:
        return None
    return target.scales(pair.target, strip.first, strip.last - strip.first).copy()


def _per_block(target: StoredMatrix, strip: _ComparedRows, stored: Array | None) -> Array:
    """Return a scale for each block of a strip: 1 if the encoding has none."""
    if stored is not None and target.encoding.has_block_scales:
        return stored
    rows, cols = matrix(target)
    block_rows, block_cols = blocks(target)
    height = 1 if cols == 1 else -(-(strip.last - strip.first) // block_rows)
    width = -(-(rows if cols == 1 else cols) // block_cols)
    return np.full((height, width), 1.0 if stored is None else stored.flat[0], np.float32)


def _peaks(values: Array, width: int, limit: Limit) -> Array:
    """Return the largest magnitude of each block, plus the error of the smallest F16 scales."""
    in_blocks = np.abs(values).reshape(values.shape[0], -1, width)
    peaks: Array = in_blocks.max(axis=2) + np.float32(LOST_WITH_SCALE / limit.floor)
    return peaks


def _limit(pair: Pair, *, only_exact: bool) -> Limit:
    """Return the most lenient limit among the source encodings of a tensor's rows."""
    if only_exact and _rounds_to_bf16(pair):
        return EXACT
    encoding = pair.target.encoding
    limits = [
        limit_for(segment.source.encoding, encoding, keep_dtype=pair.keep_dtype)
        for segment in pair.segments
    ]
    return max(limits, key=lambda limit: limit.rel_error, default=EXACT)


def _rounds_to_bf16(pair: Pair) -> bool:
    """Return whether a right conversion has only one result: FP8 x scale, rounded to BF16."""
    intended = {segment.source.encoding.intended_dtype for segment in pair.segments}
    return intended == {DType.BF16} and pair.target.encoding == PLAIN[DType.BF16]


def _stored_bytes(pair: Pair) -> int:
    held = pair.target.segments(0, pair.target.rows)
    return sum(segment.nbytes for segment in (*pair.segments, *held))


def _decoded(encoding: Encoding) -> np.dtype[Any]:
    return BF16_BITS if encoding == PLAIN[DType.BF16] else F32


def _working(pair: Pair) -> np.dtype[Any]:
    """Return the dtype to decode SRC to: BF16 if SRC is, or if DST is its rounding to BF16."""
    if _rounds_to_bf16(pair):
        return BF16_BITS
    if pair.target.encoding.encodes_from_f32:
        return F32
    kinds = {_decoded(segment.source.encoding) for segment in pair.segments}
    return BF16_BITS if kinds == {BF16_BITS} else F32


def _same_bytes(
    pair: Pair, strip: _ComparedRows, arena: Arena, source: Decoder, target: Decoder
) -> bool:
    """Return whether both sides store the strip in the same bytes; False if that is not decided.

    Bytes are compared only if the rows are one piece in SRC; others are compared as numbers.
    """
    encoding, (segment, *others) = pair.target.encoding, pair.segments
    unit = encoding.row_multiple
    first = segment.first_row + strip.first
    in_pieces = others or pair.target.bands or pair.target.pitch or segment.source.pitch
    if in_pieces or not encoding.can_hold(segment.source.encoding) or first % unit:
        return False
    rows, cols = strip.last - strip.first, matrix(pair.target)[1]
    size = encoding.row_bytes(cols)
    left = arena.take("left", (rows, size), np.uint8)
    right = arena.take("right", (rows, size), np.uint8)
    source.read(segment.source, 0, first * size, left)
    target.read(pair.target, 0, strip.first * size, right)
    if not np.array_equal(left, right):
        return False
    if not encoding.has_scales:
        return True
    before = source.scales(segment.source, first, rows).copy()
    after = target.scales(pair.target, strip.first, rows)
    return np.array_equal(before.view(np.uint32), after.view(np.uint32))
