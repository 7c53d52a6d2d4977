"""Conversions, judged by safetensors, torch, compressed-tensors and transformers."""

import fnmatch
import json

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize
from transformers.utils.quantization_config import CompressedTensorsConfig, FineGrainedFP8Config

from lingconv import ConvertOptions, Fp8Options, Resources, convert, inspect, quantize
from tests.support import (
    E4M3,
    copy_checkpoint,
    edit_json,
    read_tensors,
    reference_dequantize,
    reference_quantize,
    rewrite,
    same_bits,
)

QUANTIZED = ("attention.query_key_value", "attention.dense", "_proj.weight")


def is_quantized(name):
    return any(mark in name for mark in QUANTIZED) and "eh_proj" not in name and "scale" not in name


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def run(source, target, **options):
    convert(source, target, ConvertOptions(**options))
    assert not inspect(target).faults
    return read_tensors(target)


def check_fp8(source, found, suffix, block, **reference):
    """Check every tensor against the plain torch definition."""
    before = read_tensors(source)
    assert {n.removesuffix(suffix) for n in found} == set(before)
    for name, weight in before.items():
        if not is_quantized(name):
            assert same_bits(found[name], weight)
            continue
        codes, scales = reference_quantize(weight, *block, **reference)
        assert found[name].dtype == E4M3
        assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(found[name + suffix].float(), scales), name


def test_default_fp8(golden, tmp_path):
    found = run(golden, tmp_path / "out", dtype="fp8")
    check_fp8(golden, found, "_scale_inv", (128, 128))
    assert {t.dtype for n, t in found.items() if n.endswith("_scale_inv")} == {torch.float32}
    stated = config_of(tmp_path / "out")["quantization_config"]
    parsed = FineGrainedFP8Config(**{k: v for k, v in stated.items() if k != "quant_method"})
    assert list(parsed.weight_block_size) == [128, 128]
    assert parsed.activation_scheme == "dynamic"
    assert stated["quant_method"] == "fp8"
    assert "scale_fmt" not in stated
    assert "lm_head" in parsed.modules_to_not_convert
    assert "model.layers.1.mlp.gate" in parsed.modules_to_not_convert


def test_kept_modules_spare_no_quantized_module(golden, tmp_path):
    """transformers matches by substring, vLLM exactly: neither may hit a quantized weight."""
    run(golden, tmp_path / "out", dtype="fp8")
    kept = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    for name in read_tensors(golden):
        if is_quantized(name):
            assert name.removesuffix(".weight") not in kept
            assert not any(f"{module}." in name for module in kept)


@pytest.mark.parametrize("storage", ["f32", "e8m0"])
def test_ue8m0(golden, tmp_path, storage):
    fp8 = Fp8Options(scale="ue8m0", scale_dtype=storage)
    found = run(golden, tmp_path / "out", dtype="fp8", fp8=fp8)
    check_fp8(golden, found, "_scale_inv", (128, 128), ue8m0=True)
    dtypes = {t.dtype for n, t in found.items() if n.endswith("_scale_inv")}
    assert dtypes == {torch.float32 if storage == "f32" else torch.float8_e8m0fnu}
    assert config_of(tmp_path / "out")["quantization_config"]["scale_fmt"] == "ue8m0"


def test_ling_policy(golden, tmp_path):
    found = run(golden, tmp_path / "out", dtype="fp8", fp8=Fp8Options(scale="ling"))
    powers = 0
    for name, weight in read_tensors(golden).items():
        if not is_quantized(name):
            continue
        ue8m0 = name.endswith("attention.dense.weight") or (
            "mlp.experts" in name and "down_proj" not in name
        )
        codes, scales = reference_quantize(weight, min_amax=1e-4, ue8m0=ue8m0)
        assert torch.equal(found[name].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found[name + "_scale_inv"], scales)
        powers += ue8m0
    assert powers == 3 + 2 * 8 * 2
    assert "scale_fmt" not in config_of(tmp_path / "out")["quantization_config"]


def test_scale_rules_apply_to_what_they_name(golden, tmp_path):
    fp8 = Fp8Options(scale_rules=(("re:.*attention", "ue8m0"), ("model.layers.0.*dense", "f32")))
    found = run(golden, tmp_path / "out", dtype="fp8", fp8=fp8)
    for name, scales in found.items():
        if name.endswith("_scale_inv"):
            exact = torch.equal(scales.log2().round().exp2(), scales)
            assert exact == (
                "attention" in name and name != "model.layers.0.attention.dense.weight_scale_inv"
            )


