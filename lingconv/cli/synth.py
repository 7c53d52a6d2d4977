"""`lingconv synth`: a checkpoint of random weights, of any size."""

from typing import Annotated

import typer

import lingconv
from lingconv.cli.common_options import Destination, DisplayFlags, Formats, Fresh, ResourceFlags
from lingconv.cli.convert import show
from lingconv.cli.convert_options import (
    OUTPUT,
    DType,
    MaxShardSize,
    layout_of,
    shard_bytes,
)
from lingconv.cli.format_options import OutType
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_progress
from lingconv.plans.options import AUTO, ConvertOptions, GgufOptions


@grouped
def synth(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A config.json, or: tiny, ling-mini-2.0, ling-flash-2.0, ling-1t.",
        ),
    ],
    destination: Destination,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Cut to this many layers.")
    ] = None,
    dense_layers: Annotated[
        int | None, typer.Option("--dense-layers", min=0, help="How many of them are dense.")
    ] = None,
    mtp: Annotated[int | None, typer.Option("--mtp", min=0, help="Number of MTP layers.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same bytes.")] = 0,
    dtype: DType = None,
    outtype: OutType = AUTO,
    max_shard_size: MaxShardSize = "",
    headers_only: Annotated[
        bool,
        typer.Option(
            "--headers-only",
            help="Sparse files: full size, no data, to plan on.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    fresh: Fresh = False,
    *,
    limits: ResourceFlags,
    formats: Formats = None,
    printed: DisplayFlags,
) -> None:
    """Write a checkpoint of random weights with realistic statistics, for trials and benchmarks.

    Examples: `lingconv synth ling-mini-2.0 cut --layers 4`,
    `lingconv synth ling-1t plan-only --headers-only`
    """
    with make_progress() as progress:
        result = lingconv.api.synth(
            config,
            destination,
            ConvertOptions(
                layout=layout_of(None, destination),
                dtype=dtype or "",
                gguf=GgufOptions(outtype=outtype.lower()),
                max_shard_bytes=shard_bytes(max_shard_size),
            ),
            layers=layers,
            dense_layers=dense_layers,
            mtp=mtp,
            seed=seed,
            headers_only=headers_only,
            formats=formats,
            resources=limits.resources,
            progress=progress,
            fresh=fresh,
        )
    show(result)
