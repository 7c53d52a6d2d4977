"""Strips of an average: the rows of every checkpoint, weighted and added in float64."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np

from lingconv.checkpoint.decoder import BF16_BITS, F32, Decoder, Nonfinite, source_of
from lingconv.encodings.dtypes import DType
from lingconv.encodings.kernels import weighted_sum as kernel
from lingconv.encodings.plain import PLAIN
from lingconv.plans.lowering import RowStrip
from lingconv.plans.plan import Term
from lingconv.storage.aligned_buffers import Arena, Array


class Averager:
    """Fills strips with averages, one at a time; one Averager per thread."""

    def __init__(self, arena: Arena, decoders: Sequence[Decoder], weights: Sequence[float]) -> None:
        self._arena = arena
        self._decoders = decoders
        self._weights = np.array(weights, np.float64)

    def fill(self, strip: RowStrip, values: Array) -> int:
        """Fill `values` (BF16 bits or float32) with a strip; return 1 if any is NaN or Inf, else 0.

        The checkpoints are added in their order, a few at a time.
        """
        nonfinite = self._fill_from_files(strip, values)
        if nonfinite != kernel.UNREADABLE:
            return nonfinite
        runs = [(term, run) for term in strip.terms for run in _in_widths(term.sources)]
        sums = self._arena.take("sums", (values.size if len(runs) > 1 else 0,), np.float64)
        for place, (term, sources) in enumerate(runs):
            rows = self._arena.take("terms", (len(sources), *values.shape), _working(term))
            for number, into in zip(sources, rows, strict=True):
                self._decoders[number].fill(term.segments, 0, into)
            weights = self._weights[list(sources)]
            flat, begin = rows.reshape(len(sources), -1), place == 0
            if place < len(runs) - 1:
                kernel.add(flat, weights, sums, begin=begin)
        to_odd = strip.transfer.target.encoding == PLAIN[DType.F16]
        return kernel.finish(flat, weights, sums, begin, values.reshape(-1), to_odd)

    def _fill_from_files(self, strip: RowStrip, values: Array) -> int:
        """Fill `values` in one call if each checkpoint's rows are one run of bytes in an open file.

        Handing the GIL from thread to thread for every read takes longer than reading. Returns
        UNREADABLE if they are not, and if a read fails: `fill` then decodes them one by one.
        """
        dtypes = {_working(term) for term in strip.terms}
        runs = [self._decoders[n].run_in_file(t.segments) for t in strip.terms for n in t.sources]
        if len(dtypes) > 1 or None in runs:
            return kernel.UNREADABLE
        fds, offsets = zip(*filter(None, runs), strict=True)
        room = kernel.WIDTHS[0] * kernel.READ_ELEMENTS
        return kernel.average_files(
            np.array(fds, np.intc),
            np.array(offsets, np.int64),
            self._weights[[number for term in strip.terms for number in term.sources]],
            self._arena.take("terms", (room,), dtypes.pop()),
            values.reshape(-1),
            strip.transfer.target.encoding == PLAIN[DType.F16],
        )

    def find_nonfinite(self, strip: RowStrip) -> tuple[Nonfinite, int]:
        """Return where the checkpoints have a NaN or Inf, and the number of the first such one."""
        shape = strip.last - strip.first, prod(strip.transfer.target.shape[1:])
        for term in strip.terms:
            for number in term.sources:
                values = self._arena.take("found", shape, F32)
                self._decoders[number].fill(term.segments, 0, values)
                bad = ~np.isfinite(values).all(axis=1)
                if bad.any():
                    return source_of(term.segments, shape[1], int(bad.argmax())), number
        last = strip.terms[-1]
        return source_of(last.segments, shape[1], 0), last.sources[-1]


def _working(term: Term) -> np.dtype[Any]:
    """Return the dtype in which rows are read: BF16 bits if all are stored so, else float32."""
    encodings = {segment.source.encoding for segment in term.segments}
    return BF16_BITS if encodings == {PLAIN[DType.BF16]} else F32


def _in_widths(sources: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the sources in runs whose lengths the kernel supports (`kernel.WIDTHS`)."""
    done = 0
    while done < len(sources):
        width = next(width for width in kernel.WIDTHS if width <= len(sources) - done)
        yield sources[done : done + width]
        done += width
