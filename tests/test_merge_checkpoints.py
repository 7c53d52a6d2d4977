"""Averages, against a plain float64 reference and against mergekit's own."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import save_file

import lingconv
from lingconv import ConvertOptions, Fp8Options, GgufOptions, Resources
from lingconv.api import merge_checkpoints, plan_average
from lingconv.encodings.kernels import weighted_sum as kernel
from lingconv.errors import CheckpointError, DestinationError, ResourceError, UsageError
from lingconv.plans import checkpoint_weights as weighting
from lingconv.plans.checkpoint_weights import Decay, Weighting
from lingconv.plans.plan import Plan
from tests.support import (
    assert_same_model,
    copy_checkpoint,
    edit_json,
    read_tensors,
    reference_dequantize,
    rewrite,
    same_bits,
    tree_digest,
)

ROOT = Path(__file__).parents[1]
COUNT = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five checkpoints of one training run, as a constant learning rate leaves them."""
    folder = tmp_path_factory.mktemp("run")
    lingconv.synth("tiny", folder / "s0", mtp=1)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, COUNT):
        copy_checkpoint(folder / f"s{step - 1}", folder / f"s{step}")

        def train(tensors):
            for name, tensor in tensors.items():
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() / 4
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)

        rewrite(folder / f"s{step}", train)
    return [folder / f"s{step}" for step in range(COUNT)]


def reference(sources, weights):
    """Return the weighted sums in float64, in the order of the sources."""
    sums = {name: np.zeros(tensor.shape) for name, tensor in read_tensors(sources[0]).items()}
    for source, weight in zip(sources, weights, strict=True):
        for name, tensor in read_tensors(source).items():
            sums[name] += weight * tensor.double().numpy()
    return sums


def nearest(wanted, dtype):
    """Round float64 to `dtype` once, ties to even, by trying the neighbours of a first guess."""
    kinds = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    exact = torch.from_numpy(np.asarray(wanted))
    guess = exact.to(dtype)
    bits = guess.view(kinds[dtype])
    found = guess.clone()
    for step in (-1, 1):
        other = (bits + step).view(dtype)
        closer = (other.double() - exact).abs() - (found.double() - exact).abs()
        even = (other.view(kinds[dtype]) & 1) == 0
        found = torch.where((closer < 0) | ((closer == 0) & even), other, found)
    return found


def assert_average(found, sums):
    assert found.keys() == sums.keys()
    wrong = [n for n, t in found.items() if not same_bits(t, nearest(sums[n], t.dtype))]
    assert wrong == []


@pytest.mark.parametrize("decay", [*Decay, "mean"])
def test_the_float64_sum_rounded_once(run, decay, tmp_path):
    weights = weighting.mean(COUNT) if decay == "mean" else weighting.by_decay(decay, COUNT)
    merge_checkpoints(run, tmp_path / "out", weights)
    assert_average(read_tensors(tmp_path / "out"), reference(run, weights.weights))
    report = lingconv.inspect(tmp_path / "out")
    assert not report.faults


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_other_dtypes_are_rounded_once_too(run, dtype, tmp_path):
    weights = weighting.by_decay(Decay.COSINE, COUNT)
    merge_checkpoints(run, tmp_path / "out", weights, ConvertOptions(dtype=dtype))
    found = read_tensors(tmp_path / "out")
    assert {t.dtype for t in found.values()} <= {torch.float32, torch.float16}
    assert_average(found, reference(run, weights.weights))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 12, 17])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize(("least", "size"), [(-140, 5000), (-60, 5000), (-60, 4999)])
