"""The options that most commands share: what is read, what a run may use, what is printed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from lingconv.cli.output import output
from lingconv.cli.units import parse_size
from lingconv.engine import Resources
from lingconv.errors import UsageError
from lingconv.recognise import Given

RUN = "Run"

Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="Checkpoint to read: a folder, or a .gguf file.")
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, or NAME.gguf.")]
Formats = Annotated[
    str | None, typer.Option("--formats", metavar="PATH", help="Family file or folder of your own.")
]
Jobs = Annotated[
    int,
    typer.Option(
        "-j",
        "--jobs",
        min=0,
        envvar="LINGCONV_JOBS",
        help="Threads; 0 chooses by the number of processors.",
        rich_help_panel=RUN,
    ),
]
Verify = Annotated[
    bool,
    typer.Option("--verify", help="Prove the result afterwards.", rich_help_panel=RUN),
]


def _set_json(value: bool) -> bool:
    output.json = value
    return value


def _set_quiet(value: bool) -> bool:
    output.quiet = value
    return value


def _set_verbose(value: bool) -> bool:
    output.verbose = value
    return value


@dataclass(frozen=True, slots=True)
class Printed:
    """How much is printed, and for whom; `output` has it."""

    json: Annotated[
        bool, typer.Option("--json", callback=_set_json, help="Print one JSON document.")
    ] = False
    quiet: Annotated[
        bool,
        typer.Option("-q", "--quiet", callback=_set_quiet, help="Print the essential word only."),
    ] = False
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", callback=_set_verbose, help="Print all details.")
    ] = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may use."""

    jobs: Jobs = 0
    max_memory: Annotated[
        str,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            envvar="LINGCONV_MAX_MEMORY",
            help="Budget for buffers, above the interpreter.",
            rich_help_panel=RUN,
        ),
    ] = "1GiB"

    @property
    def resources(self) -> Resources:
        """The limits, as the engine takes them."""
        return Resources(jobs=self.jobs, max_memory_bytes=parse_size(self.max_memory))


@dataclass(frozen=True, slots=True)
class Said:
    """What the user says of SRC's model."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE", help="A config.json in place of what SRC says of its model."
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One key of that config. Repeatable."),
    ] = None

    def given(self, *, main_params: bool = False) -> Given | None:
        """Return what is said, or None when that is nothing."""
        if self.config is None and not self.settings and not main_params:
            return None
        pairs = [pair("--set", text, "KEY=VALUE") for text in self.settings or ()]
        values = {key: _value(text) for key, text in pairs}
        return Given(_read_config(self.config) if self.config else None, values, main_params)


FromMainParams = Annotated[
    bool,
    typer.Option(
        "--from-main-params",
        help="Read the optimizer's FP32 weights instead of their roundings.",
        rich_help_panel="Megatron",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Start over: remove what an earlier run wrote to DST.",
        rich_help_panel=RUN,
    ),
]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"`--config {path}` cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise UsageError(f"`--config {path}` is not a JSON object")
    return value


def _value(text: str) -> Any:
    """Return a number, a switch or any other JSON value; what is none is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def pair(option: str, text: str, form: str) -> tuple[str, str]:
    """Return the two sides of `left=right`; raise UsageError that shows the right `form`."""
    left, sign, right = text.partition("=")
    if not (left and sign and right):
        raise UsageError(f"`{option} {text}`", hint=f"write it as `{option} {form}`")
    return left, right
