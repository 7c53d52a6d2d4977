"""Config keys that change what is computed: understood, written, or refused by name.

The numbers are those of transformers' own functions, and of llama.cpp's formulas.
"""

import json
import math
import shutil

import gguf
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import lingconv
from lingconv import CheckpointError, ConvertOptions, GgufOptions
from lingconv.api import open_model
from lingconv.verification.reference.ling2 import rope
from tests.support import edit_json

GGUF = ConvertOptions(layout="gguf", gguf=GgufOptions("bf16"))
MEGATRON = ConvertOptions(layout="megatron")
LING = "bailingmoe2"
HEAD_DIM, CONTEXT, ORIGINAL = 64, 4096, 1024


@pytest.fixture
def source(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "source")
    return tmp_path / "source"


def configured(source, **keys):
    edit_json(source / "config.json", lambda config: config.update(keys))
    return source


def key_values(source, tmp_path):
    lingconv.convert(source, tmp_path / "x.gguf", GGUF)
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    return {name.removeprefix(f"{LING}."): field.contents() for name, field in fields.items()}


# Partial rotation ---------------------------------------------------------------------------------

SPELLINGS = {
    "factor": {"partial_rotary_factor": 0.5},
    "dimension": {"rotary_dim": 32},
    "transformers 5": {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 600000}},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_half_of_the_dimensions_are_rotated(name, source, tmp_path):
    edit_json(source / "config.json", lambda config: config.pop("partial_rotary_factor"))
    configured(source, **SPELLINGS[name])
    assert open_model(source).symbols["rotary_dim"] == HEAD_DIM // 2
    assert key_values(source, tmp_path)["rope.dimension_count"] == HEAD_DIM // 2
    assert lingconv.plan(source, MEGATRON).args["rotary_percent"] == 0.5
    assert not lingconv.inspect(source).faults


def test_a_config_that_does_not_say_how_many_is_told_of(source):
    edit_json(source / "config.json", lambda config: config.pop("partial_rotary_factor"))
    (fault,) = lingconv.inspect(source).faults
    assert "`rope_parameters.partial_rotary_factor`: 64 is taken" in fault.message
    assert not fault.fatal


# Scaled RoPE --------------------------------------------------------------------------------------

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SCALED = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn, attention factor": YARN | {"attention_factor": 1.25},
    "yarn, betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, two mscales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, one mscale": YARN | {"mscale": 0.7},
}


def of_transformers(scaling):
    """Return the frequencies and the factor on cos and sin, by transformers' own functions."""
    parameters = {"rope_theta": 600000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}
    parameters |= scaling or {}
    parameters["rope_type"] = parameters.pop("type", "default")
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT, rope_parameters=parameters,
    )  # fmt: skip
    kind = parameters["rope_type"]
    if kind == "default":
        places = torch.arange(0, HEAD_DIM // 2, 2, dtype=torch.float32)
        return 1 / 600000.0 ** (places / (HEAD_DIM // 2)), 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize("name", SCALED)
def test_the_rotations_are_those_of_transformers(name, source):
    configured(source, rope_scaling=SCALED[name])
    frequencies, factor = of_transformers(SCALED[name])
    found = rope(3, open_model(source).symbols, torch.float32, "cpu")
    half = frequencies.numel()
    for position in range(3):
        angles = position * frequencies
        torch.testing.assert_close(found.cos_SR[position, :half], angles.cos() * factor)
        torch.testing.assert_close(found.sin_SR[position, :half], angles.sin() * factor)


@pytest.mark.parametrize("name", SCALED)
def test_gguf_has_what_llama_cpp_reads(name, source, tmp_path):
    """llama.cpp multiplies cos and sin by attn_factor x (1 + 0.1 ln factor), if it is YaRN."""
    configured(source, rope_scaling=SCALED[name])
    found = key_values(source, tmp_path)
    scaling = SCALED[name] or {}
    assert found.get("rope.scaling.type") == scaling.get("type")
    assert found.get("rope.scaling.factor") == scaling.get("factor")
    if scaling.get("type") == "yarn":
        assert found["rope.scaling.original_context_length"] == ORIGINAL
        _, factor = of_transformers(scaling)
        theirs = found.get("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(4.0))
        assert theirs == pytest.approx(factor, rel=1e-6)
    warnings = [
        text for text in lingconv.plan(source, GGUF).warnings if "llama.cpp computes" in text
    ]
    assert len(warnings) == (2 if "beta_fast" in scaling else 0)


@pytest.mark.parametrize("kind", ["llama3", "dynamic", "longrope", "su", "YARN", "new"])
def test_other_scalings_are_refused_by_name(kind, source, tmp_path):
    configured(source, rope_scaling={"type": kind, "factor": 4.0})
    for options in (GGUF, MEGATRON):
        with pytest.raises(CheckpointError, match=rf"`rope_scaling` is '{kind}'") as caught:
            lingconv.plan(source, options)
        assert "`settings=rope_scaling=null`" in caught.value.hint
    with pytest.raises(CheckpointError, match="is not computed here"):
        lingconv.forward(source, tokens="1,2,3")
    lingconv.convert(source, tmp_path / "copy")  # its config is carried as it is
    assert json.loads((tmp_path / "copy/config.json").read_text())["rope_scaling"]["type"] == kind


def test_megatron_divides_positions_and_has_no_yarn(source, tmp_path):
    configured(source, rope_scaling=SCALED["linear"])
    plan = lingconv.plan(source, MEGATRON)
    assert plan.args["rotary_seq_len_interpolation_factor"] == 4
    lingconv.convert(source, tmp_path / "there", MEGATRON)
    symbols = open_model(tmp_path / "there").symbols
    assert (symbols["rope_scaling"], symbols["rope_factor"]) == ("linear", 4)
    configured(source, rope_scaling=YARN)
    with pytest.raises(CheckpointError, match="Megatron has only linear"):
        lingconv.plan(source, MEGATRON)


# All other keys -----------------------------------------------------------------------------------

# Keys of transformers 5's configs that change the output of a model, and a value that does.
OTHERS = {
    "hidden_act": "gelu",
    "use_rmsnorm": False,
    "norm_head": True,
    "norm_softmax": True,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_bias": True,
    "mlp_bias": True,
    "rope_interleave": True,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "moe_layer_freq": 2,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "attention_multiplier": 0.0078125,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_mathematics_is_copied_and_never_converted_or_run(key, source, tmp_path):
    configured(source, **{key: OTHERS[key]})
    (fault,) = lingconv.inspect(source).faults
    assert fault.message.startswith(f"`{key}` is ")
    for options in (GGUF, MEGATRON, ConvertOptions(layout="megatron-ranks")):
        with pytest.raises(CheckpointError, match="has no key for") as caught:
            lingconv.plan(source, options)
        assert f"`{key}` is " in str(caught.value.faults[0])
    with pytest.raises(CheckpointError, match="is not computed here"):
        lingconv.forward(source, tokens="1,2,3")
    plan = lingconv.plan(source)
    assert plan.config[key] == OTHERS[key]
    assert any(f"`{key}`" in text for text in plan.warnings)


@pytest.mark.parametrize("key", OTHERS)
def test_what_means_the_usual_is_no_fault(key, source):
    configured(source, **{key: None})
    assert lingconv.inspect(source).faults == ()
