"""Encoding of BF16 or float32 to integers of 4 bits with a scale for each group of columns.

A number is (code - 8) x scale. A byte holds two codes (0 to 15), the even column in its low half;
eight columns are a little-endian word. BF16 is passed as uint16. Rounding is to nearest, ties to
even.
"""

from typing import Any, Final

import numpy as np
from numpy import float32, uint8, uint32

from lingconv.encodings.kernels.groups import (
    add_groups,
    find_peaks,
    pack,
    room_for_peaks,
    spread_groups,
)
from lingconv.encodings.kernels.jit import BF16, BOOL, BYTES, F32, INT, helper, kernel
from lingconv.encodings.kernels.numeric import Array, bf16_from_bits, float_bits, float_of, load

# The scale of a group, and the least code.
DIVIDED_BY_7_5: Final = 0  # amax / 7.5; codes -8 to 7
DIVIDED_BY_7: Final = 1  # amax / 7; codes -7 to 7
SIGNED: Final = 2  # amax / 8, with the sign that makes the largest number -8

ALL_FINITE: Final = -1

_MAGIC: Final = 12582912.0  # 1.5 x 2^23: its float32 ulp is 1
_EMPTY_GROUP: Final = 2.0**-7  # the epsilon of BF16
# Factors of the scale that a search tries, in this order.
_SHRINKS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)


@helper
def bf16(value: Any) -> Any:
    """Return a float32 rounded to BF16."""
    return float_of(uint32(uint32(bf16_from_bits(float_bits(value))) << uint32(16)))


@helper
def _code(quotient: Any, lowest: Any) -> Any:
    """Return the code of a quotient, from `lowest` (-8 or -7) + 8 to 15, as float32 bits."""
    bounded = min(max(quotient, lowest), float32(7))
    return uint8(uint32(float_bits(bounded + float32(_MAGIC)) + uint32(8)) & uint32(0x0F))


@helper
def _put_codes(line: Array, scales: Array, lowest: Any, rounds: bool, codes: Array) -> None:
    if rounds:
        for col in range(line.size):
            codes[col] = _code(bf16(load(line[col]) / scales[col]), lowest)
    else:
        for col in range(line.size):
            codes[col] = _code(load(line[col]) / scales[col], lowest)


@helper
def _put_squares(line: Array, scales: Array, lowest: Any, squares: Array) -> None:
    """Store the squared error of each column."""
    for col in range(line.size):
        value = load(line[col])
        scale = scales[col]
        bounded = min(max(value / scale, lowest), float32(7))
        near = (bounded + float32(_MAGIC)) - float32(_MAGIC)
        difference = near * scale - value
        squares[col] = difference * difference


@helper
def _set_steps(line: Array, peaks: Array, width: int, rule: int, steps: Array) -> None:
    """Fill `steps` with the exact scale of each group; that of a group of zeros is 0."""
    for group in range(peaks.size):
        peak = peaks[group]
        if rule == DIVIDED_BY_7:
            steps[group] = peak / float32(7)
        elif rule == DIVIDED_BY_7_5:
            steps[group] = peak / float32(7.5)
        else:
            steps[group] = peak / float32(8)
            for col in range(group * width, group * width + width):
                if load(line[col]) == peak:
                    steps[group] = -peak / float32(8)
                    break


@helper
def _round_steps(steps: Array, shrink: Any, scales: Array) -> None:
    """Fill `scales` with steps, shrunk and rounded to BF16; 0 becomes 2^-7."""
    for group in range(steps.size):
        scale = bf16(steps[group] * shrink)
        scales[group] = float32(_EMPTY_GROUP) if scale == float32(0) else scale


_INT4 = BYTES, F32, INT, BOOL, BOOL


@kernel((BF16, *_INT4), (F32, *_INT4))
def quantize(
    source: Array, packed: Array, scales: Array, rule: int, rounds: bool, search: bool
) -> int:
    """Quantize rows to `packed` codes [rows, cols / 2] and `scales` [rows, groups] (float32).

    Scales are rounded to BF16 before they are used. `rounds`: quotients are rounded to BF16 first,
    as torch does when it divides BF16 by BF16. With `search`, smaller scales are tried too, and the
    first with the least squared error is taken. Returns -1, or the first row with NaN or Inf.
    """
    rows, cols = source.shape
    groups = scales.shape[1]
    width = cols // groups
    lowest = float32(-7) if rule == DIVIDED_BY_7 else float32(-8)
    halves = room_for_peaks(source[0])
    peaks = np.empty(groups, np.float32)
    steps = np.empty(groups, np.float32)
    tried = np.empty(groups, np.float32)
    errors = np.empty(groups, np.float32)
    least = np.empty(groups, np.float32)
    spread = np.empty(cols, np.float32)
    squares = np.empty(cols, np.float32)
    sums = np.empty((2, cols // 2), np.float32)
    codes = np.empty(cols, np.uint8)
    for row in range(rows):
        line, best = source[row], scales[row]
        if not find_peaks(line, halves, peaks):
            return row
        _set_steps(line, peaks, width, rule, steps)
        _round_steps(steps, float32(1), best)
        for turn in range(len(_SHRINKS) if search else 0):
            _round_steps(steps, float32(_SHRINKS[turn]), tried)
            spread_groups(tried, width, spread)
            _put_squares(line, spread, lowest, squares)
            add_groups(squares, sums, errors)
            for group in range(groups):
                if turn == 0 or errors[group] < least[group]:
                    least[group] = errors[group]
                    best[group] = tried[group]
        spread_groups(best, width, spread)
        _put_codes(line, spread, lowest, rounds, codes)
        pack(codes, packed[row])
    return ALL_FINITE
