"""Experts in one tensor: by plain torch, and by the real transformers and mlx-lm."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import Concatenate, MergeModulelist
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridExperts

import lingconv
from lingconv import ConvertOptions, Fp8Options, GgufOptions, VerifyOptions
from lingconv.containers.hf import safetensors as container
from lingconv.errors import CheckpointError, UsageError
from tests.conftest import DATA
from tests.support import (
    assert_same_model,
    copy_checkpoint,
    edit_json,
    read_tensors,
    reference_dequantize,
    rewrite,
    same_bits,
)

NAMES = ["dfactory", "transformers", "automodel", "mlx"]
EXPERTS = 8
TRANSFORMERS = {
    "num_local_experts": EXPERTS,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "hidden_act": "silu",
    "_experts_implementation": "eager",
}
MOE_LAYERS = ("model.layers.1.", "model.layers.2.")  # the second one is the MTP layer


def merge(source, target, names="dfactory", **options):
    lingconv.convert(source, target, ConvertOptions(layout="hf-merged", merged=names, **options))
    return read_tensors(target)


def split(source, target, **options):
    lingconv.convert(source, target, ConvertOptions(**options))
    return target


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stacked(tensors, layer, kind):
    """Return the experts of a layer as a list, by their names in Hugging Face's layout."""
    return [tensors[f"{layer}mlp.experts.{e}.{kind}_proj.weight"] for e in range(EXPERTS)]


def by_torch(tensors, names):
    """Return what a tool that holds the whole model in memory would write, dialect by dialect."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in MOE_LAYERS:
        gate, up, down = (stacked(tensors, layer, kind) for kind in ("gate", "up", "down"))
        pairs = [torch.cat(pair) for pair in zip(gate, up, strict=True)]
        place = f"{layer}mlp.experts."
        if names == "dfactory":
            for kind, each in (("gate", gate), ("up", up), ("down", down)):
                found[f"{place}{kind}_proj"] = torch.stack(each)
        elif names == "transformers":
            found[place + "gate_up_proj"] = torch.stack(pairs)
            found[place + "down_proj"] = torch.stack(down)
        elif names == "automodel":
            found[place + "gate_and_up_projs"] = torch.stack([each.T for each in pairs])
            found[place + "down_projs"] = torch.stack([each.T for each in down])
        else:
            for kind, each in (("gate", gate), ("up", up), ("down", down)):
                found[f"{layer}mlp.switch_mlp.{kind}_proj.weight"] = torch.stack(each)
            found[f"{layer}mlp.gate.gate_proj.weight"] = found.pop(f"{layer}mlp.gate.weight")
    return as_automodel(found) if names == "automodel" else found


def as_automodel(tensors):
    """Rename and cut as Automodel's adapter for Ling 2.0 does: 4 heads, 2 of keys, of 64 each."""
    renames = {
        "model.word_embeddings.": "model.embed_tokens.",
        ".attention.dense.": ".self_attn.o_proj.",
        ".attention.query_layernorm.": ".self_attn.q_norm.",
        ".attention.key_layernorm.": ".self_attn.k_norm.",
        ".mlp.gate.expert_bias": ".mlp.gate.e_score_correction_bias",
    }
    found = {}
    for name, tensor in tensors.items():
        if ".query_key_value." in name:
            base = name.removesuffix("attention.query_key_value.weight")
            for kind, part in zip("qkv", tensor.split([256, 128, 128]), strict=True):
                found[f"{base}self_attn.{kind}_proj.weight"] = part
            continue
        for old, new in renames.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


@pytest.mark.parametrize("names", NAMES)
def test_stacked_as_torch_stacks_and_split_again(golden, names, tmp_path):
    found = merge(golden, tmp_path / "merged", names)
    wanted = by_torch(read_tensors(golden), names)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []
    report = lingconv.inspect(tmp_path / "merged")
    assert report.layout == f"hf+{names}"
    assert not report.faults
    assert config_of(tmp_path / "merged") == config_of(golden)
    assert_same_model(golden, split(tmp_path / "merged", tmp_path / "hf"))
    assert config_of(tmp_path / "hf") == config_of(golden)


