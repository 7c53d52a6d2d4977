"""torch_dist: read as megatron-core wrote it, written so that torch and megatron-core read it."""

import io
import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader

import lingconv
from lingconv.checkpoint.chunk_bands import Gap, stored_in_boxes, with_bands
from lingconv.containers.megatron import dcp_metadata as torch_dist
from lingconv.containers.megatron import pickles
from lingconv.containers.megatron.pickle_values import OpaqueObject
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.containers.stored_tensor import Box, HeaderError, StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.encodings.plain import PLAIN
from lingconv.plans.options import ConvertOptions, MegatronOptions
from tests.killer import kill_many
from tests.support import assert_same_model, read_tensors

ROOT = Path(__file__).parents[1]
SIMPLE = ("1 1 1", "2 1 1", "1 2 1", "1 1 2")
ITERATION = "iter_0000001"


@pytest.fixture(scope="session")
def golden_dist():
    """The golden model as megatron-core 0.16.1 saved it."""
    return ROOT / "tests/data/tiny-ling-v2-torch_dist"


@pytest.fixture(scope="session")
def config(golden):
    return json.loads((golden / "config.json").read_text())


def to_megatron(source, target, **options):
    request = ConvertOptions(layout="megatron", megatron=MegatronOptions(**options))
    lingconv.convert(source, target, request)
    return target


def load_with_torch(folder):
    """Return all tensors, read by torch.distributed.checkpoint itself."""
    reader = FileSystemReader(folder)
    state = {
        name: torch.empty(item.size, dtype=item.properties.dtype)
        for name, item in reader.read_metadata().state_dict_metadata.items()
        if hasattr(item, "size")
    }
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, storage_reader=reader)
    return state


def test_what_megatron_core_saved_becomes_the_golden_model(golden, golden_dist, config, tmp_path):
    lingconv.convert(golden_dist, tmp_path / "hf", given=SourceOverrides(config))
    assert_same_model(golden, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text()) == config


# megatron-core 0.19.2 saved it, with arguments of Megatron's launcher: see generate.py beside it.
NEWER = ROOT / "tests/data/megatron-0.19/two-mtp"
DISTCP = "iter_0000003/__0_0.distcp"


def test_arguments_where_megatron_core_0_19_has_them(tmp_path):
    """It writes no common.pt. The model is that of the files that it was made of, key by key."""
    source = ROOT / "tests/data/forward/two-mtp"
    lingconv.convert(NEWER, tmp_path / "hf")
    assert_same_model(source, tmp_path / "hf")
    found, config = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "hf", source))
    keys = set(config) - {"pad_token_id", "rope_scaling", "use_cache", "num_shared_experts"}
    assert {key: found.get(key) for key in keys} == {key: config[key] for key in keys}
    report = lingconv.inspect(NEWER)
    assert report.sound
    assert report.left_out.keys() == {"extra state"}  # the arguments are not among what is left


