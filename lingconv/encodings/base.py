"""`Encoding`: the storage of a matrix's numbers, as a frozen value without data.

It has the tensors of a matrix of a given shape, the block of rows and columns that is encoded
together, the encodings whose bytes it can copy, and the error of a number that is rounded to it:
all that planning and proof need. The arithmetic is in its `codec`, which is imported on first
access: planning does not import numpy.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from enum import StrEnum
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, cast

from lingconv.encodings.dtypes import DType, StoredType
from lingconv.encodings.tensor_spec import TensorSpec

if TYPE_CHECKING:
    from lingconv.encodings.codec import Codec, GpuCodec


class Limit(NamedTuple):
    """The largest error that is allowed in a tensor.

    An element may differ by `relative` x |element| + `floor` x the encoding's `error_unit`; the
    whole tensor by `rel_error`, the Frobenius norm of the difference over that of the source, and
    by what every element may lose however small all are (`lost`): half a step near zero.
    """

    relative: float
    floor: float
    rel_error: float
    lost: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether no difference is allowed."""
        return self.rel_error == 0.0

    def allowed(self, signal: float, elements: int) -> float:
        """Return the largest norm of the difference, for a source whose square sum is `signal`."""
        return math.hypot(self.rel_error * math.sqrt(signal), self.lost * math.sqrt(elements))


EXACT = Limit(0.0, 0.0, 0.0)


class ErrorUnit(StrEnum):
    """The unit of the `floor` of a limit."""

    ONE = "one"  # the numbers themselves
    SCALE = "scale"  # the scale of the element's block
    PEAK = "peak"  # the largest magnitude in the element's block of the source


class Encoding(ABC):
    """Base class of the encodings: frozen, hashable, with a JSON form.

    A subclass sets `kind`, its name in JSON, and `codec_path`, the import path (`module:class`) of
    its Codec; `gpu_path` is that of its GpuCodec, or empty.
    """

    __slots__ = ()

    kind: ClassVar[str]
    codec_path: ClassVar[str]
    gpu_path: ClassVar[str] = ""
    # Whether elements share a scale: encoding them again then rounds them again.
    is_quantized: ClassVar[bool] = False
    # Whether scales are stored in tensors of their own.
    has_scales: ClassVar[bool] = False
    # Whether elements are e4m3 codes, which a proof compares undecoded, and scales amax / 448.
    is_e4m3: ClassVar[bool] = False
    # Whether the largest magnitude of the matrix has to be known before its first row is encoded.
    needs_amax: ClassVar[bool] = False
    # Whether matrices that are stacked in one tensor can be stored.
    holds_stacks: ClassVar[bool] = True
    # Whether NaN and Inf can be stored; else they are refused even if the user allows them.
    holds_nonfinite: ClassVar[bool] = True
    # Whether numbers are always widened to float32 before they are encoded.
    encodes_from_f32: ClassVar[bool] = False
    error_unit: ClassVar[ErrorUnit] = ErrorUnit.ONE
    # Numbers whose magnitude in units of the scale is larger are saturated.
    saturation: ClassVar[float] = math.inf
    # Rows and columns of a proof's figures, for encodings without blocks of their own.
    figure_block: ClassVar[tuple[int, int]] = (128, 128)

    @property
    @abstractmethod
    def label(self) -> str:
        """The encoding's short name in messages: `bf16`, `q4_k`, `fp8-block f32 scales`."""

    @property
    @abstractmethod
    def stored_types(self) -> tuple[StoredType, ...]:
        """The type of each tensor of the encoding: elements first, then scales."""

    @abstractmethod
    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the tensors that store a matrix [rows, cols], or a stack [n, rows, cols]."""

    @abstractmethod
    def row_bytes(self, cols: int) -> int:
        """Return the number of bytes of a row of `cols` elements, without scale tensors."""

    @abstractmethod
    def error_limit(self, source: "Encoding") -> Limit:
        """Return the limit of the error of a right conversion from `source` to this encoding."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""

    @classmethod
    @abstractmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the encoding with `to_json`'s fields."""

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that store a matrix."""
        return (name,)

    def can_hold(self, other: "Encoding") -> bool:
        """Return whether bytes of encoding `other` are valid in this one unchanged."""
        return self == other

    @property
    def is_decodable(self) -> bool:
        """Whether lingconv can decode it to numbers."""
        return True

    @property
    def row_multiple(self) -> int:
        """Number of rows that must be encoded together."""
        return 1

    @property
    def col_multiple(self) -> int:
        """Number of elements in a block within a row; a row consists of whole blocks."""
        return 1

    @property
    def element_bits(self) -> float:
        """Number of bits of an element, without scale tensors."""
        return 8 * self.row_bytes(self.col_multiple) / self.col_multiple

    @property
    def element_bytes(self) -> int:
        """Number of bytes of an element, at least 1, for the size of buffers."""
        return 1

    @property
    def intended_dtype(self) -> DType | None:
        """The dtype to which runtimes round decoded numbers; None if they do not round them."""
        return None

    @property
    def fits_bf16(self) -> bool:
        """Whether decoding to BF16 is right: numbers are BF16, or meant to be rounded to it."""
        return self.intended_dtype == DType.BF16

    def works_in_f32(self, sources: Collection["Encoding"]) -> bool:
        """Return whether rows of `sources` are decoded to float32 before they are encoded in this.

        Otherwise BF16 is enough to lose nothing.
        """
        return not all(source.fits_bf16 for source in sources)

    def part_rows(self, part: int, first: int, num_rows: int, height: int) -> tuple[int, int]:
        """Return the first and the last row (excluded) in tensor `part` of rows of a matrix.

        The rows are counted over a stack of matrices of `height` rows each.
        """
        return first, first + num_rows

    def has_whole_blocks(self, first: int, num_rows: int, height: int) -> bool:
        """Return whether `num_rows` rows from `first` on cut no block of stacked matrices."""
        return True

    @property
    def has_block_scales(self) -> bool:
        """Whether each block of a proof's figures has a scale of its own."""
        return False

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether every scale has to be a power of two."""
        return False

    def scale_width(self, cols: int) -> int:
        """Return the number of elements of a row that share a scale."""
        return cols

    def blocks(self, height: int, cols: int) -> tuple[int, int]:
        """Return rows and columns of the blocks of a proof's figures."""
        return self.figure_block

    @property
    def codec(self) -> "Codec":
        """The Codec of this encoding; imports numpy and the kernels."""
        return cast("Codec", _made_for(self, self.codec_path))

    @property
    def gpu(self) -> "GpuCodec | None":
        """The GpuCodec of this encoding, or None; imports torch and Triton."""
        return cast("GpuCodec", _made_for(self, self.gpu_path)) if self.gpu_path else None


@cache
def _made_for(encoding: Encoding, path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)(encoding)
