"""llama.cpp itself loads what is written, and agrees with the reference forward pass of it."""

import json

import pytest
import torch
import xllamacpp
from safetensors.torch import load_file
from tokenizers import Tokenizer

from lingconv.api import convert, forward
from tests.conftest import DATA
from tests.test_gguf_write import to_gguf

IDS = load_file(DATA / "tiny-ling-v2.expected.safetensors")["input_ids"][0].tolist()
# What separates the two by their nature: llama.cpp keeps keys and values in F16, and rounds
# activations before a matrix of BF16 (to BF16) or of blocks (to 8 bits). The log-probabilities of
# the golden model spread over more than 4.
BOUNDS = {"f32": 0.004, "f16": 0.01, "bf16": 0.05, "q8_0": 0.15, "q6_k": 0.2, "q4_k_m": 0.2}


def log_probabilities(path, ids):
    """Return llama.cpp's log-probabilities of the token after `ids`."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256, 1, 0
    params.cpuparams.n_threads = 2
    params.warmup = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": ids, "n_predict": 1, "n_probs": 512, "temperature": 0.0, "cache_prompt": False}
    )
    answer = json.loads(answer) if isinstance(answer, str) else answer
    found = torch.full((512,), -torch.inf, dtype=torch.float64)
    for item in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[item["id"]] = item["logprob"]
    return found


@pytest.mark.parametrize("tensors_per_file", [0, 12])
@pytest.mark.parametrize("outtype", BOUNDS)
def test_log_probabilities_agree(golden, tmp_path, outtype, tensors_per_file):
    convert(golden, tmp_path / "x.gguf", to_gguf(outtype, max_shard_tensors=tensors_per_file))
    first = min(tmp_path.glob("*.gguf"))
    assert (first.name == "x.gguf") == (tensors_per_file == 0)
    for count in (1, 24):
        ids = IDS[:count]
        ours = forward(first, tokens=",".join(map(str, ids))).tensors["logits"][0, -1]
        ours = torch.log_softmax(ours.double(), -1)
        theirs = log_probabilities(first, ids)
        assert theirs.max() - theirs.min() > 4
        assert (ours - theirs).abs().max() < BOUNDS[outtype]
        assert ours.argmax() == theirs.argmax()


def test_a_file_without_mtp_layers_loads(golden, tmp_path):
    convert(golden, tmp_path / "x.gguf", to_gguf("q8_0", mtp="drop"))
    assert log_probabilities(tmp_path / "x.gguf", IDS).isfinite().all()


def test_llama_cpp_splits_text_as_the_tokenizer_does(golden, tmp_path):
    convert(golden, tmp_path / "x.gguf", to_gguf("bf16"))
    text = "<role>HUMAN</role>Sort the names in order, then print them.<|role_end|>"
    ids = Tokenizer.from_file(str(golden / "tokenizer.json")).encode(text).ids
    path = tmp_path / "x.gguf"
    assert torch.equal(log_probabilities(path, text), log_probabilities(path, ids))
