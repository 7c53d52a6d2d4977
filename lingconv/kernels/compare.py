"""How far two matrices are apart, block by block, compiled by numba.

Shapes: matrices are M x N, of BF16 (as uint16) or float32 each, in blocks of BM x BN. Per block the
kernel adds up `NUM_SUMS` numbers (the names below), so that a tensor's figures and its worst block
come out of one pass. Elements that are NaN or Inf on either side are left out of all sums.

Products are summed in float32 within a line of a block and in float64 beyond it. `reassoc` lets LLVM
keep such a sum in SIMD lanes; which bits the sums end with does not matter here.
"""

from typing import Any, Final

import numpy as np
from numba import njit
from numpy import float32, float64, uint32

from lingconv.kernels.numeric import Array, float_bits, load

SIGNAL: Final = 0  # sum of left^2
OTHER: Final = 1  # sum of right^2
DOT: Final = 2  # sum of left x right
NOISE: Final = 3  # sum of (left - right)^2
WORST: Final = 4  # largest |left - right|
PEAK: Final = 5  # largest |left|
DIFFERENT: Final = 6  # elements whose bits differ, as float32
BEYOND: Final = 7  # elements with |left - right| > relative x |left| + floor
ZEROED: Final = 8  # elements that are zero on the right only
SATURATED: Final = 9  # elements with |left| > ceiling
NONFINITE: Final = 10  # elements that are NaN or Inf on one side, or differently on both
NUM_SUMS: Final = 11

_MAGNITUDE: Final = 0x7FFFFFFF
_EXPONENT: Final = 0x7F800000


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract"})
def compare(
    left: Array,
    right: Array,
    block_rows: int,
    block_cols: int,
    first_row: int,
    relative: float,
    floors: Array,
    ceilings: Array,
    sums: Array,
) -> None:
    """Add what two matrices have in common and apart to `sums` [rows, cols of blocks, NUM_SUMS].

    The matrices start `first_row` rows below the top of the first row of blocks; `floors` and
    `ceilings` (float32) have a number for each block.
    """
    rows, cols = left.shape
    slope = float32(relative)
    for row in range(rows):
        block_row = (first_row + row) // block_rows
        for block_col in range(sums.shape[1]):
            begin = block_col * block_cols
            end = min(begin + block_cols, cols)
            a_line, b_line = left[row, begin:end], right[row, begin:end]
            floor, ceiling = floors[block_row, block_col], ceilings[block_row, block_col]
            signal, other = float32(0), float32(0)
            dot, noise = float32(0), float32(0)
            worst, peak = uint32(0), uint32(0)
            different, beyond = uint32(0), uint32(0)
            zeroed, saturated, nonfinite = uint32(0), uint32(0), uint32(0)
            for i in range(a_line.size):
                a, b = load(a_line[i]), load(b_line[i])
                a_size = uint32(float_bits(a) & uint32(_MAGNITUDE))
                b_size = uint32(float_bits(b) & uint32(_MAGNITUDE))
                bad = max(a_size, b_size) >= uint32(_EXPONENT)
                same = (float_bits(a) == float_bits(b)) | ((a != a) & (b != b))
                a = float32(0) if bad else a
                b = float32(0) if bad else b
                error = a - b
                size = abs(a)
                gap = abs(error)
                signal += a * a
                other += b * b
                dot += a * b
                noise += error * error
                worst = max(worst, float_bits(gap))
                peak = max(peak, float_bits(size))
                different += uint32(not same)
                beyond += uint32(gap > slope * size + floor)
                zeroed += uint32((size > float32(0)) & (b == float32(0)))
                saturated += uint32(size > ceiling)
                nonfinite += uint32(bad & (not same))
            total = sums[block_row, block_col]
            total[SIGNAL] += float64(signal)
            total[OTHER] += float64(other)
            total[DOT] += float64(dot)
            total[NOISE] += float64(noise)
            total[WORST] = max(total[WORST], float64(uint32(worst).view(np.float32)))
            total[PEAK] = max(total[PEAK], float64(uint32(peak).view(np.float32)))
            total[DIFFERENT] += different
            total[BEYOND] += beyond
            total[ZEROED] += zeroed
            total[SATURATED] += saturated
            total[NONFINITE] += nonfinite


def new_sums(block_rows: int, block_cols: int) -> np.ndarray[Any, Any]:
    """Return zeroed sums for a grid of block_rows x block_cols blocks."""
    return np.zeros((block_rows, block_cols, NUM_SUMS), np.float64)
