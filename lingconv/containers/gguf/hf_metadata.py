"""The small files of a Hugging Face folder, read by gguf-py as llama.cpp's converter reads them.

gguf-py wants a folder with the model's name, so the files are laid out in a temporary one, wherever
they come from.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from lingconv.containers.checkpoint import Checkpoint
from lingconv.errors import CheckpointError
from lingconv.plans.key_values import Value, ValueType
from lingconv.storage.file_names import CONFIG_NAME
from lingconv.storage.provenance import name_of

TOKENIZER = "tokenizer.json"
_CARD = "README.md"
_FILES = (
    _CARD,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TEMPLATES = "additional_chat_templates/"
_MAX_BYTES = 250_000_000
_LOGGERS = ("metadata", "gguf.vocab", "gguf.gguf_writer")


class HfFiles:
    """The files of one checkpoint in a folder of their own. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._temporary = tempfile.TemporaryDirectory(prefix="lingconv-")
        name = name_of(checkpoint.storage.uri)
        self.folder = Path(self._temporary.name) / (name or "model")

    def __enter__(self) -> Self:
        self.folder.mkdir()
        for name, stat in self._checkpoint.side_files.items():
            wanted = name in _FILES or name.startswith(_TEMPLATES)
            if wanted and stat.size <= _MAX_BYTES:
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(self._checkpoint.storage.read(name))
        (self.folder / CONFIG_NAME).write_text(json.dumps(self._checkpoint.config), "utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def tokenizer(self) -> dict[str, Any]:
        """Return tokenizer.json; raise CheckpointError when there is none or it is no object."""
        path = self.folder / TOKENIZER
        if not path.exists():
            raise CheckpointError(
                f"{self._checkpoint.storage.uri} has no {TOKENIZER}",
                hint="copy the tokenizer's files beside the weights: a GGUF file holds them too",
            )
        try:
            value = json.loads(path.read_bytes())
        except ValueError as exc:
            raise CheckpointError(f"{TOKENIZER} is not JSON: {exc}") from exc
        if not isinstance(value, dict):
            raise CheckpointError(f"{TOKENIZER} is not a JSON object")
        return value

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
            hint="mend the file, or leave it out of the folder",
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
