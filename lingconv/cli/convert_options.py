"""The options that say what to write, in groups, and the request that they add up to."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from lingconv.cli.common_options import pair
from lingconv.cli.units import parse_size
from lingconv.errors import UsageError
from lingconv.model.parallelism import Parallel
from lingconv.plans.options import (
    AUTO,
    DEFAULT_MERGED,
    SCALE_F32,
    ConvertOptions,
    ExpertNames,
    Fp8Options,
    GgufOptions,
    MegatronOptions,
    Mtp,
    Scheme,
    Spec,
    Target,
    TargetDType,
)
from lingconv.storage.file_names import SUFFIX

FP8 = "FP8"
GGUF = "GGUF"
MEGATRON = "Megatron"
OUTPUT = "Output"


ExpertsAs = Annotated[
    str,
    typer.Option(
        "--experts-as",
        metavar="NAME",
        help="Whose names stacked experts go by: dfactory, transformers, automodel or mlx.",
        rich_help_panel=OUTPUT,
    ),
]
DType = Annotated[
    TargetDType | None,
    typer.Option(
        "--dtype", help="What to store weights in; kept by default.", rich_help_panel=OUTPUT
    ),
]
OutType = Annotated[
    str,
    typer.Option(
        "--outtype",
        metavar="TYPE",
        help="bf16, q8_0, q4_k_m ... as llama-quantize names them; `auto` is the weights' own"
        " 16-bit float.",
        rich_help_panel=GGUF,
    ),
]
MaxShardSize = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        "--split-max-size",
        metavar="SIZE",
        help="5GB, 10GiB ...; 10GB by default, for GGUF one file.",
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True, slots=True)
class LayoutFlags:
    """What the target is."""

    to: Annotated[
        Target | None,
        typer.Option(
            "--to", help="Layout; `gguf` where DST says so, else `hf`.", rich_help_panel=OUTPUT
        ),
    ] = None
    experts_as: ExpertsAs = DEFAULT_MERGED
    dtype: DType = None


@dataclass(frozen=True, slots=True)
class OutputFlags:
    """What goes into it, and in files of which size."""

    max_shard_size: MaxShardSize = ""
    mtp: Annotated[
        Mtp, typer.Option("--mtp", help="What to do with MTP layers.", rich_help_panel=OUTPUT)
    ] = Mtp.KEEP
    drop: Annotated[
        list[str] | None,
        typer.Option(
            "--drop",
            metavar="PATTERN",
            help="Leave out tensors that the model does not know. Repeatable.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    allow_nonfinite: Annotated[
        bool,
        typer.Option("--allow-nonfinite", help="Go on at NaN and Inf.", rich_help_panel=OUTPUT),
    ] = False
    allow_requantize: Annotated[
        bool,
        typer.Option(
            "--allow-requantize",
            help="Round what is quantized a second time.",
            rich_help_panel=OUTPUT,
        ),
    ] = False

    def options(self) -> ConvertOptions:
        """Return a request that asks for nothing else."""
        return ConvertOptions(
            mtp=self.mtp.value,
            max_shard_bytes=shard_bytes(self.max_shard_size),
            drop=tuple(self.drop or ()),
            allow_nonfinite=self.allow_nonfinite,
            allow_requantize=self.allow_requantize,
        )


@dataclass(frozen=True, slots=True)
class Fp8Flags:
    """How weights are quantized to FP8."""

    scheme: Annotated[
        Scheme, typer.Option("--scheme", help="128x128 blocks, or rows.", rich_help_panel=FP8)
    ] = Scheme.BLOCK
    dialect: Annotated[
        str,
        typer.Option(
            "--dialect",
            help="`fp8` (DeepSeek's names) or `compressed-tensors`; the scheme's own by default.",
            rich_help_panel=FP8,
        ),
    ] = ""
    scale: Annotated[
        list[str] | None,
        typer.Option(
            "--scale",
            metavar="[PATTERN=]POLICY",
            help="`f32` (default), `ue8m0` (powers of two) or `ling` (as Ling's converter mixes"
            " them). Repeatable.",
            rich_help_panel=FP8,
        ),
    ] = None
    scale_dtype: Annotated[
        str,
        typer.Option(
            "--scale-dtype",
            help="`f32`, `bf16` or `e8m0`; the dialect's own by default.",
            rich_help_panel=FP8,
        ),
    ] = ""
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            metavar="PATTERN",
            help="Keep these weights unquantized: name, glob, or `re:` and a regex. Repeatable.",
            rich_help_panel=FP8,
        ),
    ] = None

    def options(self) -> Fp8Options:
        """Return what is asked for; `--scale` without a pattern sets the default policy."""
        default = SCALE_F32
        rules = []
        for text in self.scale or ():
            pattern, _, policy = text.rpartition("=")
            if pattern:
                rules.append((pattern, policy))
            else:
                default = policy
        return Fp8Options(
            scheme=self.scheme.value,
            dialect=self.dialect,
            scale=default,
            scale_rules=tuple(rules),
            scale_dtype=self.scale_dtype,
            ignore=tuple(self.ignore or ()),
        )


@dataclass(frozen=True, slots=True)
class GgufFlags:
    """What goes into GGUF files."""

    outtype: OutType = AUTO
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="Another type for some tensors, the first match counts. Repeatable.",
            rich_help_panel=GGUF,
        ),
    ] = None
    tensor_type_file: Annotated[
        Path | None,
        typer.Option(
            "--tensor-type-file",
            metavar="FILE",
            help="A file of REGEX=TYPE, after those of `--tensor-type`.",
            rich_help_panel=GGUF,
        ),
    ] = None
    tokenizer_pre: Annotated[
        str,
        typer.Option(
            "--tokenizer-pre",
            metavar="NAME",
            help="How llama.cpp splits text; known for Ling's tokenizer.",
            rich_help_panel=GGUF,
        ),
    ] = ""
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata",
            metavar="KEY=TEXT",
            help="A text of your own, such as general.quantized_by=ME. Repeatable.",
            rich_help_panel=GGUF,
        ),
    ] = None
    split_max_tensors: Annotated[
        int,
        typer.Option(
            "--split-max-tensors",
            metavar="N",
            min=0,
            help="Tensors in a file; 0 is no limit.",
            rich_help_panel=GGUF,
        ),
    ] = 0

    def options(self) -> GgufOptions:
        """Return what is asked for."""
        file = self.tensor_type_file
        words = [*(self.tensor_type or ()), *(_words(file) if file else ())]
        return GgufOptions(
            outtype=self.outtype.lower(),
            tensor_types=tuple(pair("--tensor-type", word, "REGEX=TYPE") for word in words),
            tokenizer_pre=self.tokenizer_pre,
            metadata=tuple(pair("--metadata", text, "KEY=TEXT") for text in self.metadata or ()),
            max_shard_tensors=self.split_max_tensors,
        )


@dataclass(frozen=True, slots=True)
class MegatronFlags:
    """Names and ranks of Megatron."""

    spec: Annotated[
        Spec,
        typer.Option(
            "--spec", help="Megatron's layers: their names differ.", rich_help_panel=MEGATRON
        ),
    ] = Spec.TE
    singleton_experts: Annotated[
        bool,
        typer.Option(
            "--singleton-experts",
            help="A tensor for each expert, instead of all in one.",
            rich_help_panel=MEGATRON,
        ),
    ] = False
    grouped_gemm: Annotated[
        bool | None,
        typer.Option(
            "--grouped-gemm/--sequential",
            help="How the files of ranks name experts; grouped for TE, sequential for local"
            " layers.",
            rich_help_panel=MEGATRON,
        ),
    ] = None
    legacy_grouped_gemm: Annotated[
        bool,
        typer.Option(
            "--legacy-grouped-gemm",
            help="All experts of a rank in `weight1` and `weight2`, as Megatron's option of that"
            " name.",
            rich_help_panel=MEGATRON,
        ),
    ] = False
    tp: Annotated[
        int,
        typer.Option(
            "--tp",
            "--target-tensor-parallel-size",
            metavar="N",
            help="Tensor parallel ranks.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    pp: Annotated[
        int,
        typer.Option(
            "--pp",
            "--target-pipeline-parallel-size",
            metavar="N",
            help="Pipeline stages.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    ep: Annotated[
        int,
        typer.Option(
            "--ep",
            "--target-expert-parallel-size",
            metavar="N",
            help="Expert parallel ranks.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    etp: Annotated[
        int,
        typer.Option(
            "--etp",
            metavar="N",
            help="Ranks that split an expert's tensors; as many as `--tp` by default.",
            rich_help_panel=MEGATRON,
        ),
    ] = 0
    vpp: Annotated[
        int,
        typer.Option(
            "--vpp", metavar="N", help="Model chunks on a pipeline stage.", rich_help_panel=MEGATRON
        ),
    ] = 1
    pp_layers: Annotated[
        str,
        typer.Option(
            "--pp-layers",
            metavar="N,N,...",
            help="Decoder layers of each stage; as many on all by default.",
            rich_help_panel=MEGATRON,
        ),
    ] = ""

    def options(self) -> MegatronOptions:
        """Return what is asked for."""
        try:
            layers = (
                tuple(int(word) for word in self.pp_layers.split(",")) if self.pp_layers else ()
            )
        except ValueError as exc:
            raise UsageError(f"`--pp-layers {self.pp_layers}` are not whole numbers") from exc
        grouped = self.spec == Spec.TE if self.grouped_gemm is None else self.grouped_gemm
        names = ExpertNames.GROUPED if grouped else ExpertNames.SEQUENTIAL
        return MegatronOptions(
            self.spec.value,
            self.singleton_experts,
            ExpertNames.FUSED.value if self.legacy_grouped_gemm else names.value,
            Parallel(self.tp, self.pp, self.ep, self.etp or self.tp, self.vpp, layers),
        )


@dataclass(frozen=True, slots=True)
class ConvertFlags:
    """Everything that may be asked of a conversion."""

    layout: LayoutFlags
    output: OutputFlags
    fp8: Fp8Flags
    gguf: GgufFlags
    megatron: MegatronFlags

    def options(self, destination: str) -> ConvertOptions:
        """Return the request; the name of DST may say the layout."""
        return replace(
            self.output.options(),
            layout=layout_of(self.layout.to, destination),
            merged=self.layout.experts_as,
            dtype=self.layout.dtype or "",
            fp8=self.fp8.options(),
            gguf=self.gguf.options(),
            megatron=self.megatron.options(),
        )


def shard_bytes(text: str) -> int | None:
    """Return the largest size of a file; None leaves it to the layout."""
    return parse_size(text) if text else None


def layout_of(to: Target | None, destination: str) -> str:
    """Return the layout that is asked for, in words or by the name of DST."""
    return to or (Target.GGUF if destination.endswith(SUFFIX) else Target.HF)


def _words(path: Path) -> list[str]:
    """Return the words of a text file."""
    try:
        return path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}") from exc