def test_kernels_at_every_number_of_checkpoints(count, dtype, least, size):
    """Subnormals, huge values, ties and signed zeros among them; odd lengths."""
    rng = np.random.default_rng(count)
    wide = rng.standard_normal((count, size)).astype(np.float32)
    wide *= np.float32(2.0) ** rng.integers(least, 120, (count, size)).astype(np.float32)
    wide[:, :100] = rng.integers(-3, 4, (count, 100))
    wide[:, 100:200] = -0.0
    bits = wide.view(np.uint32) & np.uint32(0xFFFF0000)
    terms = (bits >> 16).astype(np.uint16) if dtype == np.uint16 else wide
    numbers = bits.view(np.float32) if dtype == np.uint16 else wide
    weights = rng.random(count)
    weights /= weights.sum()
    sums = np.zeros(size)
    for weight, row in zip(weights, numbers, strict=True):
        sums += weight * row.astype(np.float64)
    parts, done = [], 0
    while done < count:
        width = next(width for width in kernel.WIDTHS if width <= count - done)
        parts.append(slice(done, done + width))
        done += width
    held = np.full(size, np.nan)
    for place, part in enumerate(parts[:-1]):
        kernel.add(terms[part].copy(), weights[part], held, begin=place == 0)
    last, begin = parts[-1], len(parts) == 1
    bf16, f32, odd = np.empty(size, np.uint16), np.empty(size, "f4"), np.empty(size, "f4")
    arguments = terms[last].copy(), weights[last], held, begin
    assert not kernel.finish(*arguments, bf16, False)
    assert not kernel.finish(*arguments, f32, False)
    assert not kernel.finish(*arguments, odd, True)
    assert np.array_equal(f32, sums.astype(np.float32))
    found = torch.from_numpy(bf16.view(np.int16)).view(torch.bfloat16)
    assert same_bits(found, nearest(sums, torch.bfloat16))
    with np.errstate(over="ignore"):
        assert np.array_equal(odd.astype(np.float16), sums.astype(np.float16))


def test_a_tie_of_the_float32_is_none_of_the_float64():
    """1 + 2^-8 + 2^-40 rounds up to BF16, though its float32 is the tie that rounds to even."""
    terms = np.array([[1.0 + 2.0**-8], [2.0**-40]], np.float32)
    target = np.empty(1, np.uint16)
    kernel.finish(terms, np.ones(2), np.zeros(0), True, target, False)
    assert target[0] == 0x3F81
    assert torch.tensor(1 + 2.0**-8 + 2.0**-40, dtype=torch.float64).bfloat16() == 1.0


def test_ties_of_bf16_sums_go_to_even_unless_there_is_more():
    ties = np.array([[1.0, 1.0 + 2.0**-7, 1.0, -1.0], [2.0**-8] * 3 + [-(2.0**-8)]], np.float32)
    more = np.array([[0.0, 0.0, 2.0**-40, 0.0]], np.float32)
    terms = (np.concatenate([ties, more, more * 0]).view(np.uint32) >> 16).astype(np.uint16)
    target = np.empty(4, np.uint16)
    assert not kernel.finish(terms, np.ones(4), np.zeros(0), True, target, False)
    assert [hex(bits) for bits in target] == ["0x3f80", "0x3f82", "0x3f81", "0xbf80"]


