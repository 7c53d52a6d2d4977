"""The codecs of four bits: NVFP4, MXFP4, INT4."""

import math

import numpy as np

from lingconv.encodings.codec import Array, Buffers, Encoded, RowRange, StoredRows
from lingconv.encodings.codecs.fp8 import decode_scales
from lingconv.encodings.dtypes import DType
from lingconv.encodings.four_bits import INT4_ZERO, MXFP4_GROUP, NVFP4_GROUP, Int4, Mxfp4, Nvfp4
from lingconv.encodings.kernels import fp4_encode, int4_encode, low_bit_decode
from lingconv.encodings.kernels.numeric import f32_to_bf16
from lingconv.encodings.scaling import Rule, Scaling, Search

_STORED = {DType.F32: np.float32, DType.BF16: np.uint16, DType.U8: np.uint8}
_MAX = np.float32(6 * 448)  # e2m1's largest number times e4m3's
_FOUR_SIX_MAX = np.float32(6 * 256)
_TINY_BF16 = np.float32(2.0**-126)
# The smallest normal e4m3: scales below it are rounded to multiples of 2^-9.
_LEAST_NORMAL = np.float32(2.0**-6)
_CUT = np.float32(24 * 2.0**-10)


def _e4m3_numbers() -> Array:
    """Return the numbers of the 256 codes of e4m3."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    magnitude = np.where(exponent > 0, normal, mantissa * 2.0**-9)
    magnitude[codes & 127 == 127] = np.nan
    return np.where(codes < 128, magnitude, -magnitude).astype(np.float32)


_E4M3 = _e4m3_numbers()


def _bf16(value: np.float32) -> np.float32:
    """Return a number rounded to BF16."""
    rounded = np.empty(1, np.uint16)
    f32_to_bf16(np.array([value], np.float32), rounded)
    return np.float32((rounded.astype(np.uint32) << 16).view(np.float32)[0])


def _read_codes(rows: StoredRows, first: int, count: int) -> Array:
    """Return the packed codes of rows [count, cols / 2]."""
    codes = rows.buffers.take("read", (count, rows.cols // 2), np.uint8)
    rows.read(0, first * (rows.cols // 2), codes)
    return codes


def _read_scales(rows: StoredRows, first: int, count: int, group: int, dtype: type) -> Array:
    """Return the stored scales of rows [count, groups]."""
    width = rows.cols // group
    raw = rows.buffers.take("scales in", (count, width), dtype)
    rows.read(1, first * width * raw.itemsize, raw)
    return raw


class Nvfp4Codec:
    """Codec of e2m1 with e4m3 scales and one float32 for the matrix."""

    def __init__(self, encoding: Nvfp4) -> None:
        self._encoding = encoding

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` with code x scale, as float32 or rounded to BF16."""
        codes = _read_codes(rows, first, len(values))
        units = self._units(rows, first, len(values))[0]
        return bool(low_bit_decode.dequantize_e2m1(codes, units, values))

    def _units(self, rows: StoredRows, first: int, count: int) -> tuple[Array, Array]:
        """Return what code 1.0 stands for in each group, and the e4m3 scales as float32."""
        raw = _read_scales(rows, first, count, NVFP4_GROUP, np.uint8)
        scales = _E4M3[raw]
        number = np.empty(1, np.float32)
        rows.read(2, 0, number)
        with np.errstate(divide="ignore", invalid="ignore"):
            units = scales / number if self._encoding.divides else scales * number
        return units, scales

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return codes and scales, and with the first row what the matrix has one of.

        NaN and Inf have no code, and are always refused.
        """
        codes = buffers.take("write", (len(values), place.cols // 2), np.uint8, like=place.offset)
        scales = buffers.take(
            "scales out", (len(values), place.cols // NVFP4_GROUP), np.uint8, like=0
        )
        narrow = values.dtype == np.uint16
        number = self.number(place.amax, scaling, narrow=narrow)
        if scaling.search == Search.FOUR_OVER_SIX:
            bad = fp4_encode.quantize_nvfp4_four_over_six(
                values, codes, scales, _amax_of(place.amax)
            )
        else:
            divisor = fp4_encode.DIVISOR_BF16 if narrow else fp4_encode.DIVISOR_F32
            rule = divisor if self._encoding.divides else fp4_encode.MULTIPLIER
            sweeps = scaling.search == Search.SWEEP
            quantize = fp4_encode.sweep_nvfp4 if sweeps else fp4_encode.quantize_nvfp4
            bad = quantize(values, codes, scales, float(number), rule)
        once = [] if place.first else [np.array([number], np.float32)]
        if once and self._encoding.has_inputs:
            once.append(np.ones(1, np.float32))
        return Encoded([codes, scales, *once], bad)

    def number(self, amax: float, scaling: Scaling, *, narrow: bool) -> np.float32:
        """Return the number of a matrix whose largest magnitude is `amax`, rounded as stored.

        compressed-tensors rounds each step to the weights' dtype, BF16 if `narrow`; an infinite
        divisor, that of zeros, becomes 1.
        """
        if scaling.search == Search.FOUR_OVER_SIX:
            largest = np.float32(_amax_of(amax))
            return _FOUR_SIX_MAX / largest if self._encoding.divides else largest / _FOUR_SIX_MAX
        if not self._encoding.divides:
            return np.float32(amax) / _MAX
        largest = max(np.float32(amax), _TINY_BF16)
        with np.errstate(over="ignore"):
            if narrow:
                divisor = _bf16(_bf16(np.float32(1) / largest) * _MAX)
            else:
                divisor = np.float32(1) / largest * _MAX
        return divisor if math.isfinite(divisor) else np.float32(1)

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Return the unit of the error limit's floor in each group.

        It is what code 1.0 stands for; where the e4m3 scale is subnormal, it grows by what rounding
        the scale may cut off.
        """
        units, scales = self._units(rows, first, num_rows)
        safe = np.maximum(scales, np.float32(2.0**-10))
        return np.where(scales < _LEAST_NORMAL, units * (1 + _CUT / safe), units)