def test_common_pt_counts_where_both_are_there(tmp_path):
    """As `load_common_state_dict` of megatron-core 0.19.2 has it."""
    folder = Path(shutil.copytree(NEWER, tmp_path / "m"))
    older = to_megatron(ROOT / "tests/data/forward/two-mtp", tmp_path / "older") / ITERATION
    state = torch.load(older / "common.pt", weights_only=False)
    state["args"].rotary_base = 10_000
    torch.save(state, folder / "iter_0000003/common.pt")
    lingconv.convert(folder, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["rope_theta"] == 10_000


@pytest.mark.parametrize("left", [0, 30_000, 60_000])
def test_arguments_in_a_file_that_is_cut_short(left, tmp_path):
    """One fault, although what describes the model is lost with its weights."""
    folder = Path(shutil.copytree(NEWER, tmp_path / "m"))
    path = folder / DISTCP
    path.write_bytes(path.read_bytes()[:left])
    (fault,) = refuses(folder, tmp_path)
    assert (fault.file, fault.hint) == (DISTCP, "fetch the file again")


def test_arguments_that_are_damaged(tmp_path):
    folder = Path(shutil.copytree(NEWER, tmp_path / "m"))
    metadata = FileSystemReader(folder / "iter_0000003").read_metadata()
    (start,) = (
        place.offset
        for key, place in metadata.storage_data.items()
        if key.fqn == "common_state/shard_0_1"
    )
    data = bytearray((folder / DISTCP).read_bytes())
    data[start + 2_000] ^= 1
    (folder / DISTCP).write_bytes(data)
    (fault,) = refuses(folder, tmp_path, "CRC-32")
    assert (fault.file, fault.tensor) == (DISTCP, "common_state/shard_0_1")


@pytest.mark.parametrize("spec", ["te", "local"])
@pytest.mark.parametrize("singleton", [False, True])
def test_there_and_back(golden, spec, singleton, tmp_path):
    target = to_megatron(golden, tmp_path / "m", spec=spec, singleton_experts=singleton)
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert json.loads((tmp_path / "hf" / name).read_text()) == json.loads(
            (golden / name).read_text()
        )


@pytest.mark.parametrize("mtp", [0, 2])
def test_there_and_back_with_the_dimensions_of_ling_mini(mtp, tmp_path):
    """Rows, heads and widths as released; few layers and experts."""
    preset = json.loads((ROOT / "formats/presets/ling-mini-2.0.json").read_text())
    preset.update(num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, vocab_size=1000)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(preset))
    lingconv.synth(path, tmp_path / "hf", layers=3, dense_layers=2, mtp=mtp)
    to_megatron(tmp_path / "hf", tmp_path / "m")
    lingconv.convert(tmp_path / "m", tmp_path / "again")
    assert_same_model(tmp_path / "hf", tmp_path / "again")


def test_torch_reads_what_megatron_core_would_have_written(golden, golden_dist, tmp_path):
    """The same names, shapes and numbers as in the genuine file; and sound archives."""
    folder = to_megatron(golden, tmp_path / "m", spec="local") / ITERATION
    ours, genuine = load_with_torch(folder), load_with_torch(golden_dist)
    assert ours.keys() == genuine.keys()
    assert [
        name for name in ours if not torch.equal(ours[name].float(), genuine[name].float())
    ] == []
    metadata, expected = (FileSystemReader(f).read_metadata() for f in (folder, golden_dist))
    assert expected.state_dict_metadata.keys() <= metadata.state_dict_metadata.keys()
    for place in metadata.storage_data.values():
        data = (folder / place.relative_path).read_bytes()[place.offset :][: place.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None  # every checksum is right


def test_arguments_are_what_megatron_unpickles(golden, tmp_path):
    folder = to_megatron(golden, tmp_path / "m") / ITERATION
    state = torch.load(folder / "common.pt", weights_only=False)
    args = state["args"]
    assert (args.num_layers, args.moe_layer_freq, args.num_query_groups) == (2, [0, 1], 2)
    assert (args.params_dtype, args.rotary_percent, args.mtp_num_layers) == (torch.bfloat16, 0.5, 1)
    assert args.untie_embeddings_and_output_weights is True
    assert (tmp_path / "m/latest_checkpointed_iteration.txt").read_text() == "1\n"


def test_config_is_made_of_the_arguments(golden, config, tmp_path):
    """Without config.json beside it, every key that shapes the model comes back."""
    target = to_megatron(golden, tmp_path / "m")
    (target / "config.json").unlink()
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")
    rebuilt = json.loads((tmp_path / "hf/config.json").read_text())
    keys = set(config) - {"eos_token_id", "pad_token_id", "max_window_layers", "rope_scaling"}
    keys -= {"mtp_loss_scaling_factor"}  # no number of the model
    assert {key: rebuilt.get(key) for key in keys} == {key: config[key] for key in keys}


def test_fp8_is_dequantized_and_the_bias_stays_in_f32(golden_block, tmp_path):
    target = to_megatron(golden_block, tmp_path / "m")
    lingconv.convert(target, tmp_path / "hf")
    lingconv.convert(golden_block, tmp_path / "plain", ConvertOptions(dtype="bf16"))
    assert_same_model(tmp_path / "plain", tmp_path / "hf")
    state = load_with_torch(target / ITERATION)
    assert {name for name, value in state.items() if value.dtype != torch.bfloat16} == {
        "decoder.layers.1.mlp.router.expert_bias",
        "mtp.layers.0.transformer_layer.mlp.router.expert_bias",
    }


def test_without_mtp_layers(golden, tmp_path):
    request = ConvertOptions(layout="megatron", mtp="drop")
    lingconv.convert(golden, tmp_path / "m", request)
    lingconv.convert(tmp_path / "m", tmp_path / "hf")
    lingconv.convert(golden, tmp_path / "plain", ConvertOptions(mtp="drop"))
    assert_same_model(tmp_path / "plain", tmp_path / "hf")


def test_other_routing_is_warned_of(golden, config, tmp_path):
    """Megatron adds the topk // group_topk best scores of a group, the model's own code two."""
    options = ConvertOptions(layout="megatron")
    assert lingconv.plan(golden, options).warnings == ()
    changed = SourceOverrides({**config, "topk_group": 2})
    (warning,) = lingconv.plan(golden, options, given=changed).warnings
    assert "by its 1 best experts" in warning


@pytest.mark.parametrize("rounds", [10, pytest.param(40, marks=pytest.mark.long)])
def test_a_run_goes_on_where_a_kill_left_it(golden, tmp_path, rounds):
    assert kill_many("megatron", golden, tmp_path, rounds).resumed >= rounds // 4


# megatron-core itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parallel",
    ["2 2 2", *(pytest.param(one, marks=pytest.mark.long) for one in SIMPLE)],
)
def test_megatron_core_loads_runs_and_saves_it(golden, config, parallel, tmp_path):
    """At TP, PP and EP: the golden logits within 1e-4, and what it saves is the golden model."""
    folder = to_megatron(golden, tmp_path / "m", spec="local") / ITERATION
    expected = ROOT / "tests/data/tiny-ling-v2.expected.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_client", folder, expected, tmp_path / "saved",
         *parallel.split()],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])["errors"]
    assert errors
    assert all(len(each) == 2 and max(each) < 1e-4 for each in errors), errors
    lingconv.convert(tmp_path / "saved", tmp_path / "hf", given=SourceOverrides(config))
    assert_same_model(golden, tmp_path / "hf")