@pytest.mark.parametrize("count", [1, 3, 8, 13])
@pytest.mark.parametrize("size", [10, kernel.READ_ELEMENTS, 2 * kernel.READ_ELEMENTS + 7])
def test_files_are_averaged_in_one_call(tmp_path, count, size):
    """Byte for byte what reading them one by one and adding gives; short files are noticed."""
    rng = np.random.default_rng(size + count)
    terms = (rng.standard_normal((count, size)).astype("f4").view("u4") >> 16).astype("u2")
    files = []
    for number, row in enumerate(terms):
        path = tmp_path / f"{number}"
        path.write_bytes(b"x" * (number + 1) + row.tobytes())
        files.append(path.open("rb"))
    weights = rng.random(count)
    sums = np.zeros(size)
    for weight, row in zip(weights, terms, strict=True):
        sums += weight * (row.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    fds = np.array([file.fileno() for file in files], np.intc)
    offsets = np.arange(1, count + 1)
    room = np.empty(kernel.WIDTHS[0] * kernel.READ_ELEMENTS, np.uint16)
    target = np.empty(size, np.uint16)
    assert kernel.average_files(fds, offsets, weights, room, target, False) == 0
    found = torch.from_numpy(target.view(np.int16)).view(torch.bfloat16)
    assert same_bits(found, nearest(sums, torch.bfloat16))
    offsets[-1] += 1
    met = kernel.average_files(fds, offsets, weights, room, target, False)
    assert met == kernel.UNREADABLE
    for file in files:
        file.close()


def test_threads_memory_and_order_of_work_change_no_byte(run, tmp_path):
    weights = weighting.by_decay(Decay.ONE_MINUS_SQRT, COUNT)
    options = ConvertOptions(max_shard_bytes=500_000)
    for name, resources in {
        "one": Resources(jobs=1),
        "many": Resources(jobs=7),
        "little": Resources(jobs=2, max_memory_bytes=40 << 20),
    }.items():
        merge_checkpoints(run, tmp_path / name, weights, options, resources=resources)
    wanted = tree_digest(tmp_path / "one")
    assert tree_digest(tmp_path / "many") == wanted
    assert tree_digest(tmp_path / "little") == wanted
    with pytest.raises(ResourceError, match="the budget is"):
        merge_checkpoints(
            run, tmp_path / "none", weights, options, resources=Resources(max_memory_bytes=1000)
        )


@pytest.fixture(scope="module")
def mixed(run, tmp_path_factory):
    """The same checkpoints, each in another layout, and what they hold as Hugging Face's BF16."""
    folder = tmp_path_factory.mktemp("mixed")
    requests = [
        ConvertOptions(layout="megatron"),
        ConvertOptions(layout="hf-merged", merged="transformers"),
        ConvertOptions(layout="megatron-ranks"),
        ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="bf16")),
        ConvertOptions(max_shard_bytes=700_000),
    ]
    for number, (source, options) in enumerate(zip(run, requests, strict=True)):
        target = folder / ("m3.gguf" if options.layout == "gguf" else f"m{number}")
        lingconv.convert(source, target, options)
    return [folder / name for name in ("m0", "m1", "m2", "m3.gguf", "m4")]


def test_any_mix_of_layouts(run, mixed, tmp_path):
    weights = weighting.by_decay(Decay.LINEAR, COUNT)
    merge_checkpoints(run, tmp_path / "wanted", weights)
    merge_checkpoints(mixed, tmp_path / "found", weights)
    assert_same_model(tmp_path / "wanted", tmp_path / "found")


def test_megatron_iterations_straight_from_training(run, tmp_path):
    """Iteration folders without a config.json beside them: the arguments say what they are."""
    iterations = []
    for step, source in enumerate(run[:3]):
        target = tmp_path / "runs" / f"{step}"
        lingconv.convert(source, target, ConvertOptions(layout="megatron"))
        iterations.append(target / "iter_0000001")
    weights = weighting.mean(3)
    merge_checkpoints(iterations, tmp_path / "found", weights)
    merge_checkpoints(run[:3], tmp_path / "wanted", weights)
    assert_same_model(tmp_path / "wanted", tmp_path / "found")
    record = json.loads((tmp_path / "found/lingconv.json").read_text())
    assert {source["revision"] for source in record["sources"]} == {"iteration 1"}


