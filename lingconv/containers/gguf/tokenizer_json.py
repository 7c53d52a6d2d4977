"""tokenizer.json of a byte-level BPE tokenizer, as the tokenizers library writes it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LETTERS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def gpt2_splitting() -> dict[str, Any]:
    """Return the pre-tokenizer that splits text as GPT-2 does."""
    return {**_LETTERS, "use_regex": True}


def splitting_by(regex: str) -> dict[str, Any]:
    """Return a pre-tokenizer that splits text by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_LETTERS, "use_regex": False}]}


def tokenizer_json(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    added: Iterable[tuple[int, str, bool]],
    splitting: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the file's content; `added` are tokens as (id, text, special).

    They must be in `vocab` too: the library gives numbers of its own to those that are not.
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            for number, text, special in added
        ],
        "normalizer": None,
        "pre_tokenizer": splitting,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