# Chunks ----------------------------------------------------------------------------------------


@st.composite
def boxes(draw):
    """A tensor of one to four axes, cut on each of them, and some boxes twice."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    parts = [((), ())]
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        runs = [(first, last - first) for first, last in pairwise(cuts)]
        parts = [((*o, first), (*s, n)) for o, s in parts for first, n in runs]
    more = draw(st.lists(st.sampled_from(parts), max_size=3))
    whole = draw(st.lists(st.just(((0,) * len(shape), shape)), max_size=1))
    return shape, draw(st.permutations([*parts, *more, *whole]))


@settings(max_examples=300)
@given(boxes())
def test_any_chunks_make_the_tensor(drawn):
    shape, parts = drawn
    whole = np.arange(np.prod(shape)).reshape(shape)
    data, stored = {}, []
    for number, (offsets, sizes) in enumerate(parts):
        box = whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        data[f"f{number}"] = box.reshape(-1, sizes[-1] if len(shape) > 1 else 1)
        stored.append(Box(offsets, sizes, f"f{number}", 0, box.size * 4))
    tensor = StoredTensor("t", DType.F32, shape, "f0", 0, whole.size * 4, tuple(stored))
    matrix = with_bands(*stored_in_boxes(tensor, PLAIN[DType.F32]))
    rows = []
    for band in matrix.bands:
        assert band.start == sum(len(row) for row in rows)
        rows.append(
            np.hstack(
                [
                    data[c.source.extents[0].file][c.first_row :, c.first_col :][
                        : c.num_rows, : c.num_cols
                    ]
                    for c in band.chunks
                ]
            )
        )
    assert np.array_equal(np.vstack(rows).reshape(shape), whole)


def test_what_is_in_no_chunk_is_a_gap():
    boxes = (Box((0, 0), (2, 4), "f", 0, 32), Box((2, 0), (2, 3), "f", 32, 24))
    tensor = StoredTensor("t", DType.F32, (4, 4), "f", 0, 64, boxes)
    with pytest.raises(Gap, match="rows 2 to 4, column 3"):
        with_bands(*stored_in_boxes(tensor, PLAIN[DType.F32]))


# Other writers ---------------------------------------------------------------------------------


class Rewriter:
    """Saves a changed state with torch.distributed.checkpoint, chunks as torch cuts them."""

    def __init__(self, folder):
        self.state = load_with_torch(folder)

    def save(self, target, source):
        with pytest.warns(UserWarning, match="single process"):
            dcp.save(self.state, checkpoint_id=target)
        if (source / "common.pt").exists():
            shutil.copy(source / "common.pt", target)
        return target


def test_layers_in_one_tensor_vocabulary_padded_and_optimizer_beside(golden_dist, config, tmp_path):
    """What older Megatron, a larger vocabulary and a training run leave in the files."""
    config = {**config, "num_hidden_layers": 2, "first_k_dense_replace": 2}
    config["num_nextn_predict_layers"] = 0
    rewriter = Rewriter(golden_dist)
    state = {
        k: v for k, v in rewriter.state.items() if not k.startswith(("mtp.", "decoder.layers."))
    }
    dense = {k: v for k, v in rewriter.state.items() if k.startswith("decoder.layers.0.")}
    for name, value in dense.items():
        state[name.replace("layers.0.", "layers.")] = torch.stack([value, value * 2])
    padding = torch.ones(16, 256, dtype=torch.bfloat16)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.cat([state[name], padding])
    state["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(256)
    state["rng_state/shard_0_1"] = torch.zeros(3)
    genuine, rewriter.state = rewriter.state, state
    source = rewriter.save(tmp_path / "old", golden_dist)
    report = lingconv.inspect(source, given=SourceOverrides(config))
    assert report.sound
    assert {kind: held.entries for kind, held in report.left_out.items()} == {
        "optimizer state": 1, "random state": 1,
    }  # fmt: skip
    assert sum("16 rows of padding" in str(fault) for fault in report.faults) == 2
    lingconv.convert(source, tmp_path / "hf", given=SourceOverrides(config))
    found = read_tensors(tmp_path / "hf")
    weight = genuine["decoder.layers.0.self_attention.linear_proj.weight"]
    for layer, factor in ((0, 1), (1, 2)):
        assert torch.equal(found[f"model.layers.{layer}.attention.dense.weight"], weight * factor)
    assert found["lm_head.weight"].shape == (512, 256)


def test_main_params_of_the_optimizer(golden, golden_dist, config, tmp_path):
    """Weights in FP32, of which the checkpoint's own are the roundings."""
    rewriter = Rewriter(golden_dist)
    fine = {}
    for name, value in list(rewriter.state.items()):
        if value.dtype == torch.bfloat16:
            fine[name] = value.float() * (1 + 2**-10)
            prefix = "chained_1." if "experts.experts" in name else ""
            rewriter.state[f"{prefix}optimizer.state.fp32_param.{name}"] = fine[name]
            rewriter.state[f"{prefix}optimizer.state.exp_avg.{name}"] = torch.zeros(value.shape)
    source = rewriter.save(tmp_path / "m", golden_dist)
    request = ConvertOptions(dtype="f32")
    lingconv.convert(
        source, tmp_path / "hf", request, given=SourceOverrides(config, main_params=True)
    )
    found = read_tensors(tmp_path / "hf")
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert torch.equal(found["model.layers.0.attention.dense.weight"], fine[name])
    experts = fine["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"]
    assert torch.equal(found["model.layers.1.mlp.experts.5.down_proj.weight"], experts[5])
    lingconv.convert(source, tmp_path / "plain", given=SourceOverrides(config))
    assert_same_model(golden, tmp_path / "plain")
    with pytest.raises(lingconv.CheckpointError, match="no optimizer state"):
        lingconv.plan(golden_dist, given=SourceOverrides(config, main_params=True))