@pytest.mark.parametrize(
    "options",
    [
        ConvertOptions(dtype="fp8"),
        ConvertOptions(dtype="fp8", fp8=Fp8Options(scheme="channel")),
        ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q4_k_m")),
        ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q8_0")),
        ConvertOptions(layout="megatron"),
        ConvertOptions(layout="megatron-ranks"),
        ConvertOptions(layout="hf-merged", merged="automodel", dtype="bf16"),
        ConvertOptions(layout="hf-merged", dtype="fp8"),
    ],
    ids=lambda o: f"{o.layout}-{o.dtype}-{o.fp8.scheme}-{o.gguf.outtype}",
)
def test_any_target_in_one_pass(run, options, tmp_path):
    """The same bytes as from the average in F32, which loses next to nothing."""
    weights = weighting.by_decay(Decay.COSINE, COUNT)
    merge_checkpoints(run, tmp_path / "f32", weights, ConvertOptions(dtype="f32"))
    merge_checkpoints(run, tmp_path / "one", weights, options)
    if options.layout.startswith("megatron") or options.merged == "automodel":
        # These keep what the base is in: BF16, rounded once.
        merge_checkpoints(run, tmp_path / "plain", weights)
        lingconv.convert(tmp_path / "one", tmp_path / "back", ConvertOptions(dtype=options.dtype))
        assert_same_model(tmp_path / "plain", tmp_path / "back")
        return
    lingconv.convert(tmp_path / "f32", tmp_path / "two", options)
    weight_files = {".gguf", ".safetensors"}
    one, two = (
        {path.suffix: path for path in (tmp_path / n).iterdir() if path.suffix in weight_files}
        for n in ("one", "two")
    )
    if options.layout == "gguf":
        left, right = (GGUFReader(files[".gguf"]) for files in (one, two))
        pairs = zip(left.tensors, right.tensors, strict=True)
        assert all(a.name == b.name and np.array_equal(a.data, b.data) for a, b in pairs)
        said = left.fields["lingconv.average"].contents()
        assert said.startswith("cosine decay: ")
        assert str(run[0]) in said
        return
    found, wanted = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    quantized = [name for name in wanted if "_scale" in name or name + "_scale_inv" in wanted]
    assert quantized
    assert all(same_bits(found[name], wanted[name]) for name in quantized)


def test_quantized_sources_are_dequantized_exactly(run, tmp_path):
    """FP8 times its scale in float32, not rounded to BF16 before it is added."""
    sources = []
    for number, source in enumerate(run[:3]):
        lingconv.quantize(source, tmp_path / f"q{number}")
        sources.append(tmp_path / f"q{number}")
    merge_checkpoints(sources, tmp_path / "out", weighting.mean(3), ConvertOptions(dtype="bf16"))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    sums = np.zeros(read_tensors(sources[0])[name].shape)
    for source in sources:
        tensors = read_tensors(source)
        plain = reference_dequantize(
            tensors[name], tensors[name + "_scale_inv"], dtype=torch.float32
        )
        sums += (1 / 3) * plain.double().numpy()
    assert same_bits(read_tensors(tmp_path / "out")[name], nearest(sums, torch.bfloat16))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    with pytest.raises(UsageError, match="in the last checkpoint"):
        merge_checkpoints(sources, tmp_path / "none", weighting.mean(3))
    with pytest.raises(UsageError, match="round it twice"):
        merge_checkpoints(sources, tmp_path / "n", weighting.mean(3), ConvertOptions(dtype="fp8"))


def test_excluded_tensors_are_the_last_ones(run, tmp_path):
    weights = weighting.mean(COUNT)
    exclude = ("*.expert_bias", "re:.*norm")
    merge_checkpoints(run, tmp_path / "out", weights, ConvertOptions(exclude=exclude))
    found, last = read_tensors(tmp_path / "out"), read_tensors(run[-1])
    kept = [name for name in found if "norm" in name or name.endswith("expert_bias")]
    assert len(kept) > 5
    assert all(same_bits(found[name], last[name]) for name in kept)
    sums = reference(run, weights.weights)
    averaged = {name: tensor for name, tensor in found.items() if name not in kept}
    assert_average(averaged, {name: sums[name] for name in averaged})
    record = json.loads((tmp_path / "out/lingconv.json").read_text())
    assert record["dropped"]["taken from the last checkpoint: `--exclude`"]["count"] == len(kept)
    with pytest.raises(UsageError, match="exclude"):
        merge_checkpoints(run, tmp_path / "n", weights, ConvertOptions(exclude=("none",)))