@pytest.mark.parametrize("names", NAMES)
def test_each_dialect_from_every_other(golden, names, tmp_path):
    wanted = merge(golden, tmp_path / "wanted", names)
    for other in NAMES:
        merge(golden, tmp_path / other, other)
        found = merge(tmp_path / other, tmp_path / f"{other}-{names}", names)
        assert found.keys() == wanted.keys()
        assert all(same_bits(found[name], wanted[name]) for name in wanted)


def test_transformers_own_operations_agree(golden, tmp_path):
    found, tensors = merge(golden, tmp_path / "m", "transformers"), read_tensors(golden)
    for layer in MOE_LAYERS:
        gate, up, down = (stacked(tensors, layer, kind) for kind in ("gate", "up", "down"))
        together = MergeModulelist(dim=0).convert(
            {"gate": gate, "up": up}, ["gate", "up"], ["gate_up"]
        )
        fused = Concatenate(dim=1).convert(together, ["gate", "up"], ["gate_up"])
        assert same_bits(fused["gate_up"], found[f"{layer}mlp.experts.gate_up_proj"])
        (alone,) = MergeModulelist(dim=0).convert({"down": down}, ["down"], ["down"]).values()
        assert same_bits(alone, found[f"{layer}mlp.experts.down_proj"])


def test_transformers_experts_compute_the_same(golden, tmp_path):
    found, tensors = merge(golden, tmp_path / "m", "transformers"), read_tensors(golden)
    config = SimpleNamespace(**TRANSFORMERS)
    module = BailingHybridExperts(config)
    place = "model.layers.1.mlp.experts."
    module.load_state_dict(
        {name: found[place + name].float() for name in ("gate_up_proj", "down_proj")}, strict=True
    )
    tokens = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 7], [3, 1], [2, 6], [5, 4], [7, 0]])
    weights = torch.full((5, 2), 0.5)
    wanted = torch.zeros(5, 256)
    for token in range(5):
        for expert in chosen[token]:
            gate, up, down = (
                stacked(tensors, "model.layers.1.", kind)[expert].float()
                for kind in ("gate", "up", "down")
            )
            hidden = torch.nn.functional.silu(gate @ tokens[token]) * (up @ tokens[token])
            wanted[token] += 0.5 * (down @ hidden)
    with torch.no_grad():
        assert torch.allclose(module(tokens, chosen, weights), wanted, atol=1e-6)


def test_transformers_fp8_experts_take_the_scales(golden, tmp_path):
    found = merge(golden, tmp_path / "m", "transformers", dtype="fp8")
    config = SimpleNamespace(**TRANSFORMERS)
    module = FP8Experts(config, block_size=(128, 128))
    place = "model.layers.1.mlp.experts."
    own = {n.removeprefix(place): t for n, t in found.items() if n.startswith(place)}
    module.load_state_dict(own, strict=True)
    assert own["gate_up_proj_scale_inv"].shape == (EXPERTS, 2, 2)


def test_mlx_lm_loads_and_computes(golden, tmp_path):
    mx = pytest.importorskip("mlx.core", reason="mlx has no wheel for this machine")
    from mlx_lm.utils import load_model

    merge(golden, tmp_path / "m", "mlx", mtp="drop")  # mlx-lm's model has no MTP layers
    mx.set_default_device(mx.cpu)
    model, _ = load_model(tmp_path / "m", strict=True)
    model.set_dtype(mx.float32)
    expected = load_file(DATA / "tiny-ling-v2.expected.safetensors")
    logits = np.array(model(mx.array(expected["input_ids"].numpy())).astype(mx.float32))
    assert np.abs(logits - expected["logits"].numpy()).max() < 1e-4