# Faults ----------------------------------------------------------------------------------------


def broken(golden, tmp_path, change):
    target = to_megatron(golden, tmp_path / "m")
    change(target / ITERATION)
    return target


def refuses(target, tmp_path, *words, **given):
    """Whether `plan` refuses, and names all of `words`."""
    with pytest.raises(lingconv.CheckpointError) as caught:
        lingconv.plan(target, given=SourceOverrides(**given) if given else None)
    text = "\n".join([str(caught.value), *map(str, caught.value.faults), *caught.value.details])
    assert [word for word in words if word not in text] == [], text
    return caught.value.faults


def edit_metadata(folder, change):
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_a_file_that_is_not_there(golden, tmp_path):
    target = broken(golden, tmp_path, lambda folder: (folder / "__0_0.distcp").unlink())
    (fault,) = refuses(target, tmp_path, "__0_0.distcp", "is missing")
    assert fault.hint == "fetch the missing files again"


def test_a_file_that_is_cut_short(golden, tmp_path):
    def cut(folder):
        with (folder / "__0_0.distcp").open("r+b") as file:
            file.truncate(3_000_000)

    (fault,) = refuses(broken(golden, tmp_path, cut), tmp_path, "__0_0.distcp", "cut short")
    assert fault.hint == "fetch the file again"


