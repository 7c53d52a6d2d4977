"""Plain encodings: one number per element, no scales."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lingconv.encodings.dtypes import DTYPES, DType
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec

# What numbers are written in; tensors of any other dtype are only ever copied.
FLOATS = (DType.BF16, DType.F16, DType.F32)
# F64 is read as well, which merges leave behind, and rounded once; nothing is written in it.
DECODABLE = (*FLOATS, DType.F64)


@dataclass(frozen=True, slots=True)
class Plain:
    """Elements of `dtype`, row by row."""

    kind: ClassVar[str] = "plain"
    dtype: DType

    @property
    def label(self) -> str:
        """Short name for people: `bf16`."""
        return self.dtype.lower()

    @property
    def row_multiple(self) -> int:
        """Rows that must be encoded together."""
        return 1

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of `cols` elements."""
        return cols * self.dtype.itemsize

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the physical tensors that hold a matrix: just itself."""
        return (tensor_spec(name, self.dtype, shape),)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of those tensors."""
        return (name,)

    def can_hold(self, other: object) -> bool:
        """Return whether bytes of encoding `other` are valid in this one as they are."""
        return self == other

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"dtype": self.dtype.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Build from `to_json`'s fields."""
        return cls(DTYPES[fields["dtype"]])


# One value for each dtype: a large checkpoint has tens of thousands of tensors in a few of them.
PLAIN = {dtype: Plain(dtype) for dtype in DType}
