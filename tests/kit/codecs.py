"""Encodings under test: a line for each, with an implementation of it that is not ours.

A new encoding is one more `CodecCase` in `CASES`; `tests/test_codecs.py` has the tests.
"""

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch

from lingconv.encodings import Encoding, Fp8, Ggml, Int4, Mxfp4, Nvfp4, ScaleShape
from lingconv.encodings.codec import BF16_BITS, F32
from lingconv.encodings.dtypes import DType, GgmlType
from lingconv.encodings.ggml_ftype import is_written
from lingconv.encodings.plain import PLAIN
from lingconv.encodings.scaling import Rule, Scaling, Search
from tests.kit import four_bits
from tests.support import E4M3, reference_dequantize, reference_quantize

TORCH = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8_E8M0: torch.float8_e8m0fnu,
}
UNSCALED = Scaling(0.0, power_of_two=False)
CT = Scaling(0.0, False, Search.NONE, Rule.BF16_QUOTIENT)  # what llm-compressor does on a CPU
# float32 [rows, cols] -> the bytes of each tensor; those bytes and a shape -> float32 [rows, cols].
Encode = Callable[[np.ndarray], list[np.ndarray]]
Decode = Callable[[list[np.ndarray], tuple[int, int]], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class CodecCase:
    """An encoding, its reference for one matrix, and what to try it with.

    `encode` is None where nothing is written. `values_in` and `values_out` are the dtypes of rows
    that its codec encodes from and decodes to. `shape` is a matrix with blocks at its edges, which
    takes more than one run of rows.
    `keeps` are the dtypes of rows that are stored unseen, so that NaN in them is not reported.
    `scales` gives the scale of each element, as float32 [rows, cols].
    `random_parts` makes valid bytes of each tensor for decoding alone.
    """

    name: str
    encoding: Encoding
    shape: tuple[int, int]
    decode: Decode
    encode: Encode | None
    random_parts: Callable[[np.random.Generator, tuple[int, int]], list[np.ndarray]]
    values_in: tuple[np.dtype, ...] = (F32,)
    values_out: tuple[np.dtype, ...] = (F32,)
    scaling: Scaling = UNSCALED
    keeps: tuple[np.dtype, ...] = ()
    scales: Decode | None = None

    def __str__(self) -> str:
        return self.name


def to_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().copy()


def random_bytes(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.integers(0, 256, count, np.uint8)


# Plain: torch's casts ----------------------------------------------------------------------------


def plain(dtype: DType) -> CodecCase:
    kind = TORCH[dtype]

    def encode(values: np.ndarray) -> list[np.ndarray]:
        return [to_bytes(torch.from_numpy(values).to(kind))]

    def decode(parts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        return torch.from_numpy(parts[0]).view(kind).float().reshape(shape).numpy()

    both = (BF16_BITS, F32) if dtype == DType.BF16 else (F32,)
    return CodecCase(
        name=dtype.lower(),
        encoding=PLAIN[dtype],
        shape=(7, 24),
        decode=decode,
        encode=encode,
        random_parts=lambda rng, shape: [random_bytes(rng, dtype.nbytes_of(shape))],
        values_in=both,
        values_out=both,
        keeps={DType.BF16: (BF16_BITS,), DType.F32: (F32,)}.get(dtype, ()),
    )


# FP8: the definition in plain torch ---------------------------------------------------------------


def fp8(
    name: str,
    block: tuple[int, int],
    scale_dtype: DType,
    kind: ScaleShape = ScaleShape.GRID,
    *,
    suffix: str = "_scale_inv",
    power_of_two: bool = False,
    min_amax: float = 0.0,
    writes: bool = True,
) -> CodecCase:
    encoding = Fp8(*block, suffix, scale_dtype, kind, power_of_two=power_of_two)
    stored = TORCH[scale_dtype]
    ue8m0, bf16 = power_of_two, scale_dtype == DType.BF16

    def encode(values: np.ndarray) -> list[np.ndarray]:
        weight = torch.from_numpy(values)
        codes, scales = reference_quantize(
            weight, *block, min_amax=min_amax, ue8m0=ue8m0, bf16_scale=bf16
        )
        return [to_bytes(codes), to_bytes(scales.to(stored))]

    def grid_of(parts: list[np.ndarray], shape: tuple[int, int]) -> torch.Tensor:
        scales = torch.from_numpy(parts[1]).view(stored).float()
        return scales.reshape(encoding.grid(*shape))

    def decode(parts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        codes = torch.from_numpy(parts[0]).view(E4M3).reshape(shape)
        block_rows = block[0] or shape[0]
        scales = grid_of(parts, shape)
        return reference_dequantize(codes, scales, block_rows, block[1], torch.float32).numpy()

    def scales(parts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        ones = torch.ones(shape).to(E4M3)
        return decode([to_bytes(ones), parts[1]], shape)

    def random_parts(rng: np.random.Generator, shape: tuple[int, int]) -> list[np.ndarray]:
        made = torch.from_numpy(rng.lognormal(-6, 4, encoding.grid(*shape)).astype(np.float32))
        return [random_bytes(rng, shape[0] * shape[1]), to_bytes(made.to(stored))]

    return CodecCase(
        name=name,
        encoding=encoding,
        shape=(300, 160) if block[0] > 1 else (9, 160),
        decode=decode,
        encode=encode if writes else None,
        random_parts=random_parts,
        values_in=(BF16_BITS, F32),
        values_out=(BF16_BITS, F32),
        scaling=Scaling(min_amax, power_of_two=power_of_two),
        scales=scales,
    )


# ggml: gguf-py, and llama.cpp itself where gguf-py only reads -------------------------------------

_GGUF_PY_WRITES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
_FUSES = platform.machine() not in ("x86_64", "AMD64")  # compilers fuse there, which changes bits


@cache
def _llama_cpp() -> ctypes._CFuncPtr:
    """Return the function that llama-quantize calls for every chunk of rows."""
    import xllamacpp

    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return function


def ggml(kind: GgmlType) -> CodecCase:
    theirs = gguf.GGMLQuantizationType(kind.id)
    cols = max(2 * kind.elements, 256)

    def encode(values: np.ndarray) -> list[np.ndarray]:
        if kind in _GGUF_PY_WRITES:
            return [gguf.quants.quantize(values, theirs).reshape(-1)]
        blocks = np.zeros(values.size // kind.elements * kind.nbytes, np.uint8)
        rows = np.ascontiguousarray(values)
        _llama_cpp()(kind.id, rows.ctypes.data, blocks.ctypes.data, 0, *rows.shape, None)
        return [blocks]

    def decode(parts: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(parts[0].reshape(shape[0], -1), theirs).reshape(shape)

    has_reference = kind in _GGUF_PY_WRITES or not _FUSES
    return CodecCase(
        name=kind.lower(),
        encoding=Ggml(kind),
        shape=(5, cols),
        decode=decode,
        encode=encode if is_written(kind) and has_reference else None,
        random_parts=lambda rng, shape: [random_bytes(rng, kind.nbytes_of(shape))],
        values_in=(BF16_BITS, F32),
    )


BLOCK, CHANNEL, TENSOR = (128, 128), (1, 0), (0, 0)

CASES = [
    *map(plain, (DType.BF16, DType.F16, DType.F32)),
    fp8("fp8 block f32", BLOCK, DType.F32),
    fp8("fp8 block f32, amax from 1e-4", BLOCK, DType.F32, min_amax=1e-4),
    fp8("fp8 block f32, powers of two", BLOCK, DType.F32, power_of_two=True),
    fp8("fp8 block e8m0", BLOCK, DType.F8_E8M0, power_of_two=True),
    fp8("fp8 block bf16", BLOCK, DType.BF16, suffix="_scale"),
    fp8("fp8 block f32, compressed-tensors", BLOCK, DType.F32, suffix="_scale"),
    fp8("fp8 channel bf16", CHANNEL, DType.BF16, ScaleShape.COLUMN, suffix="_scale"),
    fp8("fp8 channel f32", CHANNEL, DType.F32, ScaleShape.COLUMN, suffix="_scale"),
    fp8("fp8 channel f32 vector", CHANNEL, DType.F32, ScaleShape.VECTOR, suffix="_scale"),
    fp8("fp8 tensor f32", TENSOR, DType.F32, ScaleShape.SCALAR, suffix="_scale", writes=False),
    fp8("fp8 tensor bf16", TENSOR, DType.BF16, ScaleShape.SCALAR, suffix="_scale", writes=False),
    four_bits.case("nvfp4", Nvfp4(), 0),
    four_bits.case("mxfp4", Mxfp4(), 0),
    four_bits.case("int4", Int4(32), 32, CT),
    four_bits.case("int4", Int4(128), 128, CT),
    *(ggml(kind) for kind in GgmlType if kind.is_quantized and Ggml(kind).is_decodable),
]
WRITTEN = [case for case in CASES if case.encode is not None]