def fp8_sources(golden_block, golden_channel, golden, tmp_path):
    """Yield FP8 checkpoints in every dialect that is read."""
    yield "compressed-tensors, block", golden_block
    yield "compressed-tensors, channel", golden_channel
    for name, fp8 in {
        "fp8": Fp8Options(),
        "ue8m0": Fp8Options(scale="ue8m0"),
        "e8m0": Fp8Options(scale="ue8m0", scale_dtype="e8m0"),
        "ling": Fp8Options(scale="ling"),
    }.items():
        lingconv.quantize(golden, tmp_path / name, fp8)
        yield name, tmp_path / name
    vector = copy_checkpoint(golden_channel, tmp_path / "vector")
    rewrite(vector, lambda t: t.update({n: v.squeeze(1) for n, v in t.items() if "_scale" in n}))
    yield "a vector of scales", vector


@pytest.mark.parametrize("names", ["dfactory", "transformers", "mlx"])
def test_quantized_checkpoints_merge_without_being_touched(
    golden, golden_block, golden_channel, names, tmp_path
):
    for number, (dialect, source) in enumerate(
        fp8_sources(golden_block, golden_channel, golden, tmp_path)
    ):
        found = merge(source, tmp_path / f"m{number}", names)
        before = read_tensors(source)
        (suffix,) = {n.rsplit("weight")[-1] for n in before if "_scale" in n}
        for layer in MOE_LAYERS:
            place = f"{layer}mlp.experts." if names != "mlx" else f"{layer}mlp.switch_mlp."
            end = "_proj.weight" if names == "mlx" else "_proj"
            for part in ("", suffix):
                kinds = {
                    kind: [
                        before[f"{layer}mlp.experts.{e}.{kind}_proj.weight{part}"]
                        for e in range(EXPERTS)
                    ]
                    for kind in ("gate", "up", "down")
                }
                if names == "transformers":
                    gates, ups = kinds.pop("gate"), kinds.pop("up")
                    kinds["gate_up"] = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
                for kind, each in kinds.items():
                    assert same_bits(torch.stack(each), found[f"{place}{kind}{end}{part}"]), dialect
        assert_same_model(source, split(tmp_path / f"m{number}", tmp_path / f"s{number}"))
        if names != "mlx":  # it has another name for routers, which patterns may not fit
            assert config_of(tmp_path / f"s{number}") == config_of(source)
        assert not lingconv.inspect(tmp_path / f"m{number}").faults
        verdict = lingconv.verify(source, tmp_path / f"m{number}", VerifyOptions(level="tensors"))
        assert verdict.ok, verdict.findings


