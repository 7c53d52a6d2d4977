"""The small files of a Hugging Face folder, made again from the key-values of a GGUF file."""

import json
import struct
from typing import Any

from lingconv.containers.gguf.tokenizer import MERGES, MODEL, PRE, TOKEN_TYPES, TOKENS, TokenType
from lingconv.containers.gguf.tokenizer_json import gpt2_splitting, splitting_by, tokenizer_json
from lingconv.errors import Fault
from lingconv.errors.value_kinds import Field, Kind, Schema, checked
from lingconv.model.family import KnownTokenizer
from lingconv.plans.key_values import Metadata, Value, ValueType

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ID_KEYS = {"pad": "padding", "sep": "seperator", "unk": "unknown"}  # as gguf.Keys spells them
_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_TEMPLATE = "tokenizer.chat_template"
MAX_ID = 1 << 31
# What may stand under the keys that are read here, and that llama.cpp reads as well.
_TEXTS = Field((Kind.LIST,), items=(Kind.TEXT,))
_FIELDS: Schema = {
    MODEL: Field((Kind.TEXT,)),
    PRE: Field((Kind.TEXT,)),
    TOKENS: _TEXTS,
    MERGES: _TEXTS,
    TOKEN_TYPES: Field((Kind.LIST,), items=(Kind.INT,)),
    _TEMPLATE: Field((Kind.TEXT,)),
    **{f"tokenizer.ggml.{_ID_KEYS.get(n, n)}_token_id": Field((Kind.INT,)) for n in _SPECIAL},
    **{f"tokenizer.ggml.add_{name}_token": Field((Kind.BOOL,)) for name in _SPECIAL},
    **{key: Field((Kind.FLOAT,)) for key in _SAMPLING},
}
# GPT-2's own splitting, which tokenizers has built in.
_GPT2 = ("gpt-2", "default")


def plain_values(metadata: Metadata) -> dict[str, Any]:
    """Return the values by key; a float32 as the shortest decimal that stands for it."""
    return {
        key: _shortest(value.data) if value.type == ValueType.FLOAT32 else value.data
        for key, value in metadata.items()
    }


def _shortest(value: float) -> float:
    """Return 1e-06 for 9.999999974752427e-07."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.unpack("<f", struct.pack("<f", short))[0] == value:
                return short
        except OverflowError:  # the largest float32, rounded up
            continue
    return value


def well_typed(metadata: Metadata, file: str) -> tuple[dict[str, Value], list[Fault]]:
    """Return the key-values without those that are not of their type, and a fault for each."""
    named = {key: Field((Kind.TEXT,)) for key in metadata if key.startswith(_TEMPLATE + ".")}
    data = {key: value.data for key, value in metadata.items()}
    good, faults = checked(data, {**_FIELDS, **named}, file)
    tokens, types = good.get(TOKENS), good.get(TOKEN_TYPES)
    if tokens is not None and types is not None and len(types) != len(tokens):
        message = f"`{TOKEN_TYPES}` has {len(types):,} items for {len(tokens):,} tokens"
        faults.append(Fault("json", message, file))
        del good[TOKEN_TYPES]
    if any(len(merge.split(" ", 1)) < 2 for merge in good.get(MERGES, ())):
        faults.append(Fault("json", f"`{MERGES}` holds a text that is no pair of tokens", file))
        del good[MERGES]
    return {key: value for key, value in metadata.items() if key in good}, faults


def special_ids(metadata: Metadata) -> dict[str, int]:
    """Return the ids of the tokens that generation begins and ends with, by config.json's keys."""
    ids = {f"{name}_token_id": _special_id(metadata, name) for name in ("bos", "eos", "pad")}
    return {key: number for key, number in ids.items() if number is not None}


def _special_id(metadata: Metadata, name: str) -> int | None:
    key = f"tokenizer.ggml.{_ID_KEYS.get(name, name)}_token_id"
    value = metadata[key].data if key in metadata else None
    # llama.cpp passes over what is no token, -1 for one, as well.
    count = len(metadata[TOKENS].data) if TOKENS in metadata else MAX_ID
    return value if type(value) is int and 0 <= value < count else None


def rebuild_files(
    metadata: Metadata, known: KnownTokenizer
) -> tuple[dict[str, bytes], list[Fault]]:
    """Return tokenizer and generation files, and why some of them cannot be made.

    The metadata are well typed.
    """
    files = {"generation_config.json": _json(_generation_config(metadata))}
    if TOKENS not in metadata:
        return files, [Fault("tokenizer", "holds no tokenizer", fatal=False)]
    model, pre = _text(metadata, MODEL), _text(metadata, PRE)
    tokens = metadata[TOKENS].data
    types = _types(metadata, len(tokens))
    if model != "gpt2":
        message = f"tokenizer of kind `{model}` is not rebuilt, only byte-level BPE (`gpt2`) is"
        return files, [Fault("tokenizer", message, fatal=False)]
    if pre not in (known.pre, *_GPT2):
        message = f"tokenizer is not rebuilt: how `{pre}` splits text is not known here"
        return files, [Fault("tokenizer", message, fatal=False)]
    split = "" if pre in _GPT2 else known.split
    files["tokenizer.json"] = _json(_tokenizer(metadata, tokens, types, split))
    files["tokenizer_config.json"] = _json(_tokenizer_config(metadata, tokens))
    return files, []


def _text(metadata: Metadata, key: str) -> str:
    return str(metadata[key].data) if key in metadata else ""


def _types(metadata: Metadata, count: int) -> list[int]:
    held: list[int] = metadata[TOKEN_TYPES].data if TOKEN_TYPES in metadata else []
    return held or [int(TokenType.NORMAL)] * count


def _tokenizer(metadata: Metadata, tokens: list[str], types: list[int], split: str) -> Any:
    """Return tokenizer.json; `split` is a regular expression, or empty for GPT-2's own rule."""
    merges = metadata[MERGES].data if MERGES in metadata else []
    numbered = list(zip(range(len(tokens)), tokens, types, strict=True))
    return tokenizer_json(
        {text: number for number, text, kind in numbered if kind != TokenType.UNUSED},
        [merge.split(" ", 1) for merge in merges],
        [
            (number, text, kind == TokenType.CONTROL)
            for number, text, kind in numbered
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        ],
        splitting_by(split) if split else gpt2_splitting(),
    )


def _tokenizer_config(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in _SPECIAL:
        number = _special_id(metadata, name)
        if number is not None:
            config[f"{name}_token"] = tokens[number]
        switch = f"tokenizer.ggml.add_{name}_token"
        if switch in metadata:
            config[f"add_{name}_token"] = metadata[switch].data
    template = _chat_template(metadata)
    if template:
        config["chat_template"] = template
    return config


def _chat_template(metadata: Metadata) -> str | list[dict[str, str]]:
    """Return the chat template, or all of them by name where there are several."""
    default = _text(metadata, _TEMPLATE)
    named = [
        {"name": key.removeprefix(_TEMPLATE + "."), "template": value.data}
        for key, value in metadata.items()
        if key.startswith(_TEMPLATE + ".")
    ]
    return [{"name": "default", "template": default}, *named] if named else default


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    values = plain_values({key: metadata[key] for key in _SAMPLING if key in metadata})
    config = {_SAMPLING[key]: value for key, value in values.items()}
    return {**config, **special_ids(metadata)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
