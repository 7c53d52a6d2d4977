"""The codec of plain numbers: copied, widened or rounded."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lingconv.encodings.codec import (
    BF16_BITS,
    F32,
    Array,
    Buffers,
    Encoded,
    RowRange,
    StoredRows,
)
from lingconv.encodings.dtypes import DType
from lingconv.encodings.kernels import numeric
from lingconv.encodings.plain import Plain
from lingconv.encodings.scaling import Scaling


class PlainCodec:
    """Codec of one dtype: BF16, F16 or F32."""

    def __init__(self, encoding: Plain) -> None:
        self._dtype = encoding.dtype

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` with the stored numbers, unchanged or widened to float32."""
        return _DECODERS[self._dtype, values.dtype](rows, first, values)

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return `values` themselves, or rounded to nearest, ties to even."""
        return _ENCODERS[self._dtype, values.dtype](values, place, buffers)

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Raise AssertionError: there are none."""
        raise AssertionError(f"{self._dtype} has no scales")


def _read(rows: StoredRows, first: int, values: Array) -> bool:
    rows.read_rows(first, values)
    return False  # a plain read does not look at the values


def _bf16_to_f32(rows: StoredRows, first: int, values: Array) -> bool:
    stored = rows.buffers.take("read", values.shape, np.uint16)
    rows.read_rows(first, stored)
    return bool(numeric.bf16_to_f32(stored.reshape(-1), values.reshape(-1)))


def _f16_to_f32(rows: StoredRows, first: int, values: Array) -> bool:
    stored = rows.buffers.take("read", values.shape, np.float16)
    rows.read_rows(first, stored)
    np.copyto(values, stored)
    return not np.isfinite(stored).all()


def _f64_to_f32(rows: StoredRows, first: int, values: Array) -> bool:
    stored = rows.buffers.take("read", values.shape, np.float64)
    rows.read_rows(first, stored)
    with np.errstate(over="ignore"):
        np.copyto(values, stored, casting="same_kind")
    nonfinite = not np.isfinite(values).all()
    if rows.rounds_to_odd:
        _to_odd(stored, values)
    return nonfinite


def _to_odd(exact: Array, rounded: Array) -> None:
    """Make float32 `rounded` the neighbour of float64 `exact` whose last bit is 1, if not equal.

    Boldo and Melquiond, "When double rounding is odd" (2005): rounding that to nearest in two bits
    less or fewer gives what rounding `exact` gives.
    """
    bits = rounded.view(np.uint32)
    bits -= np.abs(rounded) > np.abs(exact)  # towards zero
    bits |= (rounded != exact) & ~np.isnan(exact)


_DECODERS: dict[tuple[DType, np.dtype[Any]], Callable[[StoredRows, int, Array], bool]] = {
    (DType.BF16, BF16_BITS): _read,
    (DType.BF16, F32): _bf16_to_f32,
    (DType.F16, F32): _f16_to_f32,
    (DType.F32, F32): _read,
    (DType.F64, F32): _f64_to_f32,
}


def _as_they_are(values: Array, place: RowRange, buffers: Buffers) -> Encoded:
    return Encoded([values])  # decoding has checked them


def _f32_to_bf16(values: Array, place: RowRange, buffers: Buffers) -> Encoded:
    rounded = buffers.take("write", values.shape, np.uint16, like=place.offset)
    nonfinite = numeric.f32_to_bf16(values.reshape(-1), rounded.reshape(-1))
    return Encoded([rounded], _first_infinite(rounded, 0x7F80) if nonfinite else -1)


def _f32_to_f16(values: Array, place: RowRange, buffers: Buffers) -> Encoded:
    rounded = buffers.take("write", values.shape, np.float16, like=place.offset)
    with np.errstate(over="ignore"):
        np.copyto(rounded, values, casting="same_kind")
    finite = np.isfinite(rounded).all()
    return Encoded([rounded], -1 if finite else _first_infinite(rounded, 0x7C00))


def _first_infinite(rounded: Array, infinity: int) -> int:
    """Return the first row with a NaN or Inf (all exponent bits set); there must be one."""
    bad = (rounded.view(np.uint16) & infinity) == infinity
    return int(bad.any(axis=1).argmax())


_ENCODERS: dict[tuple[DType, np.dtype[Any]], Callable[[Array, RowRange, Buffers], Encoded]] = {
    (DType.BF16, BF16_BITS): _as_they_are,
    (DType.BF16, F32): _f32_to_bf16,
    (DType.F16, F32): _f32_to_f16,
    (DType.F32, F32): _as_they_are,
}
