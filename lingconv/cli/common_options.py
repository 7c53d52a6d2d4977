"""The options that most commands share: what is read, what a run may use, what is printed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lingconv.cli.terminal import terminal
from lingconv.cli.units import parse_size
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.errors import UsageError
from lingconv.execution.devices import CPU
from lingconv.execution.plan_share import PlanShare
from lingconv.execution.resources import LOCAL, Resources
from lingconv.storage.upload_target import PublishOptions

RUN = "Run"
HUB = "Hub"

Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint to read: a folder, a .gguf file, hf://org/name[@rev], or s3://bucket/folder.",
    ),
]
Destination = Annotated[
    str,
    typer.Argument(
        metavar="DST",
        help="Folder to write, NAME.gguf, hf://org/name[@branch][/NAME.gguf], or s3://bucket/folder.",
    ),
]
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
    terminal.json = value
    return value


def _set_quiet(value: bool) -> bool:
    terminal.quiet = value
    return value


def _set_verbose(value: bool) -> bool:
    terminal.verbose = value
    return value


@dataclass(frozen=True, slots=True)
class DisplayFlags:
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
class ResourceFlags:
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
    part: Annotated[
        str,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Write the I-th of N shares of the files; `lingconv finish DST` comes last.",
            rich_help_panel=RUN,
        ),
    ] = ""
    executor: Annotated[
        str,
        typer.Option(
            "--executor", help="`local`, or `ray` for the nodes of a cluster.", rich_help_panel=RUN
        ),
    ] = LOCAL
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Of a Ray cluster, `auto` for the one that runs here; none starts one.",
            rich_help_panel=RUN,
        ),
    ] = ""

    device: Annotated[
        str,
        typer.Option(
            "--device",
            envvar="LINGCONV_DEVICE",
            help="`cpu`; or GPUs for FP8 and BF16: `cuda`, `cuda:N`, `cuda:all`.",
            rich_help_panel=RUN,
        ),
    ] = CPU

    @property
    def resources(self) -> Resources:
        """The limits, as the engine takes them."""
        return Resources(
            jobs=self.jobs,
            max_memory_bytes=parse_size(self.max_memory),
            part=PlanShare.parse(self.part) if self.part else None,
            executor=self.executor,
            address=self.address,
            device=self.device,
        )


@dataclass(frozen=True, slots=True)
class PublishFlags:
    """How a repository is written to."""

    create: Annotated[
        bool,
        typer.Option("--create", help="Create the repository, private.", rich_help_panel=HUB),
    ] = False
    public: Annotated[
        bool,
        typer.Option("--public", help="With `--create`: for all to see.", rich_help_panel=HUB),
    ] = False
    pull_request: Annotated[
        bool,
        typer.Option("--pr", help="Write to a new pull request.", rich_help_panel=HUB),
    ] = False
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Remove another checkpoint that the repository holds.",
            rich_help_panel=HUB,
        ),
    ] = False

    @property
    def options(self) -> PublishOptions:
        """The request."""
        return PublishOptions(self.create, self.public, self.pull_request, self.replace)


@dataclass(frozen=True, slots=True)
class SourceFlags:
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

    def given(self, *, main_params: bool = False) -> SourceOverrides | None:
        """Return what is said, or None when that is nothing."""
        if self.config is None and not self.settings and not main_params:
            return None
        pairs = [pair("--set", text, "KEY=VALUE") for text in self.settings or ()]
        values = {key: _value(text) for key, text in pairs}
        return SourceOverrides(
            _read_config(self.config) if self.config else None, values, main_params
        )


@dataclass(frozen=True, slots=True)
class HubFlags:
    """What is allowed while SRC or DST is on the Hub."""

    publish: PublishFlags
    max_disk: Annotated[
        str,
        typer.Option(
            "--max-disk",
            metavar="SIZE",
            help="Most disk for weights that are only passing through; two of the largest files.",
            rich_help_panel=HUB,
        ),
    ] = ""
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Fetch whole files just ahead of the work, instead of byte ranges.",
            rich_help_panel=HUB,
        ),
    ] = False
    staging: Annotated[
        Path | None,
        typer.Option(
            "--staging",
            metavar="DIR",
            envvar="LINGCONV_STAGING",
            help="Where files are kept until the Hub has them; the user's cache by default.",
            rich_help_panel=HUB,
        ),
    ] = None

    def resources(self, limits: ResourceFlags) -> Resources:
        """Return what a run may use."""
        return replace(
            limits.resources,
            max_disk_bytes=parse_size(self.max_disk) if self.max_disk else 0,
            download=self.download,
            staging=self.staging,
        )


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
Recheck = Annotated[
    bool,
    typer.Option(
        "--recheck",
        help="Compare finished files byte by byte with what they should hold; write what differs.",
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