def test_all_experts_dropped_without_a_word(golden, tmp_path):
    """As a converter once did (Megatron-LM issue 5844): every one of them is named."""

    def drop(metadata):
        for name in [n for n in metadata.state_dict_metadata if "experts.experts" in n]:
            del metadata.state_dict_metadata[name]

    target = broken(golden, tmp_path, lambda folder: edit_metadata(folder, drop))
    names = [
        f"{prefix}mlp.experts.experts.linear_{fc}.weight"
        for prefix in ("decoder.layers.1.", "mtp.layers.0.transformer_layer.")
        for fc in ("fc1", "fc2")
    ]
    refuses(target, tmp_path, *names)


def test_one_chunk_dropped(golden, tmp_path):
    name = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"

    def drop(metadata):
        for key in [key for key in metadata.storage_data if key.fqn == name]:
            del metadata.storage_data[key]

    target = broken(golden, tmp_path, lambda folder: edit_metadata(folder, drop))
    refuses(target, tmp_path, name, "is listed, and not where it is")


@pytest.mark.parametrize(
    ("sizes", "offsets"), [((10**12, 0), (0, 0)), ((64, 256), (10**9, 0)), ((256,), (0,))]
)
def test_chunks_that_are_no_part_of_their_tensor(golden, sizes, offsets, tmp_path):
    name = "decoder.layers.0.self_attention.linear_proj.weight"

    def lie(metadata):
        (chunk,) = metadata.state_dict_metadata[name].chunks
        for key, place in list(metadata.storage_data.items()):
            if key.fqn == name:
                index = type(key)(name, torch.Size(offsets))
                metadata.storage_data[index] = place
        chunk.sizes, chunk.offsets = torch.Size(sizes), torch.Size(offsets)

    target = broken(golden, tmp_path, lambda folder: edit_metadata(folder, lie))
    refuses(target, tmp_path, name, "is no part of [256, 256]")


def test_a_tensor_that_nobody_maps(golden, tmp_path):
    def add(metadata):
        norm = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
        metadata.state_dict_metadata["decoder.surprise.weight"] = norm
        for key, place in list(metadata.storage_data.items()):
            if key.fqn == "decoder.final_layernorm.weight":
                index = type(key)("decoder.surprise.weight", key.offset)
                metadata.storage_data[index] = place

    target = broken(golden, tmp_path, lambda folder: edit_metadata(folder, add))
    refuses(target, tmp_path, "decoder.surprise.weight")
    lingconv.convert(target, tmp_path / "hf", ConvertOptions(drop=("decoder.surprise.*",)))
    assert_same_model(golden, tmp_path / "hf")


