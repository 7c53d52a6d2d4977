"""Data types of stored tensors, spelled as safetensors spells them."""

from enum import StrEnum
from typing import Self


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
        """Attach the size to the member: a plain attribute, read millions of times."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.bits = bits
        member.itemsize = max(1, bits // 8)
        return member


DTYPES: dict[str, DType] = {dtype.value: dtype for dtype in DType}