def test_expert_bias_and_norms_are_averaged_by_default(run, tmp_path):
    merge_checkpoints(run, tmp_path / "out", weighting.mean(COUNT))
    found, last = read_tensors(tmp_path / "out"), read_tensors(run[-1])
    for name in ("model.layers.1.mlp.gate.expert_bias", "model.norm.weight"):
        assert found[name].dtype == last[name].dtype
        assert not same_bits(found[name], last[name])


def test_what_has_no_weight_is_not_read(run, tmp_path):
    """A constant learning rate is the last checkpoint, byte for byte, NaN in others or not."""
    bad = copy_checkpoint(run[0], tmp_path / "bad")
    name = "model.norm.weight"
    rewrite(bad, lambda t: t.update({name: t[name] * float("nan")}))
    sources = [bad, run[1], run[2]]
    constant = Weighting.of_decay("constant", [1.0, 1.0])
    result = merge_checkpoints(sources, tmp_path / "out", constant)
    assert_same_model(run[2], tmp_path / "out")
    assert [w for w in result.warnings if "weight 0" in w] == [
        f"{source}: has weight 0 and is not read" for source in sources[:2]
    ]
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(sources, tmp_path / "n", weighting.mean(3))
    assert f"{bad}/model.safetensors: {name}: NaN" in caught.value.message


def test_nonfinite_numbers_are_found_in_the_checkpoint_that_has_them(run, tmp_path):
    bad = copy_checkpoint(run[2], tmp_path / "bad")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def spoil(tensors):
        tensors[name][5, 7] = float("inf")

    rewrite(bad, spoil)
    sources = [*run[:2], bad, *run[3:]]
    for options in (ConvertOptions(), ConvertOptions(dtype="f32"), ConvertOptions(dtype="fp8")):
        with pytest.raises(CheckpointError) as caught:
            merge_checkpoints(sources, tmp_path / "n", weighting.mean(COUNT), options, fresh=True)
        assert f"{bad}/model.safetensors: {name}: NaN or Inf at or below row 5" in (
            caught.value.message
        )
    allowed = ConvertOptions(allow_nonfinite=True)
    merge_checkpoints(sources, tmp_path / "out", weighting.mean(COUNT), allowed)
    assert read_tensors(tmp_path / "out")[name][5, 7] == float("inf")


class TestNotOneModel:
    def refused(self, sources, tmp_path, *matches):
        with pytest.raises(CheckpointError) as caught:
            merge_checkpoints(sources, tmp_path / "out", weighting.mean(len(sources)))
        for match in matches:
            assert any(match in detail for detail in caught.value.details), caught.value.details
        assert not (tmp_path / "out").exists()
        return caught.value

    def test_other_numbers_are_all_listed(self, run, tmp_path):
        one, two = tmp_path / "one", tmp_path / "two"
        lingconv.synth("tiny", one, layers=3, mtp=0)
        copy_checkpoint(run[0], two)
        edit_json(two / "config.json", lambda c: c.update(rope_theta=1e6, norm_topk_prob=False))
        error = self.refused(
            [one, two, run[1]],
            tmp_path,
            "`num_hidden_layers` is 3",
            "`num_nextn_predict_layers` is 0",
            "`rope_theta` is 1000000.0",
            "`norm_topk_prob` is False",
        )
        assert {fault.file for fault in error.faults} == {str(one), str(two)}

    def test_missing_tensors_are_named_with_their_checkpoint(self, run, tmp_path):
        one = copy_checkpoint(run[0], tmp_path / "one")
        rewrite(one, lambda t: t.pop("model.norm.weight"))
        two = copy_checkpoint(run[1], tmp_path / "two")
        rewrite(two, lambda t: t.update(stray=torch.zeros(3)))
        self.refused(
            [one, two, run[2]],
            tmp_path,
            f"{one}: model.norm.weight: is missing",
            f"{two}/model.safetensors: stray: is no tensor",
        )

    def test_what_no_tensor_depends_on_is_said(self, run, tmp_path):
        one = copy_checkpoint(run[0], tmp_path / "one")
        edit_json(one / "config.json", lambda c: c.update(seq_aux=True, initializer_range=0.006))
        (one / "chat_template.jinja").write_text("{{ 1 }}")
        two = copy_checkpoint(run[1], tmp_path / "two")
        (two / "chat_template.jinja").write_text("{{ 2 }}")
        result = merge_checkpoints([one, two], tmp_path / "out", weighting.mean(2))
        text = "\n".join(result.warnings)
        assert "`seq_aux` is True, in the last one not there" in text
        assert "`initializer_range` is 0.006, in the last one" in text
        assert f"{one}: chat_template.jinja is not that of {two}" in text
        assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ 2 }}"

    def test_one_twice_or_alone(self, run, tmp_path):
        with pytest.raises(UsageError, match="twice"):
            merge_checkpoints([run[0], run[1], f"{run[0]}/"], tmp_path / "out", weighting.mean(3))
        with pytest.raises(UsageError, match="two checkpoints"):
            merge_checkpoints([run[0]], tmp_path / "out", weighting.mean(1))
        with pytest.raises(DestinationError, match="inside the source"):
            merge_checkpoints(run[:2], run[0] / "out", weighting.mean(2))


