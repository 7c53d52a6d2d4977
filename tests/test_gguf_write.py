"""GGUF files as a target: what llama.cpp's converter and llama-quantize write, in one pass."""

import hashlib
import json
import re
import shutil
from contextlib import suppress

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import lingconv
import lingconv.execution.pipeline.strip_executor
import lingconv.execution.pipeline.worker_pool
from lingconv.api import convert, open_model
from lingconv.containers.gguf.tokenizer import CHECK_TEXT
from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.ggml_ftype import FileType
from lingconv.encodings.kernels.ggml_encode import QUANTIZERS
from lingconv.errors import CheckpointError, DestinationError, Interrupted, UsageError
from lingconv.execution.pipeline.worker_pool import WorkerPool
from lingconv.planner.planner import build_plan
from lingconv.plans.options import ConvertOptions, GgufOptions
from lingconv.plans.plan import Plan
from tests.conftest import DATA
from tests.support import copy_checkpoint, edit_json, header_of, rewrite

EXPECTED = json.loads((DATA / "tiny-ling-v2.gguf-expected.json").read_text())
LING = "bailingmoe2"
ROOT = DATA.parents[1]


def to_gguf(outtype, *, mtp="keep", max_shard_bytes=None, **more):
    return ConvertOptions(
        layout="gguf",
        gguf=GgufOptions(outtype=outtype, **more),
        mtp=mtp,
        max_shard_bytes=max_shard_bytes,
    )


