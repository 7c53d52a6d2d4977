"""The small files of a Hugging Face folder, read by gguf-py as llama.cpp's converter reads them.

gguf-py wants a folder with the model's name, so the files are laid out in a temporary one, wherever
they come from.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from lingconv.containers.checkpoint import Checkpoint
from lingconv.errors import CheckpointError
from lingconv.errors.value_kinds import Field, Kind, Schema, checked, shown
from lingconv.plans.key_values import Value, ValueType
from lingconv.storage import Storage
from lingconv.storage.file_names import CARD_NAME, CONFIG_NAME
from lingconv.storage.front_matter import FrontMatterError, load_front_matter, split_card
from lingconv.storage.provenance import name_of
from lingconv.storage.records import (
    MAX_TEXT_BYTES,
    MAX_TOKENIZER_BYTES,
    read_bytes,
    read_checked,
    read_text,
)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"
_TEMPLATES = "additional_chat_templates/"
_LOGGERS = ("metadata", "gguf.vocab", "gguf.gguf_writer")
_MAX_FLOAT32 = 3.4e38
_MAX_INT32 = (1 << 31) - 1

_TEXT = Field((Kind.TEXT,))
_TEXTS = Field((Kind.TEXT, Kind.LIST), items=(Kind.TEXT,))
_NUMBER = Field((Kind.FLOAT,), least=-_MAX_FLOAT32, most=_MAX_FLOAT32)
_COUNT = Field((Kind.INT,), least=-_MAX_INT32, most=_MAX_INT32)
_MODELS = Field((Kind.TEXT, Kind.LIST), items=(Kind.TEXT, Kind.OBJECT))
_ABOUT = ("name", "author", "version", "organization", "description", "finetune", "basename")
_WHERE = ("size_label", "url", "doi", "uuid", "repo_url")
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# The keys that gguf-py's metadata.py looks up in a card.
_CARD_FIELDS: Schema = {
    **dict.fromkeys((*_ABOUT, *_WHERE), _TEXT),
    **{f"model_{key}": _TEXT for key in (*_ABOUT, *_WHERE, "creator", "type")},
    **dict.fromkeys(("license_name", "license_link", "pipeline_tag"), _TEXT),
    **dict.fromkeys(("license", "tags", "language", "languages"), _TEXTS),
    **dict.fromkeys(("base_model", "base_models", "base_model_sources"), _MODELS),
    **dict.fromkeys(("dataset", "datasets", "dataset_sources"), _MODELS),
}
_GENERATION_FIELDS: Schema = {
    "sequence": _TEXT,
    **dict.fromkeys(("top_k", "penalty_last_n", "mirostat"), _COUNT),
    **dict.fromkeys(("top_p", "min_p", "xtc_probability", "xtc_threshold"), _NUMBER),
    **dict.fromkeys(("temperature", "penalty_repeat", "mirostat_tau", "mirostat_eta"), _NUMBER),
}
_TOKENIZER_CONFIG_FIELDS: Schema = {
    "chat_template": Field((Kind.TEXT, Kind.LIST), items=(Kind.OBJECT,)),
    **{f"{name}_token": Field((Kind.TEXT, Kind.OBJECT)) for name in _SPECIAL},
    **{f"add_{name}_token": Field((Kind.BOOL,)) for name in _SPECIAL},
    "added_tokens_decoder": Field((Kind.OBJECT,), items=(Kind.OBJECT,)),
}
_ADDED_FIELDS: Schema = {
    "content": Field((Kind.TEXT,), required=True),
    "special": Field((Kind.BOOL,)),
    "normalized": Field((Kind.BOOL,)),
}
_TOKENIZER_FIELDS: Schema = {
    "model": Field((Kind.OBJECT,), required=True),
    "added_tokens": Field((Kind.LIST,), items=(Kind.OBJECT,)),
    "post_processor": Field((Kind.OBJECT,)),
}


def _card(storage: Storage, name: str) -> bytes:
    """Return what of a card's front matter says something of the model, every value as a text."""
    import yaml  # which planning needs for nothing else

    try:
        found = load_front_matter(split_card(read_text(storage, name)).yaml, as_text=True)
    except FrontMatterError as exc:
        raise CheckpointError(f"the model card ({name}): front matter {exc}", hint=_MEND) from exc
    known, faults = checked(found, _CARD_FIELDS, name)
    for key in ("base_model", "base_models", "datasets", "dataset"):
        held = known.get(key)
        for entry in held if isinstance(held, list) else ():
            if isinstance(entry, dict):
                faults += checked(entry, dict.fromkeys(entry, _TEXT), f"{name}: `{key}`")[1]
    if faults:
        text = f"the model card ({name}): front matter cannot be used"
        raise CheckpointError(text, faults=faults, hint=_MEND)
    kept = {key: value for key, value in known.items() if key in _CARD_FIELDS}
    text = yaml.safe_dump(kept, allow_unicode=True, sort_keys=False) if kept else ""
    return f"---\n{text}---\n".encode()


def _record(fields: Schema) -> Callable[[Storage, str], bytes]:
    def read(storage: Storage, name: str) -> bytes:
        return json.dumps(read_checked(storage, name, fields)).encode()

    return read


def _as_it_is(storage: Storage, name: str) -> bytes:
    return read_bytes(storage, name, MAX_TEXT_BYTES)


def _tokenizer(storage: Storage, name: str) -> bytes:
    return read_bytes(storage, name, MAX_TOKENIZER_BYTES)


