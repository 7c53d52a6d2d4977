"""The GGUF column and the mixes: names, shapes and types as llama.cpp's own tools write them."""

import json
import re

import gguf
import pytest

from lingconv.api import open_model
from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.ggml_ftype import FileType, GgufTensor, ModelSize, choose_types
from lingconv.model.layout import build_layout
from tests.conftest import DATA

EXPECTED = json.loads((DATA / "tiny-ling-v2.gguf-expected.json").read_text())
GOLDEN_SIZE = ModelSize(blocks=3, experts=8, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def tensors(golden):
    """The tensors of the golden model in the GGUF layout."""
    model = open_model(golden)
    layout = build_layout(model.family, model.symbols, "gguf")
    return [GgufTensor(name, tensor.stored_shape) for name, tensor in layout.tensors.items()]


def test_names_and_shapes_equal_the_converter(tensors):
    expected = {name: shape for name, (_, shape, _) in EXPECTED["bf16"]["tensors"].items()}
    assert {tensor.name: list(tensor.shape[::-1]) for tensor in tensors} == expected


def test_experts_are_the_rows_of_a_stack_in_their_order(golden):
    model = open_model(golden)
    stack = build_layout(model.family, model.symbols, "gguf").tensors["blk.1.ffn_down_exps.weight"]
    assert stack.stored_shape == (8, 256, 128)
    assert [rows.logical for rows in stack.rows] == [f"layers.1.experts.{i}.down" for i in range(8)]
    assert [rows.start for rows in stack.rows] == [256 * i for i in range(8)]


@pytest.mark.parametrize("outtype", EXPECTED)
def test_types_equal_llama_quantize(outtype, tensors):
    mix = FileType(outtype.lower())
    expected = {name: kind for name, (kind, _, _) in EXPECTED[outtype]["tensors"].items()}
    assert choose_types(tensors, mix, GOLDEN_SIZE) == expected
    assert mix.file_type == EXPECTED[outtype]["metadata"]["general.file_type"]


def test_overrides_come_first_and_leave_what_stays_plain(tensors):
    overrides = [
        (re.compile("ffn_down_exps"), GgmlType.Q8_0),
        (re.compile("ffn_"), GgmlType.Q6_K),
        (re.compile("attn_norm"), GgmlType.Q4_K),
    ]
    chosen = choose_types(tensors, FileType.Q4_K_M, GOLDEN_SIZE, overrides)
    assert chosen["blk.1.ffn_down_exps.weight"] == GgmlType.Q8_0
    assert chosen["blk.1.ffn_up_exps.weight"] == GgmlType.Q6_K
    assert chosen["blk.1.ffn_down_shexp.weight"] == GgmlType.Q8_0  # rows of 128 elements
    assert chosen["blk.1.attn_norm.weight"] == GgmlType.F32
    assert chosen["blk.1.ffn_gate_inp.weight"] == GgmlType.F32


def test_rows_of_odd_length_fall_back_to_f16():
    chosen = choose_types(
        [GgufTensor("blk.0.ffn_up.weight", (8, 40))], FileType.Q4_K_M, GOLDEN_SIZE
    )
    assert chosen == {"blk.0.ffn_up.weight": GgmlType.F16}


@pytest.mark.parametrize("kind", GgmlType)
def test_sizes_equal_gguf_py(kind):
    number = gguf.GGMLQuantizationType[kind.value]
    assert (number.value, gguf.GGML_QUANT_SIZES[number]) == (kind.id, (kind.elements, kind.nbytes))


@pytest.mark.parametrize("mix", FileType)
def test_file_types_equal_gguf_py(mix):
    by_number = {member.value: member.name for member in gguf.LlamaFileType}
    name = by_number[mix.file_type].removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    assert name == mix.value
