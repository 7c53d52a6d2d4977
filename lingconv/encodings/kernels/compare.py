"""Differences between two matrices, block by block, compiled by numba.

Shapes: matrices are M x N, of BF16 (as uint16), float32, or, on the right, e4m3 (as uint8) to be
multiplied by a scale for each block; in blocks of BM x BN. Per block the kernel accumulates
`NUM_SUMS` numbers (the names below), so that one pass gives a tensor's figures and its worst block.
Elements that are NaN or Inf on either side are left out of the sums.

The loop over a line of a block accumulates sums and maxima only, which stay in SIMD lanes. If they
show that an element is not finite, zero or too large, a second, slower loop counts these; good
checkpoints hardly ever need it. Products are summed in float32 within a line and in float64 across
lines; `reassoc` allows SIMD lanes, because the last bits of the sums do not matter here.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, float64, uint32

from lingconv.encodings.kernels.jit import BF16, BYTES, F32, FLOAT, INT, helper, kernel
from lingconv.encodings.kernels.numeric import Array, float_bits, is_nonfinite, load, magnitude_of

SIGNAL: Final = 0  # sum of left^2
DOT: Final = 1  # sum of left x right
NOISE: Final = 2  # sum of (left - right)^2
WORST: Final = 3  # largest |left - right|
PEAK: Final = 4  # largest |left|
BEYOND: Final = 5  # elements with |left - right| > relative x |left| + floor x scale
ZEROED: Final = 6  # elements that are zero on the right only
SATURATED: Final = 7  # elements with |left| > ceiling x scale
NONFINITE: Final = 8  # elements that are NaN or Inf on one side, or differently on both
SHARED_NONFINITE: Final = 9  # elements that are NaN or Inf, alike, on both sides
NUM_SUMS: Final = 10

_MAGNITUDE: Final = 0x7FFFFFFF
_EXPONENT: Final = 0x7F800000
_COMPARE: Final = INT, INT, INT, FLOAT, FLOAT, FLOAT, F32, types.float64[:, :, ::1]


def _scaled(value: Any, scale: Any) -> Any:
    """Return the number of an element of the right matrix, with the scale applied to e4m3."""


@overload(_scaled)
def _scaled_overload(value: Any, scale: Any) -> Any:
    return _scaled_code if value == types.uint8 else _scaled_number


def _scaled_code(value: Any, scale: Any) -> Any:
    return load(value) * scale


def _scaled_number(value: Any, scale: Any) -> Any:
    return load(value)


@kernel(
    *((left, right, *_COMPARE) for left in (BF16, F32) for right in (BF16, F32, BYTES)),
    fastmath={"reassoc", "nsz", "contract"},
)
def compare(
    left: Array,
    right: Array,
    block_rows: int,
    block_cols: int,
    first_row: int,
    relative: float,
    floor: float,
    ceiling: float,
    scales: Array,
    sums: Array,
) -> None:
    """Add the sums over two matrices to `sums` [block rows, block cols, NUM_SUMS].

    The matrices start `first_row` rows below the top of the first row of blocks; `scales` (float32)
    has a number for each block, which is the unit of `floor` and `ceiling`.
    """
    rows, cols = left.shape
    slope = float32(relative)
    for row in range(rows):
        block_row = (first_row + row) // block_rows
        for block_col in range(sums.shape[1]):
            begin = block_col * block_cols
            end = min(begin + block_cols, cols)
            a_line, b_line = left[row, begin:end], right[row, begin:end]
            scale = scales[block_row, block_col]
            lowest, highest = float32(floor) * scale, float32(ceiling) * scale
            signal, dot, noise = float32(0), float32(0), float32(0)
            worst, peak = uint32(0), uint32(0)
            beyond, zeros = uint32(0), uint32(0)
            for i in range(a_line.size):
                a, b = load(a_line[i]), _scaled(b_line[i], scale)
                error = a - b
                size, gap = abs(a), abs(error)
                signal += a * a
                dot += a * b
                noise += error * error
                worst = max(worst, float_bits(gap))
                peak = max(peak, float_bits(size))
                beyond += uint32(gap > slope * size + lowest)
                zeros += uint32(b == float32(0))
            top = uint32(peak).view(np.float32)
            # Squares of numbers near 2^64 and above are infinite in float32.
            overflows = not (signal < float32(np.inf) and noise < float32(np.inf))
            if overflows or worst >= uint32(_EXPONENT):
                where = (row, begin, end, block_row, block_col)
                _look_closely(left, right, where, slope, lowest, highest, scale, sums)
                continue
            if zeros > 0 or top > highest:
                where = (row, begin, end, block_row, block_col)
                _count_extremes(left, right, where, highest, sums)
            sums[block_row, block_col, SIGNAL] += float64(signal)
            sums[block_row, block_col, DOT] += float64(dot)
            sums[block_row, block_col, NOISE] += float64(noise)
            sums[block_row, block_col, BEYOND] += beyond
            largest = float64(uint32(worst).view(np.float32))
            if largest > sums[block_row, block_col, WORST]:
                sums[block_row, block_col, WORST] = largest
            if top > sums[block_row, block_col, PEAK]:
                sums[block_row, block_col, PEAK] = top


# Passing slices to a function would cost more than the whole line: hence `where`, a position in
# both matrices and in the grid of blocks (row, first and last column, row and column of the block).
@helper
def _count_extremes(left: Array, right: Array, where: Any, highest: Any, sums: Array) -> None:
    """Count the elements that are zero on the right only, and those above `highest`."""
    row, begin, end, block_row, block_col = where
    for col in range(begin, end):
        size = abs(load(left[row, col]))
        if size > highest:
            sums[block_row, block_col, SATURATED] += 1
        if size > 0 and load(right[row, col]) == 0:
            sums[block_row, block_col, ZEROED] += 1


@helper
def _look_closely(
    left: Array,
    right: Array,
    where: Any,
    slope: Any,
    lowest: Any,
    highest: Any,
    scale: Any,
    sums: Array,
) -> None:
    """Add the sums of a line with NaN, Inf or very large numbers, element by element."""
    row, begin, end, block_row, block_col = where
    total = sums[block_row, block_col]
    for col in range(begin, end):
        a, b = load(left[row, col]), _scaled(right[row, col], scale)
        size = uint32(float_bits(a) & uint32(_MAGNITUDE))
        other = uint32(float_bits(b) & uint32(_MAGNITUDE))
        if max(size, other) >= uint32(_EXPONENT):
            both_nan = min(size, other) > uint32(_EXPONENT)
            alike = both_nan or float_bits(a) == float_bits(b)
            total[SHARED_NONFINITE if alike else NONFINITE] += 1
            continue
        gap = abs(a - b)
        total[SIGNAL] += float64(a) * float64(a)
        total[DOT] += float64(a) * float64(b)
        total[NOISE] += float64(gap) * float64(gap)
        total[WORST] = max(total[WORST], float64(gap))
        total[PEAK] = max(total[PEAK], float64(abs(a)))
        if gap > slope * abs(a) + lowest:
            total[BEYOND] += 1
    _count_extremes(left, right, where, highest, sums)


@kernel(*((left, right) for left in (BF16, F32) for right in (BF16, F32)))
def count_different(left: Array, right: Array) -> int:
    """Return the number of elements whose float32 bits differ: -0 from 0, one NaN from another."""
    rows, cols = left.shape
    different = 0
    for row in range(rows):
        for col in range(cols):
            different += float_bits(load(left[row, col])) != float_bits(load(right[row, col]))
    return different


@kernel((BF16,), (F32,))
def count_nonfinite(values: Array) -> int:
    """Return the number of elements that are NaN or Inf."""
    rows, cols = values.shape
    count = 0
    for row in range(rows):
        for col in range(cols):
            count += is_nonfinite(magnitude_of(values[row, col]))
    return count


def new_sums(block_rows: int, block_cols: int) -> np.ndarray[Any, Any]:
    """Return zeroed sums for a grid of block_rows x block_cols blocks."""
    return np.zeros((block_rows, block_cols, NUM_SUMS), np.float64)
