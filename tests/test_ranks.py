"""The files of Megatron's ranks: spread anyhow, loaded by megatron-core, put together again."""

import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

import lingconv
from lingconv.containers.megatron.rank_assembly import find_parallel
from lingconv.model.parallelism import Parallel, all_ranks
from lingconv.plans.options import ConvertOptions, MegatronOptions
from tests.support import assert_same_model, read_tensors

ROOT = Path(__file__).parents[1]
SIMPLE = ("1 1 1", "2 1 1", "1 2 1")
ITERATION = "iter_0000001"


def to_ranks(source, target, parallel, experts="grouped", mtp="transformer_layer", **options):
    spec = "te" if experts != "sequential" else "local"
    megatron = MegatronOptions(spec=spec, experts=experts, parallel=parallel, mtp_module=mtp)
    request = ConvertOptions(layout="megatron-ranks", megatron=megatron, **options)
    lingconv.convert(source, target, request)
    return target


def file_of(target, rank):
    return target / ITERATION / rank / "model_optim_rng.pt"


def load(path):
    return torch.load(path, weights_only=False)


GRID = [
    Parallel(tp, pp, ep, etp)
    for tp, pp, ep in product((1, 2, 4), (1, 2), (1, 2, 4))
    for etp in sorted({1, tp})
]


WAYS = [(parallel, experts) for parallel in GRID for experts in ("grouped", "sequential", "fused")]


def pairs(way):
    """Return each two settings of a way, with their numbers."""
    parallel, experts = way
    return set(combinations(enumerate((*parallel[:4], experts)), 2))


