"""The checkpoints of an average: opened, and checked to be of one model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.containers.checkpoint import Checkpoint
from lingconv.encodings import quantization_config
from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.planner.sources import Average
from lingconv.plans.checkpoint_weights import Weighting

# Config keys that may differ between checkpoints of one model: how and by what they were stored.
_STORAGE_KEYS = {quantization_config.KEY, "torch_dtype", "dtype", "transformers_version"}
_STORAGE_KEYS |= {"_name_or_path"}
# Files up to this size (tokenizers) are compared byte by byte, larger ones by size alone.
_COMPARED_BYTES = 64 << 20

Open = Callable[[str], Checkpoint]
Recognise = Callable[[Checkpoint], Model]


def open_average(
    sources: Sequence[str], weighting: Weighting, open_one: Open, recognise: Recognise
) -> Average:
    """Return the checkpoints with a weight above 0, and the last one, oldest first.

    Raises UsageError if there is only one, or one twice, and CheckpointError with all differences
    if they are not the same model.
    """
    _refuse_doubles(sources)
    last = len(sources) - 1
    kept = [n for n, weight in enumerate(weighting.weights) if weight > 0 or n == last]
    models: list[Model] = []
    for number in kept:
        models.append(_recognised(open_one(sources[number]), models, recognise))
    *others, base = models
    differences = [fault for model in others for fault in _differences(model, base)]
    fatal = [fault for fault in differences if fault.fatal]
    if fatal:
        raise CheckpointError("these are not checkpoints of one model", faults=fatal)
    unread = [
        Fault("weight", "has weight 0 and is not read", sources[number], fatal=False)
        for number in range(last)
        if number not in kept
    ]
    models[-1] = replace(base, faults=(*base.faults, *differences, *unread))
    weights = tuple(weighting.weights[number] for number in kept)
    return Average(tuple(models), weights, weighting.name)


def _refuse_doubles(sources: Sequence[str]) -> None:
    if len(sources) < 2:
        raise UsageError("an average needs two checkpoints or more")
    seen: dict[Path, str] = {}
    for source in sources:
        twin = seen.setdefault(Path(source).resolve(), source)
        if twin is not source:
            raise UsageError(
                f"{source} is there twice", hint="give it a larger weight instead: `weights`"
            )


def _recognised(checkpoint: Checkpoint, known: Sequence[Model], recognise: Recognise) -> Model:
    """Return a recognised checkpoint; if its headers equal those of the last one, it shares them.

    The headers of dozens of checkpoints then take the memory of one.
    """
    twin = known[-1] if known else None
    if twin is not None and _looks_like(checkpoint, twin.checkpoint):
        alike = replace(checkpoint, tensors=twin.checkpoint.tensors, config=twin.checkpoint.config)
        return replace(twin, checkpoint=alike)
    return recognise(checkpoint)


def _looks_like(one: Checkpoint, other: Checkpoint) -> bool:
    plain = one.metadata is None and one.args == other.args and not one.is_spread
    return (
        plain
        and other.metadata is None
        and one.config == other.config
        and one.faults == other.faults
        and one.tensors == other.tensors
    )


def _differences(model: Model, base: Model) -> Iterator[Fault]:
    """Yield the differences between a checkpoint and the base: model, config keys, small files."""
    where, other = model.checkpoint.storage.uri, base.checkpoint.storage.uri
    if model.architecture != base.architecture or model.family.name != base.family.name:
        yield Fault("model", f"is {model.architecture}, {other} is {base.architecture}", where)
        return
    for symbol, value in base.symbols.items():
        own = model.symbols[symbol]
        if own != value:
            key = model.family.key(symbol, model.layout.name)
            yield Fault("config", f"`{key}` is {own}, in {other} it is {value}", where)
    yield from _other_keys(model, base)
    yield from _other_files(model.checkpoint, base.checkpoint)


def _other_keys(model: Model, base: Model) -> Iterator[Fault]:
    """Yield the keys of config.json that differ and on which no tensor depends."""
    if model.layout.base != base.layout.base:
        return
    own, other = model.checkpoint.config, base.checkpoint.config
    known = {key for symbol in base.family.symbols for keys in symbol.keys.values() for key in keys}
    for key in {**other, **own}:
        if own.get(key) != other.get(key) and key not in _STORAGE_KEYS | known:
            message = f"config: `{key}` is {_shown(own, key)}, in the last one {_shown(other, key)}"
            yield Fault("config", message, model.checkpoint.storage.uri, fatal=False)


def _shown(config: Any, key: str) -> str:
    return repr(config[key]) if key in config else "not there"


def _other_files(checkpoint: Checkpoint, base: Checkpoint) -> Iterator[Fault]:
    """Yield the small files that differ from the base's: a tokenizer, a chat template."""
    for name, stat in base.side_files.items():
        own = checkpoint.side_files.get(name)
        if own is None:
            continue
        same = own.size == stat.size
        if same and stat.size <= _COMPARED_BYTES:
            same = checkpoint.storage.read(name) == base.storage.read(name)
        if not same:
            message = f"{name} is not that of {base.storage.uri}, which is carried over"
            yield Fault("file", message, checkpoint.storage.uri, fatal=False)
