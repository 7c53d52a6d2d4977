"""Weighted sums of checkpoints in float64, rounded once.

Every element's sum starts at 0.0 and adds its terms in the order of the checkpoints, each product
and each sum rounded to float64: the bits depend neither on threads nor on SIMD; no fast-math.
"""

from typing import Any, Final

import numpy as np
from numba import types
from numba.extending import overload
from numpy import float32, float64, uint16, uint32, uint64, uintp

from lingconv.encodings.kernels.jit import (
    BF16,
    BF16_LINE,
    BOOL,
    F32,
    F32_LINE,
    F64_LINE,
    INT,
    helper,
    inlined,
    kernel,
)
from lingconv.encodings.kernels.numeric import float_bits, load

Array = np.ndarray[Any, Any]

# Numbers of checkpoints that are added at once, while a sum is in a register.
WIDTHS: Final = (8, 4, 2, 1)
_EXPONENT: Final = 0x7F800000
# Number of sums that are rounded at once: they stay in the L1 cache.
_BLOCK: Final = 1024
# Number of elements of each checkpoint that are read at once: they stay in the L2 cache.
READ_ELEMENTS: Final = 64 << 10
UNREADABLE: Final = -1
_RARE: Final = 2  # a block with subnormal results, which takes the slow path
_LEAST_NORMAL: Final = ((1023 - 126) << 53) - 1  # 2^-126, as `_magnitude_below_zero` has it

# ssize_t pread(int fd, void *buf, size_t count, off_t offset), POSIX
_pread: Any = types.ExternalFunction(
    "pread", types.intp(types.intc, types.uintp, types.uintp, types.int64)
)


@inlined
def _add_some(
    terms: Any, first: Any, weights: Any, sums: Any, begin: Any, width: Any
) -> None:  # inlined with a constant width, so that the inner loop is unrolled
    for i in range(sums.size):
        total = float64(0.0) if begin else sums[i]
        for j in range(width):
            total += weights[j] * float64(load(terms[j, uintp(first + i)]))
        sums[i] = total


@kernel(*((terms, INT, F64_LINE, F64_LINE, BOOL) for terms in (BF16, F32)))
def _add(terms: Array, first: int, weights: Array, sums: Array, begin: bool) -> None:
    """Add the terms from column `first` on."""
    if len(weights) == 8:
        _add_some(terms, first, weights, sums, begin, 8)
    elif len(weights) == 4:
        _add_some(terms, first, weights, sums, begin, 4)
    elif len(weights) == 2:
        _add_some(terms, first, weights, sums, begin, 2)
    else:
        _add_some(terms, first, weights, sums, begin, 1)


@helper
def _to_odd(value: Any) -> Any:
    """Return the float32 bits of a float64 rounded to odd.

    That is towards zero, with the last bit set if inexact. Rounding the result to fewer bits equals
    rounding the float64 itself (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded
    sums").
    """
    near = float32(value)
    bits = float_bits(near)
    error = value - float64(near)
    inexact = error != 0.0 and uint32(bits & uint32(1)) == uint32(0)
    beyond = (error > 0.0) == (value > 0.0)
    step = uint32(1) if beyond else uint32(0xFFFFFFFF)
    return uint32(bits + step) if inexact else bits


@helper
def _round_bf16(sums: Array, target: Array) -> int:
    worst = uint32(0)
    for i in range(sums.size):
        bits = _to_odd(sums[i])
        odd = uint32(uint32(bits >> uint32(16)) & uint32(1))
        rounded = uint32(uint32(uint32(bits + uint32(0x7FFF)) + odd) >> uint32(16))
        worst = max(worst, uint32(rounded & uint32(0x7FFF)))
        target[i] = uint16(rounded)
    return int(worst >= uint32(0x7F80))


@helper
def _round_f32(sums: Array, target: Array, to_odd: bool) -> int:
    bits = target.view(np.uint32)
    worst = uint32(0)
    for i in range(sums.size):
        found = _to_odd(sums[i]) if to_odd else float_bits(sums[i])
        worst = max(worst, uint32(found & uint32(0x7FFFFFFF)))
        bits[i] = found
    return int(worst >= uint32(_EXPONENT))


def add(terms: Array, weights: Array, sums: Array, *, begin: bool) -> None:
    """Add weights[j] * terms[j] to `sums`; with `begin`, sums start at zero.

    `terms` [J, N] are BF16 (uint16) or float32, J one of WIDTHS; `sums` [N] are float64.
    """
    _add(terms, 0, weights, sums, begin)


def _round(sums: Any, target: Any, to_odd: Any) -> Any:
    """Fill `target` with sums rounded to its dtype, BF16 or float32."""


@overload(_round)
def _round_of(sums: Any, target: Any, to_odd: Any) -> Any:
    def to_bf16(sums: Any, target: Any, to_odd: Any) -> Any:
        return _round_bf16(sums, target)

    def to_f32(sums: Any, target: Any, to_odd: Any) -> Any:
        return _round_f32(sums, target, to_odd)

    return to_bf16 if target.dtype == types.uint16 else to_f32


@inlined
def _bf16_in_f32(value: Any) -> Any:
    """Return the float32 bits of `value` rounded to BF16; not for subnormal results."""
    bits = float64(value).view(np.uint64)
    odd = uint64(uint64(bits >> uint64(45)) & uint64(1))
    rounded = uint64(uint64(bits + uint64(0x0FFFFFFFFFFF)) + odd)
    exact = uint64(rounded & uint64(0xFFFFE00000000000)).view(np.float64)
    return float_bits(float32(exact))


@inlined
def _magnitude_below_zero(value: Any) -> Any:
    """Return float64 bits with the order of |value|, except that zeros are the largest."""
    return uint64(uint64(float64(value).view(np.uint64) << uint64(1)) - uint64(1))


