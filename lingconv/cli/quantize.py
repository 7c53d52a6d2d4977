"""`lingconv quantize`: to FP8 or four bits, layout kept."""

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
from lingconv.cli.four_bit_options import FourBitFlags
from lingconv.cli.option_groups import grouped
from lingconv.errors import UsageError
from lingconv.plans.options import TargetDType


@grouped
def quantize(
    source: Source,
    destination: Destination,
    to_fp8: Annotated[bool, typer.Option("--fp8", help="To FP8 e4m3 (the default).")] = False,
    to_nvfp4: Annotated[
        bool, typer.Option("--nvfp4", help="To NVFP4: 4.5 bits, groups of 16.")
    ] = False,
    to_int4: Annotated[
        bool, typer.Option("--int4", help="To INT4: 4.5 bits in groups of 32, 4.125 of 128.")
    ] = False,
    to_mxfp4: Annotated[
        bool, typer.Option("--mxfp4", help="To MXFP4: 4.25 bits, groups of 32.")
    ] = False,
    *,
    fp8: Fp8Flags,
    four_bits: FourBitFlags,
    output: OutputFlags,
    verify: Verify = False,
    fresh: Fresh = False,
    recheck: Recheck = False,
    limits: ResourceFlags,
    hub: HubFlags,
    formats: Formats = None,
    printed: DisplayFlags,
) -> None:
    """Quantize a checkpoint to FP8 or four bits: `convert --dtype ...`, layout kept.

    Four bits are for routed experts, unless `--include` says otherwise.

    Examples: `lingconv quantize Ling-1T Ling-1T-FP8 --fp8`,
    `lingconv quantize Ling-1T out --fp8 --scheme channel`,
    `lingconv quantize Ling-1T-FP8 Ling-1T-NVFP4 --nvfp4 --rest fp8`
    """
    wanted = {
        TargetDType.FP8: to_fp8,
        TargetDType.NVFP4: to_nvfp4,
        TargetDType.INT4: to_int4,
        TargetDType.MXFP4: to_mxfp4,
    }
    chosen = [dtype for dtype, is_wanted in wanted.items() if is_wanted] or [TargetDType.FP8]
    if len(chosen) > 1:
        flags = " and ".join(f"`--{dtype}`" for dtype in chosen)
        raise UsageError(f"{flags} contradict each other", hint="choose one of them")
    dtype = chosen[0]
    quantization = four_bits.quantization(dtype, fp8.options())
    options = replace(output.options(), dtype=dtype, **quantization)
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
