"""The options of four bits on the command line, and how they share those of FP8."""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from lingconv.encodings.scaling import Rule, Search
from lingconv.plans.options import FourBitOptions, Fp8Options, TargetDType

FOUR_BITS = "Four bits"


@dataclass(frozen=True, slots=True)
class FourBitFlags:
    """The options of NVFP4, MXFP4 and INT4."""

    group: Annotated[
        int,
        typer.Option(
            "--group",
            metavar="N",
            help="Columns that share a scale in INT4: 32 (default), 64 or 128.",
            rich_help_panel=FOUR_BITS,
        ),
    ] = 0
    search: Annotated[
        Search,
        typer.Option(
            "--search",
            help="Scales to try for the least squared error: `four-over-six` or `sweep` for NVFP4,"
            " `mse` for INT4 and MXFP4.",
            rich_help_panel=FOUR_BITS,
        ),
    ] = Search.NONE
    rule: Annotated[
        Rule,
        typer.Option(
            "--rule",
            help="Scale of INT4: amax / 7.5 (`f32`; `ct`: as llm-compressor rounds on a CPU),"
            " amax / 7 (`kimi`), or amax / 8 with a sign (`signed`).",
            rich_help_panel=FOUR_BITS,
        ),
    ] = Rule.QUOTIENT
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            metavar="PATTERN",
            help="Weights to quantize; default: routed experts. Repeatable.",
            rich_help_panel=FOUR_BITS,
        ),
    ] = None
    rest: Annotated[
        str,
        typer.Option(
            "--rest",
            metavar="DTYPE",
            help="Other linear weights: `bf16` (default) or `fp8`.",
            rich_help_panel=FOUR_BITS,
        ),
    ] = TargetDType.BF16
    inputs: Annotated[
        bool,
        typer.Option(
            "--w4a4",
            help="NVFP4 with 4-bit activations: an input scale of 1.0 for every matrix, which is"
            " assumed and not measured.",
            rich_help_panel=FOUR_BITS,
        ),
    ] = False

    def quantization(self, dtype: str, fp8: Fp8Options) -> dict[str, Any]:
        """Return the fields `fp8` and `four_bits` of ConvertOptions.

        `--dialect` and `--ignore` are those of the dtype that is asked for.
        """
        asked = bool(dtype) and TargetDType(dtype).has_four_bits
        four_bits = FourBitOptions(
            dialect=fp8.dialect if asked else "",
            group=self.group,
            search=self.search,
            rule=self.rule,
            include=tuple(self.include or ()),
            ignore=fp8.ignore if asked else (),
            rest=self.rest,
            inputs=self.inputs,
        )
        rest = replace(fp8, dialect="", ignore=()) if asked else fp8
        return {"fp8": rest, "four_bits": four_bits}
