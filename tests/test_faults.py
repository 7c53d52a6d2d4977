"""Broken, inconsistent and hostile checkpoints: refused with file and tensor, all at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lingconv import CheckpointError, ConvertOptions, UsageError, inspect, plan
from lingconv.containers.source_overrides import SourceOverrides
from tests.support import (
    INDEX,
    copy_checkpoint,
    edit_json,
    read_header,
    read_tensors,
    rewrite,
    write_raw,
)

SHARD_2 = "model-00002-of-00003.safetensors"
DATA = Path(__file__).parent / "data"
NORM = "model.layers.1.post_attention_layernorm.weight"
WEIGHT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def source(golden, tmp_path):
    return copy_checkpoint(golden, tmp_path / "in")


@pytest.fixture
def fp8(golden_block, tmp_path):
    return copy_checkpoint(golden_block, tmp_path / "in")


def refusal(folder, **options):
    """Return the lines that a refused plan gives; `inspect` must report the same faults."""
    with pytest.raises(CheckpointError) as caught:
        plan(folder, ConvertOptions(**options))
    found = [str(fault) for fault in inspect(folder).faults if fault.fatal]
    assert found == [str(fault) for fault in caught.value.faults]
    assert not inspect(folder).sound
    return found


def test_truncated_shard(source):
    data = (source / SHARD_2).read_bytes()
    header, _ = read_header(source / SHARD_2)
    offsets = {name: each["data_offsets"][1] for name, each in header.items() if "." in name}
    last = max(offsets, key=offsets.get)
    (source / SHARD_2).write_bytes(data[:-100])
    assert refusal(source) == [
        f"{SHARD_2}: truncated file: {len(data) - 100:,} bytes, its tensors reach to byte"
        f" {len(data):,} ({last})"
    ]
    (source / SHARD_2).write_bytes(data[:50])
    (line,) = refusal(source)
    assert line.startswith(f"{SHARD_2}: truncated: header says")
    (source / SHARD_2).write_bytes(b"")
    (line,) = refusal(source)
    assert line.startswith(f"{SHARD_2}: file of 0 bytes")


@pytest.mark.parametrize("fault", ["cut", "gone"])
@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_broken_shard_is_one_fault_and_says_what_to_do(fp8, fault, with_index, number):
    """Not one for each of its tensors, none for scales whose weights it holds, no hint to drop."""
    name = f"model-{number:05d}-of-00003.safetensors"
    if fault == "cut":
        (fp8 / name).write_bytes((fp8 / name).read_bytes()[:1000])
    else:
        (fp8 / name).unlink()
    if not with_index:
        (fp8 / INDEX).unlink()
    with pytest.raises(CheckpointError) as caught:
        plan(fp8)
    assert [found.file for found in caught.value.faults] == [name]
    assert caught.value.hint in ("fetch the file again", "fetch the missing shards again")


def test_missing_shard(source):
    (source / SHARD_2).unlink()
    assert refusal(source) == [f"{SHARD_2}: the index names this shard, and it is not there"]


@pytest.mark.parametrize(
    "path", ["../x.safetensors", "/etc/passwd", "a/../../b", "a//b", ".git/b", "..", "", 7, None]
)
def test_index_that_points_outside(source, path):
    edit_json(source / INDEX, lambda index: index["weight_map"].update({NORM: path}))
    assert any(
        line.startswith(f"{INDEX}: {NORM}: index points outside") for line in refusal(source)
    )


def test_index_that_names_the_wrong_shard(source):
    wrong = "model-00001-of-00003.safetensors"
    edit_json(source / INDEX, lambda index: index["weight_map"].update({NORM: wrong}))
    assert refusal(source) == [f"{INDEX}: {NORM}: index says {wrong}, but it is in {SHARD_2}"]


def test_an_index_that_lacks_a_tensor_or_has_one_too_many_is_stale(source):
    """Loaders open the files that an index names, and take what is in them."""
    edit_json(source / INDEX, lambda index: index["weight_map"].pop(NORM))
    lacks = [str(fault) for fault in inspect(source).faults]
    assert lacks == [
        f"{INDEX}: leaves out 1 tensor ({NORM}) of the files that it names; they are read"
    ]
    edit_json(
        source / INDEX, lambda index: index["weight_map"].update({NORM: SHARD_2, "ghost": SHARD_2})
    )
    (warning,) = plan(source, ConvertOptions()).warnings
    assert warning == f"{INDEX}: is stale: it lists 1 tensor (ghost) that no file holds"


def test_an_index_in_front_of_weights_in_a_folder(source):
    """As `save_pretrained` of some trainers writes it; transformers joins the two."""
    (source / "weights").mkdir()
    for path in source.glob("*.safetensors"):
        path.rename(source / "weights" / path.name)

    def into_folder(index):
        index["weight_map"] = {n: f"weights/{f}" for n, f in index["weight_map"].items()}

    edit_json(source / INDEX, into_folder)
    assert not inspect(source).faults


def test_an_index_of_another_save_beside_a_whole_model(source):
    rewrite(source, lambda tensors: None)
    names = {NORM: SHARD_2, "model.word_embeddings.weight": "model-00001-of-00003.safetensors"}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (fault,) = inspect(source).faults
    assert not fault.fatal
    assert "none of the 2 files that it names is there; model.safetensors is read" in str(fault)


def test_an_index_that_lists_mtp_tensors_nobody_saved(source):
    def without_mtp(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            ghosts.append(name)
            del tensors[name]

    ghosts = []
    rewrite(source, without_mtp)
    rest = read_header(source / "model.safetensors")[0].keys() - {"__metadata__"}
    weight_map = dict.fromkeys([*rest, *ghosts], "model.safetensors")
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(CheckpointError) as caught:
        plan(source, ConvertOptions())
    assert len(caught.value.faults) == len(ghosts) == 39
    assert all("the index is stale" in line for line in caught.value.details)
    assert "`mtp=drop`" in caught.value.hint
    plan(source, ConvertOptions(mtp="drop"))


def test_mtp_tensors_in_a_file_that_the_index_does_not_name(source):
    mtp = {n: t for n, t in read_tensors(source).items() if n.startswith("model.layers.2.")}

    def without_mtp(tensors):
        for name in mtp:
            del tensors[name]

    rewrite(source, without_mtp)
    (source / "model.safetensors").rename(source / "a.safetensors")
    rest = read_header(source / "a.safetensors")[0].keys() - {"__metadata__"}
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(rest, "a.safetensors")}))
    save_file(mtp, source / "mtp.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        plan(source, ConvertOptions())
    assert len(caught.value.faults) == len(mtp)
    assert all("mtp.safetensors holds it" in line for line in caught.value.details)
    assert "--mtp" not in caught.value.hint
    (source / INDEX).unlink()  # as the hint says
    assert not [fault for fault in inspect(source).faults if fault.fatal]


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4998663840\n"
)


@pytest.mark.parametrize("name", [SHARD_2, "tokenizer.json", "config.json", INDEX])
def test_a_pointer_of_git_lfs_is_named(source, name):
    (source / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError) as caught:
        plan(source, ConvertOptions())
    assert any(f"{name}: is a Git LFS pointer" in line for line in caught.value.details)


def test_a_pointer_in_place_of_a_picture_is_left_behind_by_name(source):
    (source / "figure.png").write_bytes(POINTER)
    (fault,) = inspect(source).faults
    assert str(fault).startswith("figure.png: is a Git LFS pointer")
    assert "figure.png" not in plan(source, ConvertOptions()).side_files


def test_a_page_of_html_in_place_of_a_shard(source):
    (source / SHARD_2).write_bytes(b"\n<!DOCTYPE html><html>" + b" " * 5000)
    assert refusal(source)[0] == f"{SHARD_2}: is an HTML page, not the file itself: fetch it again"


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}', '{"weight_map": []}'])
def test_index_that_is_none(source, text):
    (source / INDEX).write_text(text)
    assert any(line.startswith(INDEX) for line in refusal(source))


def test_wrong_total_size_is_odd_but_harmless(source):
    edit_json(source / INDEX, lambda index: index["metadata"].update(total_size=5))
    (fault,) = inspect(source).faults
    assert not fault.fatal
    assert "`total_size` is 5, the tensors have 6,305,600 bytes" in fault.message
    assert plan(source).warnings == (str(fault),)


def test_two_shards_with_the_same_tensor(source):
    header, data = read_header(source / SHARD_2)
    begin, end = header[NORM]["data_offsets"]
    extra = "model-00004-of-00003.safetensors"
    write_raw(
        source / extra, {NORM: {**header[NORM], "data_offsets": [0, end - begin]}}, data[begin:end]
    )
    edit_json(source / INDEX, lambda index: index["weight_map"].update(extra=extra))
    assert any(line == f"{extra}: {NORM}: is in {SHARD_2} too" for line in refusal(source))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "F128"}, "unknown dtype 'F128'"),
        ({"data_offsets": [0, 10**15]}, "outside"),
        ({"shape": [512]}, "does not take"),
    ],
)
def test_broken_header_entry(source, change, says):
    header, data = read_header(source / SHARD_2)
    header[NORM].update(change)
    write_raw(source / SHARD_2, header, data)
    assert any(line.startswith(f"{SHARD_2}: {NORM}: ") and says in line for line in refusal(source))


def test_overlapping_tensors(source):
    header, data = read_header(source / SHARD_2)
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin - 2, end - 2]
    write_raw(source / SHARD_2, header, data)
    assert any("overlaps" in line for line in refusal(source))


def test_weight_without_its_scale(fp8):
    rewrite(fp8, lambda tensors: tensors.pop(WEIGHT + "_scale"))
    (line,) = refusal(fp8)
    assert line.startswith(f"model.safetensors: {WEIGHT}: FP8 weight without its scale")


def test_scale_without_its_weight(fp8):
    rewrite(fp8, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].bfloat16()}))
    lines = refusal(fp8)
    assert lines == [f"model.safetensors: {WEIGHT}_scale: scale of a weight that is BF16, not FP8"]


def test_scale_of_nothing(source):
    rewrite(source, lambda tensors: tensors.update({"ghost.weight_scale_inv": torch.ones(2, 2)}))
    assert refusal(source) == [
        "model.safetensors: ghost.weight_scale_inv: scale of a weight that is not there"
    ]


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (torch.ones(3, 1), "scale has shape [3, 1]"),
        (torch.ones(256, 1), "in blocks of 128 x 128 needs another"),
        (torch.ones(2, 1).to(torch.int32), "I32 scale"),
        (torch.ones(2, 1).double(), "F64 scale"),
    ],
)
def test_scale_of_the_wrong_kind(fp8, scale, says):
    rewrite(fp8, lambda tensors: tensors.update({WEIGHT + "_scale": scale}))
    (line,) = refusal(fp8)
    assert line.startswith(f"model.safetensors: {WEIGHT}_scale: ")
    assert says in line


def test_weight_with_two_scales(fp8):
    rewrite(fp8, lambda t: t.update({WEIGHT + "_scale_inv": t[WEIGHT + "_scale"].clone()}))
    (line,) = refusal(fp8)
    assert "FP8 weight has two scales" in line


def test_tensor_of_the_wrong_shape(source):
    rewrite(source, lambda tensors: tensors.update({WEIGHT: torch.ones(128, 256)}))
    (line,) = refusal(source)
    assert line == (
        f"model.safetensors: {WEIGHT}: has shape [128, 256], config.json calls for [256, 128]"
    )


def test_config_that_contradicts_the_tensors(source):
    edit_json(source / "config.json", lambda config: config.update(num_experts=7))
    lines = refusal(source)
    assert sum("is no tensor of Ling 2.0" in line for line in lines) == 6
    assert sum("mlp.gate" in line and "calls for [7" in line for line in lines) == 4


def test_config_that_contradicts_the_scales(fp8):
    def channel(config):
        group = config["quantization_config"]["config_groups"]["FP8_BLOCK"]
        group["weights"].update(strategy="channel", block_structure=None)

    edit_json(fp8 / "config.json", channel)
    lines = refusal(fp8)
    assert len(lines) == 63
    assert "in blocks of 1 x all needs another" in lines[0]


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq"}, "`quant_method` is 'gptq'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "not e4m3"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "not two numbers"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "two positive numbers"),
        ({"quant_method": "compressed-tensors"}, "incomplete"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {
            "type": "int", "num_bits": 4}}}}, "int of 4 bits in groups of None, which is not read"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {
            "type": "float", "num_bits": 8, "strategy": "wild"}}}}, "'wild' is not read"),
        ([], "not an object"),
    ],
)  # fmt: skip
def test_quantization_config_that_is_not_understood(source, quantization, says):
    edit_json(source / "config.json", lambda c: c.update(quantization_config=quantization))
    (line,) = refusal(source)
    assert line.startswith("config.json: ")
    assert says in line


def test_quantization_config_without_fp8_weights_is_odd(source):
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    edit_json(source / "config.json", lambda c: c.update(quantization_config=stated))
    assert [f.message for f in inspect(source).faults] == [
        "has a `quantization_config`, but no weight is quantized"
    ]


def test_fp8_weights_without_a_quantization_config_are_odd(fp8):
    edit_json(fp8 / "config.json", lambda config: config.pop("quantization_config"))
    assert "but 63 weights are FP8" in inspect(fp8).faults[0].message
    assert inspect(fp8).sound


def test_mtp_layers_that_the_config_does_not_know(source):
    edit_json(source / "config.json", lambda c: c.update(num_nextn_predict_layers=0))
    lines = refusal(source)
    assert len(lines) == 39
    built = plan(source, ConvertOptions(drop=("model.layers.2.*",)))
    assert {item.reason for item in built.dropped} == {"left out by `--drop`"}
    assert len(built.dropped) == 39


def test_known_buffers_are_dropped_by_name(source):
    name = "model.layers.0.attention.rotary_emb.inv_freq"
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(16)}))
    (dropped,) = plan(source).dropped
    assert (dropped.name, dropped.nbytes) == (name, 64)
    assert "rope_theta" in dropped.reason


@pytest.mark.parametrize("names", ["x", [3], {"a": 1}])
def test_architectures_of_another_type(source, names):
    edit_json(source / "config.json", lambda config: config.update(architectures=names))
    with pytest.raises(CheckpointError, match=r"config\.json: `architectures`"):
        inspect(source)


@pytest.mark.parametrize("names", [["BailingMoeForCausalLM"], ["LlamaForCausalLM"], [], None])
def test_unknown_architecture(source, names):
    edit_json(source / "config.json", lambda config: config.update(architectures=names))
    with pytest.raises(CheckpointError, match="unknown architecture") as caught:
        inspect(source)
    assert "known: BailingMoeV2ForCausalLM" in caught.value.details
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000])
def test_config_that_is_none(source, text):
    (source / "config.json").write_text(text)
    with pytest.raises(CheckpointError):
        inspect(source)


def test_llada2_is_read_and_keeps_its_name(source):
    edit_json(source / "config.json", lambda c: c.update(architectures=["LLaDA2MoeModelLM"]))
    report = inspect(source)
    assert (report.architecture, report.faults) == ("LLaDA2MoeModelLM", ())
    assert plan(source).config["architectures"] == ["LLaDA2MoeModelLM"]


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="holds no"):
        inspect(tmp_path)
    with pytest.raises(UsageError, match="is neither a folder nor"):
        inspect(tmp_path / "nowhere")


def test_shards_without_an_index_are_read_and_mentioned(source):
    (source / INDEX).unlink()
    (fault,) = inspect(source).faults
    assert (fault.fatal, fault.file) == (False, INDEX)
    assert len(list(plan(source).transfers())) == 86


def test_stray_weights_are_left_behind_loudly(source):
    write_raw(source / "old.safetensors", {})
    (fault,) = inspect(source).faults
    assert "left behind" in fault.message
    assert [item.name for item in plan(source).dropped] == ["old.safetensors"]


def test_odd_dtypes_are_reported(source):
    rewrite(source, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()}))
    (fault,) = inspect(source).faults
    assert fault.message == "1 norm tensors are f32, 15 are bf16"


def test_integers_cannot_become_floats(source):
    rewrite(source, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.int16)}))
    with pytest.raises(CheckpointError) as caught:
        plan(source, ConvertOptions(dtype="f32"))
    assert f"{WEIGHT}: i16 cannot be converted to f32" in caught.value.details[0]


def test_all_faults_come_together(fp8):
    def change(tensors):
        del tensors[WEIGHT + "_scale"]
        del tensors["model.norm.weight"]
        tensors["lm_head.weight"] = torch.ones(3, 3)
        tensors["surprise"] = torch.ones(1)

    rewrite(fp8, change)
    assert len(refusal(fp8)) == 4


def test_the_report_is_json(source):
    json.dumps(inspect(source).to_json())


# Hints -----------------------------------------------------------------------------------------


def keep(words, alone=""):
    leaves = f", `drop={alone}` leaves it out" if alone else ""
    return f"`settings={words}` takes it as a part of the model{leaves}"


@pytest.mark.parametrize(
    ("key", "stated", "right", "num_extra"),
    [
        # The numbers follow from the tensors that the modeling file makes of each key.
        ("tie_word_embeddings", True, "false", 1),  # the head
        ("use_qk_norm", False, "true", 6),  # two norms in each of three layers
        ("moe_router_enable_expert_bias", False, "true", 2),  # layers 1 and 2 have routers
        # 4 of the projection, 6 of attention, router and bias, 8 x 3 of experts, 3 shared
        ("num_nextn_predict_layers", 0, "1", 39),
        ("num_nextn_predict_layers", None, "1", 39),
    ],
)
def test_tensors_that_a_key_of_the_config_leaves_out(source, key, stated, right, num_extra):
    """To drop them would lose what is trained: the hint keeps them, and it works."""
    edit_json(source / "config.json", lambda config: config.update({key: stated}))
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert len(caught.value.faults) == num_extra
    assert all(f"`{key}` is" in fault.message for fault in caught.value.faults)
    wanted = keep(f"{key}={right}", "lm_head.weight" if num_extra == 1 else "")
    assert {fault.hint for fault in caught.value.faults} == {wanted}
    assert caught.value.hint == wanted
    given = SourceOverrides(settings={key: json.loads(right)})
    assert not plan(source, given=given).dropped


def test_two_mtp_layers_whose_number_is_lost(tmp_path):
    source = copy_checkpoint(DATA / "forward/two-mtp", tmp_path / "in")
    edit_json(source / "config.json", lambda config: config.pop("num_nextn_predict_layers"))
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert caught.value.hint == keep("num_nextn_predict_layers=2")


def test_a_hint_belongs_to_its_own_fault(source):
    """A shard to fetch, a tensor of nobody: neither is told to do what the other needs."""
    rewrite(source, lambda tensors: tensors.update(surprise=torch.zeros(3)))
    (source / "more-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        plan(source)
    assert caught.value.hint == ""
    by_hint = {
        fault.hint: line
        for fault, line in zip(caught.value.faults, caught.value.details, strict=True)
    }
    assert len(by_hint) == 3
    assert all(line.endswith(f" ({hint})") for hint, line in by_hint.items())
