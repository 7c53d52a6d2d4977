"""Four bits: two codes to a byte, and a scale for each group of columns of a row.

    encoding  number                                 group  tensors beside the codes
    NVFP4     e2m1 x e4m3 scale, of a whole matrix   16     scale, one float32
    MXFP4     e2m1 x 2^k                             32     exponent
    INT4      (0 to 15 - 8) x BF16 scale             any    scale, the matrix's shape

Formats: compressed-tensors 0.20 (`compressors/nvfp4`, `mxfp4`, `pack_quantized`), ModelOpt 0.47
(`qtensor/nvfp4_tensor.py`), and what inclusionAI and Quark publish.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Self

from lingconv.encodings.base import EXACT, Encoding, ErrorUnit, Limit
from lingconv.encodings.dtypes import DTYPES, DType, StoredType
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec

NVFP4_GROUP = 16
MXFP4_GROUP = 32
INT4_ZERO = 8  # the code of 0
_WEIGHT = "weight"


class Dialect(StrEnum):
    """Who reads the tensors, by their names."""

    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"
    LING = "ling"  # inclusionAI's Ling 3.0 `-fp4`
    QUARK = "quark"


class _Grouped(Encoding):
    """Base of the encodings of four bits: row by row, in groups of `col_multiple` columns."""

    __slots__ = ()

    is_quantized: ClassVar[bool] = True
    has_scales: ClassVar[bool] = True
    holds_stacks: ClassVar[bool] = False
    holds_nonfinite: ClassVar[bool] = False
    error_unit: ClassVar[ErrorUnit] = ErrorUnit.SCALE
    limit: ClassVar[Limit]

    @property
    def intended_dtype(self) -> DType:
        """BF16: models were quantized from it, and runtimes compute in it."""
        return DType.BF16

    def works_in_f32(self, sources: Collection[Encoding]) -> bool:
        """Return whether amax has to be computed in float32: a source is not BF16.

        Quantized sources are decoded to BF16 first, as model_free_ptq and ModelOpt do.
        """
        return not all(source.fits_bf16 for source in sources)

    @property
    def has_block_scales(self) -> bool:
        """Whether each block of a proof's figures has a scale of its own."""
        return True

    def scale_width(self, cols: int) -> int:
        """Return the columns of a group."""
        return self.col_multiple

    def blocks(self, height: int, cols: int) -> tuple[int, int]:
        """Return the blocks of a proof's figures: a group of a row."""
        return 1, self.col_multiple

    def row_bytes(self, cols: int) -> int:
        """Return the number of bytes of a row of `cols` codes."""
        return cols // 2

    def error_limit(self, source: Encoding) -> Limit:
        """Return the limit for rounding to codes of four bits."""
        return EXACT if self.can_hold(source) else self.limit

    def part_rows(self, part: int, first: int, num_rows: int, height: int) -> tuple[int, int]:
        """Return the rows of tensor `part`: the same in codes and scales; the rest has one row."""
        return (first, first + num_rows) if part < 2 else (0, 1)


class _Nvfp4Names(NamedTuple):
    codes: str
    scales: str
    number: str
    number_shape: tuple[int, ...]
    inputs: str  # in place of `weight`


_NVFP4_NAMES = {
    Dialect.COMPRESSED_TENSORS: _Nvfp4Names(
        "_packed", "_scale", "_global_scale", (1,), "input_global_scale"
    ),
    Dialect.MODELOPT: _Nvfp4Names("", "_scale", "_scale_2", (), "input_scale"),
}


