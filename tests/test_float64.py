"""Weights that a merge left in float64: read, and rounded once, as torch rounds them."""

import gguf
import numpy as np
import pytest
import torch

from lingconv import ConvertOptions, convert, verify
from lingconv.plans.options import GgufOptions
from tests.support import copy_checkpoint, read_tensors, rewrite, same_bits

WEIGHT = "model.layers.0.mlp.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.expert_bias"


def between(dtype, count):
    """Return numbers a hair beside the middle of two neighbours: two roundings go astray."""
    low = torch.linspace(0.5, 2, count).to(dtype)
    high = (low.view(torch.int16) + 1).view(dtype)
    middle = (low.double() + high.double()) / 2
    hair = middle * 2.0**-40
    return torch.cat([middle - hair, middle, middle + hair, -middle + hair])


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def source(request, golden, tmp_path):
    def change(tensors):
        for name in (WEIGHT, BIAS):
            tensors[name] = tensors[name].double()
        hard = between(request.param, 64)
        tensors[WEIGHT].view(-1)[: len(hard)] = hard
        tensors[BIAS][0] = 1 / 3

    folder = copy_checkpoint(golden, tmp_path / "in")
    rewrite(folder, change)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)]
)
def test_rounded_once(source, tmp_path, name, dtype):
    before = read_tensors(source)
    convert(source, tmp_path / "out", ConvertOptions(dtype=name))
    after = read_tensors(tmp_path / "out")
    exact = before[WEIGHT].numpy()
    if dtype == torch.bfloat16:  # torch rounds twice: float64 -> float32 -> bfloat16
        right = torch.from_numpy(nearest_bf16(exact)).view(torch.bfloat16)
    else:
        right = torch.from_numpy(exact.astype({"f16": np.float16, "f32": np.float32}[name]))
    assert same_bits(after[WEIGHT], right)
    assert same_bits(after[BIAS], before[BIAS])  # a bias is never rounded
    assert verify(source, tmp_path / "out").ok


def nearest_bf16(values):
    """Return BF16 bits by comparing with both neighbours, ties to even: no rounding in between."""
    low = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    best = low
    for step in (-1, 1):
        other = (low.astype(np.int32) + step).astype(np.uint16)
        gap = np.abs(wide(other) - values) - np.abs(wide(best) - values)
        best = np.where((gap < 0) | ((gap == 0) & (other % 2 == 0)), other, best)
    return best.view(np.int16)


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def test_a_bias_becomes_float32_in_gguf(source, tmp_path):
    options = ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="bf16"))
    convert(source, tmp_path / "x.gguf", options)
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}[
        "blk.1.exp_probs_b.bias"
    ]
    assert np.array_equal(found.data, read_tensors(source)[BIAS].numpy().astype(np.float32))
