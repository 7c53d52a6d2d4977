"""`lingconv convert`: from any checkpoint to another layout, dtype or shard size."""

from pathlib import Path
from typing import Annotated

import typer

from lingconv import api
from lingconv.cli import plan as plan_command
from lingconv.cli.options import (
    AllowNonfinite,
    AllowRequantize,
    Destination,
    Dialect,
    Drop,
    Formats,
    Fresh,
    Ignore,
    Jobs,
    Json,
    MaxMemory,
    MaxShardSize,
    MtpOption,
    Quiet,
    Scale,
    ScaleDtype,
    SchemeOption,
    Source,
    Verbose,
    request,
    resources,
)
from lingconv.cli.output import output
from lingconv.cli.plan import DType, To
from lingconv.cli.progress import make_progress
from lingconv.cli.units import file_size
from lingconv.engine import Resources, Result
from lingconv.options import ConvertOptions, Mtp, Scheme

SCHEMA = "lingconv.convert/1"


def convert(
    source: Source,
    destination: Destination,
    to: To = "hf",
    dtype: DType = None,
    max_shard_size: MaxShardSize = "10GB",
    mtp: MtpOption = Mtp.KEEP,
    drop: Drop = None,
    scheme: SchemeOption = Scheme.BLOCK,
    dialect: Dialect = "",
    scale: Scale = None,
    scale_dtype: ScaleDtype = "",
    ignore: Ignore = None,
    allow_nonfinite: AllowNonfinite = False,
    allow_requantize: AllowRequantize = False,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Show the plan and stop.")
    ] = False,
    fresh: Fresh = False,
    jobs: Jobs = 0,
    max_memory: MaxMemory = "1GiB",
    formats: Formats = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a checkpoint. The same command resumes a run that was stopped.

    Examples: `lingconv convert Ling-1T-FP8 Ling-1T --dtype bf16`,
    `lingconv convert Ling-1T out --max-shard-size 5GB`
    """
    options = request(
        to=to,
        dtype=dtype or "",
        max_shard_size=max_shard_size,
        mtp=mtp,
        drop=drop,
        scheme=scheme,
        dialect=dialect,
        scale=scale,
        scale_dtype=scale_dtype,
        ignore=ignore,
        allow_nonfinite=allow_nonfinite,
        allow_requantize=allow_requantize,
    )
    limits = resources(jobs, max_memory)
    if dry_run:
        built = api.plan(source, options, formats=formats)
        plan_command.show(built, destination, limits, verbose=verbose)
        return
    run(source, destination, options, limits, formats=formats, fresh=fresh)


def run(
    source: Path,
    destination: Path,
    options: ConvertOptions,
    limits: Resources,
    *,
    formats: str | None,
    fresh: bool,
) -> None:
    """Convert with progress on stderr, and print the result."""
    with make_progress() as progress:
        result = api.convert(
            source,
            destination,
            options,
            formats=formats,
            resources=limits,
            progress=progress,
            fresh=fresh,
        )
    show(result)


def show(result: Result) -> None:
    """Print what a run did."""
    rate = result.bytes_written / result.seconds if result.seconds else 0.0
    found = result.files_found_finished
    line = (
        f"{result.destination}: nothing to do, all {found} weight files are there"
        if not result.files_written
        else f"{result.destination}: {result.files_written} weight files,"
        f" {file_size(result.bytes_written)} in {result.seconds:.1f} s ({file_size(rate)}/s)"
        + (f", {found} were there" if found else "")
    )
    value = {
        "schema": SCHEMA,
        "destination": result.destination,
        "digest": result.digest,
        "files_written": result.files_written,
        "files_found_finished": found,
        "bytes_written": result.bytes_written,
        "seconds": round(result.seconds, 3),
    }
    output.result([line], value, result.destination)
