"""How a checkpoint is loaded: a line for each runtime that reads what was written, and no other.

A row of the table names the layouts and the encodings that a runtime reads; what is not in a row is
not claimed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lingconv.encodings.quantization_config import COMPRESSED_TENSORS, FP8, KEY

BF16 = "plain"
FP8_E8M0 = "fp8-e8m0"
GGUF = "ggml"


class Runtime(NamedTuple):
    """A runtime, and what is to be typed."""

    name: str
    language: str
    text: str


class _Row(NamedTuple):
    name: str
    layouts: tuple[str, ...]
    encodings: tuple[str, ...]
    language: str
    text: str
    needs_remote_code: bool = False


_TABLE = (
    _Row(
        "vLLM",
        ("hf",),
        (BF16, FP8, COMPRESSED_TENSORS),
        "sh",
        "vllm serve {repository} --trust-remote-code --tensor-parallel-size 8",
    ),
    _Row(
        "SGLang",
        ("hf",),
        (BF16, FP8, COMPRESSED_TENSORS),
        "sh",
        "python -m sglang.launch_server --model-path {repository} --trust-remote-code --tp-size 8",
    ),
    _Row(
        "transformers",
        ("hf",),
        (BF16,),
        "python",
        "from transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(\n"
        '    "{repository}", dtype="auto", device_map="auto", trust_remote_code=True\n'
        ")",
        needs_remote_code=True,
    ),
    _Row("mlx-lm", ("hf-merged+mlx",), (BF16,), "sh", "mlx_lm.generate --model {repository}"),
    _Row(
        "llama.cpp",
        ("gguf",),
        (GGUF, BF16),
        "sh",
        "llama-server --hf-repo {repository} --hf-file {file}",
    ),
    _Row(
        "Megatron-LM",
        ("megatron",),
        (BF16,),
        "sh",
        "hf download {repository} --local-dir checkpoint\n"
        "# then train or serve with: --load checkpoint --ckpt-format torch_dist",
    ),
    _Row(
        "Megatron-LM",
        ("megatron-ranks",),
        (BF16,),
        "sh",
        "hf download {repository} --local-dir checkpoint\n"
        "# then train or serve with: --load checkpoint --ckpt-format torch",
    ),
)


def loaders(
    layout: str, encoding: str, config: Mapping[str, Any], repository: str, file: str
) -> list[Runtime]:
    """Return what reads a checkpoint of a layout and an encoding; `file` is its first one."""
    return [
        Runtime(row.name, row.language, row.text.format(repository=repository, file=file))
        for row in _TABLE
        if layout in row.layouts
        and encoding in row.encodings
        and (not row.needs_remote_code or "auto_map" in config)
    ]


def encoding_word(config: Mapping[str, Any], labels: Mapping[str, int]) -> str:
    """Return the word of the table for how weights are stored, from config and encodings."""
    quantization = config.get(KEY) or {}
    if any("e8m0" in label and "ue8m0" not in label for label in labels):
        return FP8_E8M0
    if quantization:
        return str(quantization.get("quant_method", ""))
    floats = {"bf16", "f16", "f32"}
    return BF16 if set(labels) <= floats else GGUF
