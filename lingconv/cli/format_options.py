"""The options of single encodings and formats: FP8, GGUF, Megatron."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lingconv.cli.common_options import pair
from lingconv.errors import UsageError
from lingconv.model.parallelism import Parallel
from lingconv.plans.options import (
    AUTO,
    SCALE_F32,
    ExpertNames,
    Fp8Options,
    GgufOptions,
    MegatronOptions,
    MtpModule,
    Scheme,
    Spec,
)

FP8 = "FP8"
GGUF = "GGUF"
MEGATRON = "Megatron"

OutType = Annotated[
    str,
    typer.Option(
        "--outtype",
        metavar="TYPE",
        help="llama-quantize's file type: bf16, q8_0, q4_k_m ...; `auto` keeps the weights' 16-bit"
        " float.",
        rich_help_panel=GGUF,
    ),
]


@dataclass(frozen=True, slots=True)
class Fp8Flags:
    """The options of FP8 quantization."""

    scheme: Annotated[
        Scheme,
        typer.Option(
            "--scheme",
            help="Weights that share a scale: 128x128 blocks, or rows (channel).",
            rich_help_panel=FP8,
        ),
    ] = Scheme.BLOCK
    dialect: Annotated[
        str,
        typer.Option(
            "--dialect",
            metavar="NAME",
            help="Naming of FP8: `fp8` (DeepSeek's) or `compressed-tensors`; default: `fp8` for"
            " blocks, `compressed-tensors` for rows.",
            rich_help_panel=FP8,
        ),
    ] = ""
    scale: Annotated[
        list[str] | None,
        typer.Option(
            "--scale",
            metavar="[PATTERN=]POLICY",
            help="Rounding of scales: `f32` (default), `ue8m0` (powers of two) or `ling` (Ling's"
            " converter's mix of both). Repeatable.",
            rich_help_panel=FP8,
        ),
    ] = None
    scale_dtype: Annotated[
        str,
        typer.Option(
            "--scale-dtype",
            metavar="DTYPE",
            help="Dtype of scales: `f32`, `bf16` or `e8m0`; default: the dialect's.",
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
        """Return the Fp8Options; `--scale` without a pattern sets the default policy."""
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
    """The options of GGUF files."""

    outtype: OutType = AUTO
    tensor_type: Annotated[
        list[str] | None,
        typer.Option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="ggml type of the tensors that match; the first match counts. Repeatable.",
            rich_help_panel=GGUF,
        ),
    ] = None
    tensor_type_file: Annotated[
        Path | None,
        typer.Option(
            "--tensor-type-file",
            metavar="FILE",
            help="File with REGEX=TYPE lines, which count after those of `--tensor-type`.",
            rich_help_panel=GGUF,
        ),
    ] = None
    tokenizer_pre: Annotated[
        str,
        typer.Option(
            "--tokenizer-pre",
            metavar="NAME",
            help="llama.cpp's pre-tokenizer; default: detected for Ling's tokenizer.",
            rich_help_panel=GGUF,
        ),
    ] = ""
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata",
            metavar="KEY=TEXT",
            help="Set a text in the metadata: general.quantized_by=ME. Repeatable.",
            rich_help_panel=GGUF,
        ),
    ] = None
    split_max_tensors: Annotated[
        int,
        typer.Option(
            "--split-max-tensors",
            metavar="N",
            min=0,
            help="Most tensors in a file; 0 means no limit.",
            rich_help_panel=GGUF,
        ),
    ] = 0

    def options(self) -> GgufOptions:
        """Return the GgufOptions."""
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
    """The options of Megatron's formats: names of layers, and degrees of parallelism."""

    spec: Annotated[
        Spec,
        typer.Option(
            "--spec",
            help="Layer implementation that loads the checkpoint; it decides names.",
            rich_help_panel=MEGATRON,
        ),
    ] = Spec.TE
    singleton_experts: Annotated[
        bool,
        typer.Option(
            "--singleton-experts",
            help="Store each expert as a tensor of its own; default: all in one tensor.",
            rich_help_panel=MEGATRON,
        ),
    ] = False
    grouped_gemm: Annotated[
        bool | None,
        typer.Option(
            "--grouped-gemm/--sequential",
            help="Names of experts in legacy per-rank checkpoints; default: grouped for `te`,"
            " sequential for `local`.",
            rich_help_panel=MEGATRON,
        ),
    ] = None
    legacy_grouped_gemm: Annotated[
        bool,
        typer.Option(
            "--legacy-grouped-gemm",
            help="Store all experts of a rank in `weight1` and `weight2`, as Megatron's option of"
            " that name does.",
            rich_help_panel=MEGATRON,
        ),
    ] = False
    tp: Annotated[
        int,
        typer.Option(
            "--tp",
            "--target-tensor-parallel-size",
            metavar="N",
            help="Number of tensor parallel ranks.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    pp: Annotated[
        int,
        typer.Option(
            "--pp",
            "--target-pipeline-parallel-size",
            metavar="N",
            help="Number of pipeline stages.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    ep: Annotated[
        int,
        typer.Option(
            "--ep",
            "--target-expert-parallel-size",
            metavar="N",
            help="Number of expert parallel ranks.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    etp: Annotated[
        int,
        typer.Option(
            "--etp",
            metavar="N",
            help="Number of ranks that split an expert's tensors; default: `--tp`.",
            show_default=False,
            rich_help_panel=MEGATRON,
        ),
    ] = 0
    vpp: Annotated[
        int,
        typer.Option(
            "--vpp",
            metavar="N",
            help="Number of model chunks per pipeline stage.",
            rich_help_panel=MEGATRON,
        ),
    ] = 1
    pp_layers: Annotated[
        str,
        typer.Option(
            "--pp-layers",
            metavar="N,N,...",
            help="Number of decoder layers of each stage; default: equal numbers.",
            rich_help_panel=MEGATRON,
        ),
    ] = ""

    mtp_module: Annotated[
        MtpModule,
        typer.Option(
            "--mtp-module",
            help="Name of the layer inside of an MTP layer in the files of ranks:"
            " `mtp_model_layer` for megatron-core 0.17 and later.",
            rich_help_panel=MEGATRON,
        ),
    ] = MtpModule.TRANSFORMER_LAYER

    def options(self) -> MegatronOptions:
        """Return the MegatronOptions."""
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
            self.mtp_module.value,
        )


def _words(path: Path) -> list[str]:
    """Return the words of a text file, separated by white space."""
    try:
        return path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}") from exc
