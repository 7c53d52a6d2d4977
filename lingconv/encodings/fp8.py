"""FP8: e4m3 elements with one scale per block, in the dialects that runtimes read.

    w ~= float32(q) * float32(scale)

Decoding multiplies by the scale in every dialect, DeepSeek's `weight_scale_inv` included, despite
its name. A block is (rows, cols); a channel scale is the block (1, all columns).

    dialect             names                     block       scale
    fp8 (DeepSeek)      X.weight_scale_inv        128 x 128   F32 or F8_E8M0, grid
    compressed-tensors  X.weight_scale            128 x 128   BF16 (F32 is read too), grid
    compressed-tensors  X.weight_scale            1 x all     BF16 (F32 is read too), [out, 1]
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Self

from lingconv.encodings.base import EXACT, Encoding, ErrorUnit, Limit
from lingconv.encodings.dtypes import DTYPES, E4M3_MAX, DType, StoredType
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec

SCALE_SUFFIXES = ("_scale_inv", "_scale")
SCALE_DTYPES: dict[StoredType, DType] = {
    dtype: dtype for dtype in (DType.F32, DType.BF16, DType.F8_E8M0)
}

# Rounding to nearest is off by at most 2^-4, 0.0361 over a tensor. A little more is allowed,
# because llm-compressor rounds quotients to BF16 before it rounds them to e4m3, which moves about
# 3 % of its codes by one step.
_SUBNORMAL_STEP = 2.0**-9
_ROUNDED_ONCE = Limit(0.07, _SUBNORMAL_STEP, 0.04)
_ROUNDED_TWICE = Limit(0.14, 2 * _SUBNORMAL_STEP, 0.08)


class ScaleShape(StrEnum):
    """The shape of the scale tensor of a matrix."""

    GRID = "grid"  # [ceil(rows / block_rows), ceil(cols / block_cols)]
    COLUMN = "column"  # [rows, 1]: a grid too, by another name
    VECTOR = "vector"  # [rows]
    SCALAR = "scalar"  # []


@dataclass(frozen=True, slots=True)
class Fp8(Encoding):
    """E4M3 elements with scales: `block_cols` 0 means a whole row, `block_rows` 0 all rows."""

    kind: ClassVar[str] = "fp8"
    codec_path: ClassVar[str] = "lingconv.encodings.codecs.fp8:Fp8Codec"
    gpu_path: ClassVar[str] = "lingconv.encodings.codecs.gpu:Fp8GpuCodec"
    is_quantized: ClassVar[bool] = True
    has_scales: ClassVar[bool] = True
    is_e4m3: ClassVar[bool] = True
    error_unit: ClassVar[ErrorUnit] = ErrorUnit.SCALE
    # Numbers up to half a step above 448 are rounded to it; larger ones are saturated.
    saturation: ClassVar[float] = E4M3_MAX + 16.0
    block_rows: int
    block_cols: int
    scale_suffix: str
    scale_dtype: DType
    scale_shape: ScaleShape = ScaleShape.GRID
    # Whether all scales are powers of two, by the config's label or the E8M0 dtype.
    power_of_two: bool = False

    @property
    def label(self) -> str:
        """The encoding's short name in messages: `fp8-block f32 scales`."""
        block = "channel" if self.block_rows == 1 else "block" if self.block_rows else "tensor"
        power = " ue8m0" if self.power_of_two and self.scale_dtype != DType.F8_E8M0 else ""
        return f"fp8-{block} {self.scale_dtype.lower()}{power} scales"

    @property
    def stored_types(self) -> tuple[StoredType, ...]:
        """E4M3, then the dtype of the scales."""
        return (DType.F8_E4M3, self.scale_dtype)

    @property
    def intended_dtype(self) -> DType:
        """BF16: models were quantized from it, and runtimes compute in it."""
        return DType.BF16

    def works_in_f32(self, sources: Collection[Encoding]) -> bool:
        """Return whether amax has to be computed in float32: a source is quantized or not BF16."""
        return any(source.is_quantized or not source.fits_bf16 for source in sources)

    @property
    def row_multiple(self) -> int:
        """Number of rows that must be encoded together: those of a block."""
        return self.block_rows or 1

    def block(self, rows: int, cols: int) -> tuple[int, int]:
        """Return rows and columns of a block in a matrix of rows x cols."""
        return self.block_rows or max(rows, 1), self.block_cols or max(cols, 1)

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """Return the numbers of blocks in a matrix of rows x cols; edge blocks are smaller."""
        block_rows, block_cols = self.block(rows, cols)
        return -(-rows // block_rows), -(-cols // block_cols)

    def part_rows(self, part: int, first: int, num_rows: int, height: int) -> tuple[int, int]:
        """Return the rows of tensor `part`: the same ones in elements, rows of blocks in scales."""
        if part == 0:
            return first, first + num_rows
        return self.scale_rows(first, num_rows, height)

    @property
    def has_block_scales(self) -> bool:
        """Whether a matrix has more than one scale."""
        return self.block_rows > 0

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether the config or the scales' dtype says so."""
        return self.power_of_two

    def scale_width(self, cols: int) -> int:
        """Return the columns of a block."""
        return self.block_cols or cols

    def blocks(self, height: int, cols: int) -> tuple[int, int]:
        """Return the blocks of the scales if a matrix has several, else the default ones."""
        return self.block(height, cols) if self.has_block_scales else self.figure_block

    def error_limit(self, source: Encoding) -> Limit:
        """Return the limit for rounding to e4m3, once or twice."""
        if self.can_hold(source):
            return EXACT
        return _ROUNDED_TWICE if source.has_scales else _ROUNDED_ONCE

    def scale_rows(self, first: int, num_rows: int, height: int) -> tuple[int, int]:
        """Return the first and the last (excluded) scale row of `num_rows` rows from `first` on.

        Rows and scale rows are counted over a stack of matrices of `height` rows each.
        """
        unit = self.block_rows or height
        per_matrix = -(-height // unit)
        top, bottom = divmod(first, height), divmod(first + num_rows - 1, height)
        return (
            top[0] * per_matrix + top[1] // unit,
            bottom[0] * per_matrix + bottom[1] // unit + 1,
        )

    @staticmethod
    def by_matrix(first: int, num_rows: int, height: int) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of `num_rows` rows from `first` on, cut at matrices of a stack.

        Blocks start again with every matrix of a stack. A part is (its offset in the rows, its
        number of rows, its first row in its matrix).
        """
        done = 0
        while done < num_rows:
            inner = (first + done) % height
            count = min(height - inner, num_rows - done)
            yield done, count, inner
            done += count

    def has_whole_blocks(self, first: int, num_rows: int, height: int) -> bool:
        """Return whether `num_rows` rows from `first` on cut no block of stacked matrices."""
        unit = self.block_rows or height
        ends = first % height, (first + num_rows) % height
        return all(row % unit == 0 for row in ends)

    def scale_tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scale tensor of a matrix of `shape`, or of a stack of them."""
        *stack, rows, cols = shape
        grid = self.grid(rows, cols)
        shapes = {ScaleShape.VECTOR: (grid[0],), ScaleShape.SCALAR: ()}
        return (*stack, *shapes.get(self.scale_shape, grid))

    def row_bytes(self, cols: int) -> int:
        """Return the number of bytes of a row of `cols` elements, without scales."""
        return cols * DType.F8_E4M3.itemsize

    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the physical tensors that store a matrix: elements, then scales."""
        return (
            tensor_spec(name, DType.F8_E4M3, shape),
            tensor_spec(name + self.scale_suffix, self.scale_dtype, self.scale_tensor_shape(shape)),
        )

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors of elements and scales."""
        return (name, name + self.scale_suffix)

    def can_hold(self, other: Encoding) -> bool:
        """Return whether bytes of encoding `other` are valid in this one unchanged.

        Names are not compared: the blocks of the two dialects differ in nothing else.
        """
        return (
            isinstance(other, Fp8)
            and (self.block_rows, self.block_cols) == (other.block_rows, other.block_cols)
            and self.scale_dtype == other.scale_dtype
            and (other.power_of_two or not self.power_of_two)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            "block": [self.block_rows, self.block_cols],
            "scale_suffix": self.scale_suffix,
            "scale_dtype": self.scale_dtype.value,
            "scale_shape": self.scale_shape.value,
            "power_of_two": self.power_of_two,
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""
        return cls(
            block_rows=fields["block"][0],
            block_cols=fields["block"][1],
            scale_suffix=fields["scale_suffix"],
            scale_dtype=DTYPES[fields["scale_dtype"]],
            scale_shape=ScaleShape(fields["scale_shape"]),
            power_of_two=fields["power_of_two"],
        )


def recognise(
    shape: tuple[int, ...],
    scale_name_suffix: str,
    scale_dtype: DType,
    scale_shape: tuple[int, ...],
    block: tuple[int, int],
    *,
    power_of_two: bool,
) -> Fp8 | None:
    """Return the encoding of an FP8 matrix by its scale tensor, or None if none fits.

    The scales of a stack of matrices are stacked along the same axes.
    `block` is the block size that the config states (128 x 128 if it states none).
    """
    rows = shape[-2]
    e8m0 = scale_dtype == DType.F8_E8M0
    candidates = (
        (1, 0, ScaleShape.COLUMN),
        (1, 0, ScaleShape.VECTOR),
        (*block, ScaleShape.GRID),
        (0, 0, ScaleShape.SCALAR),
        (0, 0, ScaleShape.VECTOR),
    )
    # A grid with one scale per row is taken for a column only if the stated block says so.
    for block_rows, block_cols, kind in sorted(candidates, key=lambda item: item[:2] != block):
        found = Fp8(
            block_rows,
            block_cols,
            scale_name_suffix,
            scale_dtype,
            kind,
            power_of_two=power_of_two or e8m0,
        )
        if rows and found.scale_tensor_shape(shape) == scale_shape:
            return found
    return None
