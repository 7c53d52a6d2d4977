"""Flags for fields: messages of the core name an option as `field` or `field=value`.

A caller of the functions reads keywords; on the command line they become the flags of Typer's own
table: "add `dtype=bf16`" is shown as "add `--dtype bf16`".
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
# The command that has the most options, and what others are in its words.
_HOME = "convert"
_STAND_INS = {"merge experts": "convert --to hf-merged", "quantize": "convert --dtype fp8"}
_NAMED = re.compile(r"`([a-z_][a-z_.]*)(?:=([^`]*))?`")


def speller(app: typer.Typer, words: Sequence[str] = ()) -> Callable[[str], str]:
    """Return a function that shows a message of the core with the flags of a command line.

    `words` are those of the command line that runs: a flag that its command does not have is shown
    with a command that has it.
    """
    spellings: list[Mapping[str, str]] = []

    def spell(text: str) -> str:
        if "`" not in text:
            return text
        if not spellings:  # Typer builds its table in milliseconds, which good runs do not need
            spellings.append(_spellings(app, words))
        return _NAMED.sub(lambda found: _flag(found, spellings[0]), text)

    return spell


def _spellings(app: typer.Typer, words: Sequence[str]) -> dict[str, str]:
    """Return how each parameter is shown: the flag, its value as `{}`, in backquotes."""
    commands = dict(_commands(typer.main.get_command(app)))
    name = _running(commands, words)
    first = [_HOME, *commands]
    shown = {}
    for parameter, flag in flags_of(app).items():
        homes = [each for each in first if parameter in flags_of_command(commands[each])]
        elsewhere = name and name not in homes
        home = _STAND_INS.get(name, homes[0]) if homes[0] == _HOME else homes[0]
        shown[parameter] = f"`{flag}{{}}`" + (f" of `lingconv {home}`" if elsewhere else "")
    return shown


def _running(commands: Collection[str], words: Sequence[str]) -> str:
    """Return the command that the words of a command line name; empty for none."""
    for count in (2, 1):
        name = " ".join([word for word in words if not word.startswith("-")][:count])
        if name in commands:
            return name
    return ""


def flags_of(app: typer.Typer) -> dict[str, str]:
    """Return the flag of every parameter of every command: the first of its spellings."""
    found: dict[str, str] = {}
    for _, command in _commands(typer.main.get_command(app)):
        found.update(flags_of_command(command))
    return found


def flags_of_command(command: Any) -> dict[str, str]:
    """Return the flag of every parameter of one command."""
    return {
        parameter.name: next(flag for flag in parameter.opts if flag.startswith("--"))
        for parameter in command.params
        if any(flag.startswith("--") for flag in parameter.opts)
    }


def _commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it by their names; the program's own is empty."""
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {word}".strip())


def parameter_of(field: str) -> str:
    """Return the parameter of the command line that sets a field; dots lead into values."""
    last = field.rpartition(".")[2]
    return _PARAMETERS.get(last, last)


def _flag(found: re.Match[str], spellings: Mapping[str, str]) -> str:
    field, value = found[1], found[2]
    shown = spellings.get(parameter_of(field))
    if shown is None:
        return found[0]  # a key of a config, a word
    switch = _SWITCHES.get(f"{field}={value}")
    if switch is not None:
        return f"`{switch}`" + shown.partition("}`")[2]
    return shown.format("" if value is None else f" {value}")
