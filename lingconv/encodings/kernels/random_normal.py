"""Pseudo-random weights by position: a seed gives the same bytes, in whatever order they are read.

Each element is a function of (seed, row, column) alone. A 32-bit hash of the position selects a
normal quantile from a table, so that the loop is one gather and a few integer operations.
"""

from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy import float32, uint32, uint64

from lingconv.encodings.kernels.jit import BF16_LINE, F32_LINE, FLOAT, INT, helper, kernel
from lingconv.encodings.kernels.numeric import float_bits, store

Array = np.ndarray[Any, Any]

TABLE_BITS = 14
_OUTLIER_HASHES = (1 << 32) // 512  # about one column in 512 is an outlier channel
_OUTLIER_GAIN = 8.0


@cache
def normal_table() -> Array:
    """Return 2^14 quantiles of the standard normal distribution, float32, antisymmetric."""
    half = 1 << (TABLE_BITS - 1)
    normal = NormalDist()
    upper = [normal.inv_cdf(0.5 + (i + 0.5) / (2 * half)) for i in range(half)]
    positive = np.array(upper, np.float32)
    return np.concatenate([-positive[::-1], positive])


@helper
def _mix32(value: Any) -> Any:
    """Return MurmurHash3's finalizer (public domain, Austin Appleby): each bit affects all bits."""
    value = uint32(value ^ uint32(value >> uint32(16)))
    value = uint32(value * uint32(0x85EBCA6B))
    value = uint32(value ^ uint32(value >> uint32(13)))
    value = uint32(value * uint32(0xC2B2AE35))
    return uint32(value ^ uint32(value >> uint32(16)))


@helper
def _row_seed(seed: Any, row: Any) -> Any:
    mixed = uint64(seed) ^ uint64(uint64(row) * uint64(0x9E3779B97F4A7C15))
    return _mix32(uint32(mixed ^ uint64(mixed >> uint64(32))))


@helper
def _counter(col: Any) -> Any:
    return uint32(uint32(col) * uint32(0x9E3779B1))


@helper
def _column_deviations(cols: int, seed: int, deviation: float) -> Array:
    """Return the standard deviation of each column: the same for all but the outlier channels."""
    col_seed = _row_seed(seed, -1)
    deviations = np.empty(cols, np.float32)
    for col in range(cols):
        is_outlier = _mix32(uint32(_counter(col) ^ col_seed)) < uint32(_OUTLIER_HASHES)
        deviations[col] = deviation * (_OUTLIER_GAIN if is_outlier else 1.0)
    return deviations


@kernel(*((target, INT, INT, INT, F32_LINE, FLOAT, FLOAT) for target in (BF16_LINE, F32_LINE)))
def normal_rows(
    target: Array, start: int, cols: int, seed: int, table: Array, mean: float, deviation: float
) -> None:
    """Fill `target` (BF16 as uint16, or float32) with elements `start` ... of a matrix.

    The matrix has `cols` columns; elements are normal around `mean`, and a few columns, the same in
    every row, are outlier channels.
    """
    deviations = _column_deviations(cols, seed, deviation)
    done = 0
    while done < target.size:
        row, col = divmod(start + done, cols)
        count = min(cols - col, target.size - done)
        row_seed = _row_seed(seed, row)
        line = target[done : done + count]
        scale = deviations[col : col + count]
        for i in range(count):
            position = _mix32(uint32(_counter(col + i) + row_seed))
            value = table[np.int64(position >> uint32(32 - TABLE_BITS))]
            store(line, i, float_bits(float32(mean) + float32(value * scale[i])))
        done += count
