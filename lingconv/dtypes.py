"""Data types of stored tensors, spelled as safetensors spells them."""

from enum import StrEnum


class DType(StrEnum):
    """A safetensors dtype (github.com/huggingface/safetensors, safetensors/src/tensor.rs)."""

    F4 = "F4"
    F6_E2M3 = "F6_E2M3"
    F6_E3M2 = "F6_E3M2"
    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    F8_E5M2 = "F8_E5M2"
    F8_E4M3 = "F8_E4M3"
    F8_E8M0 = "F8_E8M0"
    I16 = "I16"
    U16 = "U16"
    F16 = "F16"
    BF16 = "BF16"
    I32 = "I32"
    U32 = "U32"
    F32 = "F32"
    C64 = "C64"
    F64 = "F64"
    I64 = "I64"
    U64 = "U64"

    @property
    def bits(self) -> int:
        """Size of one element in bits."""
        return _BITS[self]

    @property
    def itemsize(self) -> int:
        """Size of one element in whole bytes; sub-byte types count as one."""
        return max(1, _BITS[self] // 8)


_BITS = {
    DType.F4: 4,
    DType.F6_E2M3: 6,
    DType.F6_E3M2: 6,
    DType.BOOL: 8,
    DType.U8: 8,
    DType.I8: 8,
    DType.F8_E5M2: 8,
    DType.F8_E4M3: 8,
    DType.F8_E8M0: 8,
    DType.I16: 16,
    DType.U16: 16,
    DType.F16: 16,
    DType.BF16: 16,
    DType.I32: 32,
    DType.U32: 32,
    DType.F32: 32,
    DType.C64: 64,
    DType.F64: 64,
    DType.I64: 64,
    DType.U64: 64,
}

DTYPES: dict[str, DType] = {dtype.value: dtype for dtype in DType}
