"""Groups of columns that share a scale, and codes of four bits: what the 4-bit kernels share.

A row is processed in loops over all of its columns, whose length compilers do not know; a loop over
each short group would neither be unrolled nor vectorized well. The largest element of each group is
found by halving the row, pair by pair, until a group is one number; so is the sum.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy import uint8, uint16, uint32, uint64

from lingconv.encodings.kernels.intrinsics import repeat_16
from lingconv.encodings.kernels.jit import BF16, F32, helper, kernel
from lingconv.encodings.kernels.numeric import Array, float_bits, float_of


def _new_halves(line: Any) -> Any:
    """Return an array for the halves of a row, of magnitudes as unsigned integers."""


def _halve(line: Any, count: Any, out: Any) -> Any:
    """Store the larger of each of the first `count` pairs of magnitudes."""


def _magnitude_at(line: Any, index: Any) -> Any:
    """Return a magnitude as float32."""


@overload(_new_halves)
def _new_halves_overload(line: Any) -> Any:
    def bf16(line: Any) -> Any:
        return np.empty((2, (line.size + 1) // 2), np.uint16)

    def f32(line: Any) -> Any:
        return np.empty((2, (line.size + 1) // 2), np.uint32)

    return bf16 if line.dtype == types.uint16 else f32


@helper
def _halve_16(pairs: Array, count: int, out: Array) -> None:
    for i in range(count):
        pair = pairs[i]
        low = uint16(pair & uint32(0x7FFF))
        high = uint16(uint32(pair >> uint32(16)) & uint32(0x7FFF))
        out[i] = max(low, high)


@helper
def _halve_32(pairs: Array, count: int, out: Array) -> None:
    for i in range(count):
        pair = pairs[i]
        low = uint32(pair & uint64(0x7FFFFFFF))
        high = uint32(uint64(pair >> uint64(32)) & uint64(0x7FFFFFFF))
        out[i] = max(low, high)


@overload(_halve)
def _halve_overload(line: Any, count: Any, out: Any) -> Any:
    def bf16(line: Any, count: Any, out: Any) -> None:
        _halve_16(line.view(np.uint32), count, out)

    def f32(line: Any, count: Any, out: Any) -> None:
        _halve_32(line.view(np.uint64), count, out)

    return bf16 if line.dtype == types.uint16 else f32


@overload(_magnitude_at)
def _magnitude_at_overload(line: Any, index: Any) -> Any:
    def bf16(line: Any, index: Any) -> Any:
        return float_of(uint32(line[index]) << uint32(16))

    def f32(line: Any, index: Any) -> Any:
        return float_of(line[index])

    return bf16 if line.dtype == types.uint16 else f32


@helper
def room_for_peaks(line: Array) -> Any:
    """Return the work arrays of `find_peaks` for rows like `line`."""
    return _new_halves(line)


@helper
def find_peaks(line: Array, room: Array, peaks: Array) -> bool:
    """Fill `peaks` with the largest magnitude of each group; return whether all are finite.

    A row [cols] of BF16 (uint16) or float32 consists of groups of a power of two of columns.
    """
    count = line.size // 2
    _halve(line, count, room[0])
    turn = 0
    while count > peaks.size:
        count //= 2
        _halve(room[turn], count, room[1 - turn])
        turn = 1 - turn
    worst = uint32(0)
    for group in range(peaks.size):
        peak = _magnitude_at(room[turn], group)
        worst = max(worst, float_bits(peak))
        peaks[group] = peak
    return bool(worst < uint32(0x7F800000))


@helper
def add_groups(squares: Array, room: Array, sums: Array) -> None:
    """Fill `sums` with the sum of each group of float32, added pair by pair."""
    count = squares.size // 2
    _add_pairs(squares.view(np.uint64), count, room[0])
    turn = 0
    while count > sums.size:
        count //= 2
        _add_pairs(room[turn].view(np.uint64), count, room[1 - turn])
        turn = 1 - turn
    for group in range(sums.size):
        sums[group] = room[turn, group]


@helper
def _add_pairs(pairs: Array, count: int, out: Array) -> None:
    for i in range(count):
        pair = pairs[i]
        out[i] = float_of(uint32(pair)) + float_of(uint32(pair >> uint64(32)))


@helper
def spread_groups(numbers: Array, width: int, into: Array) -> None:
    """Fill `into` [cols] with the number of each column's group; `width` is a multiple of 16."""
    for group in range(numbers.size):
        for part in range(0, width, 16):
            repeat_16(into, group * width + part, numbers[group])


@helper
def pack(codes: Array, out: Array) -> None:
    """Store two codes (0 to 15) to a byte, the even column in its low half."""
    pairs = codes.view(np.uint16)
    for j in range(pairs.size):
        out[j] = uint8(uint16(pairs[j] & uint16(0x0F)) | uint16(pairs[j] >> uint16(4)))


@helper
def unpack(packed: Array, codes: Array) -> None:
    """Store the two codes of each byte in a byte each, the low half first."""
    pairs = codes.view(np.uint16)
    for j in range(packed.size):
        byte = uint16(packed[j])
        pairs[j] = uint16(byte & uint16(0x0F)) | uint16(uint16(byte & uint16(0xF0)) << uint16(4))


def _largest_bits(numbers: Any) -> Any:
    """Return the bits of the largest magnitude of a line, as float32's."""


@overload(_largest_bits)
def _largest_bits_overload(numbers: Any) -> Any:
    def bf16(numbers: Any) -> Any:
        worst = uint16(0)
        for i in range(numbers.size):
            worst = max(worst, uint16(numbers[i] & uint16(0x7FFF)))
        return uint32(uint32(worst) << uint32(16))

    def f32(numbers: Any) -> Any:
        bits = numbers.view(np.uint32)
        worst = uint32(0)
        for i in range(bits.size):
            worst = max(worst, uint32(bits[i] & uint32(0x7FFFFFFF)))
        return worst

    return bf16 if numbers.dtype == types.uint16 else f32


@kernel((BF16,), (F32,))
def largest_magnitude(values: Array) -> float:
    """Return the largest magnitude of a matrix of BF16 (uint16) or float32; NaN counts as more."""
    return float(float_of(_largest_bits(values.reshape(-1))))
