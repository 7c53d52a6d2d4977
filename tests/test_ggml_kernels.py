"""ggml's blocks: the bytes that llama.cpp itself writes, and what gguf-py reads from ours."""

import ctypes
import hashlib
import json
import platform
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lingconv.encodings.kernels import ggml_encode as ggml
from tests.conftest import DATA

KERNELS = {
    "Q4_0": ggml.quantize_q4_0,
    "Q4_1": ggml.quantize_q4_1,
    "Q5_0": ggml.quantize_q5_0,
    "Q5_1": ggml.quantize_q5_1,
    "Q8_0": ggml.quantize_q8_0,
    "Q2_K": ggml.quantize_q2_k,
    "Q3_K": ggml.quantize_q3_k,
    "Q4_K": ggml.quantize_q4_k,
    "Q5_K": ggml.quantize_q5_k,
    "Q6_K": ggml.quantize_q6_k,
    "IQ4_NL": ggml.quantize_iq4_nl,
    "IQ4_XS": ggml.quantize_iq4_xs,
    "MXFP4": ggml.quantize_mxfp4,
    "TQ1_0": ggml.quantize_tq1_0,
    "TQ2_0": ggml.quantize_tq2_0,
}
EXPECTED = json.loads((DATA / "tiny-ling-v2.gguf-expected.json").read_text())
# The tensors of the golden model that llama-quantize quantizes, by their names in both layouts.
ATTENTION = {"attn_qkv": "attention.query_key_value", "attn_output": "attention.dense"}
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def quantize(name, values):
    """Run a kernel over float32 rows; return the blocks as bytes."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, elements)
    out = np.full((len(blocks), nbytes), 0xAA, np.uint8)
    KERNELS[name](blocks, out)
    return out


def dequantize(name, blocks):
    return gguf.dequantize(blocks, GGMLQuantizationType[name])


def hf_names(name):
    """Return the Hugging Face tensors that a GGUF tensor of the golden model stacks."""
    plain = {"token_embd": "model.word_embeddings", "output": "lm_head"}
    parts = name.removesuffix(".weight").split(".")
    if parts[0] in plain:
        return [f"{plain[parts[0]]}.weight"]
    layer, what = f"model.layers.{parts[1]}", parts[-1]
    if what == "eh_proj":
        return [f"{layer}.eh_proj.weight"]
    if what in ATTENTION:
        return [f"{layer}.{ATTENTION[what]}.weight"]
    _, projection, *kind = what.split("_")
    module = PROJECTIONS[projection]
    if kind == ["exps"]:
        return [f"{layer}.mlp.experts.{expert}.{module}.weight" for expert in range(8)]
    return [f"{layer}.mlp.{'shared_experts.' if kind else ''}{module}.weight"]


@pytest.fixture(scope="module")
def weights(golden):
    found = {}
    for shard in golden.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("outtype", [name for name in EXPECTED if name != "bf16"])
def test_bytes_equal_llama_quantize(outtype, weights):
    compared = 0
    for name, (kind, shape, digest) in EXPECTED[outtype]["tensors"].items():
        if kind in KERNELS:
            values = torch.cat([weights[part] for part in hf_names(name)])
            assert values.numel() == np.prod(shape)
            blocks = quantize(kind, values.numpy())
            assert hashlib.sha256(blocks.tobytes()).hexdigest() == digest, name
            compared += 1
    assert compared == 24


def rows(seed, kind, blocks):
    """Return rows that meet the corners of the searches."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((blocks, 256)).astype(np.float32)
    makers = {
        "normal": lambda: values,
        "heavy": lambda: values**5,
        "positive": lambda: abs(values),
        "sparse": lambda: values * (generator.random(values.shape) < 0.05),
        "spread": lambda: (
            values * np.exp(generator.standard_normal((blocks, 16)) * 8).repeat(16, 1)
        ),
        "faint": lambda: values * 10.0 ** generator.integers(-18, -6, (blocks, 16)).repeat(16, 1),
        "levels": lambda: generator.integers(-3, 4, values.shape).astype(np.float32),
        "zero": lambda: np.zeros_like(values),
        "zeros of both signs": lambda: abs(values) * (values > 1) * np.sign(values[:, ::-1]),
    }
    return np.ascontiguousarray(makers[kind](), np.float32)


CORNERS = (
    *("normal", "heavy", "positive", "sparse", "spread", "faint", "levels", "zero"),
    "zeros of both signs",
)


@pytest.fixture(scope="module")
def llama_cpp():
    """llama.cpp itself: the function that llama-quantize calls for every chunk of rows."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("compilers fuse multiplications and additions elsewhere, which changes bits")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return function


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), corner=st.sampled_from(CORNERS))
def test_bytes_equal_llama_cpp(llama_cpp, name, seed, corner):
    values = rows(seed, corner, 130)
    got = quantize(name, values)
    want = np.zeros_like(got)
    kind = GGMLQuantizationType[name].value
    llama_cpp(kind, values.ctypes.data, want.ctypes.data, 0, *values.shape, None)
    np.testing.assert_array_equal(got, want)


# Relative error that each type may have on Gaussian weights, about a fifth above what it has.
BOUNDS = {
    "Q2_K": 0.35,
    "Q3_K": 0.18,
    "Q4_K": 0.09,
    "Q5_K": 0.045,
    "Q6_K": 0.024,
    "IQ4_NL": 0.10,
    "IQ4_XS": 0.10,
    "MXFP4": 0.16,
}


@pytest.mark.parametrize("name", BOUNDS)
def test_gguf_py_reads_what_was_meant(name):
    values = rows(1, "normal", 64)
    read = dequantize(name, quantize(name, values)).reshape(values.shape)
    assert np.linalg.norm(read - values) / np.linalg.norm(values) < BOUNDS[name]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("blocks", [1, 3, 65])
def test_blocks_do_not_know_each_other(name, blocks):
    """Whatever shares its lanes, a block becomes the same bytes; the last lanes may be empty."""
    values = np.concatenate([rows(seed, kind, blocks) for seed, kind in enumerate(CORNERS)])
    together = quantize(name, values)
    step = len(together) // len(values)
    for i in range(0, len(values), 7):
        alone = quantize(name, values[i : i + 1])
        np.testing.assert_array_equal(alone, together[i * step : (i + 1) * step])


def test_f16_equals_numpy():
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(bits.view(np.float16))]
    exact = finite.view(np.float16).astype(np.float32)
    assert [int(ggml.half_bits(value)) for value in exact] == finite.tolist()
    assert [float(ggml.half_value(code)) for code in finite] == exact.tolist()
    between = np.concatenate([(exact[1:] + exact[:-1]) / 2, np.float32([65519, 65520, 7e4, 1e-9])])
    with np.errstate(over="ignore"):
        want = between.astype(np.float16).view(np.uint16)
    assert [int(ggml.half_bits(value)) for value in between] == want.tolist()