def covering(ways):
    """Return few of the ways, in which each two settings meet that meet in any of them."""
    missing, chosen = set().union(*map(pairs, ways)), []
    while missing:
        chosen.append(max(ways, key=lambda way: len(pairs(way) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


FEW = covering(WAYS)


@pytest.mark.parametrize(
    ("parallel", "experts"),
    [pytest.param(*way, marks=[] if way in FEW else pytest.mark.long) for way in WAYS],
    ids=["-".join(map(str, (*parallel[:4], experts))) for parallel, experts in WAYS],
)
def test_there_and_back(golden, parallel, experts, tmp_path):
    target = to_ranks(golden, tmp_path / "m", parallel, experts)
    assert len(list(target.rglob("*.pt"))) == len(all_ranks(parallel))
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads(
        (golden / "config.json").read_text()
    )


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Ling-mini's widths, eight layers of four experts, and two MTP layers."""
    folder = tmp_path_factory.mktemp("deep")
    preset = json.loads((ROOT / "formats/presets/ling-mini-2.0.json").read_text())
    preset.update(num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    preset.update(vocab_size=512, hidden_size=256, num_attention_heads=2, num_key_value_heads=1)
    (folder / "config.json").write_text(json.dumps(preset))
    lingconv.synth(folder / "config.json", folder / "hf", layers=8, dense_layers=2, mtp=2)
    return folder / "hf"


@pytest.mark.parametrize(
    "parallel",
    [
        Parallel(pp=2, vpp=2),
        Parallel(pp=4, vpp=2, tp=2, etp=2),
        Parallel(pp=3, layers=(2, 3, 3)),
        Parallel(pp=2, layers=(7, 1), ep=2),
    ],
)
def test_virtual_stages_and_uneven_ones(deep, parallel, tmp_path):
    target = to_ranks(deep, tmp_path / "m", parallel)
    names = [
        f"{path.parent.name}/{key}/{name}"
        for path in target.rglob("*.pt")
        for key, value in load(path).items()
        if key.startswith("model")
        for name in value
        if not name.endswith("_extra_state")
    ]
    found = find_parallel(names, vars(load(next(target.rglob("*.pt")))["args"]))
    assert found[:5] == parallel[:5]
    assert not parallel.layers or found.layers == parallel.layers
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(deep, tmp_path / "hf")


def test_a_vocabulary_is_padded_as_megatron_pads_it(tmp_path):
    """To a multiple of 128 for each rank, with zeros; Ling's 157184 at TP 8 becomes 157696."""
    assert Parallel(tp=8).padded(157184, 128) == 157696
    preset = json.loads((ROOT / "formats/presets/ling-mini-2.0.json").read_text())
    preset.update(num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2)
    preset.update(vocab_size=1000, hidden_size=512, num_attention_heads=4)
    (tmp_path / "config.json").write_text(json.dumps(preset))
    lingconv.synth(tmp_path / "config.json", tmp_path / "hf", layers=2, dense_layers=1)
    target = to_ranks(tmp_path / "hf", tmp_path / "m", Parallel(tp=4, etp=4))
    word = "embedding.word_embeddings.weight"
    shares = [load(file_of(target, f"mp_rank_{rank:02d}"))["model"][word] for rank in range(4)]
    assert [share.shape for share in shares] == [(256, 512)] * 4
    whole = torch.cat(shares)
    assert torch.equal(whole[:1000], read_tensors(tmp_path / "hf")["model.word_embeddings.weight"])
    assert not whole[1000:].any()
    for path in target.rglob("*.pt"):
        assert zipfile.ZipFile(path).testzip() is None
    assert load(file_of(target, "mp_rank_03"))["args"].padded_vocab_size == 1024
    lingconv.convert(target, tmp_path / "again")
    assert_same_model(tmp_path / "hf", tmp_path / "again")


def test_names_are_those_of_a_ranks_own_modules(golden, tmp_path):
    target = to_ranks(golden, tmp_path / "m", Parallel(tp=2, pp=2, ep=4, etp=1))
    state = load(file_of(target, "mp_rank_01_001_003"))
    model = state["model"]
    assert "embedding.word_embeddings.weight" in model  # for the MTP layer behind the last stage
    assert model["decoder.layers.0.mlp.experts.linear_fc1.weight1"].shape == (256, 256)
    assert "decoder.layers.1.self_attention.linear_qkv.weight" not in model
    assert model["decoder.layers.0.mlp.shared_experts.linear_fc2.weight"].shape == (256, 64)
    assert model["decoder.layers.0.mlp.router.expert_bias"].dtype == torch.float32
    assert state["args"].pipeline_model_parallel_size == 2
    assert state["args"].expert_tensor_parallel_size == 1


@pytest.mark.parametrize("dtype", ["", "f32"])
def test_fused_experts_are_what_grouped_mlp_multiplies_by(golden, dtype, tmp_path):
    """GroupedMLP views weight1 as [experts, hidden, 2 width], weight2 as [.., width, hidden]."""
    target = to_ranks(golden, tmp_path / "m", Parallel(ep=2), "fused", dtype=dtype)
    hf = read_tensors(golden)
    for rank in range(2):
        model = load(file_of(target, f"mp_rank_00_{rank:03d}"))["model"]
        prefix = "decoder.layers.1.mlp.experts."
        one, two = model[prefix + "weight1"], model[prefix + "weight2"]
        assert (one.shape, two.shape) == ((256, 4 * 2 * 128), (4 * 128, 256))
        for local in range(4):
            expert = f"model.layers.1.mlp.experts.{4 * rank + local}."
            gate, up = (hf[f"{expert}{name}_proj.weight"] for name in ("gate", "up"))
            expected = torch.cat([gate, up]).T.to(one.dtype)
            assert torch.equal(one.view(4, 256, -1)[local], expected)
            down = hf[f"{expert}down_proj.weight"].T.to(one.dtype)
            assert torch.equal(two.view(4, -1, 256)[local], down)
        assert not [name for name in model if name.endswith("experts._extra_state")]


@pytest.mark.parametrize(
    "parallel",
    ["2 2 2", "4 1 2", *(pytest.param(one, marks=pytest.mark.long) for one in SIMPLE)],
)
def test_megatron_core_loads_every_name_and_no_other(golden, parallel, tmp_path):
    """`load_state_dict(strict=True)` of each rank's own module, then the golden logits."""
    tp, pp, ep = map(int, parallel.split())
    newer = tuple(map(int, version("megatron-core").split(".")[:2])) >= (0, 17)
    mtp = "mtp_model_layer" if newer else "transformer_layer"
    target = to_ranks(golden, tmp_path / "m", Parallel(tp, pp, ep, 1), "sequential", mtp)
    expected = ROOT / "tests/data/tiny-ling-v2.expected.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "tests.megatron_client", target / ITERATION, expected, "-",
         *parallel.split()],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])["errors"]
    assert errors
    assert all(len(each) == 2 and max(each) < 1e-4 for each in errors), errors


# What other people's files look like -----------------------------------------------------------


def rewrite(path, change):
    state = load(path)
    change(state)
    torch.save(state, path)


def test_files_that_torch_saved_with_optimizer_and_padding(golden, tmp_path):
    target = to_ranks(golden, tmp_path / "m", Parallel(tp=2, etp=2))
    for number in range(2):

        def change(state, number=number):
            model = state["model"]
            for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                # 528 rows in all: each rank has 264 of them
                whole = torch.cat(
                    [load_golden(golden, name), torch.zeros(16, 256, dtype=torch.bfloat16)]
                )
                model[name] = torch.nn.Parameter(whole.chunk(2)[number].clone())
            state["optimizer"] = {"state": [torch.zeros(100), {"x": torch.zeros(20)}]}
            state["args"].padded_vocab_size = 528

        rewrite(file_of(target, f"mp_rank_{number:02d}"), change)
    report = lingconv.inspect(target)
    assert report.sound, report.faults
    assert report.left_out["optimizer"] == (4, 2 * 480)
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")


def load_golden(golden, name):
    names = {
        "embedding.word_embeddings.weight": "model.word_embeddings.weight",
        "output_layer.weight": "lm_head.weight",
    }
    return read_tensors(golden)[names[name]]


def test_mtp_layers_under_their_newer_name(golden, tmp_path):
    """core_v0.17.0 calls the module `mtp_model_layer`."""
    target = to_ranks(golden, tmp_path / "m", Parallel(ep=2))

    def rename(state):
        model = state["model"]
        for name in list(model):
            model[name.replace("transformer_layer", "mtp_model_layer")] = model.pop(name)

    for rank in range(2):
        rewrite(file_of(target, f"mp_rank_00_{rank:03d}"), rename)
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")


def test_names_are_those_of_megatron_core_0_19(tmp_path):
    """Every name of the model's own `state_dict()`, as 0.19.2 has it, and no other."""
    source = ROOT / "tests/data/forward/two-mtp"
    target = to_ranks(source, tmp_path / "m", Parallel(), "sequential", mtp="mtp_model_layer")
    state = load(file_of(target, "mp_rank_00"))["model"]
    names = json.loads((ROOT / "tests/data/megatron-0.19/module_names.json").read_text())
    assert sorted(name for name in state if not name.endswith("_extra_state")) == names
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(source, tmp_path / "hf")


def test_what_age_the_names_of_mtp_layers_are_of_is_said(golden, tmp_path):
    def warnings(**options):
        megatron = MegatronOptions(**options)
        return lingconv.plan(
            golden, ConvertOptions(layout="megatron-ranks", megatron=megatron)
        ).warnings

    assert any("`mtp_module=mtp_model_layer`" in text for text in warnings())
    assert not any("mtp_module" in text for text in warnings(mtp_module="mtp_model_layer"))
    for layout, word in (("megatron", "mtp_model_layer"), ("megatron-ranks", "mtp_layer")):
        options = ConvertOptions(layout=layout, megatron=MegatronOptions(mtp_module=word))
        with pytest.raises(lingconv.UsageError, match=r"mtp_module|torch_dist") as caught:
            lingconv.plan(golden, options)
        assert caught.value.hint


# Faults ----------------------------------------------------------------------------------------


def refuses(target, *words):
    with pytest.raises(lingconv.CheckpointError) as caught:
        lingconv.plan(target)
    text = "\n".join([str(caught.value), *map(str, caught.value.faults)])
    assert [word for word in words if word not in text] == [], text
    return caught.value.faults


def test_a_rank_that_is_not_there(golden, tmp_path):
    target = to_ranks(golden, tmp_path / "m", Parallel(tp=2, pp=2, ep=2, etp=2))
    shutil.rmtree(file_of(target, "mp_rank_01_001_000").parent)
    shutil.rmtree(file_of(target, "mp_rank_00_000_001").parent)
    faults = refuses(target, "tp 2, pp 2, ep 2")
    assert [fault.file for fault in faults] == [
        f"{rank}/model_optim_rng.pt" for rank in ("mp_rank_00_000_001", "mp_rank_01_001_000")
    ]
    assert {fault.hint for fault in faults} == {"fetch the files of all ranks"}


def test_replicas_that_disagree(golden, tmp_path):
    target = to_ranks(golden, tmp_path / "m", Parallel(tp=2, etp=2))
    name = "decoder.layers.1.mlp.router.weight"

    def change(state):
        state["model"][name][3, 5] += 1

    rewrite(file_of(target, "mp_rank_01"), change)
    refuses(target, name, "mp_rank_01", "replicas disagree")


def test_names_and_shapes_that_do_not_fit(golden, tmp_path):
    target = to_ranks(golden, tmp_path / "m", Parallel(ep=2))

    def change(state):
        model = state["model"]
        model["decoder.layers.9.surprise.weight"] = torch.zeros(3)
        del model["decoder.layers.1.mlp.experts.linear_fc2.weight3"]
        model["decoder.final_layernorm.weight"] = torch.zeros(7)

    rewrite(file_of(target, "mp_rank_00_001"), change)
    refuses(
        target, "decoder.layers.9.surprise.weight", "experts.linear_fc2.weight3",
        "decoder.final_layernorm.weight", "[7]", "[256]",
    )  # fmt: skip


def test_a_file_that_is_cut_short(golden, tmp_path):
    target = to_ranks(golden, tmp_path / "m", Parallel(tp=2, etp=2))
    path = file_of(target, "mp_rank_01")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    (fault,) = refuses(target, "mp_rank_01", "is cut short")
    assert fault.hint == "fetch the file again"


@pytest.mark.parametrize("nbytes", [0, 3, 1000])
@pytest.mark.parametrize("beside", [True, False])
def test_every_rank_is_cut_short(golden, nbytes, beside, tmp_path):
    """One fault for each file, whether or not something else says what the model is."""
    target = to_ranks(golden, tmp_path / "m", Parallel(pp=2, ep=2))
    paths = sorted(target.glob(f"{ITERATION}/*/*.pt"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:nbytes])
    if not beside:
        (target / "config.json").unlink()
    faults = refuses(target, "is cut short")
    assert [fault.file for fault in faults] == [str(path.relative_to(target)) for path in paths]


def test_no_payload_runs_in_a_rank(golden, tmp_path):
    from tests.test_torch_dist import Payload

    target = to_ranks(golden, tmp_path / "m", Parallel())
    proof = tmp_path / "proof"
    path = file_of(target, "mp_rank_00")
    rewrite(path, lambda state: state.update(rng_state=[Payload(proof)]))
    proof.unlink(missing_ok=True)
    lingconv.convert(target, tmp_path / "hf")
    assert_same_model(golden, tmp_path / "hf")
    assert not proof.exists()
    load(path)
    assert proof.exists()  # torch.load does run it


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (Parallel(tp=3), "over 3 ranks"),
        (Parallel(ep=3), "8 experts"),
        (Parallel(pp=3), "2 layers"),
        (Parallel(tp=1, etp=2, ep=2), "share the file"),
        (Parallel(pp=2, layers=(1, 2)), "whose sum is 2"),
        (Parallel(tp=0), "at least 1"),
    ],
)
def test_what_cannot_be_spread(golden, parallel, words, tmp_path):
    with pytest.raises(lingconv.UsageError, match=words):
        to_ranks(golden, tmp_path / "m", parallel)