def tensors_of(*paths):
    """Return type, shape (numpy's order) and digest of every tensor, as gguf-py reads them."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            [int(size) for size in tensor.shape],
            hashlib.sha256(tensor.data.tobytes()).hexdigest(),
        )
        for path in paths
        for tensor in gguf.GGUFReader(path).tensors
    }


def metadata_of(path):
    return {field.name: field.contents() for field in gguf.GGUFReader(path).fields.values()}


@pytest.mark.parametrize("outtype", EXPECTED)
def test_tensors_and_metadata_equal_llama_cpp(golden, tmp_path, outtype):
    convert(golden, tmp_path / "out.gguf", to_gguf(outtype.lower()))
    expected = {name: tuple(value) for name, value in EXPECTED[outtype]["tensors"].items()}
    assert tensors_of(tmp_path / "out.gguf") == expected
    found = metadata_of(tmp_path / "out.gguf")
    for key, value in EXPECTED[outtype]["metadata"].items():
        if str(value).startswith("["):  # only its length is kept
            assert len(found.pop(key)) == int(value[1:-1])
        else:
            assert found.pop(key) == value
    assert not found


@pytest.mark.parametrize("mix", FileType)
def test_gguf_py_reads_every_type(golden, tmp_path, mix):
    convert(golden, tmp_path / "out.gguf", to_gguf(mix))
    model = open_model(golden)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert len(reader.tensors) == 44
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    values = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    shard = golden / model.stored["model.word_embeddings.weight"].extents[0].file
    original = load_file(shard)["model.word_embeddings.weight"].float().numpy()
    error = np.linalg.norm(values - original) / np.linalg.norm(original)
    assert error < (0.9 if mix.value.startswith("tq") else 0.4)
    assert (error == 0) == (mix in (FileType.BF16, FileType.F32))


def test_auto_is_the_float_that_the_weights_are_in(golden, tmp_path):
    convert(golden, tmp_path / "f16", ConvertOptions(dtype="f16"))
    for source, name in ((golden, "BF16"), (tmp_path / "f16", "F16")):
        out = tmp_path / f"{name}.gguf"
        convert(source, out, to_gguf("auto"))
        assert tensors_of(out)["output.weight"][0] == name


def test_fp8_goes_through_bf16_and_says_so(golden_channel, tmp_path):
    convert(golden_channel, tmp_path / "bf16", ConvertOptions(dtype="bf16"))
    convert(tmp_path / "bf16", tmp_path / "two.gguf", to_gguf("q4_k_m"))
    done = convert(golden_channel, tmp_path / "one.gguf", to_gguf("q4_k_m"))
    assert tensors_of(tmp_path / "one.gguf") == tensors_of(tmp_path / "two.gguf")
    assert any("quantized from FP8" in warning for warning in done.warnings)


def test_mtp_layers_can_be_left_out(golden, tmp_path):
    convert(golden, tmp_path / "out.gguf", to_gguf("q8_0", mtp="drop"))
    expected = EXPECTED["Q8_0"]["tensors"]
    kept = {name: tuple(v) for name, v in expected.items() if not name.startswith("blk.2.")}
    assert tensors_of(tmp_path / "out.gguf") == kept
    found = metadata_of(tmp_path / "out.gguf")
    assert (found[f"{LING}.block_count"], found[f"{LING}.nextn_predict_layers"]) == (2, 0)


# Splits -------------------------------------------------------------------------------------------


def test_a_split_has_llama_cpps_names_and_metadata(golden, tmp_path):
    done = convert(golden, tmp_path / "tiny.gguf", to_gguf("q8_0", max_shard_tensors=10))
    paths = [tmp_path / f"tiny-{number:05d}-of-00005.gguf" for number in range(1, 6)]
    assert sorted(tmp_path.glob("*.gguf")) == paths
    assert done.files_written == 5
    expected = {name: tuple(value) for name, value in EXPECTED["Q8_0"]["tensors"].items()}
    assert tensors_of(*paths) == expected
    for number, path in enumerate(paths):
        found = metadata_of(path)
        split = found["split.no"], found["split.count"], found["split.tensors.count"]
        assert split == (number, 5, 44)
        assert ("tokenizer.ggml.tokens" in found) == (number == 0)


def test_files_are_no_larger_than_asked_for(golden, tmp_path):
    convert(golden, tmp_path / "tiny.gguf", to_gguf("bf16", max_shard_bytes=1_500_000))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.gguf")]
    assert len(sizes) > 3
    assert all(size < 1_600_000 for size in sizes)  # headers come on top


def test_a_folder_gets_gguf_pys_name(golden, tmp_path):
    convert(golden, tmp_path / "out", to_gguf("q4_k_m"))
    names = [path.name for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert names == ["tiny-ling-8x1.8M-v2-Q4_K_M.gguf"]


# Types for some tensors ---------------------------------------------------------------------------


def test_tensor_types_come_before_the_mix(golden, tmp_path):
    rules = (("ffn_down_exps", "f16"), ("blk.1.attn", "Q8_0"), ("token_embd", "bf16"))
    convert(golden, tmp_path / "out.gguf", to_gguf("q4_k_m", tensor_types=rules))
    types = {name: kind for name, (kind, _, _) in tensors_of(tmp_path / "out.gguf").items()}
    assert types["blk.1.ffn_down_exps.weight"] == types["blk.2.ffn_down_exps.weight"] == "F16"
    assert types["blk.1.attn_output.weight"] == "Q8_0"
    assert types["blk.0.attn_output.weight"] == "Q5_K"
    assert types["token_embd.weight"] == "BF16"
    assert types["blk.1.attn_q_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (to_gguf("q5_k_x"), "`outtype` is `q5_k_x`"),
        (to_gguf("q4_k_m", tensor_types=(("ffn_dwon", "q8_0"),)), "matches nothing"),
        (to_gguf("q4_k_m", tensor_types=(("ffn", "iq2_xs"),)), "`tensor_types` is `iq2_xs`"),
        (to_gguf("q4_k_m", tensor_types=(("ffn(", "q8_0"),)), "no regular expression"),
        (to_gguf("bf16", tensor_types=(("ffn", "q8_0"),)), "changes a quantized mix"),
        (to_gguf("q4_k_m", mtp="only"), "MTP layers alone"),
        (to_gguf("q4_k_m", metadata=(("bailingmoe2.block_count", "3"),)), "`general.`"),
        (ConvertOptions(layout="gguf", dtype="bf16"), "not by `dtype`"),
        (ConvertOptions(gguf=GgufOptions(outtype="q8_0")), "are for GGUF"),
    ],
)
def test_requests_that_cannot_be_meant(golden, options, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        build_plan(open_model(golden), options)


# Metadata and tokenizer ---------------------------------------------------------------------------


def test_the_model_card_is_heard(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "Ling-Tiny-Chat-v2.5")
    (source / "README.md").write_text(
        "---\nlicense: mit\nbase_model: inclusionAI/Ling-mini-2.0\nlanguage: [en, zh]\n"
        "pipeline_tag: text-generation\n---\n# Tiny\n"
    )
    mine = (("general.quantized_by", "tester"),)
    convert(source, tmp_path / "out.gguf", to_gguf("q8_0", metadata=mine))
    found = metadata_of(tmp_path / "out.gguf")
    assert found["general.license"] == "mit"
    assert found["general.base_model.0.name"] == "Ling Mini 2.0"
    assert (
        found["general.base_model.0.repo_url"] == "https://huggingface.co/inclusionAI/Ling-mini-2.0"
    )
    assert found["general.languages"] == ["en", "zh"]
    assert found["general.quantized_by"] == "tester"
    assert (found["general.finetune"], found["general.version"]) == ("Chat", "v2.5")


def test_yarn_is_told(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    edit_json(source / "config.json", lambda config: config.update(rope_scaling=yarn))
    convert(source, tmp_path / "out.gguf", to_gguf("bf16"))
    found = metadata_of(tmp_path / "out.gguf")
    assert found[f"{LING}.rope.scaling.type"] == "yarn"
    assert found[f"{LING}.rope.scaling.factor"] == 4.0
    assert found[f"{LING}.rope.scaling.original_context_length"] == 1024


def test_tokens_get_types_and_padding(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")

    def add(tokenizer):
        entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        texts = {"<|fim|>": 500, "tool": 501, "<pad>": 502}
        vocab = {t: n for t, n in tokenizer["model"]["vocab"].items() if n < 500}
        pairs = [p if isinstance(p, list) else p.split() for p in tokenizer["model"]["merges"]]
        tokenizer["model"]["vocab"] = {**vocab, **texts}
        tokenizer["model"]["merges"] = [pair for pair in pairs if "".join(pair) in vocab]
        tokenizer["added_tokens"] += [
            {**entry, "id": number, "content": text, "special": False}
            for text, number in texts.items()
        ]

    edit_json(source / "tokenizer.json", add)
    convert(source, tmp_path / "out.gguf", to_gguf("bf16"))
    found = metadata_of(tmp_path / "out.gguf")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 512
    assert tokens[500:504] == ["<|fim|>", "tool", "<pad>", "[PAD503]"]
    assert types[500:504] == [3, 4, 3, 5]
    assert types[5] == 1


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_were_added_beside_tokenizer_json(file, golden, tmp_path):
    """transformers adds them when it loads; ids and texts are its."""
    from transformers import PreTrainedTokenizerFast

    source = copy_checkpoint(golden, tmp_path / "in")
    held = json.loads((source / "tokenizer.json").read_text())
    first = len(PreTrainedTokenizerFast.from_pretrained(source))
    texts = {"<section>": first, "<|tool|>": first + 1}
    assert not texts.keys() & {token["content"] for token in held["added_tokens"]}
    if file == "added_tokens.json":
        (source / file).write_text(json.dumps(texts))
    else:
        entries = {
            str(number): {"content": text, "special": text == "<|tool|>", "normalized": False}
            for text, number in texts.items()
        }
        edit_json(source / file, lambda config: config.update(added_tokens_decoder=entries))
        theirs = PreTrainedTokenizerFast.from_pretrained(source)
        assert {text: theirs.convert_tokens_to_ids(text) for text in texts} == texts
    convert(source, tmp_path / "out.gguf", to_gguf("bf16"))
    found = metadata_of(tmp_path / "out.gguf")
    assert found["tokenizer.ggml.tokens"][first : first + 2] == [*texts]
    assert found["tokenizer.ggml.token_type"][first : first + 2] == [4, 3]


@pytest.mark.parametrize(("decoder", "says"), [
    ({"5": {"content": "other"}}, "token 5 is '.*' in tokenizer.json, and 'other' in the"),
    ({"x": {"content": "new"}}, "added token 'new' with the id 'x'"),
    ({"261": {"special": True}}, r"`added_tokens_decoder.'261'`.*content"),
    ({"600": {"content": "new"}}, "has token 600, the model has 512"),
])  # fmt: skip
def test_added_tokens_that_cannot_be(decoder, says, golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    edit_json(source / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out.gguf", to_gguf("bf16"))


def forget_control_tokens(tokenizer):
    for token in tokenizer["added_tokens"]:
        token["content"] = token["content"].replace("role", "part")


def test_an_unknown_tokenizer_is_refused_before_the_first_byte(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    edit_json(source / "tokenizer.json", forget_control_tokens)
    with pytest.raises(UsageError, match="not a tokenizer that is known") as caught:
        convert(source, tmp_path / "out.gguf", to_gguf("bf16"))
    assert "`tokenizer_pre=bailingmoe2`" in caught.value.hint
    assert not list(tmp_path.glob("*.gguf*"))
    convert(source, tmp_path / "out.gguf", to_gguf("bf16", tokenizer_pre="gpt-2"))
    assert metadata_of(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == "gpt-2"


def test_a_tokenizer_is_known_by_the_tokens_of_the_check_text(golden, tmp_path):
    """The released tokenizer is not at hand: a family that knows another one is as good."""
    source = copy_checkpoint(golden, tmp_path / "in")
    edit_json(source / "tokenizer.json", forget_control_tokens)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    check = hashlib.sha256(str(tokenizer.encode(CHECK_TEXT).ids).encode()).hexdigest()
    family = (ROOT / "formats" / "ling2.toml").read_text()
    ling = "9b1be57e70d20d9501b2b3186e792d81181ae36ada3903c26f9fea418cf87206"
    assert ling in family
    (tmp_path / "own.toml").write_text(family.replace(ling, check))
    done = convert(
        source, tmp_path / "out.gguf", to_gguf("bf16"), formats=str(tmp_path / "own.toml")
    )
    assert not done.warnings
    assert metadata_of(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == "bailingmoe2"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "not a JSON object"),
        (
            lambda folder: edit_json(
                folder / "tokenizer.json", lambda value: value["model"].update(type="Unigram")
            ),
            "not byte-level BPE",
        ),
        (
            lambda folder: edit_json(
                folder / "tokenizer.json", lambda value: value["model"]["vocab"].update(far=512)
            ),
            "has token 512, the model has 512",
        ),
        (
            lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
            "model card",
        ),
        (
            lambda folder: edit_json(
                folder / "tokenizer.json", lambda value: value.update(post_processor=[1])
            ),
            "tokenizer",
        ),
    ],
)
def test_broken_descriptions_are_refused_before_the_first_byte(golden, tmp_path, change, says):
    source = copy_checkpoint(golden, tmp_path / "in")
    change(source)
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out.gguf", to_gguf("bf16"))
    assert not (tmp_path / "out.gguf").exists()


def test_an_architecture_that_llama_cpp_lacks(golden, tmp_path):
    source = copy_checkpoint(golden, tmp_path / "in")
    edit_json(source / "config.json", lambda c: c.update(architectures=["LLaDA2MoeModelLM"]))
    with pytest.raises(UsageError, match="no architecture for LLaDA2MoeModelLM"):
        convert(source, tmp_path / "out.gguf", to_gguf("bf16"))


# Numbers that do not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_what_no_block_can_hold_is_refused(golden, tmp_path, value):
    source = copy_checkpoint(golden, tmp_path / "in")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite(source, lambda tensors: tensors[name].view(-1).__setitem__(700, float(value)))
    for outtype in ("q4_k_m", "q8_0", "q6_k"):
        with pytest.raises(CheckpointError, match=re.escape(name)):
            convert(source, tmp_path / f"{outtype}.gguf", to_gguf(outtype))
        assert not (tmp_path / f"{outtype}.gguf").exists()


# One file among others ----------------------------------------------------------------------------


def test_files_beside_the_target_are_left_alone(golden, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / "other.gguf").write_text("mine")
    convert(golden, tmp_path / "a.gguf", to_gguf("q8_0"))
    convert(golden, tmp_path / "b.gguf", to_gguf("q4_0"))
    again = convert(golden, tmp_path / "a.gguf", to_gguf("q8_0"))
    assert (again.files_written, again.files_found_finished) == (0, 1)
    with pytest.raises(DestinationError, match="another conversion"):
        convert(golden, tmp_path / "a.gguf", to_gguf("q4_0"))
    convert(golden, tmp_path / "a.gguf", to_gguf("q4_0"), fresh=True)
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(tmp_path / "b.gguf")
    assert (tmp_path / "config.json").read_text() == "mine"
    with pytest.raises(DestinationError, match=r"other\.gguf is there"):
        convert(golden, tmp_path / "other.gguf", to_gguf("q8_0"), fresh=True)
    assert (tmp_path / "other.gguf").read_text() == "mine"


def test_safetensors_do_not_go_into_a_gguf_file(golden, tmp_path):
    with pytest.raises(UsageError, match="name of a GGUF file"):
        convert(golden, tmp_path / "out.gguf", ConvertOptions())


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_single_file_goes_on_where_it_stopped(golden, tmp_path, monkeypatch, jobs):
    monkeypatch.setattr(lingconv.execution.pipeline.worker_pool, "PIECE_BYTES", 200_000)
    resources = lingconv.Resources(jobs=jobs)
    convert(golden, tmp_path / "a" / "x.gguf", to_gguf("q8_0"), resources=resources)
    fill, filled = lingconv.execution.pipeline.strip_executor.StripExecutor.fill, []

    def stop_early(self, strip, output, turn):
        if len(filled) == 12:
            raise KeyboardInterrupt
        filled.append(strip)
        return fill(self, strip, output, turn)

    monkeypatch.setattr(
        lingconv.execution.pipeline.strip_executor.StripExecutor, "fill", stop_early
    )
    target, stops, total = tmp_path / "b" / "x.gguf", 0, 0
    while not target.exists():
        filled.clear()
        with suppress(Interrupted):
            convert(golden, target, to_gguf("q8_0"), resources=resources)
        total += len(filled)
        stops += 1
        assert stops < 20
    assert stops > 3  # one run of 12 strips does not suffice, and each went on
    assert total < 2 * 44  # little was done twice
    assert target.read_bytes() == (tmp_path / "a" / "x.gguf").read_bytes()


def test_a_partial_file_that_is_gone_is_written_anew(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(lingconv.execution.pipeline.worker_pool, "PIECE_BYTES", 100_000)
    target = tmp_path / "x.gguf"
    monkeypatch.setattr(
        WorkerPool, "_finish", lambda *_: (_ for _ in ()).throw(Interrupted("stop"))
    )
    with pytest.raises(Interrupted):
        convert(golden, target, to_gguf("q8_0"))
    journal = (tmp_path / ".lingconv" / "x.gguf" / "journal.jsonl").read_text()
    assert journal.count('"piece"') > 5
    (tmp_path / "x.gguf.partial").unlink()
    monkeypatch.undo()
    convert(golden, target, to_gguf("q8_0"))
    expected = {name: tuple(value) for name, value in EXPECTED["Q8_0"]["tensors"].items()}
    assert tensors_of(target) == expected


def test_a_plan_of_gguf_survives_json(golden):
    plan = build_plan(open_model(golden), to_gguf("q4_k_m", max_shard_tensors=20))
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert [header_of(file) for file in again.files] == [header_of(file) for file in plan.files]


@pytest.mark.parametrize("kind", [GgmlType.Q4_K, GgmlType.Q3_K, GgmlType.Q8_0])
def test_float32_sources_are_not_rounded_on_the_way(golden, tmp_path, kind):
    """Not even a source of another float: blocks are made of what the source really says."""
    source = tmp_path / "f32"
    shutil.copytree(golden, source)
    name = "model.layers.0.mlp.up_proj.weight"
    rng = np.random.default_rng(0)
    values = rng.standard_normal((512, 256)).astype(np.float32)

    def change(tensors):
        tensors[name] = tensors[name].float()
        tensors[name].copy_(torch.from_numpy(values))

    rewrite(source, change)
    out = tmp_path / "out.gguf"
    convert(source, out, to_gguf(kind.lower() if kind == "Q8_0" else f"{kind.lower()}_s"))
    found = next(t for t in gguf.GGUFReader(out).tensors if t.name == "blk.0.ffn_up.weight")
    blocks = np.empty((values.size // kind.elements, kind.nbytes), np.uint8)
    QUANTIZERS[kind](values.reshape(-1, kind.elements), blocks)
    assert found.tensor_type.name == kind
    assert found.data.tobytes() == blocks.tobytes()