def _amax_of(amax: float) -> float:
    """Return a largest magnitude that can be divided by."""
    return amax or float(_FOUR_SIX_MAX)


class Mxfp4Codec:
    """Codec of e2m1 with a power of two for each group."""

    def __init__(self, encoding: Mxfp4) -> None:
        self._encoding = encoding

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` with code x 2^k, as float32 or rounded to BF16."""
        codes = _read_codes(rows, first, len(values))
        units = self.scales(rows, first, len(values))
        return bool(low_bit_decode.dequantize_e2m1(codes, units, values))

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return codes and exponents. NaN and Inf have no code, and are always refused."""
        codes = buffers.take("write", (len(values), place.cols // 2), np.uint8, like=place.offset)
        scales = buffers.take(
            "scales out", (len(values), place.cols // MXFP4_GROUP), np.uint8, like=0
        )
        searches = scaling.search != Search.NONE
        return Encoded([codes, scales], fp4_encode.quantize_mxfp4(values, codes, scales, searches))

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Return the scales of rows as float32 [rows, groups]; code 255 is NaN."""
        raw = _read_scales(rows, first, num_rows, MXFP4_GROUP, np.uint8)
        return decode_scales(raw, DType.F8_E8M0)


class Int4Codec:
    """Codec of integers of 4 bits with a scale for each group."""

    def __init__(self, encoding: Int4) -> None:
        self._encoding = encoding

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` with (code - 8) x scale, as float32 or rounded to BF16."""
        codes = _read_codes(rows, first, len(values))
        scales = self._stored_scales(rows, first, len(values))
        zeros = np.full_like(scales, INT4_ZERO)
        return bool(low_bit_decode.dequantize_int4(codes, scales, zeros, values))

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return codes and scales, and with the first row the shape.

        NaN and Inf have no code, and are always refused.
        """
        group = self._encoding.group
        codes = buffers.take("write", (len(values), place.cols // 2), np.uint8, like=place.offset)
        scales = buffers.take("scales out", (len(values), place.cols // group), np.float32)
        rounds = scaling.rule == Rule.BF16_QUOTIENT and values.dtype == np.uint16
        rule = _RULES.get(scaling.rule, int4_encode.DIVIDED_BY_7_5)
        searches = scaling.search != Search.NONE
        bad = int4_encode.quantize(values, codes, scales, rule, rounds, searches)
        stored = (scales.view(np.uint32) >> 16).astype(np.uint16)
        shape = np.array([place.height, place.cols], np.int64)
        return Encoded([codes, stored, *([] if place.first else [shape])], bad)

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Return the magnitudes of the scales of rows, float32 [rows, groups]."""
        return np.abs(self._stored_scales(rows, first, num_rows))

    def _stored_scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        encoding = self._encoding
        dtype = _STORED[encoding.scale_dtype]
        raw = _read_scales(rows, first, num_rows, encoding.group, dtype)
        return decode_scales(raw, encoding.scale_dtype)


_RULES = {Rule.DIVIDED_BY_7: int4_encode.DIVIDED_BY_7, Rule.SIGNED: int4_encode.SIGNED}