def test_channel_scheme_is_compressed_tensors(golden, golden_channel, tmp_path):
    found = run(golden, tmp_path / "out", dtype="fp8", fp8=Fp8Options(scheme="channel"))
    check_fp8(golden, found, "_scale", (1, 0), bf16_scale=True)
    theirs = read_tensors(golden_channel)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in theirs.items()
    }
    for name, scale in theirs.items():
        if name.endswith("_scale"):
            assert same_bits(found[name], scale)
    check_codes_are_near(found, theirs)
    check_compressed_tensors_config(tmp_path / "out", golden_channel)


def test_block_scheme_in_the_compressed_tensors_dialect(golden, golden_block, tmp_path):
    fp8 = Fp8Options(dialect="compressed-tensors")
    found = run(golden, tmp_path / "out", dtype="fp8", fp8=fp8)
    check_fp8(golden, found, "_scale", (128, 128), bf16_scale=True)
    theirs = read_tensors(golden_block)
    for name, scale in theirs.items():
        if name.endswith("_scale"):
            assert same_bits(found[name], scale)
    check_codes_are_near(found, theirs)
    check_compressed_tensors_config(tmp_path / "out", golden_block)


def check_codes_are_near(found, theirs):
    """llm-compressor rounds quotients to BF16 first: a few of its codes are one step off ours."""
    different = total = 0
    for name, values in theirs.items():
        if values.dtype == E4M3:
            steps = (found[name].view(torch.uint8).int() - values.view(torch.uint8).int()).abs()
            assert steps.max() <= 1
            different += steps.sum().item()
            total += steps.numel()
    assert 0.02 < different / total < 0.04


def check_compressed_tensors_config(ours, theirs):
    """Both libraries parse our config, to the same scheme as llm-compressor's."""
    stated = config_of(ours)["quantization_config"]
    CompressedTensorsConfig(**stated)
    mine = QuantizationConfig.model_validate(stated)
    other = QuantizationConfig.model_validate(config_of(theirs)["quantization_config"])
    (mine_scheme,), (other_scheme,) = mine.config_groups.values(), other.config_groups.values()
    for part in ("weights", "input_activations"):
        left, right = getattr(mine_scheme, part), getattr(other_scheme, part)
        for key in (
            "num_bits",
            "type",
            "strategy",
            "symmetric",
            "dynamic",
            "block_structure",
            "group_size",
        ):
            assert getattr(left, key) == getattr(right, key), (part, key)
    assert mine_scheme.targets == other_scheme.targets
    assert mine.format == other.format
    assert mine.quantization_status == other.quantization_status


@pytest.mark.parametrize("which", ["golden_channel", "golden_block"])
def test_llm_compressors_checkpoints_decode_as_compressed_tensors_decodes_them(
    which, request, tmp_path
):
    source = request.getfixturevalue(which)
    found = run(source, tmp_path / "out", dtype="bf16")
    theirs = read_tensors(source)
    assert set(found) == {n for n in theirs if not n.endswith("_scale")}
    assert "quantization_config" not in config_of(tmp_path / "out")
    stated = QuantizationConfig.model_validate(config_of(source)["quantization_config"])
    (scheme,) = stated.config_groups.values()
    for name, values in found.items():
        scale = theirs.get(name + "_scale")
        if scale is None:
            assert same_bits(values, theirs[name])
            continue
        decoded = dequantize(theirs[name], scale.float(), args=scheme.weights).bfloat16()
        assert same_bits(values, decoded), name


