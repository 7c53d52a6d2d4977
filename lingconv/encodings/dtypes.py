"""Types of stored elements: safetensors' plain ones, and ggml's, whose elements share a block."""

from enum import StrEnum
from math import prod
from typing import Self

E4M3_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max


class DType(StrEnum):
    """A safetensors dtype (github.com/huggingface/safetensors, safetensors/src/tensor.rs).

    `bits` is the size of one element; `itemsize` the same in whole bytes, at least one.
    """

    bits: int
    itemsize: int

    F4 = "F4", 4
    F6_E2M3 = "F6_E2M3", 6
    F6_E3M2 = "F6_E3M2", 6
    BOOL = "BOOL", 8
    U8 = "U8", 8
    I8 = "I8", 8
    F8_E5M2 = "F8_E5M2", 8
    F8_E4M3 = "F8_E4M3", 8
    F8_E8M0 = "F8_E8M0", 8
    I16 = "I16", 16
    U16 = "U16", 16
    F16 = "F16", 16
    BF16 = "BF16", 16
    I32 = "I32", 32
    U32 = "U32", 32
    F32 = "F32", 32
    C64 = "C64", 64
    F64 = "F64", 64
    I64 = "I64", 64
    U64 = "U64", 64

    def __new__(cls, name: str, bits: int) -> Self:
        """Return the member with its size as a plain attribute, which is read millions of times."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.bits = bits
        member.itemsize = max(1, bits // 8)
        return member

    def nbytes_of(self, shape: tuple[int, ...]) -> int:
        """Return the number of bytes of a tensor of `shape`."""
        return prod(shape) * self.bits // 8


class GgmlType(StrEnum):
    """A ggml type: `id` is its number in GGUF files; a block has `elements` in `nbytes`.

    Numbers and sizes: `ggml_type` in ggml/include/ggml.h and the block structs in
    ggml/src/ggml-common.h of github.com/ggml-org/llama.cpp at 0c1e5709.
    """

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
    IQ2_XXS = "IQ2_XXS", 16, 256, 66
    IQ2_XS = "IQ2_XS", 17, 256, 74
    IQ3_XXS = "IQ3_XXS", 18, 256, 98
    IQ1_S = "IQ1_S", 19, 256, 50
    IQ4_NL = "IQ4_NL", 20, 32, 18
    IQ3_S = "IQ3_S", 21, 256, 110
    IQ2_S = "IQ2_S", 22, 256, 82
    IQ4_XS = "IQ4_XS", 23, 256, 136
    I8 = "I8", 24, 1, 1
    I16 = "I16", 25, 1, 2
    I32 = "I32", 26, 1, 4
    I64 = "I64", 27, 1, 8
    F64 = "F64", 28, 1, 8
    IQ1_M = "IQ1_M", 29, 256, 56
    BF16 = "BF16", 30, 1, 2
    TQ1_0 = "TQ1_0", 34, 256, 54
    TQ2_0 = "TQ2_0", 35, 256, 66
    MXFP4 = "MXFP4", 39, 32, 17
    NVFP4 = "NVFP4", 40, 64, 36

    def __new__(cls, name: str, number: int, elements: int, nbytes: int) -> Self:
        """Return the member with its numbers as plain attributes."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.id = number
        member.elements = elements
        member.nbytes = nbytes
        return member

    @property
    def is_quantized(self) -> bool:
        """Whether a block has several elements; rows must then consist of whole blocks."""
        return self.elements > 1

    @property
    def itemsize(self) -> int:
        """Number of bytes of a block, which is a single element in plain types."""
        return self.nbytes

    def nbytes_of(self, shape: tuple[int, ...]) -> int:
        """Return the number of bytes of a tensor of `shape`; its last axis has whole blocks."""
        return prod(shape) // self.elements * self.nbytes


StoredType = DType | GgmlType

DTYPES: dict[str, DType] = {dtype.value: dtype for dtype in DType}
GGML_TYPES: dict[str, GgmlType] = {kind.value: kind for kind in GgmlType}
