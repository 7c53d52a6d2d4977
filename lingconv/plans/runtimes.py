"""What runtimes read of a checkpoint (`runtimes.toml`): for plans, model cards and proofs."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from lingconv.encodings.quantization_config import KEY

BF16 = "plain"
FP8_E8M0 = "fp8-e8m0"
GGUF = "ggml"
_MOST_GPUS = 8
_MTP_KEY = "num_nextn_predict_layers"


class Loader(NamedTuple):
    """A runtime, and what is to be typed."""

    name: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Runtime:
    """An entry of `runtimes.toml`, which says what each field means."""

    name: str
    version: str
    source: str
    layouts: tuple[str, ...]
    encodings: tuple[str, ...]
    mtp: bool
    remote_code: bool
    fuses: bool
    language: str
    command: str
    parallel: str = ""

    def reads(self, layout: str, encoding: str, config: Mapping[str, Any]) -> bool:
        """Return whether a card may claim that it loads such a checkpoint."""
        return (
            layout in self.layouts
            and encoding in self.encodings
            and (self.mtp or not config.get(_MTP_KEY))
            and (not self.remote_code or "auto_map" in config)
        )


@cache
def runtimes() -> tuple[Runtime, ...]:
    """Return all entries, in the order of the file."""
    text = (files("lingconv.plans") / "runtimes.toml").read_text("utf-8")
    entries: list[dict[str, Any]] = tomllib.loads(text)["runtime"]
    for entry in entries:
        entry |= {name: tuple(entry[name]) for name in ("layouts", "encodings")}
    return tuple(Runtime(**entry) for entry in entries)


def fusing() -> str:
    """Return the runtimes that make one matrix of several, with their versions, as text."""
    return " and ".join(f"{each.name} {each.version}" for each in runtimes() if each.fuses)


def loaders(
    layout: str, encoding: str, config: Mapping[str, Any], repository: str, file: str
) -> list[Loader]:
    """Return what reads a checkpoint of a layout and an encoding; `file` is its first one."""
    size = tensor_parallel(config)
    return [
        Loader(
            each.name,
            each.language,
            each.command.strip()
            .replace("{parallel}", each.parallel.replace("{size}", str(size)) if size > 1 else "")
            .replace("{repository}", repository)
            .replace("{file}", file),
        )
        for each in runtimes()
        if each.reads(layout, encoding, config)
    ]


def without_mtp(layout: str, encoding: str, config: Mapping[str, Any]) -> list[str]:
    """Return the runtimes that would read a checkpoint if it had no MTP layers."""
    less = {**config, _MTP_KEY: 0}
    return [
        each.name
        for each in runtimes()
        if each.reads(layout, encoding, less) and not each.reads(layout, encoding, config)
    ]


def tensor_parallel(config: Mapping[str, Any]) -> int:
    """Return the most GPUs, up to 8, over which every matrix splits into whole blocks and heads."""
    block = block_cols(config)
    widths = (config.get("moe_intermediate_size"), config.get("intermediate_size"))
    heads = config.get("num_attention_heads")
    size = _MOST_GPUS
    while size > 1 and not (
        _splits(heads, size, 1) and all(_splits(width, size, block) for width in widths)
    ):
        size //= 2
    return size


def block_cols(config: Mapping[str, Any]) -> int:
    """Return the rows or columns of a matrix that have to stay together: 1 without blocks."""
    stated = config.get(KEY) or {}
    block = stated.get("weight_block_size")
    if isinstance(block, list) and block and isinstance(block[0], int):
        return block[0]
    sizes = [1]
    for group in (stated.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        structure = weights.get("block_structure")
        sizes += structure if isinstance(structure, list) else []
        sizes += [weights["group_size"]] if isinstance(weights.get("group_size"), int) else []
    return max(sizes)


def _splits(width: Any, parts: int, block: int) -> bool:
    """Return whether a width splits into parts of whole blocks; an unknown one does."""
    return not isinstance(width, int) or width % (parts * block) == 0


def encoding_word(config: Mapping[str, Any], labels: Mapping[str, int]) -> str:
    """Return the word of the table for how weights are stored, from config and encodings."""
    quantization = config.get(KEY) or {}
    if any("e8m0" in label and "ue8m0" not in label for label in labels):
        return FP8_E8M0
    if quantization:
        return str(quantization.get("quant_method", ""))
    floats = {"bf16", "f16", "f32"}
    return BF16 if set(labels) <= floats else GGUF
