"""A byte-level BPE tokenizer as GGUF keeps it, from tokenizer.json, without transformers."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

from lingconv.containers.gguf.hf_metadata import TOKENIZER, HfFiles
from lingconv.errors import CheckpointError, LingconvError, UsageError
from lingconv.errors.value_kinds import shown
from lingconv.model.family import KnownTokenizer
from lingconv.plans.key_values import Value, ValueType

PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
TOKEN_TYPES = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
MODEL = "tokenizer.ggml.model"
# The text whose tokens tell one tokenizer from another (conversion/base.py of
# github.com/ggml-org/llama.cpp at 0c1e5709): white space, emoji, digits, scripts, contractions.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis"
    " concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3"
    " កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български"
    " ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure"
    " I'll make it, 'D you like some tea? We'Ve a'lL"
)


class TokenType(IntEnum):
    """`llama_token_type` in include/llama.h."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def describe_tokenizer(
    files: HfFiles, known: KnownTokenizer, vocab_size: int, pre: str
) -> tuple[dict[str, Value], list[str]]:
    """Return the `tokenizer.*` key-values, and what is to be said of them.

    `pre` names the rule by which llama.cpp splits text; empty means the family's own, if the
    tokenizer is the family's. Raises UsageError when it is not, CheckpointError for a tokenizer
    that is no byte-level BPE or does not fit `vocab_size`.
    """
    value = files.tokenizer()
    vocab, added = _read(value)
    _add_others(vocab, added, files.added_tokens())
    warnings: list[str] = []
    with _explained():
        tokenizer = _load(files)
        if not pre:
            pre, warnings = _choose_pre(tokenizer, known, set(added))
        tokens, types = _tokens(vocab, added, tokenizer, vocab_size)
    special = files.special_tokens()
    merges = special.pop(MERGES, Value(ValueType.ARRAY, [], ValueType.STRING))
    return {
        MODEL: Value(ValueType.STRING, "gpt2"),
        PRE: Value(ValueType.STRING, pre),
        TOKENS: Value(ValueType.ARRAY, tokens, ValueType.STRING),
        TOKEN_TYPES: Value(ValueType.ARRAY, types, ValueType.INT32),
        MERGES: merges,
        **special,
    }, warnings


def _read(value: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]]:
    """Return the vocabulary and the added tokens by text, both checked for what is used of them."""
    model = value["model"]
    kind, vocab = model.get("type") or "BPE", model.get("vocab")
    added = value.get("added_tokens") or []
    if kind != "BPE" or not isinstance(vocab, dict):
        raise CheckpointError(f"{TOKENIZER} holds {shown(kind)} tokens, not byte-level BPE")
    if not all(type(number) is int and number >= 0 for number in vocab.values()):
        raise CheckpointError(f"{TOKENIZER} gives a token an id that is no number")
    merges = model.get("merges") or []
    if not isinstance(merges, list) or not all(map(_is_merge, merges)):
        raise CheckpointError(f"{TOKENIZER} has a merge that is no pair of tokens")
    by_text: dict[str, Mapping[str, Any]] = {}
    for entry in added:
        number, text = entry.get("id"), entry.get("content")
        if type(number) is not int or number < 0 or not isinstance(text, str):
            raise CheckpointError(
                f"{TOKENIZER} has an added token {shown(text)} with the id {shown(number)}"
            )
        by_text[text] = entry
    return vocab, by_text


def _add_others(
    vocab: Mapping[str, int],
    added: dict[str, Mapping[str, Any]],
    others: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add the tokens that other files name and tokenizer.json has not.

    Raises CheckpointError where two files give one id to different tokens.
    """
    texts = {number: text for text, number in vocab.items()}
    texts |= {entry["id"]: text for text, entry in added.items()}
    for text, entry in others.items():
        known = texts.get(entry["id"])
        if known is None:
            added[text] = entry
        elif known != text:
            raise CheckpointError(
                f"token {entry['id']:,} is {shown(known)} in {TOKENIZER}, and {shown(text)} in the"
                " files beside it",
                hint="take all files of the tokenizer from one save of it",
            )


def _is_merge(merge: Any) -> bool:
    """Return whether a merge is `a b`, or ["a", "b"] as newer files have it."""
    if isinstance(merge, list):
        return len(merge) == 2 and all(isinstance(part, str) for part in merge)
    return isinstance(merge, str)


def _load(files: HfFiles) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(files.folder / TOKENIZER))


@contextmanager
def _explained() -> Iterator[None]:
    """Translate what the library makes of a broken file: it raises plain Exception, and panics."""
    try:
        yield
    except (LingconvError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # pyo3_runtime.PanicException is no Exception
        raise CheckpointError(f"{TOKENIZER} cannot be used: {exc}"[:500]) from exc


def _choose_pre(tokenizer: Any, known: KnownTokenizer, added: set[str]) -> tuple[str, list[str]]:
    """Return the family's splitting rule if the tokenizer is the family's; else refuse to guess."""
    ids = tokenizer.encode(CHECK_TEXT).ids
    if hashlib.sha256(str(ids).encode()).hexdigest() == known.check:
        return known.pre, []
    if added.issuperset(known.control_tokens):
        return known.pre, [
            f"{TOKENIZER} is not the released one, but has its control tokens: llama.cpp is told to"
            f" split text as `{known.pre}` (`tokenizer_pre` chooses another rule)"
        ]
    raise UsageError(
        f"{TOKENIZER} is not a tokenizer that is known here, so how llama.cpp has to split text"
        " cannot be told",
        hint=f"name the rule: `tokenizer_pre={known.pre}` if it splits as Ling 2.0 does, or"
        " another of the names in llama.cpp's src/llama-vocab.cpp",
    )


def _tokens(
    vocab: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    tokenizer: Any,
    vocab_size: int,
) -> tuple[list[str], list[int]]:
    """Return text and type of every id below `vocab_size`; ids that nothing has are padding."""
    by_id = {number: text for text, number in vocab.items()}
    by_id.update({entry["id"]: text for text, entry in added.items()})
    if max(by_id, default=0) >= vocab_size:
        raise CheckpointError(
            f"{TOKENIZER} has token {max(by_id):,}, the model has {vocab_size:,}",
            hint="the tokenizer belongs to another model",
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [
        int(TokenType.NORMAL if number in by_id else TokenType.UNUSED)
        for number in range(vocab_size)
    ]
    for text, entry in added.items():
        if not entry.get("normalized", False):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            text = tokenizer.decode(ids, skip_special_tokens=False)
        special = entry.get("special", False) or _looks_special(text)
        tokens[entry["id"]] = text if special else text.replace("\u2581", " ")
        types[entry["id"]] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return tokens, types


def _looks_special(text: str) -> bool:
    """Return whether llama.cpp's converter takes a token for a control token by its looks."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return any(text.startswith(left) and text.endswith(right) for left, right in brackets)
