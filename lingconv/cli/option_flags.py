"""Flags for fields: messages of the core name an option as `field` or `field=value`.

A caller of the functions reads keywords; on the command line they become the flags of Typer's own
table: "add `dtype=bf16`" is shown as "add `--dtype bf16`".
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer

# Fields that are parameters of another name on the command line.
_PARAMETERS = {
    "experts": "grouped_gemm",
    "layers": "pp_layers",
    "layout": "to",
    "main_params": "from_main_params",
    "max_disk_bytes": "max_disk",
    "max_memory_bytes": "max_memory",
    "max_shard_bytes": "max_shard_size",
    "max_shard_tensors": "split_max_tensors",
    "merged": "experts_as",
    "network_bytes_per_s": "network",
    "tensor_types": "tensor_type",
}
# Values that are switches.
_SWITCHES = {"experts=sequential": "--sequential", "experts=grouped": "--grouped-gemm"}
_NAMED = re.compile(r"`([a-z_][a-z_.]*)(?:=([^`]*))?`")


def speller(app: typer.Typer) -> Callable[[str], str]:
    """Return a function that shows a message of the core with the flags of a command line."""
    flags: dict[str, str] = {}

    def spell(text: str) -> str:
        if "`" not in text:
            return text
        if not flags:  # Typer builds its table in milliseconds, which good runs do not need
            flags.update(flags_of(app))
        return _NAMED.sub(lambda found: _flag(found, flags), text)

    return spell


def flags_of(app: typer.Typer) -> dict[str, str]:
    """Return the flag of every parameter of every command: the first of its spellings."""
    return {
        name: next(flag for flag in spellings if flag.startswith("--"))
        for name, spellings in _options(typer.main.get_command(app))
    }


def _options(command: Any) -> Iterator[tuple[str, list[str]]]:
    """Yield the options of a command and of those below it: parameter and spellings."""
    for parameter in command.params:
        if any(flag.startswith("--") for flag in parameter.opts):
            yield parameter.name, parameter.opts
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)


def parameter_of(field: str) -> str:
    """Return the parameter of the command line that sets a field; dots lead into values."""
    last = field.rpartition(".")[2]
    return _PARAMETERS.get(last, last)


def _flag(found: re.Match[str], flags: Mapping[str, str]) -> str:
    field, value = found[1], found[2]
    if f"{field}={value}" in _SWITCHES:
        return f"`{_SWITCHES[f'{field}={value}']}`"
    flag = flags.get(parameter_of(field))
    if flag is None:
        return found[0]  # a key of a config, a word
    return f"`{flag}`" if value is None else f"`{flag} {value}`"
