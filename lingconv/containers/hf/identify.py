"""Which model a Hugging Face checkpoint holds: by its config.json, and by tensor names."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lingconv.containers.base import Identity
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf.small_files import CONFIG_FIELDS
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.errors import MATHEMATICS, CheckpointError, Fault
from lingconv.errors.value_kinds import checked, shown
from lingconv.model.family import Family, PhysicalName
from lingconv.model.layout import HF, build_layout
from lingconv.model.layout_detection import experts_layout, with_mtp_apart
from lingconv.model.symbol_rules import RULES
from lingconv.model.symbols import look_up
from lingconv.storage.file_names import CONFIG_NAME


def identify(
    checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides
) -> Identity:
    """Return the model that config.json describes, experts stacked or apart.

    Raises CheckpointError when it names no known architecture or lacks what describes the model.
    """
    stated = {**(overrides.config or checkpoint.config), **overrides.settings}
    config, odd = checked(stated, CONFIG_FIELDS, CONFIG_NAME)
    checkpoint = replace(checkpoint, config=config, faults=(*checkpoint.faults, *odd))
    family, architecture = find_family(checkpoint, families)
    faults = (*checkpoint.faults, *_odd_mathematics(config, family))
    checkpoint = replace(checkpoint, faults=faults)
    symbols = _resolve_symbols(checkpoint, family)
    names = checkpoint.tensors.keys()
    layout_name = experts_layout(family, HF, names)
    layout = build_layout(family, symbols, layout_name)
    if layout_name != HF:
        layout = with_mtp_apart(layout, build_layout(family, symbols, HF), names)
    return Identity(checkpoint, family, architecture, symbols, layout)


def _odd_mathematics(config: Mapping[str, Any], family: Family) -> Iterator[Fault]:
    """Yield what a config asks for beyond what the family computes, and what it leaves open."""
    for key, value in family.beyond(config):
        message = f"`{key}` is {shown(value)}, which {family.title} does not have"
        yield Fault(MATHEMATICS, message, CONFIG_NAME, fatal=False)
    for symbol in family.symbols:
        keys = symbol.keys.get(HF, ())
        if symbol.said and all(look_up(config, key) is None for key in keys):
            value = RULES[symbol.rule].value(None, {}) if symbol.rule else symbol.default
            message = f"has none of {', '.join(f'`{key}`' for key in keys)}: {value} is taken"
            yield Fault("config", message, CONFIG_NAME, fatal=False)


def find_family(checkpoint: Checkpoint, families: Sequence[Family]) -> tuple[Family, str]:
    """Return the family, and which of its architectures config.json names.

    Raises CheckpointError that lists what is known when it names none of them.
    """
    named = checkpoint.config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for family in families:
        for name in names:
            if name in family.architectures:
                return family, name
    cause = next((f for f in checkpoint.faults if f.file == CONFIG_NAME and f.fatal), None)
    if cause is not None and not names:
        raise CheckpointError(str(cause), faults=checkpoint.faults, hint=cause.hint)
    known = sorted(name for family in families for name in family.architectures)
    close = difflib.get_close_matches(names[0], known, 1) if names else []
    raise CheckpointError(
        f"{CONFIG_NAME} names an unknown architecture: {', '.join(names) or 'none'}",
        faults=checkpoint.faults,
        details=[f"known: {name}" for name in known] + [str(fault) for fault in checkpoint.faults],
        hint=f"did you mean {close[0]}?"
        if close
        else "describe the model in a family file and pass it with `formats=PATH`",
    )


def _resolve_symbols(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """Return the symbols, whether or not the config counts MTP layers as hidden layers."""
    symbols = family.resolve(checkpoint.config, HF)
    outside = _first_mtp_tensor(family, symbols)
    if outside is None or outside in checkpoint.tensors:
        return symbols
    decoder_layers = symbols["layers"] - symbols["mtp_layers"]
    if decoder_layers < 0:
        return symbols
    inside_symbols = family.resolve(checkpoint.config, HF, {"layers": decoder_layers})
    inside = _first_mtp_tensor(family, inside_symbols)
    return inside_symbols if inside in checkpoint.tensors else symbols


def _first_mtp_tensor(family: Family, symbols: Mapping[str, Any]) -> PhysicalName | None:
    """Return the name of a tensor that only the first MTP layer has, or None without MTP."""
    for block in family.blocks:
        if block.mtp and len(block.layers(symbols)):
            prefix = block.addresses[HF].format(layer=block.layers(symbols)[0], i=0)
            return PhysicalName(prefix + family.tensors[block.groups[0]][0].addresses[HF])
    return None
