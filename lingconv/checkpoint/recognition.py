"""Finds out what a checkpoint is: family, symbols and layout, from what each format says of itself.

Nothing is guessed in silence: every difference between what a checkpoint says and what it holds
becomes a Fault, and `inspect` prints what was found.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lingconv import value_kinds
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.checkpoint.tensor_matching import Matcher
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.gguf.to_hf import (
    plain_values,
    rebuild_files,
    special_ids,
    well_typed,
)
from lingconv.containers.hf.config import DTYPE_NAMES, rebuild_config
from lingconv.containers.hf.small_files import CONFIG_FIELDS
from lingconv.containers.megatron.rank_assembly import assemble_ranks
from lingconv.containers.megatron.symbols_from_shapes import symbols_from_shapes
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.encodings.dtypes import DTYPES, DType
from lingconv.errors import CheckpointError, Fault
from lingconv.model.family import Family, PhysicalName
from lingconv.model.layout import GGUF, HF, MEGATRON, Layout, build_layout
from lingconv.model.layout_detection import experts_layout, refined, with_mtp_apart
from lingconv.plans.key_values import Metadata
from lingconv.storage.file_names import CONFIG_NAME
from lingconv.storage.overlay import Overlay

ARGS_NAME = "Megatron's arguments"


def recognise(
    checkpoint: Checkpoint, families: Sequence[Family], given: SourceOverrides | None = None
) -> Model:
    """Find out what a checkpoint is.

    Raises CheckpointError when its config names no known architecture or lacks what describes the
    model; everything less is a fault of the returned Model.
    """
    given = given or SourceOverrides()
    if checkpoint.metadata is not None:
        return _recognise_gguf(checkpoint, checkpoint.metadata, families)
    if checkpoint.args is not None:
        return _recognise_megatron(checkpoint, checkpoint.args, families, given)
    stated = {**(given.config or checkpoint.config), **given.settings}
    config, odd = value_kinds.checked(stated, CONFIG_FIELDS, CONFIG_NAME)
    checkpoint = replace(checkpoint, config=config, faults=(*checkpoint.faults, *odd))
    family, architecture = _find_family(checkpoint, families)
    symbols = _resolve_symbols(checkpoint, family)
    names = checkpoint.tensors.keys()
    layout_name = experts_layout(family, HF, names)
    layout = build_layout(family, symbols, layout_name)
    if layout_name != HF:
        layout = with_mtp_apart(layout, build_layout(family, symbols, HF), names)
    return _matched(checkpoint, family, architecture, symbols, layout)


def _matched(
    checkpoint: Checkpoint,
    family: Family,
    architecture: str,
    symbols: Mapping[str, Any],
    layout: Layout,
) -> Model:
    matcher = Matcher(checkpoint, family, layout)
    matcher.match()
    return Model(
        checkpoint=checkpoint,
        family=family,
        architecture=architecture,
        symbols=symbols,
        layout=layout,
        stored=matcher.stored,
        dropped=matcher.dropped,
        stated=matcher.stated,
        faults=(*checkpoint.faults, *matcher.faults),
    )


def _recognise_gguf(
    checkpoint: Checkpoint, metadata: Metadata, families: Sequence[Family]
) -> Model:
    """Recognise a GGUF checkpoint, and show it with the small files that Hugging Face has."""
    values = plain_values(metadata)
    found = values.get("general.architecture")
    known = {family.gguf.architecture: family for family in families if family.gguf}
    family = known.get(found) if isinstance(found, str) else None
    if family is None or family.gguf is None:
        unknown = f"the unknown GGUF architecture {value_kinds.shown(found)}"
        raise CheckpointError(
            f"{checkpoint.storage.uri} has {unknown}",
            faults=checkpoint.faults,
            details=[f"known: {name}" for name in known] + [str(f) for f in checkpoint.faults],
            hint="describe the model in a family file and pass it with `--formats PATH`",
        )
    described_in = next(iter(checkpoint.shards))
    symbols = family.resolve(values, GGUF, names=checkpoint.tensors, file=described_in)
    typed, odd = well_typed(metadata, described_in)
    files, faults = rebuild_files(typed, family.gguf.tokenizer)
    matrices = [tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 2]
    dtype = matrices[0] if matrices and isinstance(matrices[0], DType) else DType.BF16
    storage = Overlay(checkpoint.storage, list(checkpoint.shards), files)
    shown = replace(
        checkpoint,
        storage=storage,
        config=rebuild_config(family, family.gguf.of, symbols, dtype, special_ids(typed)),
        side_files={name: storage.stat(name) for name in files},
        faults=(*checkpoint.faults, *odd, *faults),
    )
    return _matched(shown, family, family.gguf.of, symbols, build_layout(family, symbols, GGUF))


def _recognise_megatron(
    checkpoint: Checkpoint,
    args: Mapping[str, Any],
    families: Sequence[Family],
    given: SourceOverrides,
) -> Model:
    """Recognise what Megatron wrote: config.json is the user's, lies beside, or is made of `args`.

    Where several of them speak, they have to agree.
    """
    family = next((family for family in families if family.megatron is not None), None)
    if family is None or family.megatron is None:
        raise CheckpointError("no family file describes models in Megatron's formats")
    faults: list[Fault] = []
    config = given.config or checkpoint.config
    if args:
        symbols = family.resolve(args, MEGATRON, file=ARGS_NAME)
        if config:
            faults = list(_contradictions(family, symbols, config, chosen=given.config is not None))
        else:
            faults = list(_assumptions(family, symbols, args))
            stated = args.get("params_dtype")
            dtype = stated if isinstance(stated, DType) else DType.BF16
            config = rebuild_config(family, family.megatron.of, symbols, dtype)
    if not config:
        config = _config_from_shapes(checkpoint, family, given)
    config, odd = value_kinds.checked({**config, **given.settings}, CONFIG_FIELDS, CONFIG_NAME)
    shown = replace(checkpoint, config=config, faults=(*checkpoint.faults, *faults, *odd))
    family, architecture = _find_family(shown, [family])
    symbols = family.resolve(shown.config, HF)
    if checkpoint.is_spread:
        tensors, lost = assemble_ranks(family, symbols, args, checkpoint.tensors)
        shown = replace(shown, tensors=tensors, faults=(*shown.faults, *lost))
        layout_name = MEGATRON
    else:
        layout_name = refined(family, MEGATRON, checkpoint.tensors)
    layout = build_layout(family, symbols, layout_name)
    return _matched(shown, family, architecture, symbols, layout)


def _config_from_shapes(
    checkpoint: Checkpoint, family: Family, given: SourceOverrides
) -> dict[str, Any]:
    """Return a config of what the shapes and the user say.

    Raises CheckpointError with all that nobody says.
    """
    found = {} if checkpoint.is_spread else symbols_from_shapes(family, checkpoint.tensors)
    config: dict[str, Any] = {"architectures": [family.megatron.of if family.megatron else ""]}
    config.update(family.config)
    largest = max(checkpoint.tensors.values(), key=lambda t: t.nbytes, default=None)
    if largest is not None and largest.dtype in DTYPE_NAMES:
        config["torch_dtype"] = DTYPE_NAMES[DTYPES[largest.dtype.value]]
    missing = []
    for symbol in family.symbols:
        keys = symbol.keys.get(HF, ())
        if symbol.name in found and keys:
            config[keys[0]] = found[symbol.name]
        elif keys and MEGATRON in symbol.keys and not any(key in given.settings for key in keys):
            missing.append(keys[0])
    if missing:
        raise CheckpointError(
            f"{checkpoint.storage.uri} holds neither arguments nor a {CONFIG_NAME}",
            faults=checkpoint.faults,
            details=[f"`{key}` follows from no shape" for key in missing],
            hint="pass the model's `--config FILE` (a config.json), or `--set KEY=VALUE` for each",
        )
    return config


def _contradictions(
    family: Family, from_args: Mapping[str, Any], config: Mapping[str, Any], *, chosen: bool
) -> Iterator[Fault]:
    """Yield what the arguments say otherwise than config.json, which the user may have chosen."""
    from_config = family.resolve(config, HF)
    for symbol in family.symbols:
        one, other = from_args[symbol.name], from_config[symbol.name]
        padded = symbol.name == "vocab_size" and one > other
        if MEGATRON in symbol.keys and one != other and not padded:
            message = f"`{symbol.key(MEGATRON)}` is {one}, {CONFIG_NAME} says {other}"
            hint = "pass the right one as `--config FILE`"
            yield Fault("config", message, ARGS_NAME, fatal=not chosen, hint=hint)


def _assumptions(
    family: Family, symbols: Mapping[str, Any], args: Mapping[str, Any]
) -> Iterator[Fault]:
    """Yield what no argument says, and what it was taken for."""
    for symbol in family.symbols:
        keys = symbol.keys.get(MEGATRON, ())
        if keys and all(args.get(key) is None for key in keys):
            message = f"`{keys[0]}` is not given, taken as {symbols[symbol.name]}"
            yield Fault("config", message, ARGS_NAME, fatal=False)


def _find_family(checkpoint: Checkpoint, families: Sequence[Family]) -> tuple[Family, str]:
    named = checkpoint.config.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for family in families:
        for name in names:
            if name in family.architectures:
                return family, name
    known = sorted(name for family in families for name in family.architectures)
    close = difflib.get_close_matches(names[0], known, 1) if names else []
    raise CheckpointError(
        f"{CONFIG_NAME} names an unknown architecture: {', '.join(names) or 'none'}",
        faults=checkpoint.faults,
        details=[f"known: {name}" for name in known] + [str(fault) for fault in checkpoint.faults],
        hint=f"did you mean {close[0]}?"
        if close
        else "describe the model in a family file and pass it with `--formats PATH`",
    )


def _resolve_symbols(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    """Read the symbols; find out whether the config counts MTP layers among the hidden layers."""
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
