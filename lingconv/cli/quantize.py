"""`lingconv quantize`: to FP8, layout kept."""

from typing import Annotated

import typer

from lingconv.cli import convert
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
    Verify,
    request,
    resources,
)
from lingconv.options import Mtp, Scheme, TargetDType


def quantize(
    source: Source,
    destination: Destination,
    fp8: Annotated[bool, typer.Option("--fp8", help="To FP8 e4m3, the one target so far.")] = True,
    scheme: SchemeOption = Scheme.BLOCK,
    dialect: Dialect = "",
    scale: Scale = None,
    scale_dtype: ScaleDtype = "",
    ignore: Ignore = None,
    max_shard_size: MaxShardSize = "",
    mtp: MtpOption = Mtp.KEEP,
    drop: Drop = None,
    allow_nonfinite: AllowNonfinite = False,
    allow_requantize: AllowRequantize = False,
    verify: Verify = False,
    fresh: Fresh = False,
    jobs: Jobs = 0,
    max_memory: MaxMemory = "1GiB",
    formats: Formats = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Quantize a checkpoint to FP8: `convert --dtype fp8`, layout kept.

    Examples: `lingconv quantize Ling-1T Ling-1T-FP8 --fp8`,
    `lingconv quantize Ling-1T out --fp8 --scheme channel`
    """
    options = request(
        to="hf",
        dtype=TargetDType.FP8,
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
    convert.run(source, destination, options, limits, formats=formats, fresh=fresh, verify=verify)
