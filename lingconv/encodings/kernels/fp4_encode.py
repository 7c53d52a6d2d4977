"""Encoding of BF16 or float32 to e2m1 numbers with a scale for each group of columns.

e2m1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6 (codes 0 to 7; bit 3 is the sign). A byte
holds two of them, the even column in its low half. Rounding is to nearest, ties to the even code.
A negative number that is rounded to zero keeps its sign; -0.0 does not.

NVFP4: groups of 16, a scale in e4m3, and one float32 for the whole matrix. MXFP4: groups of 32, and
a power of two (E8M0: code e is 2^(e - 127)). BF16 is passed as uint16.
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
from lingconv.encodings.kernels.jit import BF16, BOOL, BYTES, F32, FLOAT, INT, helper, kernel
from lingconv.encodings.kernels.numeric import (
    Array,
    bf16_from_bits,
    e4m3,
    float_bits,
    float_of,
    load,
    load_e4m3,
)

NVFP4_GROUP: Final = 16
MXFP4_GROUP: Final = 32
E2M1_MAX: Final = 6.0
ALL_FINITE: Final = -1

# How the scale of a group follows from the number of its matrix.
DIVISOR_BF16: Final = 0  # scale = e4m3(divisor x bf16(amax / 6)); code x scale / divisor
DIVISOR_F32: Final = 1  # the same without rounding to BF16
MULTIPLIER: Final = 2  # scale = e4m3(amax / (6 x multiplier)); code x scale x multiplier

_EXPONENT: Final = 0x7F800000
_MAGNITUDE: Final = 0x7FFFFFFF
_ONE: Final = 127 << 23
_MAX_E4M3: Final = 448.0
_FOUR_SIX_MAX: Final = 1536.0  # 6 x 256
_MAX_E4M3_CODE: Final = 0x7E
_LEAST_E4M3: Final = 2.0**-9
_EIGHTH: Final = 0x20  # 0.125 in e4m3
# Codes of the scale that are tried below the nearest one, and above. Three below cut off a quarter.
_SWEEP_BELOW: Final = 3
_SWEEP_ABOVE: Final = 7
# Half a step of two bits of mantissa: 1.75 and more become 2.
_HALF_STEP: Final = 1 << 21
_MAX_E8M0: Final = 252  # 2^125: six times that is still finite


@helper
def _e2m1(value: Any) -> Any:
    """Return the code of a float32 as uint32; saturates at 6.

    Adding 2^(e + 22) to a magnitude of exponent e >= 0 rounds it to one bit of mantissa, in the low
    bits of the sum; the codes of the next exponent begin two higher.
    """
    magnitude = min(float_of(uint32(float_bits(value) & uint32(_MAGNITUDE))), float32(E2M1_MAX))
    exponent = max(uint32(float_bits(magnitude) & uint32(_EXPONENT)), uint32(_ONE))
    magic = float_of(uint32(exponent + uint32(22 << 23)))
    steps = uint32(float_bits(magnitude + magic) & uint32(7))
    octaves = uint32(uint32(exponent - uint32(_ONE)) >> uint32(22))
    sign = uint32(8) if value < float32(0) else uint32(0)
    return uint32(uint32(steps + octaves) | sign)


@helper
def magnitude_of_e2m1(code: Any) -> Any:
    """Return the magnitude of an e2m1 code as float32."""
    magnitude = uint32(uint32(code) & uint32(7))
    normal = float_of(uint32(uint32(magnitude << uint32(22)) + uint32(126 << 23)))
    subnormal = float32(0.5) if magnitude == uint32(1) else float32(0)
    return normal if magnitude > uint32(1) else subnormal


@helper
def _put_codes(line: Array, units: Array, codes: Array) -> None:
    """Store the code of each column; `units` [cols] are the numbers that code 1.0 stands for."""
    for col in range(line.size):
        codes[col] = uint8(_e2m1(load(line[col]) / units[col]))


@helper
def _put_squares(line: Array, units: Array, squares: Array) -> None:
    """Store the squared error of each column."""
    for col in range(line.size):
        value = load(line[col])
        unit = units[col]
        difference = magnitude_of_e2m1(_e2m1(value / unit)) * unit - abs(value)
        squares[col] = difference * difference


# NVFP4 -------------------------------------------------------------------------------------------


@helper
def _nearest_scale(amax: Any, number: Any, rule: Any) -> Any:
    """Return the e4m3 code of a group's scale."""
    if rule == MULTIPLIER:
        ratio = amax / float32(float32(E2M1_MAX) * number)
        if ratio == float32(0):
            ratio = float32(1)
        return e4m3(min(max(ratio, float32(_LEAST_E4M3)), float32(_MAX_E4M3)))
    sixth = amax / float32(E2M1_MAX)
    if rule == DIVISOR_BF16:
        sixth = float_of(uint32(uint32(bf16_from_bits(float_bits(sixth))) << uint32(16)))
    code = e4m3(min(float32(number * sixth), float32(_MAX_E4M3)))
    return uint8(_EIGHTH) if code == uint8(0) else code