@pytest.mark.parametrize("shape", ["column", "vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channel_scales_of_either_shape_and_dtype(golden_channel, tmp_path, shape, dtype):
    source = copy_checkpoint(golden_channel, tmp_path / "in")

    def change(tensors):
        for name in [n for n in tensors if n.endswith("_scale")]:
            scale = tensors[name].to(dtype)
            tensors[name] = scale[:, 0].contiguous() if shape == "vector" else scale

    rewrite(source, change)
    found = run(source, tmp_path / "out", dtype="bf16")
    for name, values in read_tensors(source).items():
        if values.dtype == E4M3:
            scale = read_tensors(source)[name + "_scale"].reshape(-1, 1)
            assert same_bits(found[name], reference_dequantize(values, scale, 1, 0))
            break


@pytest.mark.parametrize(
    "fp8",
    [
        Fp8Options(),
        Fp8Options(scale="ue8m0", scale_dtype="e8m0"),
        Fp8Options(scale="ling"),
        Fp8Options(scheme="channel"),
        Fp8Options(dialect="compressed-tensors"),
    ],
    ids=lambda fp8: f"{fp8.scheme}-{fp8.scale}-{fp8.resolved_dialect}",
)
def test_bf16_fp8_bf16_fp8_is_a_fixed_point(golden, tmp_path, fp8):
    first = run(golden, tmp_path / "a", dtype="fp8", fp8=fp8)
    run(tmp_path / "a", tmp_path / "b", dtype="bf16")
    second = run(tmp_path / "b", tmp_path / "c", dtype="fp8", fp8=fp8)
    assert first.keys() == second.keys()
    if fp8.scale == "f32":
        assert all(same_bits(first[name], second[name]) for name in first)
    # A power-of-two scale may halve while its codes double; the numbers stay.
    numbers = read_tensors(tmp_path / "b")
    again = run(tmp_path / "c", tmp_path / "d", dtype="bf16")
    assert all(same_bits(numbers[name], again[name]) for name in numbers)


def test_relayout_moves_every_bit(golden, tmp_path):
    found = run(golden, tmp_path / "out", max_shard_bytes=400_000)
    before = read_tensors(golden)
    assert found.keys() == before.keys()
    assert all(same_bits(found[name], before[name]) for name in before)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in before.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in before.values())
    assert sorted(index["weight_map"]) == sorted(before)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f16", torch.float16), ("f32", torch.float32)])
def test_plain_dtypes(golden, golden_block, tmp_path, dtype, torch_dtype):
    found = run(golden, tmp_path / "a", dtype=dtype)
    for name, values in read_tensors(golden).items():
        expected = values if "expert_bias" in name else values.to(torch_dtype)
        assert same_bits(found[name], expected)
    back = run(tmp_path / "a", tmp_path / "b", dtype="bf16")
    for name, values in found.items():
        assert same_bits(back[name], values if "expert_bias" in name else values.bfloat16())
    decoded = run(golden_block, tmp_path / "c", dtype=dtype)
    theirs = read_tensors(golden_block)
    for name, values in decoded.items():
        if name + "_scale" in theirs:
            expected = reference_dequantize(
                theirs[name], theirs[name + "_scale"], dtype=torch.float32
            )
            assert same_bits(values, expected.to(torch_dtype))
    for name in ("f16", "f32"):
        quantize(tmp_path / "a", tmp_path / f"q-{name}")
    wide = read_tensors(tmp_path / "q-f32")
    check_fp8(tmp_path / "a", wide, "_scale_inv", (128, 128))


def test_expert_bias_keeps_the_dtype_that_it_is_found_in(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")

    def change(tensors):
        for name in [n for n in tensors if n.endswith("expert_bias")]:
            tensors[name] = tensors[name].bfloat16()

    rewrite(source, change)
    found = run(source, tmp_path / "out", dtype="f32")
    assert {t.dtype for n, t in found.items() if n.endswith("expert_bias")} == {torch.bfloat16}


def test_shapes_that_128_does_not_divide(golden, tmp_path):
    """hidden 200, experts 72 wide: blocks at both edges."""
    config = config_of(golden)
    config.update(hidden_size=200, moe_intermediate_size=72, moe_shared_expert_intermediate_size=72)
    config.update(intermediate_size=136, head_dim=50)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    from lingconv import synth

    synth(path, tmp_path / "in")
    for number, fp8 in enumerate([Fp8Options(), Fp8Options(scheme="channel")]):
        found = run(tmp_path / "in", tmp_path / f"out{number}", dtype="fp8", fp8=fp8)
        if number == 0:
            check_fp8(tmp_path / "in", found, "_scale_inv", (128, 128))
            name = "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv"
            assert found[name].shape == (1, 2)
        else:
            check_fp8(tmp_path / "in", found, "_scale", (1, 0), bf16_scale=True)
        back = run(tmp_path / f"out{number}", tmp_path / f"back{number}", dtype="bf16")
        assert back.keys() == read_tensors(tmp_path / "in").keys()


def test_ignored_weights_stay_as_they_are(golden, tmp_path):
    patterns = ("model.layers.0.attention.dense", "*.down_proj", "re:.*shared_experts")
    found = run(golden, tmp_path / "out", dtype="fp8", fp8=Fp8Options(ignore=patterns))
    before = read_tensors(golden)
    kept = [
        name
        for name in before
        if name == "model.layers.0.attention.dense.weight"
        or fnmatch.fnmatch(name, "*.down_proj.weight")
        or "shared_experts" in name
    ]
    assert len(kept) > 20
    for name in kept:
        assert same_bits(found[name], before[name])
    stated = config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert {name.removesuffix(".weight") for name in kept} <= set(stated)


def test_mtp_drop_and_only(golden, tmp_path):
    before = read_tensors(golden)
    kept = run(golden, tmp_path / "drop", mtp="drop")
    assert set(kept) == {n for n in before if not n.startswith("model.layers.2.")}
    assert config_of(tmp_path / "drop")["num_nextn_predict_layers"] == 0
    record = json.loads((tmp_path / "drop" / "lingconv.json").read_text())
    assert record["dropped"] == {"left out by `--mtp`": {"count": 39, "bytes": 2431776}}
    only = run(golden, tmp_path / "only", mtp="only", dtype="fp8")
    moved = {n.replace("layers.2.", "layers.0."): t for n, t in before.items() if "layers.2." in n}
    assert {n.removesuffix("_scale_inv") for n in only} == set(moved)
    assert same_bits(only["model.layers.0.eh_proj.weight"], moved["model.layers.0.eh_proj.weight"])
    config = config_of(tmp_path / "only")
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (1, 0)
    listed = config["quantization_config"]["modules_to_not_convert"]
    # By its own name, and by the one that SGLang's BailingMoEModelNextN looks for.
    assert {"model.layers.0.eh_proj", "model.layers.1.eh_proj"} <= {*listed}
    again = run(tmp_path / "only", tmp_path / "again", dtype="bf16")
    assert set(again) == set(moved)


def test_mtp_layers_counted_inside_the_hidden_layers(golden, tmp_path):
    """Ring's modeling file counts them so."""
    source = copy_checkpoint(golden, tmp_path / "in")
    edit_json(source / "config.json", lambda config: config.update(num_hidden_layers=3))
    report = inspect(source)
    assert (report.layers, report.mtp_layers, report.faults) == (2, 1, ())
    dropped = run(source, tmp_path / "out", mtp="drop")
    assert not any("layers.2." in name for name in dropped)
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2


def test_small_files_are_carried_over(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    small = {
        "LICENSE": b"MIT",
        "modeling_bailing_moe_v2.py": b"x = 1\n",
        "chat_template.jinja": b"{}",
    }
    for name, data in small.items():
        (source / name).write_bytes(data)
    (source / "figures").mkdir()
    (source / "figures" / "plot.svg").write_bytes(b"<svg/>")
    (source / "pytorch_model.bin").write_bytes(b"not ours")
    (source / ".gitattributes").write_bytes(b"hidden")
    convert(source, tmp_path / "out", ConvertOptions(dtype="fp8"))
    for name, data in {**small, "figures/plot.svg": b"<svg/>"}.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (golden / name).read_bytes()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    record = json.loads((tmp_path / "out" / "lingconv.json").read_text())
    assert record["dropped"] == {"weights in another format": {"count": 1, "bytes": 8}}
    assert record["options"]["dtype"] == "fp8"
    convert(tmp_path / "out", tmp_path / "again", ConvertOptions(dtype="bf16"))
    chained = json.loads((tmp_path / "again" / "lingconv.json").read_text())
    assert chained["source_record"]["plan_digest"] == record["plan_digest"]


def test_nonfinite_weights_stop_the_run_with_their_name(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"

    def change(tensors):
        tensors[name][17, 3] = float("nan")

    rewrite(source, change)
    from lingconv import CheckpointError

    for number, dtype in enumerate(["fp8", "f32", "f16"]):
        target = tmp_path / f"out{number}"
        with pytest.raises(CheckpointError, match=name) as caught:
            convert(source, target, ConvertOptions(dtype=dtype))
        assert "pass `allow_nonfinite`" in caught.value.hint
        assert not (target / "config.json").exists()
    found = run(source, tmp_path / "ok", dtype="fp8", allow_nonfinite=True)
    assert found[name].float()[17, 3].isnan()
    assert found[name].float().isnan().sum() == 1


def test_a_value_too_large_for_f16_stops_the_run(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")

    def change(tensors):
        tensors["lm_head.weight"][0, 0] = 1e6

    rewrite(source, change)
    from lingconv import CheckpointError

    with pytest.raises(CheckpointError, match="too large"):
        convert(source, tmp_path / "out", ConvertOptions(dtype="f16"))


def test_threads_and_memory_change_no_byte(golden, tmp_path):
    from tests.support import tree_digest

    digests = []
    for jobs, memory in ((1, 1 << 30), (2, 1 << 30), (7, 1 << 30), (2, 24 << 20)):
        target = tmp_path / f"{jobs}-{memory}"
        convert(
            golden,
            target,
            ConvertOptions(dtype="fp8", max_shard_bytes=700_000),
            resources=Resources(jobs=jobs, max_memory_bytes=memory),
        )
        digests.append(tree_digest(target))
    assert all(digest == digests[0] for digest in digests)


def test_numbers_that_tensors_hold_are_what_numpy_reads_too(golden, tmp_path):
    run(golden, tmp_path / "out", dtype="f32")
    from safetensors.numpy import load_file

    values = load_file(tmp_path / "out" / "model.safetensors")
    assert values["lm_head.weight"].dtype == np.float32
