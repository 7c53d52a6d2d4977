"""The key-values of a GGUF file that a checkpoint becomes, as llama.cpp's converter writes them."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.gguf.header import check_value
from lingconv.containers.gguf.hf_metadata import HfFiles
from lingconv.containers.gguf.tokenizer import describe_tokenizer
from lingconv.containers.stored_tensor import HeaderError
from lingconv.encodings.ggml_ftype import FILE_TYPE_KEY
from lingconv.errors import CheckpointError, UsageError
from lingconv.model.family import Family, GgufModel
from lingconv.model.layout import Layout
from lingconv.model.symbol_rules import UNREAD
from lingconv.plans.key_values import Metadata, Value, ValueType
from lingconv.plans.options import AUTO, GgufOptions, Target

QUANTIZATION_VERSION = "general.quantization_version"
_MAX_STEM_BYTES = 200
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml/include/ggml.h


class GgufTarget(NamedTuple):
    """What a GGUF file is going to hold: the target's layout and symbols, and the file type."""

    layout: Layout
    symbols: Mapping[str, Any]
    file_type: int


def describe(
    checkpoint: Checkpoint,
    family: Family,
    architecture: str,
    target: GgufTarget,
    options: GgufOptions,
) -> tuple[dict[str, Value], list[str]]:
    """Return the key-values of the GGUF file that a checkpoint becomes, and what to say of them.

    Those of a GGUF source are carried over. Raises UsageError for a tokenizer that is not known,
    and CheckpointError when a file that describes the model cannot be used.
    """
    named = {key: Value(ValueType.STRING, text) for key, text in options.metadata}
    held = checkpoint.metadata
    if held is not None:
        kept = {key: value for key, value in held.items() if not key.startswith("split.")}
        numbers = {key: value for key, value in _numbers(family, target.symbols) if key in kept}
        ours = {**numbers, **_encoding(target.file_type)}
        if options.outtype == AUTO:  # types are kept, and so is what the source says of them
            ours = {key: value for key, value in ours.items() if key in kept}
        # What is right already keeps the type that it is written in.
        ours = {k: v for k, v in ours.items() if k not in kept or kept[k].data != v.data}
        return _written({**kept, **ours, **named}), []
    arch = _architecture(family, architecture)
    with HfFiles(checkpoint) as files:
        general = files.general(arch.architecture, _parameters(target.layout))
        tokens, warnings = describe_tokenizer(
            files, arch.tokenizer, target.symbols["vocab_size"], options.tokenizer_pre
        )
    numbers = dict(_numbers(family, target.symbols))
    found = {**general, **named, **numbers, **_encoding(target.file_type), **tokens}
    return _written(found), [*warnings, *_unread(family, target.symbols)]


def _unread(family: Family, symbols: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the model says otherwise than usual and llama.cpp does not read."""
    for symbol in family.symbols:
        if symbol.spellings.get(Target.GGUF) is UNREAD and symbols[symbol.name] != symbol.default:
            value = symbol.written(Target.GGUF, symbols)
            if value is not None:
                yield (
                    f"llama.cpp computes with {symbol.default:g} in place of `{symbol.key('hf')}`,"
                    f" {value:g}: it does not read that of this architecture"
                )


def _written(metadata: dict[str, Value]) -> dict[str, Value]:
    """Return key-values that all can be written; raise CheckpointError that names one that cannot.

    They are checked before the first byte of the target is.
    """
    try:
        for key, value in metadata.items():
            check_value(key, value)
    except HeaderError as exc:
        raise CheckpointError(f"the key-values of the GGUF file: {exc}") from exc
    return metadata


def file_stem(metadata: Metadata, mix: str) -> str:
    """Return what files are called when nobody says: `Ling-1T-v2-Q4_K_M`, as gguf-py names them."""
    import gguf

    name, base, finetune, version, size = (
        metadata[key].data if key in metadata and metadata[key].type == ValueType.STRING else None
        for key in map(
            "general.{}".format, ("name", "basename", "finetune", "version", "size_label")
        )
    )
    stem: str = gguf.naming_convention(name, base, finetune, version, size, mix)
    # The name of a file, whatever a card says: a part of it is behind, the number of the shard too.
    safe = "".join(letter if letter.isprintable() else "-" for letter in stem.replace("/", "-"))
    return safe.encode()[:_MAX_STEM_BYTES].decode("utf-8", "ignore").lstrip(".") or "model"


def _architecture(family: Family, architecture: str) -> GgufModel:
    arch = family.gguf
    if arch is None or arch.of != architecture:
        known = f": it has {arch.of} as `{arch.architecture}`" if arch else ""
        raise UsageError(f"llama.cpp has no architecture for {architecture}{known}")
    return arch


def _encoding(file_type: int) -> dict[str, Value]:
    return {
        QUANTIZATION_VERSION: Value(ValueType.UINT32, _QUANTIZATION_VERSION),
        FILE_TYPE_KEY: Value(ValueType.UINT32, file_type),
    }


def _numbers(family: Family, symbols: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield the model's numbers and switches under their GGUF keys."""
    for symbol in family.symbols:
        value = symbol.written(Target.GGUF, symbols)
        if value is not None:
            for key in symbol.keys[Target.GGUF]:
                yield key, _typed(value, is_float=isinstance(symbol.default, float))


def _typed(value: Any, *, is_float: bool) -> Value:
    """Return a number as GGUF types it: what may have a fraction is a float even if it has none."""
    if isinstance(value, str):
        return Value(ValueType.STRING, value)
    if isinstance(value, bool):
        return Value(ValueType.BOOL, value)
    if is_float or isinstance(value, float):
        return Value(ValueType.FLOAT32, float(value))
    return Value(ValueType.UINT32, value)


def _parameters(layout: Layout) -> tuple[int, int, int, int]:
    """Return all parameters, those outside of experts, those of one expert, and the experts.

    As gguf-py counts them for the size label (GGUFWriter.get_total_parameter_count).
    """
    stacks = [tensor for tensor in layout.tensors.values() if tensor.stack]
    shared = sum(prod(t.shape) for t in layout.tensors.values() if not t.stack)
    expert = sum(prod(tensor.shape) // tensor.stack for tensor in stacks)
    experts = sum(tensor.stack for tensor in stacks) // len(stacks) if stacks else 0
    return shared + sum(prod(t.shape) for t in stacks), shared, expert, experts
