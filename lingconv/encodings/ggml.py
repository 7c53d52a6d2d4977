"""ggml's encodings: a row consists of blocks, and a block contains its scales and its elements."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lingconv.encodings.base import EXACT, Encoding, ErrorUnit, Limit
from lingconv.encodings.dtypes import GGML_TYPES, GgmlType, StoredType
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec

# Types that need a scale of the whole tensor, which is stored in another tensor.
_INCOMPLETE = (GgmlType.NVFP4,)

# Limits of a right conversion: an element's error as a share of the largest magnitude in its
# block, and the whole tensor's relative error. They are a third above the largest errors measured
# on weights: normal, Laplace, Student's t (2 and 3), uniform, log-normal, sparse, positive.
_ERRORS = {
    GgmlType.Q8_0: (0.0065, 0.018),
    GgmlType.Q6_K: (0.036, 0.044),
    GgmlType.Q5_1: (0.045, 0.075),
    GgmlType.Q5_0: (0.085, 0.09),
    GgmlType.Q5_K: (0.1, 0.065),
    GgmlType.Q4_1: (0.09, 0.16),
    GgmlType.Q4_0: (0.17, 0.17),
    GgmlType.Q4_K: (0.17, 0.125),
    GgmlType.IQ4_NL: (0.18, 0.14),
    GgmlType.IQ4_XS: (0.2, 0.14),
    GgmlType.MXFP4: (0.34, 0.24),
    GgmlType.Q3_K: (0.37, 0.25),
    GgmlType.Q2_K: (0.85, 0.5),
}
# Ternary types, and those that are only read: errors up to a block's largest magnitude.
_COARSEST = (1.0, 1.0)
# A scale below half of F16's smallest step becomes zero, with numbers up to 2^8 times as large.
LOST_WITH_SCALE = 2.0**-17
_E8M0 = (GgmlType.MXFP4,)  # scales that are no F16
_BF16_STEP = 2.0**-8  # FP8 weights are rounded to BF16 first


@dataclass(frozen=True, slots=True)
class Ggml(Encoding):
    """Elements in blocks of `type`, row by row. Types without blocks are `Plain`, not this."""

    kind: ClassVar[str] = "ggml"
    codec_path: ClassVar[str] = "lingconv.encodings.codecs.ggml:GgmlCodec"
    is_quantized: ClassVar[bool] = True
    encodes_from_f32: ClassVar[bool] = True
    error_unit: ClassVar[ErrorUnit] = ErrorUnit.PEAK
    type: GgmlType

    @property
    def label(self) -> str:
        """The type's name in lower case: `q4_k`."""
        return self.type.lower()

    @property
    def stored_types(self) -> tuple[StoredType, ...]:
        """The ggml type alone."""
        return (self.type,)

    @property
    def is_decodable(self) -> bool:
        """Whether blocks contain all scales that their numbers need."""
        return self.type not in _INCOMPLETE

    @property
    def col_multiple(self) -> int:
        """Number of elements of a block."""
        return self.type.elements

    def row_bytes(self, cols: int) -> int:
        """Return the number of bytes of a row of `cols` elements, in whole blocks."""
        return cols // self.type.elements * self.type.nbytes

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the physical tensor that stores a matrix."""
        return (tensor_spec(name, self.type, shape),)

    def blocks(self, height: int, cols: int) -> tuple[int, int]:
        """Return the block of the type: one row, and its number of elements."""
        return 1, self.type.elements

    def error_limit(self, source: Encoding) -> Limit:
        """Return the limit of the type, as a share of each block's largest magnitude."""
        if self.can_hold(source):
            return EXACT
        share, rel_error = _ERRORS.get(self.type, _COARSEST)
        relative = _BF16_STEP if source.has_scales else 0.0
        return Limit(relative, share, rel_error, 0.0 if self.type in _E8M0 else LOST_WITH_SCALE)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"type": self.type.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""
        return cls(GGML_TYPES[fields["type"]])
