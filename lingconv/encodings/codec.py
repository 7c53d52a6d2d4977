"""`Codec`: the arithmetic of an encoding, from stored bytes to numbers and back.

A codec belongs to one encoding. It handles bytes and numbers, neither files nor plans: the caller
passes the rows to read (`StoredRows`) and buffers to fill (`Buffers`).
Numbers are arrays [rows, cols] of BF16 bits (uint16) or float32; the caller chooses by dtype.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lingconv.encodings.scaling import Scaling

Array = np.ndarray[Any, Any]

BF16_BITS = np.dtype(np.uint16)
F32 = np.dtype(np.float32)


class Buffers(Protocol):
    """Reusable memory, one array for each purpose."""

    def take(
        self, purpose: str, shape: tuple[int, ...], dtype: Any, like: int | None = None
    ) -> Array:
        """Return an array for `purpose`; its former content is overwritten.

        With `like`, the array has the offset in its memory page that byte `like` of a file has in
        its disk block.
        """


class StoredRows(Protocol):
    """The rows of one stored matrix, or of a stack of matrices, for a codec to read."""

    @property
    def height(self) -> int:
        """Number of rows of one matrix of the stack."""

    @property
    def cols(self) -> int:
        """Number of elements in a row."""

    @property
    def buffers(self) -> Buffers:
        """The reading thread's buffers."""

    @property
    def rounds_to_odd(self) -> bool:
        """Whether float64 becomes float32 by rounding to odd, because fewer bits are to follow."""

    def read_rows(self, first: int, into: Array) -> None:
        """Fill `into` [rows, cols] with stored elements from row `first` on."""

    def read(self, part: int, offset: int, into: Array) -> None:
        """Fill `into` with the bytes from `offset` on of tensor `part` of the encoding."""


class RowRange(NamedTuple):
    """Rows of a target matrix: `num_rows` from `first` on, of matrices of `height` x `cols`.

    `offset` is that of their elements in the target's file. `amax` is the largest magnitude of the
    matrix and of those that share its scale, if the encoding needs it.
    """

    first: int
    num_rows: int
    height: int
    cols: int
    offset: int
    amax: float = 0.0


class Encoded(NamedTuple):
    """Encoded rows: the array of each tensor of the encoding, and the number of the first bad row.

    A bad row contains NaN, Inf or a number that the encoding cannot represent; -1 means none.
    """

    parts: Sequence[Array]
    bad_row: int = -1


class Codec(Protocol):
    """Decodes and encodes numbers in one encoding; safe to share between threads."""

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` [n, cols] from row `first` on; return whether NaN or Inf was found.

        Decoding that only copies does not look for them, and returns False.
        """

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return `values` [n, cols] encoded, in buffers that are valid until taken again."""

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Return the scales of rows, float32 [block rows, block cols]; AssertionError if none."""


class GpuCodec(Protocol):
    """A codec's kernels for CUDA devices; tensors are torch's, on the current stream.

    `flag` is an int32 [1]: it is set if the CPU has to do the rows again (numbers that are not
    finite, scales out of range).
    """

    def can_decode(self, height: int, cols: int) -> bool:
        """Return whether there is a kernel that decodes rows of such a matrix."""

    def can_encode(self, height: int, cols: int) -> bool:
        """Return whether there is a kernel that encodes such a matrix."""

    def scale_grid(self, place: RowRange) -> tuple[int, int]:
        """Return the shape of the scales of rows; (0, 0) without scales."""

    def decode(
        self,
        stored: Array,
        scales: Array | None,
        place: RowRange,
        values: Any,
        flag: Any,
        take: Any,
    ) -> None:
        """Queue the decoding of stored bytes (uint8) to `values`; `take` returns buffers."""

    def encode(
        self, values: Any, scales: Any, place: RowRange, scaling: Scaling, flag: Any, take: Any
    ) -> Any:
        """Queue the encoding of `values`; fill `scales`; return the tensor of elements."""

    def stored_parts(self, elements: Array, scales: Array) -> list[Array]:
        """Return downloaded elements and scales as each tensor of the encoding stores them."""