@helper
def _set_units(scales: Array, number: Any, rule: Any, into: Array) -> None:
    """Fill `into` with the number that code 1.0 stands for in each group."""
    for group in range(scales.size):
        scale = load_e4m3(scales[group])
        into[group] = scale * number if rule == MULTIPLIER else scale / number


_NVFP4 = BYTES, BYTES, FLOAT, INT


@kernel((BF16, *_NVFP4), (F32, *_NVFP4))
def quantize_nvfp4(source: Array, packed: Array, scales: Array, number: float, rule: int) -> int:
    """Quantize rows to `packed` codes [rows, cols / 2] and `scales` [rows, cols / 16] in e4m3.

    `number` belongs to the whole matrix: a divisor or a multiplier, as `rule` says. Returns -1, or
    the first row with NaN or Inf.
    """
    factor = float32(number)
    rows, cols = source.shape
    halves = room_for_peaks(source[0])
    peaks = np.empty(scales.shape[1], np.float32)
    units = np.empty(cols, np.float32)
    codes = np.empty(cols, np.uint8)
    for row in range(rows):
        if not find_peaks(source[row], halves, peaks):
            return row
        for group in range(peaks.size):
            scales[row, group] = _nearest_scale(peaks[group], factor, rule)
        _set_units(scales[row], factor, rule, peaks)
        spread_groups(peaks, NVFP4_GROUP, units)
        _put_codes(source[row], units, codes)
        pack(codes, packed[row])
    return ALL_FINITE