@dataclass(frozen=True, slots=True)
class Nvfp4(_Grouped):
    """e2m1 codes, an e4m3 scale for 16 columns, and one float32 for the matrix.

    That float32 is a divisor in compressed-tensors, a multiplier in ModelOpt. `has_inputs`: a scale
    of the activations is stored too, for W4A4; lingconv writes 1.0, which assumes and measures
    nothing.
    """

    kind: ClassVar[str] = "nvfp4"
    codec_path: ClassVar[str] = "lingconv.encodings.codecs.four_bits:Nvfp4Codec"
    needs_amax: ClassVar[bool] = True
    # The largest e2m1 step is a third of the smaller number; a scale that is rounded down, or
    # searched, cuts the largest number by a quarter at most.
    limit: ClassVar[Limit] = Limit(0.3, 0.26, 0.14)
    dialect: Dialect = Dialect.COMPRESSED_TENSORS
    has_inputs: bool = False

    @property
    def col_multiple(self) -> int:
        """The columns of a group."""
        return NVFP4_GROUP

    @property
    def divides(self) -> bool:
        """Whether the number of the matrix is a divisor."""
        return self.dialect == Dialect.COMPRESSED_TENSORS

    @property
    def label(self) -> str:
        """The encoding's short name in messages."""
        return "nvfp4 w4a4" if self.has_inputs else "nvfp4"

    @property
    def stored_types(self) -> tuple[StoredType, ...]:
        """Packed codes, scales, the matrix's number, and that of the activations."""
        inputs = (DType.F32,) if self.has_inputs else ()
        return (DType.U8, DType.F8_E4M3, DType.F32, *inputs)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that store a matrix."""
        words = _NVFP4_NAMES[self.dialect]
        inputs = (name.removesuffix(_WEIGHT) + words.inputs,) if self.has_inputs else ()
        return (name + words.codes, name + words.scales, name + words.number, *inputs)

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the tensors that store a matrix."""
        rows, cols = shape
        one = _NVFP4_NAMES[self.dialect].number_shape
        shapes = [(rows, cols // 2), (rows, cols // NVFP4_GROUP), one, one]
        return tuple(map(tensor_spec, self.names(name), self.stored_types, shapes))

    def can_hold(self, other: Encoding) -> bool:
        """Return whether bytes of `other` are valid in this one: its number means the same."""
        return isinstance(other, Nvfp4) and (self.dialect, self.has_inputs) == (
            other.dialect,
            other.has_inputs,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"dialect": self.dialect.value, "has_inputs": self.has_inputs}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""
        return cls(Dialect(fields["dialect"]), has_inputs=fields["has_inputs"])


class _Mxfp4Names(NamedTuple):
    codes: str
    codes_dtype: DType
    scales: str
    scales_dtype: DType


_MXFP4_NAMES = {
    Dialect.COMPRESSED_TENSORS: _Mxfp4Names("_packed", DType.U8, "_scale", DType.U8),
    Dialect.LING: _Mxfp4Names("", DType.U8, "_scale_inv", DType.F8_E8M0),
    Dialect.QUARK: _Mxfp4Names("", DType.U8, "_scale", DType.U8),
}


@dataclass(frozen=True, slots=True)
class Mxfp4(_Grouped):
    """e2m1 codes, and a power of two (E8M0) for 32 columns (OCP Microscaling v1.0)."""

    kind: ClassVar[str] = "mxfp4"
    codec_path: ClassVar[str] = "lingconv.encodings.codecs.four_bits:Mxfp4Codec"
    # A group may be cut at 6 of 8 units, by OCP's own rule.
    limit: ClassVar[Limit] = Limit(0.26, 0.26, 0.17)
    dialect: Dialect = Dialect.COMPRESSED_TENSORS

    @property
    def col_multiple(self) -> int:
        """The columns of a group."""
        return MXFP4_GROUP

    @property
    def label(self) -> str:
        """The encoding's short name in messages."""
        return "mxfp4"

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether every scale has to be a power of two."""
        return True

    @property
    def stored_types(self) -> tuple[StoredType, ...]:
        """Packed codes, exponents."""
        words = _MXFP4_NAMES[self.dialect]
        return (words.codes_dtype, words.scales_dtype)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that store a matrix."""
        words = _MXFP4_NAMES[self.dialect]
        return (name + words.codes, name + words.scales)

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the tensors that store a matrix."""
        rows, cols = shape
        shapes = [(rows, cols // 2), (rows, cols // MXFP4_GROUP)]
        return tuple(map(tensor_spec, self.names(name), self.stored_types, shapes))

    def can_hold(self, other: Encoding) -> bool:
        """Return whether bytes of `other` are valid in this one: those of every dialect are."""
        return isinstance(other, Mxfp4)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"dialect": self.dialect.value}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""
        return cls(Dialect(fields["dialect"]))


@dataclass(frozen=True, slots=True)
class Int4(_Grouped):
    """Integers of 4 bits in words of 8 columns, and a scale for `group` columns.

    `shape_dtype` is that of `weight_shape`: I64 as compressed-tensors writes it, or I32.
    """

    kind: ClassVar[str] = "int4"
    codec_path: ClassVar[str] = "lingconv.encodings.codecs.four_bits:Int4Codec"
    # Half a step; a searched scale cuts the largest number by 0.39 of it at most.
    limit: ClassVar[Limit] = Limit(0.4, 0.52, 0.3)
    group: int = 32
    scale_dtype: DType = DType.BF16
    shape_dtype: DType = DType.I64

    @property
    def col_multiple(self) -> int:
        """The columns of a group."""
        return self.group

    @property
    def label(self) -> str:
        """The encoding's short name in messages: `int4 g32`."""
        return f"int4 g{self.group}"

    @property
    def stored_types(self) -> tuple[StoredType, ...]:
        """Words of eight codes, scales, and the shape."""
        return (DType.I32, self.scale_dtype, self.shape_dtype)

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that store a matrix."""
        return (f"{name}_packed", f"{name}_scale", f"{name}_shape")

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the tensors that store a matrix."""
        rows, cols = shape
        shapes = [(rows, cols // 8), (rows, cols // self.group), (2,)]
        return tuple(map(tensor_spec, self.names(name), self.stored_types, shapes))

    def can_hold(self, other: Encoding) -> bool:
        """Return whether bytes of `other` are valid in this one unchanged."""
        return self == other

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "group": self.group,
            "scale_dtype": self.scale_dtype.value,
            "shape_dtype": self.shape_dtype.value,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""
        return cls(fields["group"], DTYPES[fields["scale_dtype"]], DTYPES[fields["shape_dtype"]])


class Found(NamedTuple):
    """A stored tensor: its dtype and shape."""

    dtype: StoredType
    shape: tuple[int, ...]


def recognise(name: str, cols: int, tensors: Mapping[str, Found]) -> _Grouped | None:
    """Return the encoding of a matrix of `cols` columns by the tensors that are named after it.

    None if they are not of four bits. Whether they are all there, and of the right shapes, is for
    the caller to check: `tensors` of the encoding.
    """
    packed, plain = tensors.get(f"{name}_packed"), tensors.get(name)
    scale = tensors.get(f"{name}_scale")
    if f"{name}_shape" in tensors or (packed is not None and packed.dtype == DType.I32):
        return _recognise_int4(name, cols, scale, tensors)
    if packed is not None or f"{name}_global_scale" in tensors:
        nvfp4 = scale is not None and scale.dtype == DType.F8_E4M3
        nvfp4 |= f"{name}_global_scale" in tensors
        return _nvfp4(name, Dialect.COMPRESSED_TENSORS, tensors) if nvfp4 else Mxfp4()
    if plain is None or plain.dtype not in (DType.U8, DType.I8):
        return None
    if f"{name}_scale_2" in tensors or (scale is not None and scale.dtype == DType.F8_E4M3):
        return _nvfp4(name, Dialect.MODELOPT, tensors)
    if f"{name}_scale_inv" in tensors:
        return Mxfp4(Dialect.LING)
    return Mxfp4(Dialect.QUARK) if scale is not None and scale.dtype == DType.U8 else None


def _nvfp4(name: str, dialect: Dialect, tensors: Mapping[str, Found]) -> Nvfp4:
    inputs = name.removesuffix(_WEIGHT) + _NVFP4_NAMES[dialect].inputs
    return Nvfp4(dialect, has_inputs=inputs in tensors)


def _recognise_int4(
    name: str, cols: int, scale: Found | None, tensors: Mapping[str, Found]
) -> Int4 | None:
    if scale is None or not isinstance(scale.dtype, DType) or f"{name}_zero_point" in tensors:
        return None
    shape = tensors.get(f"{name}_shape")
    shape_dtype = DType.I32 if shape is not None and shape.dtype == DType.I32 else DType.I64
    groups = scale.shape[-1] if scale.shape else 0
    return Int4(cols // groups, scale.dtype, shape_dtype) if groups else None