def test_shapes_that_contradict_the_arguments(golden, config, tmp_path):
    target = to_megatron(golden, tmp_path / "m")
    changed = {**config, "num_key_value_heads": 4}
    (target / "config.json").write_text(json.dumps(changed))
    refuses(target, tmp_path, "num_query_groups", "linear_qkv.weight", "[512, 256]", "[768, 256]")


def test_what_shapes_say_and_what_the_user_adds(golden, golden_dist, config, tmp_path):
    with pytest.raises(lingconv.CheckpointError) as caught:
        lingconv.plan(golden_dist)
    missing = {detail.split("`")[1] for detail in caught.value.details}
    assert "hidden_size" not in missing
    settings = {key: config.get(key, config.get("partial_rotary_factor")) for key in missing}
    lingconv.convert(golden_dist, tmp_path / "hf", given=SourceOverrides(settings=settings))
    assert_same_model(golden, tmp_path / "hf")
    rebuilt = json.loads((tmp_path / "hf/config.json").read_text())
    sizes = {
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "num_experts", "moe_intermediate_size", "num_shared_experts",
        "moe_shared_expert_intermediate_size", "num_nextn_predict_layers", "num_hidden_layers",
        "first_k_dense_replace", "tie_word_embeddings", "use_qk_norm", "use_qkv_bias",
        "moe_router_enable_expert_bias",
    }  # fmt: skip
    assert sizes & missing == set()
    assert {key: rebuilt[key] for key in sizes} == {key: config[key] for key in sizes}


def test_nothing_says_what_it_is(golden_dist):
    with pytest.raises(lingconv.CheckpointError) as caught:
        lingconv.inspect(golden_dist)
    assert "`config=FILE`" in caught.value.hint


def test_damaged_metadata_never_escapes_as_another_error(golden_dist):
    """Cut and flipped bytes give a HeaderError, or something that is still a directory."""
    data = (golden_dist / ".metadata").read_bytes()
    rng = np.random.default_rng(5)
    for _ in range(300):
        hurt = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(hurt), 3):
            hurt[place] = rng.integers(0, 256)
        try:
            torch_dist.read_metadata(bytes(hurt))
        except HeaderError:
            continue


# Pickles ---------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "it ran")


def archive_with(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_no_payload_runs(golden, tmp_path):
    """In `.metadata`, in common.pt and in the entry of a weight."""
    proof = tmp_path / "proof"
    payload = Payload(proof)

    def in_metadata(folder):
        edit_metadata(folder, lambda metadata: metadata.state_dict_metadata.update(x=payload))

    def in_common(folder):
        (folder / "common.pt").write_bytes(archive_with({"args": payload}))

    def in_entry(folder):
        def move(metadata):
            place = next(
                place
                for key, place in metadata.storage_data.items()
                if key.fqn == "decoder.final_layernorm.weight"
            )
            data = archive_with(payload)
            place.relative_path, place.offset, place.length = "evil.distcp", 0, len(data)
            (folder / "evil.distcp").write_bytes(data)

        edit_metadata(folder, move)

    for number, plant in enumerate((in_metadata, in_common, in_entry)):
        folder = to_megatron(golden, tmp_path / f"m{number}")
        plant(folder / ITERATION)
        proof.unlink(missing_ok=True)  # pickling it above may have been a reading, too
        with suppress(lingconv.CheckpointError):
            lingconv.inspect(folder)
        assert not proof.exists()
    pickle.loads(pickle.dumps(payload))
    assert proof.exists()  # the payload itself works


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 255, 256, 2**31, -(2**40), 2**70, 1.5, "", "a\nb", "ä" * 300,
        [], {}, (), [1, (2, "x")], {"a": {"b": [None]}},
    ],
)  # fmt: skip
def test_plain_values_survive(value):
    data = pickles.dumps(value)
    assert pickle.loads(data) == value
    assert pickles.loads(data) == value


def test_unknown_classes_are_inert_records():
    import decimal

    found = pickles.loads(pickle.dumps({"x": decimal.Decimal("1.5"), "y": 3}))
    assert found["y"] == 3
    assert isinstance(found["x"], OpaqueObject)
    assert (found["x"].name, found["x"].args) == ("decimal.Decimal", ("1.5",))