_MEND = "mend the file, or leave it out of the folder"
_FILES: Mapping[str, Callable[[Storage, str], bytes]] = {
    CARD_NAME: _card,
    "generation_config.json": _record(_GENERATION_FIELDS),
    TOKENIZER: _tokenizer,
    TOKENIZER_CONFIG: _record(_TOKENIZER_CONFIG_FIELDS),
    "merges.txt": _as_it_is,
    "chat_template.jinja": _as_it_is,
    "chat_template.json": _record({"chat_template": _TEXT}),
}


class HfFiles:
    """The files of one checkpoint in a folder of their own. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._temporary = tempfile.TemporaryDirectory(prefix="lingconv-")
        name = name_of(checkpoint.storage.uri)
        self.folder = Path(self._temporary.name) / (name or "model")

    def __enter__(self) -> Self:
        try:
            self._lay_out()
        except BaseException:
            self._temporary.cleanup()
            raise
        return self

    def _lay_out(self) -> None:
        """Write what gguf-py is going to look for, checked."""
        self.folder.mkdir()
        storage = self._checkpoint.storage
        for name in self._checkpoint.side_files:
            read = _as_it_is if name.startswith(_TEMPLATES) else _FILES.get(name)
            if read is not None:
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(read(storage, name))
        (self.folder / CONFIG_NAME).write_text(json.dumps(self._checkpoint.config), "utf-8")

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def tokenizer(self) -> dict[str, Any]:
        """Return tokenizer.json; raise CheckpointError when there is none or it is no object."""
        if not (self.folder / TOKENIZER).exists():
            raise CheckpointError(
                f"{self._checkpoint.storage.uri} has no {TOKENIZER}",
                hint="copy the tokenizer's files beside the weights: a GGUF file holds them too",
            )
        storage = self._checkpoint.storage
        return read_checked(storage, TOKENIZER, _TOKENIZER_FIELDS, MAX_TOKENIZER_BYTES)

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """Return the tokens that were added beside tokenizer.json, as its `added_tokens` has them.

        transformers adds them when it loads the tokenizer: those of `added_tokens_decoder` in
        tokenizer_config.json, by id, and those of the older added_tokens.json, by text.
        """
        storage, held = self._checkpoint.storage, self._checkpoint.side_files
        found: dict[str, dict[str, Any]] = {}
        if ADDED_TOKENS in held:
            for text, number in read_checked(storage, ADDED_TOKENS, {}).items():
                found[text] = {"id": _token_id(number, ADDED_TOKENS, text)}
        if TOKENIZER_CONFIG in held:
            config = read_checked(storage, TOKENIZER_CONFIG, _TOKENIZER_CONFIG_FIELDS)
            for key, entry in (config.get("added_tokens_decoder") or {}).items():
                where = f"{TOKENIZER_CONFIG}: `added_tokens_decoder.{shown(key)}`"
                known, faults = checked(entry, _ADDED_FIELDS, where)
                if faults:
                    raise CheckpointError(str(faults[0]), faults=faults)
                number = int(key) if key.isascii() and key.isdigit() else key
                text = known["content"]
                found[text] = {**known, "id": _token_id(number, TOKENIZER_CONFIG, text)}
        return found

    def general(self, architecture: str, parameters: tuple[int, int, int, int]) -> dict[str, Value]:
        """Return the `general.*` key-values: name, version, size label, licence, base models ...

        gguf-py finds them in the model card, config.json, generation_config.json and the folder's
        name. `parameters` are all, shared, one expert's, and the number of experts.
        """
        import gguf  # with numpy and yaml, which planning needs for nothing else

        with _explained("the model card (README.md) or config.json"):
            found = gguf.Metadata.load(None, self.folder, None, parameters[0])
            if found.size_label is None and parameters[0]:
                found.size_label = gguf.size_label(*parameters)
            writer = gguf.GGUFWriter(None, architecture)
            writer.add_type(gguf.GGUFType.MODEL)
            found.set_gguf_meta_model(writer)
        return _collected(writer)

    def special_tokens(self) -> dict[str, Value]:
        """Return merges, ids of special tokens, and the chat template as key-values."""
        import gguf

        with _explained("the tokenizer's files"):
            writer = gguf.GGUFWriter(None, "")
            gguf.SpecialVocab(self.folder, load_merges=True).add_to_gguf(writer, quiet=True)
        found = _collected(writer)
        return {key: value for key, value in found.items() if key.startswith("tokenizer.")}


def _token_id(value: Any, file: str, text: str) -> int:
    """Return an id, or raise CheckpointError for what is none."""
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{file} has an added token {shown(text)} with the id {shown(value)}")
    return value


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Keep gguf-py's log to itself, and translate whatever a broken file makes it raise."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except Exception as exc:
        raise CheckpointError(
            f"{what} cannot be used: {type(exc).__name__}: {exc}",
            hint=_MEND,
        ) from exc
    finally:
        for logger in loggers:
            logger.disabled = False


def _collected(writer: Any) -> dict[str, Value]:
    """Return what was added to a gguf-py writer, in its order."""
    held: Mapping[str, Any] = writer.kv_data[0]
    return {key: _value(item) for key, item in held.items()}


def _value(item: Any) -> Value:
    kind = ValueType(item.type)
    if kind != ValueType.ARRAY:
        return Value(kind, item.value)
    data = list(item.value)
    if item.sub_type is not None:
        return Value(kind, data, ValueType(item.sub_type))
    return Value(kind, data, ValueType.STRING if isinstance(data[0], str) else ValueType.INT32)
