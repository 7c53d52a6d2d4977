"""The codec of ggml's blocks; its kernels equal ggml bit for bit."""

import numpy as np

from lingconv.encodings.codec import F32, Array, Buffers, Encoded, RowRange, StoredRows
from lingconv.encodings.ggml import Ggml
from lingconv.encodings.kernels import ggml_decode, ggml_encode, numeric
from lingconv.encodings.scaling import Scaling

# From 2^17 on, sums of squares in ggml's searches overflow float32, and a block may become zeros.
_SQUARES_OVERFLOW = 17
_ANY_EXPONENT = 128


class GgmlCodec:
    """Codec of one of ggml's quantized types."""

    def __init__(self, encoding: Ggml) -> None:
        self._type = encoding.type

    def decode(self, rows: StoredRows, first: int, values: Array) -> bool:
        """Fill `values` (float32) with the numbers of whole blocks."""
        kind = self._type
        count = values.size // kind.elements
        blocks = rows.buffers.take("read", (count, kind.nbytes), np.uint8)
        rows.read(0, first * values.shape[1] // kind.elements * kind.nbytes, blocks)
        ggml_decode.dequantize(kind, blocks, values.reshape(count, kind.elements))
        return bool(numeric.count_beyond(values.reshape(-1), _ANY_EXPONENT))

    def encode(
        self,
        values: Array,
        place: RowRange,
        scaling: Scaling,
        buffers: Buffers,
        *,
        allow_nonfinite: bool,
    ) -> Encoded:
        """Return the blocks; rows with numbers or F16 scales out of range are bad."""
        wide = _widened(values, buffers)
        bad_row = _first_untamed(wide)
        kind = self._type
        numbers = wide.reshape(-1, kind.elements)
        blocks = buffers.take("write", (len(numbers), kind.nbytes), np.uint8, like=place.offset)
        if bad_row >= 0 and not allow_nonfinite:
            return Encoded([blocks], bad_row)
        ggml_encode.QUANTIZERS[kind](numbers, blocks)
        for at in ggml_encode.SCALES_AT[kind]:
            bad_block = ggml_encode.find_infinite_half(blocks, at)
            if bad_block >= 0:
                return Encoded([blocks], bad_block * kind.elements // place.cols)
        return Encoded([blocks], bad_row)

    def scales(self, rows: StoredRows, first: int, num_rows: int) -> Array:
        """Raise AssertionError: scales are inside the blocks."""
        raise AssertionError(f"{self._type} has no scales in a tensor of their own")


def _widened(values: Array, buffers: Buffers) -> Array:
    if values.dtype == F32:
        return values
    wide = buffers.take("wide", values.shape, np.float32)
    numeric.bf16_to_f32(values.reshape(-1), wide.reshape(-1))
    return wide


def _first_untamed(wide: Array) -> int:
    """Return the first row with a NaN, Inf or a number of at least 2^17, or -1."""
    if not numeric.count_beyond(wide.reshape(-1), _SQUARES_OVERFLOW):
        return -1
    tame = np.abs(wide) < 2.0**_SQUARES_OVERFLOW
    return int((~tame).any(axis=1).argmax())
