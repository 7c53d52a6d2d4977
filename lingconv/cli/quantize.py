"""`lingconv quantize`: to FP8, layout kept."""

from dataclasses import replace
from typing import Annotated

import typer

from lingconv.cli import convert
from lingconv.cli.common_options import (
    Destination,
    DisplayFlags,
    Formats,
    Fresh,
    HubFlags,
    Recheck,
    ResourceFlags,
    Source,
    Verify,
)
from lingconv.cli.convert_options import OutputFlags
from lingconv.cli.format_options import Fp8Flags
from lingconv.cli.option_groups import grouped
from lingconv.plans.options import TargetDType


@grouped
def quantize(
    source: Source,
    destination: Destination,
    to_fp8: Annotated[
        bool, typer.Option("--fp8", help="To FP8 e4m3, the one target so far.")
    ] = True,
    *,
    fp8: Fp8Flags,
    output: OutputFlags,
    verify: Verify = False,
    fresh: Fresh = False,
    recheck: Recheck = False,
    limits: ResourceFlags,
    hub: HubFlags,
    formats: Formats = None,
    printed: DisplayFlags,
) -> None:
    """Quantize a checkpoint to FP8: `convert --dtype fp8`, layout kept.

    Examples: `lingconv quantize Ling-1T Ling-1T-FP8 --fp8`,
    `lingconv quantize Ling-1T out --fp8 --scheme channel`
    """
    options = replace(output.options(), dtype=TargetDType.FP8, fp8=fp8.options())
    convert.run(
        source,
        destination,
        options,
        hub.resources(limits),
        hub.publish.options,
        formats=formats,
        fresh=fresh,
        recheck=recheck,
        verify=verify,
    )