def test_plans_of_averages_survive_json(run, mixed):
    for sources, terms in ((run[1:] + run[:1], 2), (mixed, COUNT)):
        built, _ = plan_average(
            sources, weighting.mean(COUNT), ConvertOptions(exclude=("lm_head",))
        )
        again = Plan.from_json(json.loads(json.dumps(built.to_json())))
        assert again == built
        assert again.digest == built.digest
        # Checkpoints that look alike are planned as one, whatever their number.
        assert max(len(transfer.terms) for transfer in built.transfers()) == terms
        assert built.read_bytes > COUNT * 0.9 * built.tensor_bytes


def test_weights_are_part_of_the_plan(run, tmp_path):
    merge_checkpoints(run, tmp_path / "out", weighting.mean(COUNT))
    again = merge_checkpoints(run, tmp_path / "out", weighting.mean(COUNT))
    assert again.files_written == 0
    with pytest.raises(DestinationError):
        merge_checkpoints(run, tmp_path / "out", weighting.by_decay(Decay.COSINE, COUNT))
    with pytest.raises(DestinationError):
        merge_checkpoints([*run[1:], run[0]], tmp_path / "out", weighting.mean(COUNT))


def test_record_and_card(run, tmp_path):
    base = copy_checkpoint(run[1], tmp_path / "base")
    (base / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- moe\npipeline_tag: text-generation\n---\n\n# Ling\n\nOld text."
    )
    snapshot = tmp_path / "models--inclusionAI--Ling-mini-base-2.0/snapshots" / ("ab" * 20)
    copy_checkpoint(run[0], snapshot)
    weights = weighting.by_hand("1/4,3/4", 2)
    merge_checkpoints([snapshot, base], tmp_path / "out", weights)
    record = json.loads((tmp_path / "out/lingconv.json").read_text())
    assert record["sources"] == [
        {"uri": str(snapshot), "revision": "commit " + "ab" * 20, "weight": 0.25},
        {"uri": str(base), "revision": "", "weight": 0.75},
    ]
    from huggingface_hub import ModelCard

    card = ModelCard.load(tmp_path / "out/README.md")
    data = card.data.to_dict()
    assert data["base_model"] == ["inclusionAI/Ling-mini-base-2.0"]
    assert data["base_model_relation"] == "merge"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["moe", "merge", "lingconv"]
    assert "| inclusionAI/Ling-mini-base-2.0 | commit " + "ab" * 20 + " | 0.25 |" in card.text
    assert "| base | - | 0.75 |" in card.text
    assert card.text.index("An average") < card.text.index("Old text.")
    assert not lingconv.inspect(tmp_path / "out").faults


