"""`Encoding`: how the numbers of a matrix are stored, as a frozen value that needs no data.

It answers which tensors hold a matrix of a given shape, in which units of rows and columns it can
be worked on, which bytes of another encoding are valid in it, and how far a number may be off that
was rounded to it. Planning and proof ask nothing else. The arithmetic is in its `codec`, which is
imported when it is asked for: planning needs no numpy.
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
    """What a tensor may deviate by.

    An element by `relative` x |element| + `floor` x the encoding's `error_unit`; the whole tensor
    by `rel_error`, the Frobenius norm of the difference over that of the source.
    """

    relative: float
    floor: float
    rel_error: float

    @property
    def exact(self) -> bool:
        """Whether nothing may differ."""
        return self.rel_error == 0.0


EXACT = Limit(0.0, 0.0, 0.0)


class ErrorUnit(StrEnum):
    """What the `floor` of a limit counts in."""

    ONE = "one"  # the numbers themselves
    SCALE = "scale"  # the scale of the element's block
    PEAK = "peak"  # the largest magnitude in the element's block of the source


class Encoding(ABC):
    """Base of the encodings: frozen, hashable, with a JSON form.

    A subclass sets `kind`, its name in JSON, and `codec_path`, where its Codec is (`module:class`);
    `gpu_path` is where its GpuCodec is, or empty.
    """

    __slots__ = ()

    kind: ClassVar[str]
    codec_path: ClassVar[str]
    gpu_path: ClassVar[str] = ""
    # Elements share a scale, so that encoding them once more rounds them once more.
    is_quantized: ClassVar[bool] = False
    # Scales lie in tensors of their own, beside the elements.
    has_scales: ClassVar[bool] = False
    # Numbers are widened to float32 before they are encoded, whatever they were.
    encodes_from_f32: ClassVar[bool] = False
    error_unit: ClassVar[ErrorUnit] = ErrorUnit.ONE
    # A stored magnitude from here on stands for a number that was cut off.
    saturation: ClassVar[float] = math.inf
    # Columns and rows of the blocks that a proof keeps figures for, without blocks of its own.
    figure_block: ClassVar[tuple[int, int]] = (128, 128)

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for people: `bf16`, `q4_k`, `fp8-block f32 scales`."""

    @property
    @abstractmethod
    def stored_types(self) -> tuple[StoredType, ...]:
        """The type of each tensor that holds a matrix: elements first, then scales."""

    @abstractmethod
    def tensors(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Return the tensors that hold a matrix [rows, cols], or a stack [n, rows, cols]."""

    @abstractmethod
    def row_bytes(self, cols: int) -> int:
        """Return the bytes of a row of `cols` elements, scales in other tensors left out."""

    @abstractmethod
    def error_limit(self, source: "Encoding") -> Limit:
        """Return what numbers of `source` may be off by after a right conversion to this one."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""

    @classmethod
    @abstractmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Build from `to_json`'s fields."""

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that hold a matrix."""
        return (name,)

    def can_hold(self, other: "Encoding") -> bool:
        """Return whether bytes of encoding `other` are valid in this one as they are."""
        return self == other

    @property
    def is_decodable(self) -> bool:
        """Whether numbers can be read from it."""
        return True

    @property
    def row_multiple(self) -> int:
        """Rows that must be encoded together."""
        return 1

    @property
    def col_multiple(self) -> int:
        """Elements of a row that cannot be told apart in storage: a row is made of whole units."""
        return 1

    @property
    def element_bytes(self) -> int:
        """Bytes of an element, at least one: what buffers are reckoned with."""
        return 1

    @property
    def intended_dtype(self) -> DType | None:
        """What decoded numbers are meant to be rounded to; None where they are what they are."""
        return None

    @property
    def fits_bf16(self) -> bool:
        """Whether BF16 is what the numbers are, or what they are meant to be."""
        return self.intended_dtype == DType.BF16

    def works_in_f32(self, sources: Collection["Encoding"]) -> bool:
        """Return whether rows of `sources` pass through float32 on their way to this encoding.

        Otherwise BF16 is enough to lose nothing.
        """
        return not all(source.fits_bf16 for source in sources)

    def part_rows(self, part: int, first: int, num_rows: int, height: int) -> tuple[int, int]:
        """Return the first row, and the end, of tensor `part` for rows of the matrix.

        The rows are those of matrices of `height` rows one behind the other.
        """
        return first, first + num_rows

    def has_whole_blocks(self, first: int, num_rows: int, height: int) -> bool:
        """Return whether `num_rows` rows from `first` on cut no block of stacked matrices."""
        return True

    @property
    def has_block_scales(self) -> bool:
        """Whether each block that figures are kept for has a scale of its own."""
        return False

    @property
    def has_power_of_two_scales(self) -> bool:
        """Whether every scale has to be a power of two."""
        return False

    def scale_width(self, cols: int) -> int:
        """Return how many elements of a row share a scale."""
        return cols

    def blocks(self, height: int, cols: int) -> tuple[int, int]:
        """Return rows and columns of the blocks that a proof keeps figures for."""
        return self.figure_block

    @property
    def codec(self) -> "Codec":
        """What reads and writes numbers in this encoding; imports numpy and the kernels."""
        return cast("Codec", _made_for(self, self.codec_path))

    @property
    def gpu(self) -> "GpuCodec | None":
        """The same arithmetic on a GPU; None where there is none. Imports torch and Triton."""
        return cast("GpuCodec", _made_for(self, self.gpu_path)) if self.gpu_path else None


@cache
def _made_for(encoding: Encoding, path: str) -> object:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)(encoding)
