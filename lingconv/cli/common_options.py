"""The options that most commands share: source, resources, publishing, output on screen."""

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
    str | None,
    typer.Option(
        "--formats",
        metavar="PATH",
        help="Family file, or folder of them; default: the built-in ones.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        "-j",
        "--jobs",
        min=0,
        envvar="LINGCONV_JOBS",
        metavar="N",
        help="Number of threads; 0 chooses by the number of CPUs.",
        rich_help_panel=RUN,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify",
        help="Verify the output after converting.",
        rich_help_panel=RUN,
    ),
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
    """The options of what is printed; they are set in `terminal`."""

    json: Annotated[
        bool,
        typer.Option("--json", callback=_set_json, help="Print one JSON document."),
    ] = False
    quiet: Annotated[
        bool,
        typer.Option(
            "-q",
            "--quiet",
            callback=_set_quiet,
            help="Print only the result, such as the output's path.",
        ),
    ] = False
    verbose: Annotated[
        bool,
        typer.Option("-v", "--verbose", callback=_set_verbose, help="Print all details."),
    ] = False


@dataclass(frozen=True, slots=True)
class ResourceFlags:
    """The options of a run's resources."""

    jobs: Jobs = 0
    max_memory: Annotated[
        str,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            envvar="LINGCONV_MAX_MEMORY",
            help="Memory budget for buffers, besides the memory of the interpreter.",
            rich_help_panel=RUN,
        ),
    ] = "1GiB"
    part: Annotated[
        str,
        typer.Option(
            "--part",
            metavar="I/N",
            help="Write the I-th of N shares of the files; run `lingconv finish DST` after all.",
            rich_help_panel=RUN,
        ),
    ] = ""
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            metavar="NAME",
            help="Where the work is done: `local`, or `ray` for a Ray cluster.",
            rich_help_panel=RUN,
        ),
    ] = LOCAL
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Address of the Ray cluster; `auto` finds a running one; default: start one here.",
            rich_help_panel=RUN,
        ),
    ] = ""

    device: Annotated[
        str,
        typer.Option(
            "--device",
            envvar="LINGCONV_DEVICE",
            metavar="NAME",
            help="`cpu`, or GPUs that convert FP8 and BF16: `cuda`, `cuda:N`, `cuda:all`.",
            rich_help_panel=RUN,
        ),
    ] = CPU

    @property
    def resources(self) -> Resources:
        """The Resources that these options describe."""
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
    """The options of writing to a repository."""

    create: Annotated[
        bool,
        typer.Option(
            "--create",
            help="Create the repository, as a private one.",
            rich_help_panel=HUB,
        ),
    ] = False
    public: Annotated[
        bool,
        typer.Option(
            "--public",
            help="With `--create`: make the repository public.",
            rich_help_panel=HUB,
        ),
    ] = False
    pull_request: Annotated[
        bool,
        typer.Option("--pr", help="Write to a new pull request.", rich_help_panel=HUB),
    ] = False
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Replace another checkpoint in the repository.",
            rich_help_panel=HUB,
        ),
    ] = False

    @property
    def options(self) -> PublishOptions:
        """The PublishOptions."""
        return PublishOptions(self.create, self.public, self.pull_request, self.replace)


@dataclass(frozen=True, slots=True)
class SourceFlags:
    """The options that override SRC's description of its model."""

    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Use this config.json instead of SRC's; default: SRC's config or metadata.",
        ),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set one key of the config. Repeatable."),
    ] = None

    def given(self, *, main_params: bool = False) -> SourceOverrides | None:
        """Return the overrides, or None if there are none."""
        if self.config is None and not self.settings and not main_params:
            return None
        pairs = [pair("--set", text, "KEY=VALUE") for text in self.settings or ()]
        values = {key: _value(text) for key, text in pairs}
        return SourceOverrides(
            _read_config(self.config) if self.config else None, values, main_params
        )


@dataclass(frozen=True, slots=True)
class HubFlags:
    """The options that apply if SRC or DST is on the Hub."""

    publish: PublishFlags
    max_disk: Annotated[
        str,
        typer.Option(
            "--max-disk",
            metavar="SIZE",
            help="Disk budget for weights that are on disk temporarily; default: two of the largest"
            " files.",
            rich_help_panel=HUB,
        ),
    ] = ""
    download: Annotated[
        bool,
        typer.Option(
            "--download",
            help="Download whole files just before they are needed, instead of byte ranges.",
            rich_help_panel=HUB,
        ),
    ] = False
    staging: Annotated[
        Path | None,
        typer.Option(
            "--staging",
            metavar="DIR",
            envvar="LINGCONV_STAGING",
            help="Folder for files until they are uploaded; default: the user's cache folder.",
            rich_help_panel=HUB,
        ),
    ] = None

    def resources(self, limits: ResourceFlags) -> Resources:
        """Return the Resources of `limits` with these options."""
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
        help="Read the optimizer's FP32 main parameters instead of the rounded weights.",
        rich_help_panel="Megatron",
    ),
]
Fresh = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Start over: remove the files that an earlier run wrote to DST.",
        rich_help_panel=RUN,
    ),
]
Recheck = Annotated[
    bool,
    typer.Option(
        "--recheck",
        help="Compare finished files byte by byte with the plan, published ones by their digests;"
        " write differing ones again.",
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
    """Return the JSON value in a text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def pair(option: str, text: str, form: str) -> tuple[str, str]:
    """Return the two sides of `left=right`; raises UsageError with the expected `form`."""
    left, sign, right = text.partition("=")
    if not (left and sign and right):
        raise UsageError(f"`{option} {text}`", hint=f"write it as `{option} {form}`")
    return left, right
