"""Tokens to run: from a text, from numbers, from a file, or a fixed sample.

The tokenizer is the checkpoint's own tokenizer.json, through the tokenizers library; a chat
template is a stranger's program, and runs within limits (`chat_template`).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lingconv.containers.hf.small_files import read_json
from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.storage import Storage
from lingconv.verification.reference import chat_template

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
SAMPLE_TOKENS = 64
_MAX_TEMPLATE_BYTES = 10_000_000
_WITHOUT_CHAT = "pass `prompt` without `chat`, or ids: `tokens=1,2,3`"
_STRIDE = 2_654_435_761  # 2^32 / golden ratio (Knuth, TAOCP 3, 6.4): spreads ids over a vocabulary


def sample_ids(vocab_size: int, count: int = SAMPLE_TOKENS) -> Tensor:
    """Return the fixed sample [1, count]: (i x 2654435761 mod 2^32) mod vocab_size, i from 1."""
    ids = (torch.arange(1, count + 1, dtype=torch.int64) * _STRIDE) % 2**32 % vocab_size
    return ids[None]


def parse_tokens(text: str) -> Tensor:
    """Return ids [B, S] from `1,2,3` or from a file.

    A file holds numbers with commas or white space between them, a JSON list (of lists), or, as
    .safetensors, a tensor `input_ids`.
    """
    path = Path(text)
    if path.suffix == ".safetensors":
        return _read_input_ids(path)
    if path.is_file():
        text = _read_text(path)
    try:
        parsed = json.loads(text) if text.lstrip().startswith("[") else _numbers(text)
        ids = torch.tensor(parsed, dtype=torch.int64)
    except (ValueError, TypeError, RuntimeError) as exc:
        raise UsageError(
            f"`tokens={text[:60]}` is neither a list of token ids nor a file with one",
            hint="write `tokens=1,2,3` or name a file",
        ) from exc
    return ids[None] if ids.dim() == 1 else ids


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.replace(",", " ").split()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}") from exc


def _read_input_ids(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            ids: Tensor = file.get_tensor("input_ids").to(torch.int64)
    except (OSError, SafetensorError) as exc:
        raise UsageError(f"{path} holds no tensor `input_ids`: {exc}") from exc
    return ids[None] if ids.dim() == 1 else ids


class Text:
    """The tokenizer of one checkpoint. Raises CheckpointError when it is missing or broken."""

    def __init__(self, storage: Storage) -> None:
        from tokenizers import Tokenizer

        self._storage = storage
        if TOKENIZER not in storage.files():
            raise CheckpointError(
                f"{storage.uri} has no {TOKENIZER}",
                hint="copy the tokenizer beside the weights, or pass `tokens=1,2,3`",
            )
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_buffer(storage.read(TOKENIZER))
        except BaseException as exc:
            if not _is_tokenizers_own(exc):
                raise
            raise CheckpointError(
                f"{TOKENIZER} cannot be used: {exc}", hint="pass ids: `tokens=1,2,3`"
            ) from exc

    def encode(self, prompt: str, *, chat: bool = False) -> Tensor:
        """Return the ids [1, S] of a prompt, put into the chat template first if `chat`."""
        if not _is_unicode(prompt):
            raise UsageError("the prompt is not UTF-8", hint="pass its ids: `tokens=1,2,3`")
        text = self._render(prompt) if chat else prompt
        if not _is_unicode(text):
            raise CheckpointError(
                "the chat template makes halves of characters (surrogates)", hint=_WITHOUT_CHAT
            )
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=not chat).ids
        except BaseException as exc:
            if not _is_tokenizers_own(exc):
                raise
            raise CheckpointError(
                f"{TOKENIZER} cannot be used: {exc}", hint="pass ids: `tokens=1,2,3`"
            ) from exc
        return torch.tensor([ids], dtype=torch.int64)

    def decode(self, token: int) -> str:
        """Return the text of one token, special tokens included; its name where text fails."""
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return text or self._tokenizer.id_to_token(token) or ""

    def _render(self, prompt: str) -> str:
        config = self._config()
        file, template = self._template(config)
        special = {name: _content(value) for name, value in config.items() if name[-6:] == "_token"}
        messages = [{"role": "user", "content": prompt}]
        variables = {**special, "messages": messages, "add_generation_prompt": True}
        try:
            return chat_template.render(template, variables)
        except ValueError as exc:
            raise CheckpointError(
                f"{file}: the chat template cannot be rendered: {exc}", hint=_WITHOUT_CHAT
            ) from exc

    def _config(self) -> dict[str, Any]:
        if TOKENIZER_CONFIG not in self._storage.files():
            return {}
        faults: list[Fault] = []
        config = read_json(self._storage, TOKENIZER_CONFIG, faults)
        if faults:
            raise CheckpointError(
                f"{TOKENIZER_CONFIG} cannot be used", faults=faults, hint=_WITHOUT_CHAT
            )
        return config

    def _template(self, config: dict[str, Any]) -> tuple[str, str]:
        """Return the template, and before it the name of the file that holds it."""
        if CHAT_TEMPLATE in self._storage.files():
            return CHAT_TEMPLATE, self._read_template()
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name
            named = [item for item in template if isinstance(item, dict)]
            default = [item for item in named if item.get("name") == "default"]
            template = default[-1].get("template") if default else None
        if not isinstance(template, str):
            raise CheckpointError(
                f"{self._storage.uri} has no chat template",
                hint="leave `chat` out: base models have none",
            )
        return TOKENIZER_CONFIG, template

    def _read_template(self) -> str:
        if self._storage.stat(CHAT_TEMPLATE).size > _MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{CHAT_TEMPLATE} has more than {_MAX_TEMPLATE_BYTES:,} bytes", hint=_WITHOUT_CHAT
            )
        return self._storage.read(CHAT_TEMPLATE).decode("utf-8", "replace")


class NextToken(NamedTuple):
    """A candidate for the token behind the last one; `text` is empty without a tokenizer."""

    id: int
    probability: float
    text: str


def next_tokens(storage: Storage, logits_BSV: Tensor, count: int) -> list[NextToken]:
    """Return the likeliest tokens behind the last position of the last row."""
    text = Text(storage) if TOKENIZER in storage.files() else None
    shares, ids = logits_BSV[-1, -1].softmax(-1).topk(min(count, logits_BSV.shape[-1]))
    return [
        NextToken(token, share, text.decode(token) if text else "")
        for token, share in zip(ids.tolist(), shares.tolist(), strict=True)
    ]


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _is_tokenizers_own(error: BaseException) -> bool:
    """Return whether the library raised it: an Exception, or Rust's panic, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _content(value: Any) -> str:
    """Return a special token's text: given as it is, or in an object."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
