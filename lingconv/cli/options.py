"""The options that several commands share, and what they add up to."""

from pathlib import Path
from typing import Annotated

import typer

from lingconv.cli.output import output
from lingconv.cli.units import parse_size
from lingconv.engine import Resources
from lingconv.options import SCALE_F32, ConvertOptions, Fp8Options, Mtp, Scheme

FP8 = "FP8"
OUTPUT = "Output"
RUN = "Run"
FORWARD = "Forward pass"

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the checkpoint to read.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")]
Formats = Annotated[
    str | None, typer.Option("--formats", metavar="PATH", help="Family file or folder of your own.")
]
MaxShardSize = Annotated[
    str,
    typer.Option("--max-shard-size", metavar="SIZE", help="5GB, 10GiB ...", rich_help_panel=OUTPUT),
]
MtpOption = Annotated[
    Mtp, typer.Option("--mtp", help="What to do with MTP layers.", rich_help_panel=OUTPUT)
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        "--drop",
        metavar="PATTERN",
        help="Leave out tensors that the model does not know. Repeatable.",
        rich_help_panel=OUTPUT,
    ),
]
SchemeOption = Annotated[
    Scheme, typer.Option("--scheme", help="128x128 blocks, or rows.", rich_help_panel=FP8)
]
Dialect = Annotated[
    str,
    typer.Option(
        "--dialect",
        help="`fp8` (DeepSeek's names) or `compressed-tensors`; the scheme's own by default.",
        rich_help_panel=FP8,
    ),
]
Scale = Annotated[
    list[str] | None,
    typer.Option(
        "--scale",
        metavar="[PATTERN=]POLICY",
        help="`f32` (default), `ue8m0` (powers of two) or `ling` (as Ling's converter mixes them)."
        " Repeatable.",
        rich_help_panel=FP8,
    ),
]
ScaleDtype = Annotated[
    str,
    typer.Option(
        "--scale-dtype",
        help="`f32`, `bf16` or `e8m0`; the dialect's own by default.",
        rich_help_panel=FP8,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore",
        metavar="PATTERN",
        help="Keep these weights unquantized: name, glob, or `re:` and a regex. Repeatable.",
        rich_help_panel=FP8,
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option("--allow-nonfinite", help="Go on at NaN and Inf.", rich_help_panel=OUTPUT),
]
AllowRequantize = Annotated[
    bool,
    typer.Option(
        "--allow-requantize", help="Round FP8 weights a second time.", rich_help_panel=FP8
    ),
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
MaxMemory = Annotated[
    str,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        envvar="LINGCONV_MAX_MEMORY",
        help="Budget for buffers, above the interpreter.",
        rich_help_panel=RUN,
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


Json = Annotated[bool, typer.Option("--json", callback=_set_json, help="Print one JSON document.")]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", callback=_set_quiet, help="Print the essential word only.")
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", callback=_set_verbose, help="Print all details.")
]


def _fp8_options(
    scheme: Scheme,
    dialect: str,
    scale: list[str] | None,
    scale_dtype: str,
    ignore: list[str] | None,
) -> Fp8Options:
    """Return the FP8 part of a request; `--scale` without a pattern sets the default policy."""
    default = SCALE_F32
    rules = []
    for text in scale or ():
        pattern, _, policy = text.rpartition("=")
        if pattern:
            rules.append((pattern, policy))
        else:
            default = policy
    return Fp8Options(
        scheme=scheme.value,
        dialect=dialect,
        scale=default,
        scale_rules=tuple(rules),
        scale_dtype=scale_dtype,
        ignore=tuple(ignore or ()),
    )


def request(
    *,
    to: str,
    dtype: str,
    max_shard_size: str,
    mtp: Mtp,
    drop: list[str] | None,
    scheme: Scheme,
    dialect: str,
    scale: list[str] | None,
    scale_dtype: str,
    ignore: list[str] | None,
    allow_nonfinite: bool,
    allow_requantize: bool,
) -> ConvertOptions:
    """Return what the options of `plan`, `convert` and `quantize` ask for together."""
    return ConvertOptions(
        layout=to,
        dtype=dtype,
        fp8=_fp8_options(scheme, dialect, scale, scale_dtype, ignore),
        mtp=mtp.value,
        max_shard_bytes=parse_size(max_shard_size),
        drop=tuple(drop or ()),
        allow_nonfinite=allow_nonfinite,
        allow_requantize=allow_requantize,
    )


def resources(jobs: int, max_memory: str) -> Resources:
    """Return the run's limits."""
    return Resources(jobs=jobs, max_memory_bytes=parse_size(max_memory))
