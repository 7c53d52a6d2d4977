"""Stored tensors that the config does not call for: left out with a reason, or a way out."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lingconv
from lingconv import CheckpointError, ConvertOptions
from lingconv.containers.source_overrides import SourceOverrides
from tests.support import edit_json, read_tensors, rewrite

ADAPTER = "adapter_model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.word_embeddings.weight"


@pytest.fixture
def source(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "source")
    return tmp_path / "source"


def reasons(plan):
    return {dropped.name: dropped.reason for dropped in plan.dropped}


def refused(source, options=None):
    with pytest.raises(CheckpointError) as caught:
        lingconv.plan(source, options or ConvertOptions(dtype="fp8"))
    return caught.value


def test_a_tied_head_with_the_bytes_of_the_embedding(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    rewrite(source, lambda held: held.update({HEAD: held[EMBEDDING].clone()}))
    assert "the embedding's bytes" in reasons(lingconv.plan(source))[HEAD]
    lingconv.convert(source, tmp_path / "out")
    assert HEAD not in read_tensors(tmp_path / "out")


def test_a_tied_head_that_was_trained(source, tmp_path):
    """Both ways out work, and the first loses nothing."""
    edit_json(source / "config.json", lambda config: config.update(tie_word_embeddings=True))
    error = refused(source)
    assert "where `tie_word_embeddings` is true" in str(error.faults[0])
    keep, leave = error.hint.split(", ")
    assert keep == "`settings=tie_word_embeddings=false` takes it as a part of the model"
    assert leave == "`drop=lm_head.weight` leaves it out"
    given = SourceOverrides(settings={"tie_word_embeddings": False})
    lingconv.convert(source, tmp_path / "kept", given=given)
    assert torch.equal(read_tensors(tmp_path / "kept")[HEAD], read_tensors(source)[HEAD])
    lingconv.convert(source, tmp_path / "left", ConvertOptions(drop=(HEAD,)))
    assert HEAD not in read_tensors(tmp_path / "left")


def test_mtp_layers_whose_key_is_lost(source, tmp_path):
    edit_json(source / "config.json", lambda config: config.pop("num_nextn_predict_layers"))
    error = refused(source)
    assert len(error.faults) == 39
    assert error.hint == "`settings=num_nextn_predict_layers=1` takes it as a part of the model"
    given = SourceOverrides(settings={"num_nextn_predict_layers": 1})
    lingconv.convert(source, tmp_path / "kept", given=given)
    assert read_tensors(tmp_path / "kept").keys() == read_tensors(source).keys()


def test_scales_that_somebody_left_over(source, tmp_path):
    def leave(held):
        for name in [name for name in held if name.endswith("_proj.weight")]:
            held[f"{name}_scale_inv"] = torch.ones(1, 1)

    weights = read_tensors(source)
    rewrite(source, leave)
    error = refused(source)
    assert "scale of a weight that is BF16, not FP8" in str(error.faults[0])
    assert error.hint.endswith("`drop=*_scale_inv`")
    lingconv.convert(source, tmp_path / "out", ConvertOptions(drop=("*_scale_inv",)))
    found = read_tensors(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_calibrated_scales_are_no_weights(method, source, tmp_path):
    """One scale for each matrix, static activations, an FP8 cache: BF16 is code x scale."""
    expected = {}

    def quantize(held):
        for name in [n for n in held if n.endswith(("proj.weight", "dense.weight"))]:
            if "eh_proj" in name:
                continue
            scale = held[name].abs().max().float() / 448
            codes = (held[name].float() / scale).to(torch.float8_e4m3fn)
            expected[name] = (codes.float() * scale).bfloat16()
            held |= {name: codes, f"{name}_scale": scale}
            held[f"{name.removesuffix('weight')}input_scale"] = torch.tensor(0.5)
        held["model.layers.0.attention.k_scale"] = torch.tensor(0.25)
        held["model.layers.0.attention.v_scale"] = torch.tensor(0.25)

    group = {"weights": {"type": "float", "num_bits": 8, "strategy": "tensor"}}
    stated = {
        "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
        "compressed-tensors": {"quant_method": method, "config_groups": {"group_0": group}},
    }[method]
    rewrite(source, quantize)
    edit_json(source / "config.json", lambda c: c.update(quantization_config=stated))
    plan = lingconv.plan(source, ConvertOptions(dtype="bf16"))
    left = reasons(plan)
    assert (
        left["model.layers.0.attention.k_scale"]
        == left["model.layers.0.attention.dense.input_scale"]
    )
    assert "calibrated scale" in left["model.layers.0.attention.v_scale"]
    assert any("runtimes will miss them" in text for text in plan.warnings)
    lingconv.convert(source, tmp_path / "out", ConvertOptions(dtype="bf16"))
    found = read_tensors(tmp_path / "out")
    assert len(expected) == 60
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name].view(torch.int16), values.view(torch.int16))


# Other weights in the folder ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model-fp8.safetensors"])
def test_a_second_copy_of_the_model_is_left_behind_by_name(name, source, tmp_path):
    rewrite(source, lambda held: None)  # one file, no index
    weights = read_tensors(source)
    save_file({key: value.float() for key, value in weights.items()}, source / name)
    plan = lingconv.plan(source)
    assert "no part of the model" in reasons(plan)[name]
    assert any(name in text and "same names" in text for text in plan.warnings)
    lingconv.convert(source, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("has_index", [True, False])
def test_an_adapter_is_left_behind_with_its_config(has_index, source, tmp_path):
    if not has_index:
        rewrite(source, lambda held: None)
    names = read_tensors(source).keys()
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, source / ADAPTER)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    left = reasons(lingconv.plan(source))
    assert left.keys() >= {ADAPTER, "adapter_config.json"}
    lingconv.convert(source, tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == names
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_parts_of_a_model_without_an_index_are_all_read(source, tmp_path):
    """As model.safetensors and an MTP layer that was saved apart."""
    rewrite(source, lambda held: None)
    weights = read_tensors(source)
    apart = {key: value for key, value in weights.items() if ".layers.2." in key}
    rewrite(source, lambda held: [held.pop(key) for key in apart])
    save_file(apart, source / "mtp.safetensors")
    lingconv.convert(source, tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == weights.keys()
