"""The reference forward pass, judged by inclusionAI's own code and by real libraries."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from typer.testing import CliRunner

import lingconv
import lingconv.verification.reference.weights as weights_module
from lingconv import CheckpointError, ConvertOptions, ForwardOptions, Fp8Options, UsageError
from lingconv.cli.app import app
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import Fp8
from lingconv.storage.local import LocalStorage
from lingconv.verification.reference.activations import fake_quantize
from lingconv.verification.reference.prompts import Text, parse_tokens, sample_ids
from tests.conftest import DATA
from tests.support import E4M3, edit_json, read_tensors, rewrite

CASES = ["tiny-ling-v2", "forward/wide-heads", "forward/yarn", "forward/two-mtp"]
TOLERANCE = 1e-4


def forward(source, expected=None, **options):
    tokens = str(expected) if expected else None
    return lingconv.forward(source, ForwardOptions(**options), tokens=tokens)


@pytest.fixture(scope="module")
def right(golden):
    """What inclusionAI's modeling file computes from the golden checkpoint."""
    return DATA / "tiny-ling-v2.expected.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_everything_is_as_inclusionai_computes_it(case):
    expected = load_file(DATA / f"{case}.expected.safetensors")
    found = forward(DATA / case, DATA / f"{case}.expected.safetensors").tensors
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        if name.startswith("router_topk"):
            assert torch.equal(found[name].sort(-1).values, value.sort(-1).values), name
        else:
            assert (found[name] - value).abs().max() <= TOLERANCE, name


def test_bf16_rounds_but_goes_the_same_way(golden, right):
    exact, rounded = (forward(golden, right, compute=c).tensors for c in ("f32", "bf16"))
    assert rounded["hidden_states.1"].dtype == torch.bfloat16
    assert rounded["logits"].dtype == torch.float32
    cosine = torch.cosine_similarity(
        exact["hidden_states.1"].flatten(0, 1), rounded["hidden_states.1"].flatten(0, 1).float()
    )
    assert cosine.min() > 0.9999
    assert not torch.equal(exact["logits"], rounded["logits"])


