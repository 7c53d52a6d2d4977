"""ggml's encodings: a row is made of blocks, and a block holds its scales beside its elements."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lingconv.encodings.dtypes import GGML_TYPES, GgmlType
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec


@dataclass(frozen=True, slots=True)
class Ggml:
    """Elements in blocks of `type`, row by row. Types without blocks are `Plain`, not this."""

    kind: ClassVar[str] = "ggml"
    type: GgmlType

    @property
    def label(self) -> str:
        """Short name for people: `q4_k`."""
        return self.type.lower()

    @property
    def row_multiple(self) -> int:
        """Rows that must be encoded together."""
        return 1

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of `cols` elements, as many as whole blocks have."""
        return cols // self.type.elements * self.type.nbytes

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the physical tensors that hold a matrix: just itself."""
        return (tensor_spec(name, self.type, shape),)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of those tensors."""
        return (name,)

    def can_hold(self, other: object) -> bool:
        """Return whether bytes of encoding `other` are valid in this one as they are."""
        return self == other

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"type": self.type.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Build from `to_json`'s fields."""
        return cls(GGML_TYPES[fields["type"]])