def test_cards_that_are_none(run, tmp_path):
    for number, text in enumerate(("no front matter", "---\n: [broken\n---\nrest", "")):
        base = copy_checkpoint(run[1], tmp_path / f"base{number}")
        (base / "README.md").write_text(text)
        merge_checkpoints([run[0], base], tmp_path / f"out{number}", weighting.mean(2))
        found = (tmp_path / f"out{number}/README.md").read_text()
        assert text.splitlines()[-1:] == [] or text.splitlines()[-1] in found
        assert "An average of 2 checkpoints" in found


@pytest.mark.skipif(find_spec("mergekit") is None, reason="mergekit is not installed")
def test_mergekit_thinks_so_too(run, tmp_path):
    """The arithmetic of its linear merge, in float64, for every tensor: its planner, which asks
    transformers for the names of a model's tensors, does not know this family."""
    from mergekit.merge_methods.linear import linear_merge

    weights = weighting.by_decay(Decay.COSINE, COUNT)
    merge_checkpoints(run, tmp_path / "out", weights)
    sources = [read_tensors(source) for source in run]
    for name, tensor in read_tensors(tmp_path / "out").items():
        batch = SimpleNamespace(tensors=[source[name].double()[None] for source in sources])
        theirs = linear_merge.implementation(
            batch, torch.tensor([weights.weights], dtype=torch.float64), normalize=False
        )[0]
        # Its products and sums may be fused: next to a tie, both neighbours are as near.
        least = (nearest(theirs.numpy(), tensor.dtype).double() - theirs).abs()
        assert ((tensor.double() - theirs).abs() <= least + 1e-13).all(), name


def test_a_hundred_checkpoints_open_more_files_than_allowed_at_first(run, tmp_path):
    """The limit of open files is raised where the system lets it."""
    limited = (
        "import resource, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))\n"
        "from lingconv.plans import checkpoint_weights as weighting\n"
        "from lingconv.api import merge_checkpoints\n"
        "sources = sys.argv[2:]\n"
        "merge_checkpoints(sources, sys.argv[1], weighting.mean(len(sources)))"
    )
    sources = []
    for number in range(100):
        folder = tmp_path / f"s{number}"
        folder.mkdir()
        for path in run[number % COUNT].iterdir():
            if path.is_file():
                (folder / path.name).hardlink_to(path)
        sources.append(folder)
    command = [sys.executable, "-c", limited, tmp_path / "out", *sources]
    subprocess.run(command, check=True, cwd=ROOT)
    wanted = reference(sources, [1 / 100] * 100)
    assert_average(read_tensors(tmp_path / "out"), wanted)


def test_a_report_to_look_at(run, tmp_path):
    weights = weighting.by_decay(Decay.COSINE, 3)
    merge_checkpoints(run[:3], tmp_path / "out", weights, report=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Cosine decay of 3 checkpoints" in page
    assert page.count("<svg") == 2
    assert all(str(source) in page for source in run[:3])
    assert all(f"{weight:.6f}" in page for weight in weights.weights)
    assert 'src="http' not in page
    assert "<link" not in page
    assert "<script" not in page


def test_f32_masters_of_an_optimizer_are_not_lost(run, tmp_path):
    """Sources in F32 are added as they are, not by way of BF16."""
    sources = []
    for number, source in enumerate(run[:2]):
        folder = copy_checkpoint(source, tmp_path / f"f{number}")
        tensors = {n: t.float() + 1e-5 for n, t in read_tensors(source).items()}
        for path in folder.glob("*.safetensors"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        sources.append(folder)
    merge_checkpoints(sources, tmp_path / "out", weighting.mean(2), ConvertOptions(dtype="bf16"))
    found = read_tensors(tmp_path / "out")
    assert_average(found, reference(sources, [0.5, 0.5]))
