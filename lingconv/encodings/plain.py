"""Plain encodings: one number per element, no scales."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lingconv.encodings.base import EXACT, Encoding, Limit
from lingconv.encodings.dtypes import DTYPES, DType, StoredType
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec

# Dtypes that numbers are written in; tensors of any other dtype are only copied.
FLOATS = (DType.BF16, DType.F16, DType.F32)
# F64 is read as well, which merges leave behind, and rounded once; nothing is written in it.
DECODABLE = (*FLOATS, DType.F64)

# For each dtype, the dtypes whose numbers it represents exactly.
_HOLDS = {
    DType.F32: (DType.BF16, DType.F16, DType.F32),
    DType.BF16: (DType.BF16,),
    DType.F16: (DType.F16,),
}
_F16_SUBNORMAL = 2.0**-24
# Rounding to nearest: half a unit in the last place, and the error of subnormal numbers. FP8
# weights are products that are rounded twice.
_ROUNDED = {
    DType.BF16: Limit(2.0**-8 * 1.001, 1e-38, 2.0**-8),
    DType.F16: Limit(2.0**-11 * 1.001, _F16_SUBNORMAL, 2.0**-9, _F16_SUBNORMAL),
}
_FROM_SCALED = {
    **_ROUNDED,
    DType.BF16: Limit(2.0**-7, 1e-38, 2.0**-8),
    DType.F32: Limit(2.0**-22, 1e-38, 2.0**-22),
}


@dataclass(frozen=True, slots=True)
class Plain(Encoding):
    """Elements of `dtype`, row by row."""

    kind: ClassVar[str] = "plain"
    codec_path: ClassVar[str] = "lingconv.encodings.codecs.plain:PlainCodec"
    gpu_path: ClassVar[str] = "lingconv.encodings.codecs.gpu:PlainGpuCodec"
    dtype: DType

    @property
    def label(self) -> str:
        """The dtype's name in lower case: `bf16`."""
        return self.dtype.lower()

    @property
    def stored_types(self) -> tuple[StoredType, ...]:
        """The dtype alone."""
        return (self.dtype,)

    @property
    def is_decodable(self) -> bool:
        """Whether the elements are floats."""
        return self.dtype in DECODABLE

    @property
    def element_bytes(self) -> int:
        """Number of bytes of an element."""
        return self.dtype.itemsize

    @property
    def fits_bf16(self) -> bool:
        """Whether the dtype is BF16."""
        return self.dtype == DType.BF16

    def works_in_f32(self, sources: Collection[Encoding]) -> bool:
        """Return whether this dtype, or one of `sources`, is not BF16."""
        if self.dtype != DType.BF16:
            return True
        return not all(source.fits_bf16 for source in sources)

    def row_bytes(self, cols: int) -> int:
        """Return the number of bytes of a row of `cols` elements."""
        return cols * self.dtype.itemsize

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the physical tensor that stores a matrix."""
        return (tensor_spec(name, self.dtype, shape),)

    def error_limit(self, source: Encoding) -> Limit:
        """Return half a unit in the last place, unless this dtype represents `source` exactly."""
        if isinstance(source, Plain) and source.dtype in _HOLDS.get(self.dtype, (self.dtype,)):
            return EXACT
        limits = _FROM_SCALED if source.has_scales else _ROUNDED
        return limits.get(self.dtype, EXACT)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"dtype": self.dtype.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""
        return cls(DTYPES[fields["dtype"]])


# One shared value for each dtype: a large checkpoint has tens of thousands of tensors.
PLAIN = {dtype: Plain(dtype) for dtype in DType}
