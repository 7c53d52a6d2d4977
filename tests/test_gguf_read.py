"""GGUF files as a source: every type, splits, and files that lie."""

import json
import re
import shutil
import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from lingconv.api import convert, diff, forward, inspect, open_model, verify
from lingconv.containers.gguf.header import MAX_HEADER_BYTES, read_header
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.dtypes import GgmlType
from lingconv.encodings.ggml_ftype import FileType
from lingconv.encodings.kernels import ggml_decode
from lingconv.errors import CheckpointError, LingconvError, UsageError
from lingconv.plans.options import ConvertOptions, GgufOptions
from lingconv.verification.options import VerifyOptions
from tests.support import read_tensors, same_bits
from tests.test_gguf_write import tensors_of, to_gguf

BF16 = ConvertOptions(dtype="bf16")


@pytest.fixture(scope="module")
def files(golden, tmp_path_factory):
    """The golden model in some types, made once."""
    folder = tmp_path_factory.mktemp("gguf")
    for outtype in ("bf16", "q8_0", "q4_k_m"):
        convert(golden, folder / f"{outtype}.gguf", to_gguf(outtype))
    convert(golden, folder / "split.gguf", to_gguf("bf16", max_shard_tensors=15))
    return folder


# Back to Hugging Face -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["bf16.gguf", "split-00001-of-00003.gguf", "split-00003-of-00003.gguf"]
)
def test_there_and_back_changes_no_bit(golden, files, tmp_path, name):
    convert(files / name, tmp_path / "back", BF16)
    before, after = read_tensors(golden), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for tensor in before:
        assert same_bits(before[tensor], after[tensor]), tensor
    assert open_model(golden).symbols == open_model(tmp_path / "back").symbols
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((golden / "config.json").read_text())
    same = {key for key, value in original.items() if config.get(key) == value}
    assert original.keys() - same == {
        "eos_token_id", "pad_token_id",  # the tokenizer's own, which this config.json contradicts
        "max_window_layers", "mtp_loss_scaling_factor",
    }  # fmt: skip
    assert config["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 0},
        {"tie_word_embeddings": True},
        {"use_qk_norm": False, "moe_router_enable_expert_bias": False},
        {"use_qkv_bias": True, "use_bias": True, "n_group": 0, "topk_group": 0},
        {"rotary_dim": 64, "partial_rotary_factor": None, "rope_theta": 10000.5},
        {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512}},
        {"score_function": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.7},
        {"moe_shared_expert_intermediate_size": None, "num_shared_experts": 2},
        {"first_k_dense_replace": 0, "rms_norm_eps": 1e-5},
    ],
)
def test_every_switch_of_the_model_survives(golden, tmp_path, changes):
    from lingconv import synth

    config = {**json.loads((golden / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    synth(tmp_path / "config.json", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "x.gguf", to_gguf("bf16"))
    convert(tmp_path / "x.gguf", tmp_path / "back", BF16)
    before, after = open_model(tmp_path / "hf"), open_model(tmp_path / "back")
    assert before.symbols == after.symbols
    assert diff(tmp_path / "hf", tmp_path / "back").differences is not None
    tensors = read_tensors(tmp_path / "back")
    assert tensors.keys() == read_tensors(tmp_path / "hf").keys()
    for name, tensor in read_tensors(tmp_path / "hf").items():
        assert same_bits(tensor, tensors[name]), name


def test_the_tokenizer_is_rebuilt(golden, files, tmp_path):
    convert(files / "q8_0.gguf", tmp_path / "back", BF16)
    before = Tokenizer.from_file(str(golden / "tokenizer.json"))
    after = Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    assert before.get_vocab() == after.get_vocab()
    for text in ("<role>HUMAN</role>Hello world<|role_end|>", "in the order of it", "a\tb"):
        assert before.encode(text).ids == after.encode(text).ids
        assert after.decode(after.encode(text).ids, skip_special_tokens=False) == text
    config = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    original = json.loads((golden / "tokenizer_config.json").read_text())
    assert config == original
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def test_transformers_loads_the_rebuilt_tokenizer(files, tmp_path):
    from transformers import AutoTokenizer

    convert(files / "bf16.gguf", tmp_path / "back", BF16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back", config=None)
    assert tokenizer.eos_token == "<|role_end|>"
    text = tokenizer.apply_chat_template([{"role": "HUMAN", "content": "Hi"}], tokenize=False)
    assert text == "<role>HUMAN</role>Hi<|role_end|>"


@pytest.mark.parametrize("mix", FileType)
def test_every_type_is_decoded_as_gguf_py_decodes_it(golden, tmp_path, mix):
    convert(golden, tmp_path / "x.gguf", to_gguf(mix))
    convert(tmp_path / "x.gguf", tmp_path / "f32", ConvertOptions(dtype="f32"))
    convert(tmp_path / "x.gguf", tmp_path / "bf16", BF16)
    found, rounded = read_tensors(tmp_path / "f32"), read_tensors(tmp_path / "bf16")
    names = {"blk.1.ffn_down_exps.weight": "model.layers.1.mlp.experts.{}.down_proj.weight",
             "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
             "output.weight": "lm_head.weight"}  # fmt: skip
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.name in names:
            values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            parts = values if values.dim() == 3 else [values]
            for number, part in enumerate(parts):
                name = names[tensor.name].format(number)
                assert same_bits(found[name], part.contiguous()), name
                assert same_bits(rounded[name], part.bfloat16()), name


@pytest.mark.parametrize("kind", [kind for kind in GgmlType if kind.is_quantized])
def test_decoding_of_any_block_equals_gguf_py(kind):
    if kind == GgmlType.NVFP4:
        pytest.skip("needs the scale of the whole tensor")
    blocks = np.random.default_rng(kind.id).integers(0, 256, (512, kind.nbytes), np.uint8)
    values = np.empty((512, kind.elements), np.float32)
    ggml_decode.dequantize(kind, blocks, values)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.id))
    nan = np.isnan(values)
    assert np.array_equal(nan, np.isnan(expected))
    assert np.array_equal(values[~nan].view(np.uint32), expected[~nan].view(np.uint32))


def rewritten(source, target, change):
    """Copy a GGUF file with gguf-py's own writer; `change` gets name, data and type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "bailingmoe2")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, item)
    for tensor in reader.tensors:
        changed = change(tensor.name, tensor.data, tensor.tensor_type)
        if changed is not None:
            name, data, kind = changed
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_types_that_are_only_read(golden, files, tmp_path):
    kind = gguf.GGMLQuantizationType.IQ2_XS
    blocks = np.random.default_rng(0).integers(0, 256, (512, 74), np.uint8)
    blocks[:, 1] = 0x24  # scales that are finite
    expected = gguf.quants.dequantize(blocks, kind)

    def change(name, data, found):
        return (name, blocks, kind) if name == "blk.0.ffn_up.weight" else (name, data, found)

    source = rewritten(files / "bf16.gguf", tmp_path / "x.gguf", change)
    assert inspect(source).encodings["iq2_xs"] == 1
    convert(source, tmp_path / "back", ConvertOptions(dtype="f32"))
    found = read_tensors(tmp_path / "back")["model.layers.0.mlp.up_proj.weight"]
    assert same_bits(found, torch.from_numpy(expected))


def test_a_file_of_gguf_py_is_read(golden, files, tmp_path):
    source = rewritten(files / "q4_k_m.gguf", tmp_path / "x.gguf", lambda *item: item)
    assert inspect(source).sound
    convert(source, tmp_path / "a", BF16)
    convert(files / "q4_k_m.gguf", tmp_path / "b", BF16)
    ours, theirs = read_tensors(tmp_path / "b"), read_tensors(tmp_path / "a")
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


# GGUF to GGUF -------------------------------------------------------------------------------------


def test_from_bf16_gguf_the_bytes_are_the_same(golden, files, tmp_path):
    convert(files / "split-00002-of-00003.gguf", tmp_path / "x.gguf", to_gguf("q4_k_m"))
    assert tensors_of(tmp_path / "x.gguf") == tensors_of(files / "q4_k_m.gguf")
    left, right = (gguf.GGUFReader(p).fields for p in (tmp_path / "x.gguf", files / "q4_k_m.gguf"))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].contents() == right[name].contents(), name


def held_by(*paths):
    """Return tensors and key-values of a model in GGUF files, as gguf-py reads them."""
    readers = [gguf.GGUFReader(path) for path in sorted(paths)]
    tensors = {
        each.name: (each.tensor_type, each.data.tobytes()) for r in readers for each in r.tensors
    }
    fields = {name: (f.types, f.contents()) for name, f in readers[0].fields.items()}
    own = ("split.", "GGUF.")
    return tensors, {name: value for name, value in fields.items() if not name.startswith(own)}


@pytest.mark.parametrize(
    "outtype", ["q4_k_m", "q2_k", "iq4_xs", "tq2_0", "mxfp4_moe", "f16", "bf16"]
)
def test_splitting_and_merging_change_no_type(golden, tmp_path, outtype):
    """As llama-gguf-split does: every tensor and every key-value is what it was."""
    convert(golden, tmp_path / "one.gguf", to_gguf(outtype))
    convert(tmp_path / "one.gguf", tmp_path / "cut/cut.gguf", to_gguf("auto", max_shard_tensors=9))
    cut = [*(tmp_path / "cut").glob("*.gguf")]
    assert len(cut) == 5
    assert held_by(*cut) == held_by(tmp_path / "one.gguf")
    convert(min(cut), tmp_path / "again.gguf", to_gguf("auto"))
    assert held_by(tmp_path / "again.gguf") == held_by(tmp_path / "one.gguf")
    assert verify(tmp_path / "one.gguf", tmp_path / "again.gguf").kind == "relayout"


def test_metadata_is_edited_without_touching_a_tensor(files, tmp_path):
    options = to_gguf("auto", metadata=(("general.quantized_by", "me"),))
    convert(files / "q4_k_m.gguf", tmp_path / "x.gguf", options)
    tensors, fields = held_by(files / "q4_k_m.gguf")
    found, edited = held_by(tmp_path / "x.gguf")
    assert found == tensors
    assert {k: v for k, v in edited.items() if fields.get(k) != v}.keys() == {
        "general.quantized_by"
    }


def test_mtp_layers_are_dropped_from_a_quantized_file(files, tmp_path):
    options = ConvertOptions(layout="gguf", mtp="drop")
    convert(files / "q4_k_m.gguf", tmp_path / "x.gguf", options)
    tensors, _ = held_by(files / "q4_k_m.gguf")
    found, fields = held_by(tmp_path / "x.gguf")
    assert found == {name: tensors[name] for name in found}
    assert len(found) < len(tensors)
    assert fields["bailingmoe2.nextn_predict_layers"][1] == 0


def test_types_that_are_only_read_are_copied(files, tmp_path):
    kind = gguf.GGMLQuantizationType.IQ2_XS
    blocks = np.random.default_rng(0).integers(0, 256, (512, 74), np.uint8)

    def change(name, data, found):
        return (name, blocks, kind) if name == "blk.0.ffn_up.weight" else (name, data, found)

    source = rewritten(files / "bf16.gguf", tmp_path / "odd.gguf", change)
    convert(source, tmp_path / "cut/cut.gguf", to_gguf("auto", max_shard_tensors=9))
    assert held_by(*(tmp_path / "cut").glob("*.gguf")) == held_by(source)


def test_rounding_twice_has_to_be_allowed(files, tmp_path):
    with pytest.raises(UsageError, match="is q4_k already; q6_k would round it twice"):
        convert(files / "q4_k_m.gguf", tmp_path / "x.gguf", to_gguf("q6_k"))
    options = ConvertOptions(layout="gguf", gguf=GgufOptions(outtype="q6_k"), allow_requantize=True)
    convert(files / "q4_k_m.gguf", tmp_path / "x.gguf", options)
    assert inspect(tmp_path / "x.gguf").encodings["q6_k"] > 10
    convert(files / "q4_k_m.gguf", tmp_path / "same.gguf", to_gguf("q4_k_m"))
    assert tensors_of(tmp_path / "same.gguf") == tensors_of(files / "q4_k_m.gguf")


def test_blocks_do_not_go_into_safetensors(files, tmp_path):
    with pytest.raises(UsageError, match="which safetensors does not hold") as caught:
        convert(files / "q4_k_m.gguf", tmp_path / "x", ConvertOptions())
    assert "`dtype=bf16`" in caught.value.hint


def test_to_fp8_from_gguf(golden, files, tmp_path):
    convert(files / "bf16.gguf", tmp_path / "a", ConvertOptions(dtype="fp8"))
    convert(golden, tmp_path / "b", ConvertOptions(dtype="fp8"))
    ours, theirs = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


# The other commands -------------------------------------------------------------------------------


def test_inspect_tells_what_it_is(files):
    report = inspect(files / "q4_k_m.gguf")
    assert (report.layout, report.architecture) == ("gguf", "BailingMoeV2ForCausalLM")
    assert report.encodings == {"q4_k": 13, "f32": 20, "q8_0": 5, "q5_k": 3, "q5_0": 2, "q6_k": 1}
    assert report.sound
    assert (report.layers, report.dense_layers, report.mtp_layers, report.experts) == (2, 1, 1, 8)


def test_the_forward_pass_of_bf16_gguf_is_the_checkpoints_own(golden, files):
    tokens = "1,2,3,4,5"
    ours = forward(files / "bf16.gguf", tokens=tokens).tensors
    theirs = forward(golden, tokens=tokens).tensors
    assert torch.equal(ours["logits"], theirs["logits"])


def test_a_prompt_goes_through_the_rebuilt_tokenizer(golden, files):
    ours = forward(files / "bf16.gguf", prompt="in the order").tensors
    theirs = forward(golden, prompt="in the order").tensors
    assert torch.equal(ours["logits"], theirs["logits"])


@pytest.mark.parametrize("mix", [mix for mix in FileType if not mix.value.startswith("tq")])
def test_verify_says_yes_to_every_type(golden, tmp_path, mix):
    convert(golden, tmp_path / "x.gguf", to_gguf(mix))
    verdict = verify(golden, tmp_path / "x.gguf", VerifyOptions(level="tensors"))
    assert verdict.ok, verdict.findings


@pytest.mark.parametrize("outtype", ["q8_0", "q6_k", "q4_k_m"])
def test_verify_says_yes_to_blocks_of_fp8(golden_channel, golden_block, tmp_path, outtype):
    for source in (golden_channel, golden_block):
        convert(source, tmp_path / f"{source.name}.gguf", to_gguf(outtype))
        verdict = verify(source, tmp_path / f"{source.name}.gguf", VerifyOptions(level="tensors"))
        assert verdict.ok, verdict.findings


@pytest.mark.parametrize("direction", ["forth", "back"])
def test_verify_proves_bf16_bit_for_bit(golden, files, tmp_path, direction):
    convert(files / "bf16.gguf", tmp_path / "back", BF16)
    pair = (golden, files / "bf16.gguf") if direction == "forth" else (
        files / "bf16.gguf", tmp_path / "back")  # fmt: skip
    verdict = verify(*pair, VerifyOptions(level="forward"))
    assert verdict.ok, verdict.findings
    assert all(item.rel_error == 0.0 for item in verdict.tensors)
    assert verdict.forward.logits.mean_kld < 1e-12


@pytest.mark.parametrize(
    ("name", "place", "culprit"),
    [
        ("blk.1.ffn_up_exps.weight", (3, 40, 1), "layers.1.experts.3.up"),
        ("blk.0.attn_output.weight", (17, 1), "layers.0.o"),
        ("output.weight", (100, 209), "head"),
        ("blk.1.ffn_gate_inp.weight", (2, 3), "layers.1.router"),
    ],
)
def test_verify_finds_one_broken_scale(golden, files, tmp_path, name, place, culprit):
    target = tmp_path / "x.gguf"
    shutil.copy(files / "q4_k_m.gguf", target)
    reader = gguf.GGUFReader(target, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == name)
    data = tensor.data
    data[place] = data[place] * 4 if data.dtype == np.float32 else data[place] ^ 0x18
    data.flush() if hasattr(data, "flush") else reader.data.flush()
    del reader
    verdict = verify(golden, target, VerifyOptions(level="tensors"))
    assert not verdict.ok
    assert culprit in {finding.tensor for finding in verdict.findings}


def test_experts_that_were_swapped_are_found(golden, files, tmp_path):
    def change(name, data, kind):
        if name == "blk.1.ffn_down_exps.weight":
            data = np.ascontiguousarray(data[[0, 1, 3, 2, 4, 5, 6, 7]])
        return name, data, kind

    target = rewritten(files / "q8_0.gguf", tmp_path / "x.gguf", change)
    verdict = verify(golden, target, VerifyOptions(level="tensors"))
    names = [f"layers.1.experts.{number}.down" for number in (2, 3)]
    assert sorted(finding.tensor for finding in verdict.findings) == names
    for finding in verdict.findings:
        (other,) = set(names) - {finding.tensor}
        assert other in finding.message


def test_diff_compares_files_as_they_are(files):
    differences = diff(files / "bf16.gguf", files / "q8_0.gguf").differences
    assert {d.kind for d in differences} == {"dtype", "config"}
    assert not diff(files / "bf16.gguf", files / "split-00001-of-00003.gguf").differences


# Files that lie -----------------------------------------------------------------------------------


def faults_of(path):
    """Return what `inspect` says, or the error that it stops with."""
    try:
        return [str(fault) for fault in inspect(path).faults if fault.fatal]
    except LingconvError as exc:
        return [exc.message, *exc.details]


def patched(files, tmp_path, change, name="q8_0.gguf"):
    data = bytearray((files / name).read_bytes())
    changed = change(data)
    data = data if changed is None else changed
    (tmp_path / "x.gguf").write_bytes(data)
    return tmp_path / "x.gguf"


def put(fmt, at, *values):
    return lambda data: struct.pack_into(fmt, data, at, *values)


def put_after(text, skip, fmt, *values):
    """Patch what stands `skip` bytes behind a text of the header."""
    return lambda data: struct.pack_into(fmt, data, data.index(text) + len(text) + skip, *values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (put("<4s", 0, b"GGML"), "does not begin with `GGUF`"),
        (put("<I", 4, 1), "version 1 is not read"),
        (put(">I", 4, 3), "version 3 in big-endian byte order"),
        (put("<Q", 8, 2**60), "takes at least"),
        (put("<Q", 16, 2**62), "takes at least"),
        (put("<Q", 16, 0), "unknown GGUF architecture None|axes|takes at least"),
        (put("<Q", 24, 2**50), "a string at byte"),
        (put_after(b"general.type", 0, "<I", 99), "unknown value type 99"),
        (put_after(b"tokenizer.ggml.tokens", 8, "<Q", 2**40), "too many"),
        (put_after(b"tokenizer.ggml.tokens", 8, "<Q", 3_000_000), "3,000,000 strings"),
        (put_after(b"tokenizer.ggml.token_type", 8, "<Q", 3_000_000), "3,000,000 numbers"),
        (put_after(b"tokenizer.ggml.tokens", 4, "<I", 9), "array of arrays"),
        (put_after(b"bailingmoe2.block_count", 4, "<I", 2**31), "2,147,483,6"),
        (put_after(b"bailingmoe2.expert_count", 4, "<I", 2**31), "2,147,483,648"),
        (put_after(b"bailingmoe2.expert_gating_func", 4, "<I", 7), "no known gating function"),
        (put_after(b"bailingmoe2.embedding_length", 4, "<I", 128), "its metadata calls for"),
        (
            put_after(b"bailingmoe2.embedding_length", 0, "<I", 6),
            "cannot be used|whole number",
        ),
        (put_after(b"token_embd.weight", 0, "<I", 7), "7 axes"),
        (put_after(b"token_embd.weight", 4, "<Q", 255), "rows of 255 elements"),
        (put_after(b"token_embd.weight", 4, "<Q", 2**63), r"truncated file.*\(token_embd.weight\)"),
        (put_after(b"token_embd.weight", 20, "<I", 4), "unknown ggml type 4"),
        (put_after(b"token_embd.weight", 20, "<I", 12), "overlaps|hole"),
        (put_after(b"token_embd.weight", 24, "<Q", 31), "no multiple of 32"),
        (put_after(b"token_embd.weight", 24, "<Q", 2**50), "truncated file"),
        (put_after(b"token_embd.weight", 24, "<Q", 64), "overlaps"),
        (lambda data: data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"), "ffn_up"),
        (lambda data: data.replace(b"blk.0.attn_norm", b"blk.1.attn_norm"), "listed twice"),
        (lambda data: data.replace(b"general.type", b"general.name"), "comes twice"),
        (lambda data: data.replace(b"bailingmoe2", b"bailingmoe9"), "unknown GGUF architecture"),
        (lambda data: data[:1000], "truncated or damaged|within the header"),
        (lambda data: data[:-5000], "truncated file"),
        (lambda data: data[:20], "GGUF header"),
        (lambda data: b"", "GGUF header"),
    ],
)
def test_a_file_that_lies_is_told_so(files, tmp_path, change, says):
    source = patched(files, tmp_path, change)
    found = faults_of(source)
    assert any(re.search(says, text) for text in found), found
    with pytest.raises(LingconvError) as caught:
        convert(source, tmp_path / "out", BF16)
    assert caught.value.exit_code in (2, 3)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("left", [-100_000, 20])
@pytest.mark.parametrize("name", ["bf16.gguf", "split-00002-of-00003.gguf"])
def test_a_truncated_file_is_one_fault(files, tmp_path, name, left):
    """Its header may be there or not: none of its tensors has a line of its own."""
    source = tmp_path / "in"
    source.mkdir()
    for path in files.glob(name.replace("00002", "*")):
        (source / path.name).write_bytes(path.read_bytes())
    (source / name).write_bytes((source / name).read_bytes()[:left])
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", BF16)
    assert [fault.file for fault in caught.value.faults] == [name]
    assert caught.value.hint == "fetch the file again"


def test_an_impossible_alignment(golden, files, tmp_path):
    for alignment in (0, 33, 2**40):
        metadata = gguf.GGUFWriter(tmp_path / "x.gguf", "bailingmoe2")
        metadata.add_uint64("general.alignment", alignment)
        metadata.write_header_to_file()
        metadata.write_kv_data_to_file()
        metadata.close()
        assert any("not a power of two" in text for text in faults_of(tmp_path / "x.gguf"))


def test_another_alignment_is_obeyed(golden, files, tmp_path):
    reader = gguf.GGUFReader(files / "q8_0.gguf")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "bailingmoe2")
    writer.add_custom_alignment(4096)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "x.gguf", tmp_path / "y.gguf", to_gguf("q8_0"))
    assert tensors_of(tmp_path / "y.gguf") == tensors_of(files / "q8_0.gguf")
    assert gguf.GGUFReader(tmp_path / "y.gguf").alignment == 4096


def test_a_split_with_a_missing_file(files, tmp_path):
    for path in files.glob("split-*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "split-00002-of-00003.gguf").unlink()
    found = faults_of(tmp_path / "split-00001-of-00003.gguf")
    assert found == ["split-00002-of-00003.gguf: is missing: the model is split into 3 files"]
    (tmp_path / "split-00001-of-00003.gguf").unlink()
    found = faults_of(tmp_path / "split-00003-of-00003.gguf")
    assert "split-00001-of-00003.gguf: is missing: the model is split into 3 files" in found


def test_a_split_whose_files_disagree(files, tmp_path):
    for path in files.glob("split-*"):
        shutil.copy(path, tmp_path)
    second, third = (tmp_path / f"split-0000{n}-of-00003.gguf" for n in (2, 3))
    second.rename(tmp_path / "kept")
    third.rename(second)
    (tmp_path / "kept").rename(third)
    found = faults_of(tmp_path)
    assert any("says it is file 3 of 3, its name says 2 of 3" in text for text in found)


@pytest.mark.parametrize(
    ("key", "says"), [("split.count", "file 1 of 9"), ("split.tensors.count", "has 9")]
)
def test_a_split_with_a_wrong_count(files, tmp_path, key, says):
    for path in files.glob("split-*"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "split-00001-of-00003.gguf"
    data = bytearray(path.read_bytes())
    put_after(key.encode(), 4, "<H", 9)(data)
    path.write_bytes(data)
    assert any(says in text for text in faults_of(path))


def test_a_folder_of_several_models(files):
    with pytest.raises(UsageError, match="4 models in gguf format"):
        open_model(files)


def test_a_file_of_a_split_under_another_name(files, tmp_path):
    shutil.copy(files / "split-00001-of-00003.gguf", tmp_path / "x.gguf")
    assert any("says it is file 1 of 3" in text for text in faults_of(tmp_path / "x.gguf"))


def test_a_tokenizer_that_cannot_be_rebuilt_is_only_odd(golden, tmp_path):
    convert(golden, tmp_path / "x.gguf", to_gguf("bf16", tokenizer_pre="llama-bpe"))
    report = inspect(tmp_path / "x.gguf")
    assert report.sound
    assert any("how `llama-bpe` splits text" in str(fault) for fault in report.faults)
    convert(tmp_path / "x.gguf", tmp_path / "back", BF16)
    assert not (tmp_path / "back" / "tokenizer.json").exists()


@pytest.fixture(scope="module")
def header(files):
    data = (files / "q8_0.gguf").read_bytes()
    return data[: data.index(b"blk.2.layer_output_norm.weight") + 200], len(data)


@settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_damaged_headers_never_surprise(header, data):
    """Whatever the bytes: a Header with faults, or a HeaderError; never more than is there."""
    original, file_bytes = header
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 9))
        kind = data.draw(st.sampled_from(["byte", "size", "cut"]))
        if kind == "byte":
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "size":
            struct.pack_into(
                "<Q", damaged, at, data.draw(st.sampled_from([0, 2**31, 2**63, 2**40]))
            )
        else:
            del damaged[at:]
            break
        if len(damaged) < 10:
            break
    read = []

    def reader(offset, size):
        piece = bytes(damaged[offset : offset + size])
        read.append(len(piece))
        return piece

    size = data.draw(st.sampled_from([file_bytes, len(damaged)]))
    try:
        found = read_header(reader, size, "x.gguf")
    except HeaderError:
        return
    finally:
        assert sum(read) <= MAX_HEADER_BYTES
    assert all(t.offset + t.nbytes <= size for t in found.tensors)


def test_a_source_without_a_readable_first_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        open_model(tmp_path / "x.gguf")
    assert caught.value.exit_code == 3
