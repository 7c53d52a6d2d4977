"""`Codec`: the arithmetic of an encoding, from stored bytes to numbers and back.

A codec belongs to one encoding. It knows bytes and numbers, and neither files nor plans: whoever
calls hands it the rows to read (`StoredRows`) and buffers to fill (`Buffers`).
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
        """Return an array for `purpose`; what it held before is gone.

        With `like`, the array lies in its memory page as byte `like` of a file in its disk block.
        """


class StoredRows(Protocol):
    """One stored matrix, or a stack of matrices of `height` rows each, as a codec reads it."""

    @property
    def height(self) -> int:
        """Rows of a matrix of the stack."""

    @property
    def cols(self) -> int:
        """Elements in a row."""

    @property
    def buffers(self) -> Buffers:
        """Buffers of the thread that reads."""

    @property
    def rounds_to_odd(self) -> bool:
        """Whether float64 becomes float32 by rounding to odd, because fewer bits are to follow."""

    def read_rows(self, first: int, into: Array) -> None:
        """Fill `into` [rows, cols] with stored elements from row `first` on."""

    def read(self, part: int, offset: int, into: Array) -> None:
        """Fill `into` with bytes of tensor `part` of the encoding, from byte `offset` of it on."""


class RowRange(NamedTuple):
    """Rows of a target matrix: `num_rows` from `first` on, of matrices of `height` x `cols`.

    `offset` is where their elements begin in the target's file.
    """

    first: int
    num_rows: int
    height: int
    cols: int
    offset: int


class Encoded(NamedTuple):
    """Encoded rows: the bytes of each tensor of the encoding, and the first row that is bad.

    A bad row has NaN or Inf in it, or a number that the encoding cannot express; -1 is none.
    """

    parts: Sequence[Array]
    bad_row: int = -1


class Codec(Protocol):
    """Reads and writes numbers in one encoding; safe to share between threads."""

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` [n, cols] from row `first` on; return whether NaN or Inf was met.

        Where decoding does not have to look at the numbers, none is reported.
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
        """Return `values` [n, cols] encoded, in buffers that last until they are taken again."""

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Return the scales of rows as float32 [block rows, block cols]; AssertionError without."""


class GpuCodec(Protocol):
    """A codec's kernels for CUDA devices; tensors are torch's, on the current stream.

    `flag` is an int32 [1]: it is set where the processor has to look again (numbers that are not
    finite, scales beyond measure).
    """

    def can_decode(self, height: int, cols: int) -> bool:
        """Return whether there is a kernel for rows of such a matrix."""

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
        """Queue the decoding of stored bytes (uint8) to `values`; `take` gives buffers."""

    def encode(
        self, values: Any, scales: Any, place: RowRange, scaling: Scaling, flag: Any, take: Any
    ) -> Any:
        """Queue the encoding of `values`; fill `scales`; return the tensor of elements."""

    def stored_parts(self, elements: Array, scales: Array) -> list[Array]:
        """Return what came back from the device, as each tensor of the encoding stores it."""