@kernel((BF16, *_NVFP4), (F32, *_NVFP4))
def sweep_nvfp4(source: Array, packed: Array, scales: Array, number: float, rule: int) -> int:
    """Quantize as `quantize_nvfp4`, with the scale of the least squared error in each group.

    Of equal errors the first counts: that of the nearest code, then from the lowest one upwards.
    """
    factor = float32(number)
    rows, cols = source.shape
    halves = room_for_peaks(source[0])
    groups = scales.shape[1]
    peaks = np.empty(groups, np.float32)
    least = np.empty(groups, np.float32)
    errors = np.empty(groups, np.float32)
    units = np.empty(cols, np.float32)
    squares = np.empty(cols, np.float32)
    sums = np.empty((2, cols // 2), np.float32)
    nearest = np.empty(groups, np.uint8)
    tried = np.empty(groups, np.uint8)
    codes = np.empty(cols, np.uint8)
    for row in range(rows):
        if not find_peaks(source[row], halves, peaks):
            return row
        best = scales[row]
        for group in range(groups):
            nearest[group] = _nearest_scale(peaks[group], factor, rule)
            least[group] = np.inf
        for turn in range(_SWEEP_BELOW + _SWEEP_ABOVE + 2):
            step = 0 if turn == 0 else turn - 1 - _SWEEP_BELOW
            for group in range(groups):
                tried[group] = min(max(int(nearest[group]) + step, 1), _MAX_E4M3_CODE)
            _set_units(tried, factor, rule, peaks)
            spread_groups(peaks, NVFP4_GROUP, units)
            _put_squares(source[row], units, squares)
            add_groups(squares, sums, errors)
            for group in range(groups):
                if errors[group] < least[group]:
                    least[group] = errors[group]
                    best[group] = tried[group]
        _set_units(best, factor, rule, peaks)
        spread_groups(peaks, NVFP4_GROUP, units)
        _put_codes(source[row], units, codes)
        pack(codes, packed[row])
    return ALL_FINITE


_FOUR_OVER_SIX = BYTES, BYTES, FLOAT


@kernel((BF16, *_FOUR_OVER_SIX), (F32, *_FOUR_OVER_SIX))
def quantize_nvfp4_four_over_six(source: Array, packed: Array, scales: Array, amax: float) -> int:
    """Quantize rows so that the largest number of a group becomes 6, or 4 if that errs less.

    A number is code x scale x amax / 1536, with `amax` that of the matrix; 1536 = 6 x 256 leaves
    room for 1.5 times the largest scale. arXiv 2512.02010, as its authors' reference computes it.
    """
    largest = float32(amax)
    factor = float32(_FOUR_SIX_MAX) / largest
    rows, cols = source.shape
    groups = scales.shape[1]
    halves = room_for_peaks(source[0])
    peaks = np.empty(groups, np.float32)
    numbers = np.empty(groups, np.float32)
    errors = np.empty(groups, np.float32)
    least = np.empty(groups, np.float32)
    inverses = np.empty(cols, np.float32)
    units = np.empty(cols, np.float32)
    squares = np.empty(cols, np.float32)
    sums = np.empty((2, cols // 2), np.float32)
    tried = np.empty(groups, np.uint8)
    codes = np.empty(cols, np.uint8)
    for row in range(rows):
        line = source[row]
        if not find_peaks(line, halves, peaks):
            return row
        for turn in range(2):
            stretch = float32(1.5) if turn else float32(1)
            for group in range(groups):
                tried[group] = e4m3(peaks[group] / float32(E2M1_MAX) * factor * stretch)
                numbers[group] = load_e4m3(tried[group])
            spread_groups(numbers, NVFP4_GROUP, units)
            _invert(tried, factor, numbers)
            spread_groups(numbers, NVFP4_GROUP, inverses)
            for col in range(cols):
                value = load(line[col])
                near = magnitude_of_e2m1(_e2m1(value * inverses[col])) * units[col]
                difference = near * largest / float32(_FOUR_SIX_MAX) - abs(value)
                squares[col] = difference * difference
            add_groups(squares, sums, errors)
            for group in range(groups):
                if turn == 0 or errors[group] < least[group]:
                    least[group] = errors[group]
                    scales[row, group] = tried[group]
        _invert(scales[row], factor, numbers)
        spread_groups(numbers, NVFP4_GROUP, inverses)
        for col in range(cols):
            codes[col] = uint8(_e2m1(load(line[col]) * inverses[col]))
        pack(codes, packed[row])
    return ALL_FINITE


@helper
def _invert(scales: Array, factor: Any, into: Array) -> None:
    """Fill `into` with what numbers are multiplied by; 0 where the scale is 0."""
    for group in range(scales.size):
        inverse = float32(1) / (load_e4m3(scales[group]) * (float32(1) / factor))
        into[group] = inverse if scales[group] else float32(0)


# MXFP4 -------------------------------------------------------------------------------------------


@helper
def power_of_e8m0(code: Any) -> Any:
    """Return the float32 of an E8M0 code, which is not 255 (NaN); 0 is 2^-127, a subnormal."""
    return float_of(uint32(0x00400000) if code == uint8(0) else uint32(uint32(code) << uint32(23)))


@helper
def _exponent(amax: Any, offset: Any) -> Any:
    """Return the E8M0 code of a magnitude, less 2, plus `offset`."""
    field = int(float_bits(amax) >> uint32(23))
    return uint8(min(max(field - 2 + offset, 0), _MAX_E8M0))


@helper
def _rounded_exponent(amax: Any) -> Any:
    """Return the E8M0 code of a magnitude that is rounded to two bits of mantissa, less 2."""
    field = int(uint32(float_bits(amax) + uint32(_HALF_STEP)) >> uint32(23))
    return uint8(min(max(field - 2, 0), _MAX_E8M0))


_MXFP4 = BYTES, BYTES, BOOL


@kernel((BF16, *_MXFP4), (F32, *_MXFP4))
def quantize_mxfp4(source: Array, packed: Array, scales: Array, search: bool) -> int:
    """Quantize rows to `packed` codes [rows, cols / 2] and `scales` [rows, cols / 32] in E8M0.

    With `search`, the exponent of amax less 2, 3 and 1 are tried, and the first with the least
    squared error is taken. Returns -1, or the first row with NaN or Inf.
    """
    rows, cols = source.shape
    groups = scales.shape[1]
    halves = room_for_peaks(source[0])
    peaks = np.empty(groups, np.float32)
    numbers = np.empty(groups, np.float32)
    errors = np.empty(groups, np.float32)
    least = np.empty(groups, np.float32)
    units = np.empty(cols, np.float32)
    squares = np.empty(cols, np.float32)
    sums = np.empty((2, cols // 2), np.float32)
    codes = np.empty(cols, np.uint8)
    for row in range(rows):
        line, best = source[row], scales[row]
        if not find_peaks(line, halves, peaks):
            return row
        for group in range(groups):
            best[group] = _rounded_exponent(peaks[group])
        for turn in range(3 if search else 0):
            offset = 0 if turn == 0 else 2 * turn - 3
            for group in range(groups):
                numbers[group] = power_of_e8m0(_exponent(peaks[group], offset))
            spread_groups(numbers, MXFP4_GROUP, units)
            _put_squares(line, units, squares)
            add_groups(squares, sums, errors)
            for group in range(groups):
                if turn == 0 or errors[group] < least[group]:
                    least[group] = errors[group]
                    best[group] = _exponent(peaks[group], offset)
        for group in range(groups):
            numbers[group] = power_of_e8m0(best[group])
        spread_groups(numbers, MXFP4_GROUP, units)
        _put_codes(line, units, codes)
        pack(codes, packed[row])
    return ALL_FINITE
