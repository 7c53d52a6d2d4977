"""ggml's tensor types: how many elements a block has, and how many bytes it takes.

Numbers and sizes: `ggml_type` and the block structs of ggml/include/ggml.h and
ggml/src/ggml-common.h in github.com/ggml-org/llama.cpp at 0c1e5709.
"""

from enum import StrEnum
from typing import Self


class GgmlType(StrEnum):
    """A type as ggml spells it; `id` stands in GGUF files, `elements` of a row share `nbytes`."""

    id: int
    elements: int
    nbytes: int

    F32 = "F32", 0, 1, 4
    F16 = "F16", 1, 1, 2
    Q4_0 = "Q4_0", 2, 32, 18
    Q4_1 = "Q4_1", 3, 32, 20
    Q5_0 = "Q5_0", 6, 32, 22
    Q5_1 = "Q5_1", 7, 32, 24
    Q8_0 = "Q8_0", 8, 32, 34
    Q2_K = "Q2_K", 10, 256, 84
    Q3_K = "Q3_K", 11, 256, 110
    Q4_K = "Q4_K", 12, 256, 144
    Q5_K = "Q5_K", 13, 256, 176
    Q6_K = "Q6_K", 14, 256, 210
    IQ4_NL = "IQ4_NL", 20, 32, 18
    IQ4_XS = "IQ4_XS", 23, 256, 136
    BF16 = "BF16", 30, 1, 2
    TQ1_0 = "TQ1_0", 34, 256, 54
    TQ2_0 = "TQ2_0", 35, 256, 66
    MXFP4 = "MXFP4", 39, 32, 17

    def __new__(cls, name: str, number: int, elements: int, nbytes: int) -> Self:
        """Attach the numbers to the member as plain attributes."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.id = number
        member.elements = elements
        member.nbytes = nbytes
        return member

    @property
    def is_quantized(self) -> bool:
        """Whether elements share something: then rows must be made of whole blocks."""
        return self.elements > 1

    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row; `cols` must be a multiple of `elements`."""
        return cols // self.elements * self.nbytes
