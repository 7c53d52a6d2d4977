"""Codecs on a CUDA device: the kernels of `kernels/fp8_triton.py`, queued on the current stream."""

from collections.abc import Callable

import torch

from lingconv.encodings.codec import Array, RowRange
from lingconv.encodings.codecs.fp8 import encode_scales, scale_grid, scale_rounding
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import Fp8
from lingconv.encodings.kernels import fp8_triton as cuda
from lingconv.encodings.plain import Plain
from lingconv.encodings.scaling import Scaling

Tensor = torch.Tensor
# Returns a tensor on the device for a purpose; its former content is overwritten.
Take = Callable[[str, tuple[int, ...], torch.dtype], Tensor]

TORCH_DTYPES = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def upload(raw: Array, tensor: Tensor) -> None:
    """Queue a copy of stored bytes to the device."""
    tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(raw), non_blocking=True)


class PlainGpuCodec:
    """GPU codec of BF16, F16 and F32."""

    def __init__(self, encoding: Plain) -> None:
        self._dtype = TORCH_DTYPES.get(encoding.dtype)

    def can_decode(self, height: int, cols: int) -> bool:
        """Return whether the dtype is a float."""
        return self._dtype is not None

    def can_encode(self, height: int, cols: int) -> bool:
        """Return whether the dtype is a float."""
        return self._dtype is not None

    def scale_grid(self, place: RowRange) -> tuple[int, int]:
        """Return (0, 0): there are no scales."""
        return 0, 0

    def decode(
        self,
        stored: Array,
        scales: Array | None,
        place: RowRange,
        values: Tensor,
        flag: Tensor,
        take: Take,
    ) -> None:
        """Queue the upload of stored numbers, and their conversion if dtypes differ."""
        if self._dtype == values.dtype:
            upload(stored, values)
            return
        wide = take("stored", values.shape, self._float)
        upload(stored, wide)
        cuda.convert(wide, values, flag)

    def encode(
        self,
        values: Tensor,
        scales: Tensor,
        place: RowRange,
        scaling: Scaling,
        flag: Tensor,
        take: Take,
    ) -> Tensor:
        """Return the values themselves, or a tensor of them rounded."""
        if values.dtype == self._dtype:
            return values
        rounded = take("encoded", values.shape, self._float)
        cuda.convert(values, rounded, flag)
        return rounded

    def stored_parts(self, elements: Array, scales: Array) -> list[Array]:
        """Return the elements."""
        return [elements]

    @property
    def _float(self) -> torch.dtype:
        if self._dtype is None:
            raise AssertionError("only floats are converted")
        return self._dtype


class Fp8GpuCodec:
    """GPU codec of e4m3 with scales in a tensor of their own."""

    def __init__(self, encoding: Fp8) -> None:
        self._encoding = encoding

    def can_decode(self, height: int, cols: int) -> bool:
        """Return whether blocks are wide enough for the kernel."""
        return cuda.can_dequantize(self._encoding.block(height, cols)[1], cols)

    def can_encode(self, height: int, cols: int) -> bool:
        """Return whether a block fits a program of the kernel."""
        return cuda.can_quantize(*self._encoding.block(height, cols))

    def scale_grid(self, place: RowRange) -> tuple[int, int]:
        """Return the numbers of blocks of rows: down and across."""
        return scale_grid(self._encoding, place)

    def decode(
        self,
        stored: Array,
        scales: Array | None,
        place: RowRange,
        values: Tensor,
        flag: Tensor,
        take: Take,
    ) -> None:
        """Queue the decoding to code x scale, matrix by matrix of a stack."""
        if scales is None:
            raise AssertionError("FP8 has scales")
        encoding = self._encoding
        codes = take("stored", values.shape, torch.uint8)
        upload(stored, codes)
        factors = take("scales in", scales.shape, torch.float32)
        factors.copy_(torch.from_numpy(scales), non_blocking=True)
        block = encoding.block(place.height, place.cols)
        above = encoding.scale_rows(place.first, 1, place.height)[0]
        for done, count, inner in encoding.by_matrix(place.first, place.num_rows, place.height):
            part = slice(done, done + count)
            top = encoding.scale_rows(place.first + done, count, place.height)[0] - above
            first = inner % block[0]
            cuda.dequantize(codes[part], factors[top:], values[part], flag, block, first)

    def encode(
        self,
        values: Tensor,
        scales: Tensor,
        place: RowRange,
        scaling: Scaling,
        flag: Tensor,
        take: Take,
    ) -> Tensor:
        """Queue the quantization of rows, which fills `scales`; return the codes."""
        codes = take("encoded", values.shape, torch.uint8)
        block = self._encoding.block(place.height, place.cols)
        rounding = scale_rounding(self._encoding, scaling)
        cuda.quantize(values, codes, scales, flag, block, scaling.min_amax, rounding)
        return codes

    def stored_parts(self, elements: Array, scales: Array) -> list[Array]:
        """Return the codes, and the scales in their stored dtype."""
        return [elements, encode_scales(scales, self._encoding.scale_dtype)]