@pytest.mark.parametrize("scheme", ["block", "channel"])
@pytest.mark.parametrize("names", ["dfactory", "transformers"])
def test_merged_and_quantized_in_one_pass(golden, names, scheme, tmp_path):
    fp8 = Fp8Options(scheme=scheme)
    merge(golden, tmp_path / "one", names, dtype="fp8", fp8=fp8)
    lingconv.quantize(golden, tmp_path / "fp8", fp8)
    merge(tmp_path / "fp8", tmp_path / "two", names)
    assert_same_model(tmp_path / "one", tmp_path / "two")
    before, after = (config_of(tmp_path / name) for name in ("one", "two"))
    assert before == after
    merge(tmp_path / "one", tmp_path / "bf16", names, dtype="bf16")
    lingconv.convert(tmp_path / "fp8", tmp_path / "plain", ConvertOptions(dtype="bf16"))
    assert_same_model(tmp_path / "plain", split(tmp_path / "bf16", tmp_path / "apart"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A model whose expert matrices end within a block: 96 x 200, 200 x 96."""
    config = config_of(DATA / "tiny-ling-v2")
    config |= {"hidden_size": 200, "moe_intermediate_size": 96, "num_experts": 6}
    config |= {"moe_shared_expert_intermediate_size": 96}
    folder = tmp_path_factory.mktemp("odd")
    (folder / "config.json").write_text(json.dumps(config))
    lingconv.synth(folder / "config.json", folder / "bf16", seed=3)
    lingconv.quantize(folder / "bf16", folder / "fp8")
    return folder


def test_blocks_end_with_each_expert(odd, tmp_path):
    found = merge(odd / "fp8", tmp_path / "m")
    before = read_tensors(odd / "fp8")
    place = "model.layers.1.mlp.experts."
    assert found[place + "down_proj_scale_inv"].shape == (6, 2, 1)
    for expert in range(6):
        weight, scales = (found[f"{place}down_proj{end}"][expert] for end in ("", "_scale_inv"))
        own = f"{place}{expert}.down_proj.weight"
        assert torch.equal(
            reference_dequantize(weight, scales),
            reference_dequantize(before[own], before[own + "_scale_inv"]),
        )
    assert_same_model(odd / "fp8", split(tmp_path / "m", tmp_path / "s"))
    # Whoever reads and writes numbers has to begin a new block with each expert too.
    merge(odd / "bf16", tmp_path / "one", dtype="fp8")
    assert_same_model(tmp_path / "one", tmp_path / "m")
    split(tmp_path / "m", tmp_path / "plain", dtype="bf16")
    split(odd / "fp8", tmp_path / "wanted", dtype="bf16")
    assert_same_model(tmp_path / "plain", tmp_path / "wanted")
    for level in ("tensors", "forward"):
        options = VerifyOptions(level=level)
        assert lingconv.verify(odd / "bf16", tmp_path / "one", options).ok
        assert lingconv.verify(odd / "fp8", tmp_path / "m", options).ok


def test_blocks_that_would_straddle_gate_and_up_are_refused(odd, tmp_path):
    with pytest.raises(UsageError, match="do not end where") as caught:
        merge(odd / "fp8", tmp_path / "m", "transformers")
    assert "dfactory" in caught.value.hint
    merge(odd / "fp8", tmp_path / "bf16", "transformers", dtype="bf16")
    channel = Fp8Options(scheme="channel")
    merge(odd / "bf16", tmp_path / "channel", "transformers", dtype="fp8", fp8=channel)
    lingconv.quantize(odd / "bf16", tmp_path / "fp8", channel)
    assert_same_model(tmp_path / "fp8", split(tmp_path / "channel", tmp_path / "s"))


def test_one_scale_for_a_matrix_is_stacked_but_not_fused(golden, tmp_path):
    lingconv.quantize(golden, tmp_path / "fp8")

    def one_scale(tensors):
        for name in [n for n in tensors if n.endswith("_scale_inv")]:
            tensors[name] = tensors[name].flatten()[0].clone()

    rewrite(tmp_path / "fp8", one_scale)
    edit_json(
        tmp_path / "fp8/config.json", lambda c: c["quantization_config"].pop("weight_block_size")
    )
    found = merge(tmp_path / "fp8", tmp_path / "m")
    assert found["model.layers.1.mlp.experts.up_proj_scale_inv"].shape == (EXPERTS,)
    assert_same_model(tmp_path / "fp8", split(tmp_path / "m", tmp_path / "s"))
    with pytest.raises(UsageError, match="do not end where"):
        merge(tmp_path / "fp8", tmp_path / "f", "transformers")


def test_transposed_fp8_is_refused(golden, golden_channel, tmp_path):
    for source, options in ((golden_channel, {}), (golden, {"dtype": "fp8"})):
        with pytest.raises(UsageError, match="transposed"):
            merge(source, tmp_path / "m", "automodel", **options)
    merge(golden_channel, tmp_path / "m", "automodel", dtype="bf16")
    lingconv.convert(golden_channel, tmp_path / "bf16", ConvertOptions(dtype="bf16"))
    assert_same_model(tmp_path / "bf16", split(tmp_path / "m", tmp_path / "s"))


def test_the_list_of_what_is_not_quantized_follows_the_names(golden, tmp_path):
    lingconv.quantize(golden, tmp_path / "fp8", Fp8Options(ignore=("*layers.1.mlp.experts.*",)))
    key = "modules_to_not_convert"
    kept = config_of(tmp_path / "fp8")["quantization_config"][key]
    assert "model.layers.1.mlp.experts.3.up_proj" in kept
    merge(tmp_path / "fp8", tmp_path / "m", "mlx")
    listed = config_of(tmp_path / "m")["quantization_config"][key]
    assert "model.layers.1.mlp.switch_mlp.up_proj" in listed
    assert "model.layers.2.mlp.gate.gate_proj" in listed
    assert not any(".experts." in name for name in listed)
    assert not lingconv.inspect(tmp_path / "m").faults
    split(tmp_path / "m", tmp_path / "s")
    assert config_of(tmp_path / "s") == config_of(tmp_path / "fp8")


def test_checkpoints_of_dfactorys_tool_leave_mtp_layers_apart(golden, tmp_path):
    """Its tool stacks the layers below num_hidden_layers, and passes on all others."""
    half = copy_checkpoint(golden, tmp_path / "half")

    def stack(tensors):
        for kind in ("gate", "up", "down"):
            own = [
                tensors.pop(f"model.layers.1.mlp.experts.{e}.{kind}_proj.weight")
                for e in range(EXPERTS)
            ]
            tensors[f"model.layers.1.mlp.experts.{kind}_proj"] = torch.stack(own)

    rewrite(half, stack)
    report = lingconv.inspect(half)
    assert report.layout == "hf+dfactory+mtp_apart"
    assert not report.faults
    assert_same_model(golden, split(half, tmp_path / "s"))
    merge(golden, tmp_path / "all")
    merge(half, tmp_path / "m")
    assert_same_model(tmp_path / "all", tmp_path / "m")


@pytest.mark.parametrize("names", NAMES)
def test_to_and_from_other_formats(golden, names, tmp_path):
    merged = tmp_path / "merged" / golden.name
    merge(golden, merged, names)
    for layout, options in {
        "gguf": {"gguf": GgufOptions(outtype="q8_0")},
        "megatron": {},
        "megatron-ranks": {},
    }.items():
        request = ConvertOptions(layout=layout, **options)
        targets = [tmp_path / layout / word for word in ("apart", "merged")]
        for source, target in zip((golden, merged), targets, strict=True):
            lingconv.convert(source, target, request)
        left, right = (
            {
                path.relative_to(target): path.read_bytes()
                for path in target.rglob("*")
                if path.suffix in (".gguf", ".distcp", ".pt") or path.name == ".metadata"
            }
            for target in targets
        )
        assert left
        assert left == right
    merge(tmp_path / "megatron/apart", tmp_path / "again", names)
    assert_same_model(merged, tmp_path / "again")


def test_verify_names_the_expert_that_is_in_anothers_place(golden, tmp_path):
    merge(golden, tmp_path / "m", "transformers")

    def swap(tensors):
        name = "model.layers.1.mlp.experts.down_proj"
        tensors[name] = tensors[name][[0, 1, 3, 2, 4, 5, 6, 7]].clone()

    rewrite(tmp_path / "m", swap)
    verdict = lingconv.verify(golden, tmp_path / "m", VerifyOptions(level="tensors"))
    assert not verdict.ok
    assert {finding.tensor for finding in verdict.findings} >= {
        "layers.1.experts.2.down",
        "layers.1.experts.3.down",
    }


class TestBadSources:
    PLACE = "model.layers.1.mlp.experts."

    def refused(self, folder, change, match):
        rewrite(folder, change)
        with pytest.raises(CheckpointError) as caught:
            split(folder, folder.parent / "out")
        assert any(match in detail for detail in caught.value.details), caught.value.details

    @pytest.fixture
    def merged(self, golden, tmp_path):
        lingconv.quantize(golden, tmp_path / "fp8")
        merge(tmp_path / "fp8", tmp_path / "m")
        return tmp_path / "m"

    def test_an_expert_too_few(self, merged):
        name = self.PLACE + "up_proj"
        self.refused(merged, lambda t: t.update({name: t[name][:7].clone()}), "[8, 128, 256]")

    def test_a_stack_that_is_missing(self, merged):
        self.refused(merged, lambda t: t.pop(self.PLACE + "up_proj"), "is missing")

    def test_a_stack_without_its_scales(self, merged):
        self.refused(merged, lambda t: t.pop(self.PLACE + "up_proj_scale_inv"), "without its scale")

    def test_scales_of_another_shape(self, merged):
        name = self.PLACE + "up_proj_scale_inv"
        self.refused(merged, lambda t: t.update({name: t[name][:, :, :1].clone()}), "scale has")

    def test_experts_twice(self, merged):
        name = f"{self.PLACE}3.up_proj.weight"
        zeros = torch.zeros(128, 256, dtype=torch.bfloat16)
        self.refused(merged, lambda t: t.update({name: zeros}), "is no tensor")

    def test_experts_in_several_encodings(self, golden, tmp_path):
        mixed = copy_checkpoint(golden, tmp_path / "mixed")
        name = "model.layers.1.mlp.experts.3.up_proj.weight"
        rewrite(mixed, lambda t: t.update({name: t[name].float()}))
        with pytest.raises(UsageError, match="bf16 and f32"):
            merge(mixed, tmp_path / "out")
        merge(mixed, tmp_path / "bf16", dtype="bf16")
        merge(golden, tmp_path / "wanted")
        assert_same_model(tmp_path / "bf16", tmp_path / "wanted")

    def test_names_that_nobody_knows(self, golden, tmp_path):
        with pytest.raises(UsageError, match="`merged` is") as caught:
            merge(golden, tmp_path / "out", "nemo")
        assert "dfactory, transformers, automodel, mlx" in caught.value.hint
        with pytest.raises(UsageError, match="for stacked experts"):
            lingconv.convert(golden, tmp_path / "out", ConvertOptions(merged="mlx"))


def test_one_expert_at_a_time(tmp_path):
    """Buffers for a layer of Ling-1T: 256 experts of 2048 x 8192, 25.8 GB in BF16."""
    model = lingconv.api.synthetic_model("ling-1t", layers=1, dense_layers=0, mtp=0)
    from lingconv.planner.planner import build_plan
    from lingconv.plans.lowering import peak_memory

    for names in NAMES:
        plan = build_plan(model, ConvertOptions(layout="hf-merged", merged=names))
        largest = max(spec.nbytes for file in plan.files for spec in file.tensors)
        assert largest >= 8 << 30
        _, nbytes = peak_memory(plan, 4, 1 << 30)
        assert nbytes <= 1 << 30
        header = container.build_header(plan.files[0].tensors)
        assert len(header) < 25 << 20


def test_a_dialect_is_data(golden, tmp_path):
    """Another name for stacked experts is a word in a family file."""
    own = (DATA.parents[1] / "formats/ling2.toml").read_text()
    own = own.replace("[merged]\n", '[merged]\nmine = "my own runtime"\n')
    own = own.replace('hf_mlx = "mlp.switch_mlp.', 'hf_mine = "moe.')
    own = own.replace('hf_mlx = "mlp.gate.gate_proj', 'hf_mine = "moe.router').replace(
        'mlx = "stacked under `switch_mlp`: mlx-lm"\n', ""
    )
    path = tmp_path / "mine.toml"
    path.write_text(own)
    options = ConvertOptions(layout="hf-merged", merged="mine")
    lingconv.convert(golden, tmp_path / "m", options, formats=str(path))
    tensors = read_tensors(tmp_path / "m")
    assert tensors["model.layers.1.moe.up_proj.weight"].shape == (8, 128, 256)
    assert "model.layers.1.moe.router.weight" in tensors
    lingconv.convert(tmp_path / "m", tmp_path / "s", formats=str(path))
    assert_same_model(golden, tmp_path / "s")