@inlined
def _pairs(terms: Any, weights: Any, target: Any, width: Any) -> Any:
    """Add and round elements, two per word: adjacent elements need no shuffles that way.

    Returns the largest magnitude of the results, as BF16 bits, and the smallest one of the sums.
    """
    worst, least = uint32(0), uint64(0xFFFFFFFFFFFFFFFF)
    for i in range(target.size):
        left, right = float64(0.0), float64(0.0)
        for j in range(width):
            word = terms[j, uintp(i)]
            left += weights[j] * float64(uint32(word << uint32(16)).view(np.float32))
            right += weights[j] * float64(uint32(word & uint32(0xFFFF0000)).view(np.float32))
        low, high = _bf16_in_f32(left), _bf16_in_f32(right)
        least = min(least, min(_magnitude_below_zero(left), _magnitude_below_zero(right)))
        largest = max(uint32(low & uint32(0x7FFFFFFF)), uint32(high & uint32(0x7FFFFFFF)))
        worst = max(worst, largest)
        target[i] = uint32(uint32(high & uint32(0xFFFF0000)) | uint32(low >> uint32(16)))
    return worst, least


@helper
def _finish_pairs(terms: Array, weights: Array, target: Array) -> int:
    """Add and round BF16, two per word; return the result of `finish`, or _RARE."""
    if len(weights) == 8:
        worst, least = _pairs(terms, weights, target, 8)
    elif len(weights) == 4:
        worst, least = _pairs(terms, weights, target, 4)
    elif len(weights) == 2:
        worst, least = _pairs(terms, weights, target, 2)
    else:
        worst, least = _pairs(terms, weights, target, 1)
    if least < uint64(_LEAST_NORMAL):
        return _RARE
    return int(worst >= uint32(_EXPONENT))


def _at_once(terms: Any, weights: Any, target: Any) -> Any:
    """Add and round all elements at once if terms and target are BF16; else return _RARE."""


@overload(_at_once)
def _at_once_of(terms: Any, weights: Any, target: Any) -> Any:
    def as_pairs(terms: Any, weights: Any, target: Any) -> Any:
        if target.size % 2:
            return _RARE
        words = terms.reshape(-1).view(np.uint32).reshape(terms.shape[0], target.size // 2)
        return _finish_pairs(words, weights, target.view(np.uint32))

    def as_numbers(terms: Any, weights: Any, target: Any) -> Any:
        return _RARE

    bf16 = terms.dtype == types.uint16 and target.dtype == types.uint16
    return as_pairs if bf16 else as_numbers


@kernel(
    *(
        (terms, F64_LINE, F64_LINE, BOOL, target, BOOL)
        for terms in (BF16, F32)
        for target in (BF16_LINE, F32_LINE)
    )
)
def finish(
    terms: Array, weights: Array, sums: Array, begin: bool, target: Array, to_odd: bool
) -> int:
    """Add the last terms, as `add` does, and round: to BF16 (a uint16 `target`) or to float32.

    Ties go to even; `to_odd` is for a float32 that will be rounded again, to fewer bits. Returns 1
    if any result is NaN or Inf, else 0. `sums` are only read, and with `begin` not even that.
    """
    met = _at_once(terms, weights, target) if begin else _RARE
    if met != _RARE:
        return met
    held = np.empty(_BLOCK, np.float64)
    nonfinite = 0
    for first in range(0, target.size, _BLOCK):
        part = held[: min(_BLOCK, target.size - first)]
        into = target[first : first + part.size]
        if not begin:
            part[:] = sums[first : first + part.size]
        _add(terms, first, weights, part, begin)
        nonfinite |= _round(part, into, to_odd)
    return nonfinite


@helper
def _read(fd: int, into: Array, offset: int) -> bool:
    """Fill a contiguous array from byte `offset` of an open file; return whether it succeeded."""
    nbytes = into.size * into.itemsize
    done = 0
    while done < nbytes:
        count = _pread(fd, uintp(into.ctypes.data + done), uintp(nbytes - done), offset + done)
        if count <= 0:
            return False
        done += count
    return True


@kernel(
    *(
        (types.int32[::1], types.int64[::1], F64_LINE, terms, target, BOOL)
        for terms in (BF16_LINE, F32_LINE)
        for target in (BF16_LINE, F32_LINE)
    )
)
def average_files(
    fds: Array, offsets: Array, weights: Array, terms: Array, target: Array, to_odd: bool
) -> int:
    """Fill `target` [N] with the rounded sums of checkpoints in open files, without the GIL.

    Checkpoint j has N elements of the dtype of `terms` (BF16 as uint16, or float32) from byte
    `offsets[j]` of file `fds[j]` on. `terms` [WIDTHS[0] * READ_ELEMENTS] is a read buffer. Rounding
    and result are those of `finish`, or the result is UNREADABLE.
    """
    held = np.empty(READ_ELEMENTS, np.float64)  # used only with several runs
    nonfinite = 0
    for first in range(0, target.size, READ_ELEMENTS):
        count = min(READ_ELEMENTS, target.size - first)
        sums = held[:count]
        done = 0
        while done < len(fds):
            left = len(fds) - done
            width = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
            some = terms[: width * count].reshape(width, count)
            for j in range(width):
                place = offsets[done + j] + first * terms.itemsize
                if not _read(fds[done + j], some[j], place):
                    return UNREADABLE
            run = weights[done : done + width]
            if width < left:
                _add(some, 0, run, sums, done == 0)
            else:
                into = target[first : first + count]
                nonfinite |= finish(some, run, sums, done == 0, into, to_odd)
            done += width
    return nonfinite