@pytest.mark.parametrize(
    "fp8",
    [
        Fp8Options(),
        Fp8Options(scale="ling"),
        Fp8Options(scale="ue8m0", scale_dtype="e8m0"),
        Fp8Options(scheme="channel"),
        Fp8Options(dialect="compressed-tensors"),
    ],
    ids=str,
)
def test_every_fp8_dialect_computes_what_its_numbers_say(fp8, golden, right, tmp_path):
    lingconv.quantize(golden, tmp_path / "fp8", fp8)
    wide = ConvertOptions(dtype="f32")
    lingconv.convert(tmp_path / "fp8", tmp_path / "f32", wide)
    one, other = (forward(tmp_path / each, right).tensors for each in ("fp8", "f32"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_libraries_dequantize_as_we_do(golden_block, golden_channel, golden, tmp_path):
    """compressed-tensors for its own files, transformers for DeepSeek's dialect."""
    ours = tmp_path / "block"
    lingconv.quantize(golden, ours)
    for number, source in enumerate((golden_block, golden_channel, ours)):
        stored = read_tensors(source)
        out = tmp_path / f"f32-{number}"
        lingconv.convert(source, out, ConvertOptions(dtype="f32"))
        wide, seen = read_tensors(out), 0
        for name, codes in stored.items():
            if codes.dtype != E4M3:
                continue
            if source is ours:
                scale = stored[name + "_scale_inv"]
                theirs = _dequantize_fp8_weight(codes, scale, [128, 128], torch.float32)
            else:
                theirs = _compressed_tensors(codes, stored[name + "_scale"], source)
            assert torch.equal(wide[name], theirs), name
            seen += 1
        assert seen == 63


def _compressed_tensors(codes, scale, source):
    group = json.loads((source / "config.json").read_text())["quantization_config"]
    (scheme,) = group["config_groups"].values()
    arguments = QuantizationArgs.model_validate(scheme["weights"])
    return dequantize(codes, scale.float(), args=arguments, dtype=torch.float32)


def test_a_tied_head_is_the_embedding(golden, right, tmp_path):
    shutil.copytree(golden, tmp_path / "tied")
    rewrite(tmp_path / "tied", lambda tensors: tensors.pop("lm_head.weight"))
    config = tmp_path / "tied" / "config.json"
    edit_json(config, lambda values: values.update(tie_word_embeddings=True))
    found = forward(tmp_path / "tied", right).tensors
    embedding = read_tensors(golden)["model.word_embeddings.weight"].float()
    expected = found["hidden_states.2"] @ embedding.T
    assert (found["logits"] - expected).abs().max() < TOLERANCE


class TestActivations:
    def test_groups_follow_the_weights(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 300, generator=generator)
        block = Fp8(128, 128, "_scale_inv", DType.F32)
        found = fake_quantize(x, block)
        for row in range(3):
            for left in range(0, 300, 128):
                group = x[row, left : left + 128]
                scale = group.abs().max() / 448
                expected = (group / scale).to(E4M3).float() * scale
                assert torch.equal(found[row, left : left + 128], expected)
        channel = Fp8(1, 0, "_scale", DType.BF16)
        scale = x.abs().amax(1, keepdim=True) / 448
        assert torch.equal(fake_quantize(x, channel), (x / scale).to(E4M3).float() * scale)

    def test_ue8m0_weights_have_ue8m0_activations(self):
        x = torch.tensor([[3.0, 1.0, -0.3, 0.0]])
        found = fake_quantize(x, Fp8(128, 128, "_scale_inv", DType.F32, power_of_two=True))
        scale = 2.0**-7  # the power of two above 3 / 448
        assert torch.equal(found, (x / scale).to(E4M3).float() * scale)
        assert torch.equal(fake_quantize(torch.zeros(2, 4), Fp8(1, 0, "_scale", DType.BF16)),
                           torch.zeros(2, 4))  # fmt: skip

    def test_they_change_fp8_checkpoints_and_no_others(self, golden, golden_block, right):
        plain, rounded = (
            forward(golden_block, right, activations=a).tensors for a in ("plain", "fp8")
        )
        error = (plain["hidden_states.1"] - rounded["hidden_states.1"]).norm()
        assert 0.01 < error / plain["hidden_states.1"].norm() < 0.06
        plain, rounded = (forward(golden, right, activations=a).tensors for a in ("plain", "fp8"))
        assert torch.equal(plain["logits"], rounded["logits"])


class RecordingStorage(LocalStorage):
    """Notes which bytes of which files are read."""

    def __init__(self, root):
        super().__init__(root)
        self.reads = []

    def open(self, name):
        blob, reads = super().open(name), self.reads

        class Recorder:
            descriptor = blob.descriptor

            def read_into(self, offset, buffer):
                reads.append((name, offset, offset + len(buffer)))
                blob.read_into(offset, buffer)

            def read_some(self, offset, buffer):
                reads.append((name, offset, offset + len(buffer)))
                return blob.read_some(offset, buffer)

            def close(self):
                blob.close()

        return Recorder()


def test_only_chosen_experts_are_read(golden):
    from lingconv.checkpoint.open import read_checkpoint
    from lingconv.checkpoint.recognition import recognise
    from lingconv.model.family_file import load_families
    from lingconv.verification.reference.forward import trace

    storage = RecordingStorage(golden)
    model = recognise(read_checkpoint(storage), load_families())
    found = trace(model, torch.tensor([[7, 9]])).tensors
    chosen = {int(e) for e in found["router_topk.0"].unique()}
    assert 0 < len(chosen) < 8
    touched = set()
    for stored in model.stored.values():
        extent = stored.extents[0]
        start, end = extent.offset, extent.offset + extent.nbytes
        if any(n == extent.file and a < end and start < b for n, a, b in storage.reads):
            touched.add(stored.name)
    prefix = "model.layers.1.mlp.experts."
    read = {int(name.split(".")[5]) for name in touched if name.startswith(prefix)}
    assert read == chosen
    embedding = model.stored["model.word_embeddings.weight"].extents[0]
    end = embedding.offset + embedding.nbytes
    rows = [b - a for n, a, b in storage.reads
            if n == embedding.file and embedding.offset <= a < end]  # fmt: skip
    assert set(rows) == {256 * 2}  # single rows: the matrix is never read as a whole


@pytest.mark.parametrize("readers", [1, 8])
def test_strips_come_in_order_whatever_the_threads_do(readers, golden, right, monkeypatch):
    """Many strips, hardly more buffers than readers: a later strip must not starve an earlier."""
    whole = forward(golden, right).tensors
    monkeypatch.setattr(weights_module, "READERS", readers)
    monkeypatch.setattr(weights_module, "STRIP_BYTES", 2048 * 4)
    monkeypatch.setattr(weights_module, "BUFFERS", readers + 1)
    for _ in range(3):
        found = forward(golden, right).tensors
        assert (found["logits"] - whole["logits"]).abs().max() < 1e-5


def test_memory_stays_small_at_the_dimensions_of_ling_1t(tmp_path):
    """One dense and one MoE layer, 27 GB: sparse files that read as zeros take no disk."""
    lingconv.synth("ling-1t", tmp_path / "1t", layers=2, dense_layers=1, mtp=0, headers_only=True)
    code = (
        "import re, sys, lingconv\n"
        "trace = lingconv.forward(sys.argv[1], tokens=','.join(map(str, range(64))))\n"
        "assert trace.tensors['logits'].shape == (1, 64, 157184)\n"
        # Not `ru_maxrss`: that of a new program begins with what its parent had.
        "status = open('/proc/self/status').read()\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1]) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "1t"], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2 << 30


class TestBadInput:
    def test_ids_outside_of_the_vocabulary(self, golden):
        for tokens in ("1,512", "-1"):
            with pytest.raises(UsageError, match="vocabulary of 512"):
                lingconv.forward(golden, tokens=tokens)

    @pytest.mark.parametrize("tokens", ["", "a,b", "[[1, 2], [3]]", "[1, 2", "no-such.safetensors"])
    def test_tokens_that_are_none(self, tokens, golden):
        with pytest.raises(UsageError):
            lingconv.forward(golden, tokens=tokens)

    def test_requests_that_contradict_themselves(self, golden):
        with pytest.raises(UsageError, match="two ways"):
            lingconv.forward(golden, prompt="a", tokens="1")
        with pytest.raises(UsageError, match="needs a `prompt`"):
            lingconv.forward(golden, chat=True)
        for wrong in ({"compute": "f8"}, {"activations": "int4"}, {"device": "nonsense"}):
            with pytest.raises(UsageError):
                lingconv.forward(golden, ForwardOptions(**wrong))

    def test_a_missing_or_broken_tokenizer(self, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        (tmp_path / "c/tokenizer.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be used"):
            lingconv.forward(tmp_path / "c", prompt="a")
        (tmp_path / "c/tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no tokenizer.json") as caught:
            lingconv.forward(tmp_path / "c", prompt="a")
        assert "tokens=1,2,3" in caught.value.hint
        assert lingconv.forward(tmp_path / "c", tokens="1,2").tensors["logits"].shape[1] == 2

    def test_nan_in_activations_names_the_layer(self, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        name = "model.layers.1.mlp.shared_experts.up_proj.weight"
        rewrite(tmp_path / "c", lambda tensors: tensors[name].fill_(3e38))
        with pytest.raises(CheckpointError, match=r"after layers\.1"):
            lingconv.forward(tmp_path / "c", tokens="1,2")

    def test_nan_in_a_weight_names_the_weight(self, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        name = "model.layers.0.mlp.up_proj.weight"
        rewrite(tmp_path / "c", lambda tensors: tensors[name][5, 5].fill_(float("nan")))
        with pytest.raises(CheckpointError, match=name):
            lingconv.forward(tmp_path / "c", tokens="1,2")

    def test_a_checkpoint_with_a_hole_is_refused(self, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        rewrite(tmp_path / "c", lambda tensors: tensors.pop("model.norm.weight"))
        with pytest.raises(CheckpointError) as caught:
            lingconv.forward(tmp_path / "c")
        assert "model.norm.weight" in caught.value.details[0]

    def test_mtp_layers_may_be_missing_when_nobody_runs_them(self, golden, right, tmp_path):
        shutil.copytree(golden, tmp_path / "c")

        def drop(tensors):
            for name in [name for name in tensors if name.startswith("model.layers.2.")]:
                del tensors[name]

        rewrite(tmp_path / "c", drop)
        with pytest.raises(CheckpointError):
            forward(tmp_path / "c", right)
        found = forward(tmp_path / "c", right, mtp=False).tensors
        assert torch.equal(found["logits"], forward(golden, right).tensors["logits"])
        lingconv.convert(golden, tmp_path / "only", ConvertOptions(mtp="only"))
        with pytest.raises(CheckpointError, match="no decoder"):
            forward(tmp_path / "only", right)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("rope_scaling", {"type": "llama3", "factor": 8.0}, "rope_scaling `llama3`"),
            ("score_function", "tanh", "score_function `tanh`"),
            ("n_group", 3, "3 groups do not divide"),
        ],
    )
    def test_what_is_not_computed_here_is_refused(self, key, value, message, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        edit_json(tmp_path / "c/config.json", lambda config: config.update({key: value}))
        with pytest.raises(CheckpointError, match=message):
            lingconv.forward(tmp_path / "c")


class TestPrompts:
    def test_tokens_from_every_kind_of_file(self, tmp_path, right):
        (tmp_path / "ids.txt").write_text("1, 2\n3")
        (tmp_path / "ids.json").write_text("[[1, 2], [3, 4]]")
        assert parse_tokens(str(tmp_path / "ids.txt")).tolist() == [[1, 2, 3]]
        assert parse_tokens(str(tmp_path / "ids.json")).tolist() == [[1, 2], [3, 4]]
        assert parse_tokens(str(right)).shape == (2, 24)
        assert parse_tokens("5 6,7").tolist() == [[5, 6, 7]]

    def test_the_sample_is_always_the_same(self):
        ids = sample_ids(512)
        assert ids.shape == (1, 64)
        assert ids[0, :4].tolist() == [(i * 2654435761 % 2**32) % 512 for i in (1, 2, 3, 4)]
        assert ids.min() >= 0
        assert ids.max() < 512

    def test_text_and_chat_as_transformers_has_them(self, golden):
        theirs = PreTrainedTokenizerFast.from_pretrained(golden)
        text = Text(LocalStorage(golden))
        prompt = "Hello, <b>world</b>!"
        assert text.encode(prompt)[0].tolist() == theirs(prompt)["input_ids"]
        chat = theirs.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        assert text.encode(prompt, chat=True)[0].tolist() == chat

    def test_a_hostile_template_gets_nowhere(self, golden, tmp_path):
        shutil.copytree(golden, tmp_path / "c")
        template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        (tmp_path / "c/chat_template.jinja").write_text(template)
        with pytest.raises(CheckpointError, match="chat template"):
            lingconv.forward(tmp_path / "c", prompt="a", chat=True)
        (tmp_path / "c/chat_template.jinja").write_text("{{ raise_exception('no users') }}")
        with pytest.raises(CheckpointError, match="no users"):
            lingconv.forward(tmp_path / "c", prompt="a", chat=True)


class TestCommand:
    def test_output_holds_the_expected_names(self, golden, right, tmp_path):
        out = tmp_path / "out.safetensors"
        done = CliRunner().invoke(
            app, ["forward", str(golden), "--tokens", str(right), "-o", str(out), "-q"]
        )
        assert done.exit_code == 0
        assert done.stdout.strip() == str(out)
        assert load_file(out).keys() == load_file(right).keys()

    def test_json_names_the_likeliest_tokens(self, golden):
        done = CliRunner().invoke(app, ["forward", str(golden), "--prompt", "Hello", "--json"])
        value = json.loads(done.stdout)
        assert value["schema"] == "lingconv.forward/1"
        logits = lingconv.forward(golden, prompt="Hello").tensors["logits"][0, -1]
        best = logits.softmax(-1).topk(5)
        assert [token["id"] for token in value["next_tokens"]] == best.indices.tolist()
        assert value["next_tokens"][0]["probability"] == pytest.approx(best.values[0].item())
        text = Text(LocalStorage(golden))
        assert value["next_tokens"][0]["text"] == text.decode(best.indices[0].item())

    def test_people_see_tokens_and_time(self, golden):
        done = CliRunner().invoke(app, ["forward", str(golden), "--no-mtp"])
        assert "next token:" in done.stdout
        assert "waiting for data" in done.stdout

    def test_a_result_that_cannot_be_stored(self, golden, tmp_path):
        done = CliRunner().invoke(app, ["forward", str(golden), "-o", str(tmp_path / "x.npz")])
        assert isinstance(done.exception, UsageError)
        trace = lingconv.forward(golden, tokens="1")
        with pytest.raises(lingconv.LingconvError):
            trace.save(golden / "config.json" / "out.safetensors")
