"""Which model a Megatron checkpoint holds: by its arguments, by a config.json, or by its shapes.

    who speaks                          what of it counts
    -------------------------------------------------------------------------------------------
    --config FILE                       all; arguments that differ are warnings
    config.json beside the iteration    all; arguments that differ are faults
    arguments in the checkpoint         all, where there is no config.json
    shapes and --set KEY=VALUE          all, where there is neither; what is missing is refused

`--set` changes single keys of whichever config counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from lingconv.containers.base import Identity
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.hf.config import DTYPE_NAMES, rebuild_config
from lingconv.containers.hf.identify import find_family
from lingconv.containers.hf.small_files import CONFIG_FIELDS
from lingconv.containers.megatron.rank_assembly import assemble_ranks
from lingconv.containers.megatron.symbols_from_shapes import symbols_from_shapes
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.encodings.dtypes import DTYPES, DType
from lingconv.errors import CheckpointError, Fault, unusable
from lingconv.errors.value_kinds import checked
from lingconv.model.family import Family
from lingconv.model.layout import HF, MEGATRON, build_layout
from lingconv.model.layout_detection import refined
from lingconv.model.symbols import whole_number
from lingconv.storage.file_names import CONFIG_NAME

ARGS_NAME = "Megatron's arguments"
# So many experts, missing or not, are looked for one by one; more than so many are in no model.
_ALWAYS_CHECKED, _MOST = 100_000, 1_000_000

# Defaults that mean "not given", as of a scaling of RoPE: nobody has to say that there is none.
_NOT_GIVEN = ("default", 0.0)


def identify(
    checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides
) -> Identity:
    """Return the model, and the tensors of all ranks put together where they are apart.

    Raises CheckpointError when nothing describes the model completely.
    """
    family = next((family for family in families if family.megatron is not None), None)
    if family is None:
        raise CheckpointError("no family file describes models in Megatron's formats")
    config, faults = _config(checkpoint, family, overrides)
    config, odd = checked({**config, **overrides.settings}, CONFIG_FIELDS, CONFIG_NAME)
    shown = replace(checkpoint, config=config, faults=(*checkpoint.faults, *faults, *odd))
    family, architecture = find_family(shown, [family])
    symbols = family.resolve(shown.config, HF)
    _check_counts(symbols, checkpoint)
    if checkpoint.is_spread:
        whole = assemble_ranks(family, symbols, checkpoint)
        faults = [*shown.faults, *whole.faults]
        shown = replace(shown, tensors=whole.tensors, faults=(*faults,), absent=whole.absent)
        layout_name = MEGATRON
    else:
        layout_name = refined(family, MEGATRON, checkpoint.tensors)
    layout = build_layout(family, symbols, layout_name)
    return Identity(shown, family, architecture, symbols, layout)


def _check_counts(symbols: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when the model has more matrices than the files have bytes for."""
    counts = {key: max(1, whole_number(key, symbols)) for key in ("layers", "experts")}
    nbytes = sum(stat.size for stat in checkpoint.shards.values())
    if prod(counts.values()) > min(max(nbytes, _ALWAYS_CHECKED), _MOST):
        raise CheckpointError(
            f"{checkpoint.storage.uri} holds {nbytes:,} bytes of weights: too few for"
            f" {counts['layers']:,} layers of {counts['experts']:,} experts",
            faults=checkpoint.faults,
            hint="pass the model's `config=FILE` (a config.json)",
        )


def _config(
    checkpoint: Checkpoint, family: Family, overrides: SourceOverrides
) -> tuple[Mapping[str, Any], list[Fault]]:
    """Return the config that counts, and what contradicts it or was assumed."""
    args, config = checkpoint.args, overrides.config or checkpoint.config
    if not args:
        return config or _config_from_shapes(checkpoint, family, overrides), []
    symbols = family.resolve(args, MEGATRON, file=ARGS_NAME)
    if config:
        chosen = overrides.config is not None
        return config, list(_contradictions(family, symbols, config, chosen=chosen))
    stated = args.get("params_dtype")
    dtype = stated if isinstance(stated, DType) else DType.BF16
    architecture = family.megatron.of if family.megatron else ""
    built = rebuild_config(family, architecture, symbols, dtype)
    return built, list(_assumptions(family, symbols, args))


def _config_from_shapes(
    checkpoint: Checkpoint, family: Family, overrides: SourceOverrides
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
        elif (
            keys
            and MEGATRON in symbol.keys
            and symbol.default not in _NOT_GIVEN
            and not any(key in overrides.settings for key in keys)
        ):
            missing.append(keys[0])
    fatal = [fault for fault in checkpoint.faults if fault.fatal]
    if missing and fatal:  # what is missing may be in the files that cannot be read
        raise unusable(checkpoint.storage.uri, fatal)
    if missing:
        raise CheckpointError(
            f"{checkpoint.storage.uri} holds neither arguments nor a {CONFIG_NAME}",
            faults=checkpoint.faults,
            details=[f"`{key}` follows from no shape" for key in missing],
            hint="pass the model's `config=FILE` (a config.json), or `settings=KEY=VALUE` for each",
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
            hint = "pass the right one as `config=FILE`"
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
