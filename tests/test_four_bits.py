"""Four bits: the bytes of other people's tools, numbers that their readers get, and whole runs."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

import lingconv
from lingconv import (
    CheckpointError,
    ConvertOptions,
    FourBitOptions,
    Fp8Options,
    GgufOptions,
    UsageError,
)
from lingconv.api import open_model
from lingconv.encodings import Nvfp4
from lingconv.encodings.codec import RowRange
from lingconv.encodings.four_bits import Dialect
from lingconv.encodings.scaling import Scaling, Search
from lingconv.execution.engine import execute
from lingconv.planner.planner import build_plan
from tests.kit.four_bits import decompress
from tests.support import edit_json
from tests.test_codecs import Fresh, as_bytes

DATA = Path(__file__).parent / "data/low-bit"
HASHES = json.loads((DATA / "hashes.json").read_text())
EXPERT = "model.layers.1.mlp.experts.0"


@pytest.fixture(scope="module")
def model(golden):
    return open_model(golden)


def to(dtype, **options):
    return ConvertOptions(dtype=dtype, four_bits=FourBitOptions(**options))


def tensors_of(folder):
    """Return all tensors of a folder, by the safetensors package."""
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


def stated(folder):
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def hashed(tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [list(tensor.shape), hashlib.sha256(data).hexdigest()[:16]]


def assert_bytes_of(tool, folder):
    expected = {name: entry[1:] for name, entry in HASHES[tool]["tensors"].items()}
    assert {name: hashed(tensor) for name, tensor in tensors_of(folder).items()} == expected


# Bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("mxfp4a16-experts", to("mxfp4")),
        ("w4a16-g32-experts", to("int4", rule="ct")),
    ],
)
def test_bytes_of_llm_compressor(tool, options, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", options)
    assert_bytes_of(tool, tmp_path / "out")


def test_nvfp4_has_the_bytes_of_llm_compressor_where_nothing_is_shared(golden, model, tmp_path):
    """model_free_ptq gives gate and up of an expert a divisor each; without peers, so do we."""
    plan = build_plan(model, to("nvfp4"))
    alone = [
        file._replace(transfers=tuple(each._replace(peers=()) for each in file.transfers))
        for file in plan.files
    ]
    storages = [model.checkpoint.storage]
    execute(replace(plan, files=tuple(alone)), storages, tmp_path / "alone")
    assert_bytes_of("nvfp4a16-experts", tmp_path / "alone")
    found = lingconv.verify(golden, tmp_path / "alone").findings
    apart = [finding for finding in found if "runtimes keep one" in finding.message]
    assert len(apart) == len(found) == 16  # the experts of two layers
    assert apart[0].tensor == "layers.1.experts.0.gate"


def test_gate_and_up_share_the_divisor_of_the_larger(golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("nvfp4"))
    source, found = tensors_of(golden), tensors_of(tmp_path / "out")
    for number in range(8):
        name = f"model.layers.1.mlp.experts.{number}."
        gate, up = (found[f"{name}{each}_proj.weight_global_scale"] for each in ("gate", "up"))
        assert torch.equal(gate, up)
        largest = max(source[f"{name}{each}_proj.weight"].abs().max() for each in ("gate", "up"))
        expected = (torch.tensor(1.0).bfloat16() / largest * 2688).float()
        assert torch.equal(gate, expected.reshape(1))
        down = found[f"{name}down_proj.weight_global_scale"]
        largest = source[f"{name}down_proj.weight"].abs().max()
        assert torch.equal(down, (1 / largest * 2688).float().reshape(1))


def encoded(values, encoding, search=Search.NONE):
    numbers = (values.astype(np.uint32) << 16).view(np.float32)
    place = RowRange(0, *[len(values)] * 2, values.shape[1], 0, float(np.abs(numbers).max()))
    scaling = Scaling(0.0, False, search)
    made = encoding.codec.encode(values, place, scaling, Fresh(), allow_nonfinite=False)
    return [as_bytes(part) for part in made.parts]


@pytest.mark.parametrize("label", ["hurt", "tame", "zero"])
def test_matrices_made_to_hurt_become_what_compressed_tensors_makes(label):
    held = np.load(DATA / "edge_compressed_tensors.npz")
    parts = encoded(held[label], Nvfp4())
    words = ("weight_packed", "weight_scale", "weight_global_scale")
    for part, word in zip(parts, words, strict=True):
        np.testing.assert_array_equal(part, as_bytes(held[f"{label}/nvfp4a16/{word}"]))


def test_modelopt_multiplies():
    held = np.load(DATA / "edge_modelopt.npz")
    parts = encoded(held["tame"], Nvfp4(Dialect.MODELOPT))
    for part, word in zip(parts, ("weight", "weight_scale", "weight_scale_2"), strict=True):
        np.testing.assert_array_equal(part, as_bytes(held[f"nvfp4/{word}"]))


def test_four_over_six_is_that_of_its_authors(golden):
    held = np.load(DATA / "fouroversix.npz")
    weight = tensors_of(golden)[str(held["name"])].view(torch.uint16).numpy()
    codes, scales, number = encoded(weight, Nvfp4(Dialect.MODELOPT), Search.FOUR_OVER_SIX)
    np.testing.assert_array_equal(codes, held["weight"].reshape(-1))
    np.testing.assert_array_equal(scales, held["weight_scale"].reshape(-1))
    assert number.view(np.float32)[0] == held["amax"] / np.float32(1536)


def errors(parts, values):
    """Return the squared error of each group of 16 columns, as compressed-tensors decodes."""
    rows = len(values)
    state = {
        "weight_packed": torch.from_numpy(parts[0]).reshape(rows, -1),
        "weight_scale": torch.from_numpy(parts[1]).view(torch.float8_e4m3fn).reshape(rows, -1),
        "weight_global_scale": torch.from_numpy(parts[2]).view(torch.float32),
    }
    exact = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).double()
    off = decompress("nvfp4", state).double() - exact
    return (off**2).reshape(rows, -1, 16).sum(-1)


@pytest.mark.parametrize("seed", range(3))
def test_searches_err_less(seed):
    """A sweep has the nearest scale among its choices; BF16 in between may cost a last bit."""
    drawn = torch.randn(16, 512, generator=torch.Generator().manual_seed(seed)) * 0.02
    values = drawn.bfloat16().view(torch.uint16).numpy()
    none, sweep = (
        errors(encoded(values, Nvfp4(), search), values) for search in (Search.NONE, Search.SWEEP)
    )
    assert bool((sweep <= none * (1 + 2**-6)).all())
    assert sweep.sum() < 0.85 * none.sum()
    four = errors(encoded(values, Nvfp4(), Search.FOUR_OVER_SIX), values)
    assert four.sum() < 0.95 * none.sum()


# Whole runs ---------------------------------------------------------------------------------------

RUNS = {
    "nvfp4": to("nvfp4"),
    "nvfp4 sweep": to("nvfp4", search="sweep"),
    "nvfp4 4/6 modelopt": to("nvfp4", search="four-over-six", dialect="modelopt"),
    "nvfp4 modelopt w4a4": to("nvfp4", dialect="modelopt", inputs=True),
    "nvfp4, rest fp8": to("nvfp4", rest="fp8"),
    "mxfp4 mse": to("mxfp4", search="mse"),
    "mxfp4 ling": to("mxfp4", dialect="ling", rest="fp8"),
    "int4 g128 mse": to("int4", group=128, search="mse"),
    "int4 signed": to("int4", rule="signed"),
    "int4 kimi": to("int4", rule="kimi"),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_written_is_proven_and_read(name, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", RUNS[name])
    verdict = lingconv.verify(golden, tmp_path / "out")
    assert verdict.ok, verdict.findings
    report = lingconv.inspect(tmp_path / "out")
    assert report.faults == ()
    lingconv.convert(tmp_path / "out", tmp_path / "copy", ConvertOptions())
    assert tensors_of(tmp_path / "copy").keys() == tensors_of(tmp_path / "out").keys()
    for tensor, value in tensors_of(tmp_path / "copy").items():
        assert hashed(value) == hashed(tensors_of(tmp_path / "out")[tensor])
    assert stated(tmp_path / "copy") == stated(tmp_path / "out")


@pytest.mark.parametrize(("dtype", "kind", "group"), [
    ("nvfp4", "nvfp4", 0), ("mxfp4", "mxfp4", 0), ("int4", "int4", 32),
])  # fmt: skip
def test_compressed_tensors_decodes_to_the_same_numbers(dtype, kind, group, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to(dtype))
    lingconv.convert(tmp_path / "out", tmp_path / "back", ConvertOptions(dtype="bf16"))
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    held, ours = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "back")
    packed = [name for name in held if name.endswith("weight_packed")]
    assert len(packed) == 48
    for name in packed:
        module = name.removesuffix("weight_packed")
        state = {k.removeprefix(module): v for k, v in held.items() if k.startswith(module)}
        assert torch.equal(decompress(kind, state, group), ours[f"{module}weight"])


def test_the_config_is_understood_by_compressed_tensors(golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("nvfp4", rest="fp8"))
    config = QuantizationConfig.model_validate(stated(tmp_path / "out"))
    assert config.format == "mixed-precision"
    groups = {group.format: group for group in config.config_groups.values()}
    assert groups.keys() == {"float-quantized", "nvfp4-pack-quantized"}
    assert groups["nvfp4-pack-quantized"].weights.group_size == 16
    assert groups["nvfp4-pack-quantized"].input_activations is None
    modules = {name.rpartition(".")[0] for name in tensors_of(tmp_path / "out")}
    for group in groups.values():
        targets = [target.removeprefix("re:") for target in group.targets]
        fitting = {name for name in modules if any(re.match(each, name) for each in targets)}
        experts = {name for name in modules if ".experts." in name}
        kept = {"lm_head", "mlp.gate", "eh_proj", "norm", "embeddings"}
        others = {n for n in modules - experts if not n.endswith(tuple(kept))}
        assert fitting == (experts if group.weights.num_bits == 4 else others)


def test_modelopt_has_a_file_of_its_own(golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("nvfp4", dialect="modelopt", inputs=True))
    own = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    config = stated(tmp_path / "out")
    assert (own["quant_algo"], config["quant_algo"]) == ("NVFP4", "NVFP4")
    assert own["exclude_modules"] == config["ignore"]
    kept = {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"}
    assert kept <= {*own["exclude_modules"]}
    assert not any("*" in name or ".experts." in name for name in own["exclude_modules"])
    held = tensors_of(tmp_path / "out")
    inputs = [tensor for name, tensor in held.items() if name.endswith("input_scale")]
    assert len(inputs) == 48
    assert all(tensor.shape == () and tensor == 1.0 for tensor in inputs)


def test_from_fp8_from_gguf_and_from_megatron(golden, tmp_path):
    """The numbers are those of a conversion to BF16 in between."""
    sources = {
        "fp8": ConvertOptions(dtype="fp8"),
        "megatron": ConvertOptions(layout="megatron"),
        "gguf": ConvertOptions(layout="gguf"),
    }
    for name, options in sources.items():
        there = tmp_path / (f"{name}.gguf" if name == "gguf" else name)
        lingconv.convert(golden, there, options)
        lingconv.convert(there, tmp_path / f"{name}-bf16", ConvertOptions(dtype="bf16"))
        lingconv.convert(there, tmp_path / f"{name}-4", to("nvfp4"))
        lingconv.convert(tmp_path / f"{name}-bf16", tmp_path / f"{name}-4b", to("nvfp4"))
        ours, twice = tensors_of(tmp_path / f"{name}-4"), tensors_of(tmp_path / f"{name}-4b")
        assert {k: hashed(v) for k, v in ours.items()} == {k: hashed(v) for k, v in twice.items()}


@pytest.mark.parametrize("dtype", ["nvfp4", "mxfp4", "int4"])
def test_to_other_encodings(dtype, golden, tmp_path):
    """FP8 is made of the exact numbers, GGUF of those that are rounded to BF16, as from FP8."""
    lingconv.convert(golden, tmp_path / "4", to(dtype))
    lingconv.convert(tmp_path / "4", tmp_path / "f32", ConvertOptions(dtype="f32"))
    lingconv.convert(tmp_path / "4", tmp_path / "bf16", ConvertOptions(dtype="bf16"))
    fp8 = ConvertOptions(dtype="fp8", allow_requantize=True)
    q8_0 = ConvertOptions(layout="gguf", gguf=GgufOptions("q8_0"), allow_requantize=True)
    for source in ("4", "f32"):
        lingconv.convert(tmp_path / source, tmp_path / f"{source}-fp8", fp8)
    for source in ("4", "bf16"):
        lingconv.convert(tmp_path / source, tmp_path / f"{source}.gguf", q8_0)
    far, near = tensors_of(tmp_path / "4-fp8"), tensors_of(tmp_path / "f32-fp8")
    experts = {name for name in far if ".experts." in name}
    assert len(experts) == 96
    assert all(hashed(far[name]) == hashed(near[name]) for name in experts)
    far, near = (gguf.GGUFReader(tmp_path / f"{source}.gguf").tensors for source in ("4", "bf16"))
    assert [each.name for each in far] == [each.name for each in near]
    for one, other in zip(far, near, strict=True):
        np.testing.assert_array_equal(one.data, other.data)


# What is refused, and what is found ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (to("nvfp4", search="mse"), "`search` is `mse`"),
        (to("int4", search="sweep"), "`search` is `sweep`"),
        (to("nvfp4", rule="kimi"), "`rule` is `kimi`"),
        (to("int4", group=48), "`group` is `48`"),
        (to("mxfp4", dialect="modelopt"), "`dialect` is `modelopt`"),
        (to("mxfp4", inputs=True), "`inputs` is for"),
        (to("bf16", search="mse"), "are for four bits"),
        (to("nvfp4", rest="int8"), "`rest` is `int8`"),
        (to("nvfp4", dialect="modelopt", rest="fp8"), "`rest=fp8` is not written"),
        (to("nvfp4", include=("re:.*no_such",)), "`include=re:.*no_such` matches nothing"),
        (to("int4", include=("*eh_proj*",)), "`include=*eh_proj*` matches nothing"),
        (replace(to("nvfp4"), layout="hf-merged"), "is a stack of experts"),
        (replace(to("nvfp4"), fp8=Fp8Options(scheme="channel")), "are for FP8"),
    ],
)
def test_requests_that_cannot_be_meant(model, options, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        build_plan(model, options)


def test_four_bits_are_not_rounded_twice(golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("nvfp4"))
    with pytest.raises(UsageError, match="is nvfp4 already; mxfp4 would round it twice"):
        lingconv.convert(tmp_path / "out", tmp_path / "twice", to("mxfp4"))


@pytest.mark.parametrize("merged", ["dfactory", "transformers", "automodel", "mlx"])
@pytest.mark.parametrize("dtype", ["nvfp4", "mxfp4", "int4"])
def test_experts_of_four_bits_are_not_stacked(dtype, merged, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to(dtype))
    stacked = ConvertOptions(layout="hf-merged", merged=merged)
    with pytest.raises(UsageError, match=r"a stack of experts|stored transposed|is made of"):
        lingconv.plan(tmp_path / "out", stacked)
    lingconv.convert(tmp_path / "out", tmp_path / "bf16", replace(stacked, dtype="bf16"))
    lingconv.convert(tmp_path / "out", tmp_path / "apart", ConvertOptions(dtype="bf16"))
    lingconv.convert(tmp_path / "apart", tmp_path / "twice", stacked)
    found, expected = tensors_of(tmp_path / "bf16"), tensors_of(tmp_path / "twice")
    assert {k: hashed(v) for k, v in found.items()} == {k: hashed(v) for k, v in expected.items()}


def test_numbers_without_a_code_are_refused_with_their_name(golden, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden, source)
    for path in source.glob("*.safetensors"):
        held = load_file(path)
        if f"{EXPERT}.up_proj.weight" in held:
            held[f"{EXPERT}.up_proj.weight"][3, 5] = float("nan")
            save_file(held, path, {"format": "pt"})
    options = replace(to("nvfp4"), allow_nonfinite=True)
    with pytest.raises(CheckpointError, match=rf"{EXPERT}.up_proj.weight: NaN or Inf") as caught:
        lingconv.convert(source, tmp_path / "out", options)
    assert "`ignore=" in caught.value.hint


def spoil(folder, change):
    """Change the tensors of a folder."""
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        change(held)
        save_file(held, path, {"format": "pt"})


def swap_nibbles(held):
    packed = held[f"{EXPERT}.down_proj.weight_packed"]
    held[f"{EXPERT}.down_proj.weight_packed"] = (packed << 4) | (packed >> 4)


def invert_divisor(held):
    held[f"{EXPERT}.down_proj.weight_global_scale"] = (
        1 / held[f"{EXPERT}.down_proj.weight_global_scale"]
    )


def shift_scales(held):
    scales = held[f"{EXPERT}.down_proj.weight_scale"]
    held[f"{EXPERT}.down_proj.weight_scale"] = scales.roll(1, 0)


def empty_number(held):
    held[f"{EXPERT}.down_proj.weight_global_scale"][:] = float("inf")


@pytest.mark.parametrize("change", [swap_nibbles, invert_divisor, shift_scales, empty_number])
def test_the_proof_finds(change, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("nvfp4"))
    spoil(tmp_path / "out", change)
    verdict = lingconv.verify(golden, tmp_path / "out")
    assert not verdict.ok
    assert any("experts.0.down" in finding.tensor for finding in verdict.findings)


@pytest.mark.parametrize("word", ["weight_scale", "weight_global_scale", "weight_packed"])
def test_a_tensor_that_is_lost_is_named(word, golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("nvfp4"))
    spoil(tmp_path / "out", lambda held: held.pop(f"{EXPERT}.up_proj.{word}"))
    report = lingconv.inspect(tmp_path / "out")
    assert any(f"{EXPERT}.up_proj.{word}" in str(fault) for fault in report.faults)
    with pytest.raises(CheckpointError):
        lingconv.convert(tmp_path / "out", tmp_path / "x", ConvertOptions(dtype="bf16"))


def test_a_label_that_is_not_that_of_the_weights_is_found(golden, tmp_path):
    lingconv.convert(golden, tmp_path / "out", to("mxfp4"))

    def relabel(config):
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights"] |= {"group_size": 16, "strategy": "tensor_group"}

    edit_json(tmp_path / "out/config.json", relabel)
    with pytest.raises(CheckpointError) as caught:
        lingconv.convert(tmp_path / "out", tmp_path / "x", ConvertOptions(dtype="bf16"))
    assert any("says nvfp4, weights are mxfp4" in str(fault) for fault in caught.value.faults)
