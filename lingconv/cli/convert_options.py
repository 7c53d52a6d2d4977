"""The options of the output, in groups, and the ConvertOptions that they give.

Those of single encodings and formats are in `format_options.py`.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from lingconv.cli.format_options import Fp8Flags, GgufFlags, MegatronFlags
from lingconv.cli.four_bit_options import FourBitFlags
from lingconv.cli.units import parse_size
from lingconv.plans.options import (
    DEFAULT_MERGED,
    ConvertOptions,
    Mtp,
    Target,
    TargetDType,
)
from lingconv.storage.file_names import SUFFIX

OUTPUT = "Output"


ExpertsAs = Annotated[
    str,
    typer.Option(
        "--experts-as",
        metavar="NAME",
        help="Naming scheme of stacked experts: dfactory, transformers, automodel or mlx.",
        rich_help_panel=OUTPUT,
    ),
]
DType = Annotated[
    TargetDType | None,
    typer.Option(
        "--dtype",
        help="Dtype of the output's weights; default: each tensor keeps its own.",
        rich_help_panel=OUTPUT,
    ),
]
MaxShardSize = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        "--split-max-size",
        metavar="SIZE",
        help="Largest size of an output file: 5GB, 10GiB ...; default: 10GB, for GGUF one file.",
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True, slots=True)
class LayoutFlags:
    """The options of the target's layout and dtype."""

    to: Annotated[
        Target | None,
        typer.Option(
            "--to",
            help="Layout of the output; default: `gguf` if DST ends with `.gguf`, else `hf`.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    experts_as: ExpertsAs = DEFAULT_MERGED
    dtype: DType = None


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """The options of the tensors that are written, and of the files' size."""

    max_shard_size: MaxShardSize = ""
    mtp: Annotated[
        Mtp,
        typer.Option(
            "--mtp",
            help="Keep MTP layers, drop them, or write them only.",
            rich_help_panel=OUTPUT,
        ),
    ] = Mtp.KEEP
    drop: Annotated[
        list[str] | None,
        typer.Option(
            "--drop",
            metavar="PATTERN",
            help="Drop source tensors that the model does not have. Repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    allow_nonfinite: Annotated[
        bool,
        typer.Option(
            "--allow-nonfinite",
            help="Do not stop at NaN or Inf.",
            rich_help_panel=OUTPUT,
        ),
    ] = False
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize",
            help="Allow re-quantizing quantized weights.",
            rich_help_panel=OUTPUT,
        ),
    ] = False

    def options(self) -> ConvertOptions:
        """Return ConvertOptions with these options, all others at their defaults."""
        return ConvertOptions(
            mtp=self.mtp.value,
            max_shard_bytes=shard_bytes(self.max_shard_size),
            drop=tuple(self.drop or ()),
            allow_nonfinite=self.allow_nonfinite,
            allow_requantize=self.allow_requantize,
        )


@dataclass(frozen=True, slots=True)
class ConvertFlags:
    """All options of a conversion's output."""

    layout: LayoutFlags
    output: OutputFlags
    fp8: Fp8Flags
    four_bits: FourBitFlags
    gguf: GgufFlags
    megatron: MegatronFlags

    def options(self, destination: str) -> ConvertOptions:
        """Return the ConvertOptions; without `--to`, the name of DST decides the layout."""
        return replace(
            self.output.options(),
            layout=layout_of(self.layout.to, destination),
            merged=self.layout.experts_as,
            dtype=self.layout.dtype or "",
            **self.four_bits.quantization(self.layout.dtype or "", self.fp8.options()),
            gguf=self.gguf.options(),
            megatron=self.megatron.options(),
        )


def shard_bytes(text: str) -> int | None:
    """Return the largest size of a file in bytes; None means the layout's default."""
    return parse_size(text) if text else None


def layout_of(to: Target | None, destination: str) -> str:
    """Return the layout of `--to`, or by the name of DST."""
    return to or (Target.GGUF if destination.endswith(SUFFIX) else Target.HF)
