"""Reading of family files: `formats/*.toml`, packaged or the user's own (formats/README.md)."""

import os
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from lingconv.errors import UsageError
from lingconv.model.family import (
    Block,
    Drop,
    Family,
    GgufModel,
    KnownTokenizer,
    MegatronModel,
    Role,
    ScalePolicy,
    TensorRule,
    Transposition,
)
from lingconv.model.layout import HF
from lingconv.model.symbol_rules import RULES, SPELLINGS
from lingconv.model.symbols import Symbol


def builtin_formats() -> Traversable:
    """Return the folder of built-in families: packaged in a wheel, `formats/` in a checkout."""
    packaged = files("lingconv") / "_formats"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "formats"


def presets() -> dict[str, Traversable]:
    """Return the built-in model configurations by name."""
    folder = builtin_formats() / "presets"
    return {
        entry.name.removesuffix(".json"): entry
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
    }


def load_families(path: str | None = None) -> tuple[Family, ...]:
    """Return the families in `path` (a file or a folder), $LINGCONV_FORMATS_PATH, or the built-in.

    Raises UsageError if a family file is missing or invalid.
    """
    path = path or os.environ.get("LINGCONV_FORMATS_PATH")
    if path is None:
        return _builtin_families()
    root = Path(path)
    found = sorted(root.glob("*.toml")) if root.is_dir() else [root]
    if not found or not found[0].is_file():
        raise UsageError(f"no family file (*.toml) at {path}")
    return tuple(_read(entry) for entry in found)


@cache
def _builtin_families() -> tuple[Family, ...]:
    entries = sorted(builtin_formats().iterdir(), key=lambda entry: entry.name)
    return tuple(_read(entry) for entry in entries if entry.name.endswith(".toml"))


def _read(entry: Traversable) -> Family:
    try:
        return parse_family(tomllib.loads(entry.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, KeyError, ValueError, TypeError, AttributeError) as exc:
        raise UsageError(f"{entry.name} is not a family file: {exc!r}") from exc


_TENSOR_WORDS = {"group", "name", "role", "axes", "when", "repeat", "keep_dtype", "fused"}
_BOUNDS = ("least", "most", "at_most", "divides")
_SYMBOL_WORDS = ("default", "rule", "said", *_BOUNDS)
_SYMBOL_SUFFIXES = ("_as", "_with", "_without")
_INTERLEAVE = "_interleave"
_SPLIT = "_split"
_TRANSPOSED = "_transposed"
_BLOCK_WORDS = {"name", "groups", "first", "end", "mtp", "stage"}


def parse_family(data: Mapping[str, Any]) -> Family:
    """Return the Family of a family file's parsed TOML (see formats/README.md)."""
    family = data["family"]
    rules = [_parse_tensor(entry) for entry in data["tensor"]]
    return Family(
        name=family["name"],
        title=family["title"],
        architectures=family["architectures"],
        symbols=tuple(_parse_symbol(name, entry) for name, entry in data["symbols"].items()),
        blocks=tuple(_parse_block(entry) for entry in data["block"]),
        tensors={
            group: tuple(rule for rule in rules if rule.group == group)
            for group in dict.fromkeys(rule.group for rule in rules)
        },
        drops=tuple(_parse_drop(entry) for entry in data.get("drop", ())),
        scale_policies={
            name: ScalePolicy(entry["min_amax"], tuple(entry["ue8m0"]))
            for name, entry in data.get("scale_policy", {}).items()
        },
        config=family.get("config", {}),
        neutral={key: tuple(values) for key, values in family.get("neutral", {}).items()},
        merged=_parse_merged(data.get("merged", {}), rules),
        gguf=_parse_gguf(data["gguf"]) if "gguf" in data else None,
        megatron=MegatronModel(**data["megatron"]) if "megatron" in data else None,
    )


def _parse_symbol(name: str, entry: Mapping[str, Any]) -> Symbol:
    rule = entry.get("rule", "")
    if rule and rule not in RULES:
        raise ValueError(f"symbol `{name}`: no rule `{rule}` in lingconv/model/symbol_rules.py")
    keys = {
        word: (key,) if isinstance(key, str) else tuple(key)
        for word, key in entry.items()
        if word not in _SYMBOL_WORDS and not word.endswith(_SYMBOL_SUFFIXES)
    }
    spellings = {
        word.removesuffix("_as"): SPELLINGS[spelling]
        for word, spelling in entry.items()
        if word.endswith("_as")
    }
    presence = {
        word.removesuffix(suffix): (pattern, suffix == "_with")
        for suffix in ("_with", "_without")
        for word, pattern in entry.items()
        if word.endswith(suffix)
    }
    bounds = {word: entry[word] for word in _BOUNDS if word in entry}
    said = entry.get("said", False)
    return Symbol(name, keys, entry.get("default"), rule, spellings, presence, **bounds, said=said)


def _parse_merged(entry: Mapping[str, str], rules: list[TensorRule]) -> Mapping[str, str]:
    for word in entry:
        if not any(f"{HF}_{word}" in rule.addresses for rule in rules):
            raise ValueError(f"`merged.{word}`: no tensor has an `{HF}_{word}`")
    return entry


def _parse_gguf(entry: Mapping[str, Any]) -> GgufModel:
    tokenizer = dict(entry["tokenizer"])
    tokenizer["control_tokens"] = tuple(tokenizer["control_tokens"])
    return GgufModel(entry["architecture"], entry["of"], KnownTokenizer(**tokenizer))


def _parse_block(entry: Mapping[str, Any]) -> Block:
    return Block(
        name=entry["name"],
        addresses={word: text for word, text in entry.items() if word not in _BLOCK_WORDS},
        groups=tuple(entry["groups"]),
        first=entry.get("first", 0),
        end=entry.get("end", 1),
        mtp=entry.get("mtp", False),
        stage=entry.get("stage", ""),
    )


def _parse_tensor(entry: Mapping[str, Any]) -> TensorRule:
    return TensorRule(
        group=entry["group"],
        name=entry["name"],
        role=Role(entry["role"]),
        axes=tuple(_parse_axis(axis) for axis in entry["axes"]),
        addresses={
            word: text
            for word, text in entry.items()
            if word not in _TENSOR_WORDS and not word.endswith((_INTERLEAVE, _SPLIT, _TRANSPOSED))
        },
        when=entry.get("when", ""),
        repeat=tuple(entry.get("repeat", {}).items()),
        keep_dtype=entry.get("keep_dtype", False),
        interleave=_with_suffix(entry, _INTERLEAVE),
        split=_with_suffix(entry, _SPLIT),
        transposed={
            word: Transposition(value) for word, value in _with_suffix(entry, _TRANSPOSED).items()
        },
        fused=entry.get("fused", ""),
    )


def _with_suffix(entry: Mapping[str, Any], suffix: str) -> dict[str, str]:
    """Return the values of an entry's keys `LAYOUT` + suffix, by layout."""
    return {
        word.removesuffix(suffix): value for word, value in entry.items() if word.endswith(suffix)
    }


def _parse_axis(text: str) -> tuple[str | int, ...]:
    """Return the factors of an axis: `hidden` or `(2 hidden)`, einops' spelling of a product."""
    words = text.removeprefix("(").removesuffix(")").split()
    return tuple(int(word) if word.isdigit() else word for word in words)


def _parse_drop(entry: Mapping[str, Any]) -> Drop:
    patterns = {word: re.compile(text) for word, text in entry.items() if word != "reason"}
    return Drop(patterns, entry["reason"])
