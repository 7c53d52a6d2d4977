"""The options that several commands share, and what they add up to."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lingconv.cli.output import output
from lingconv.cli.units import parse_size
from lingconv.containers.gguf import SUFFIX
from lingconv.engine import Resources
from lingconv.errors import UsageError
from lingconv.options import (
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
from lingconv.ranks import Parallel
from lingconv.recognise import Given

FP8 = "FP8"
GGUF = "GGUF"
MEGATRON = "Megatron"
OUTPUT = "Output"
RUN = "Run"
FORWARD = "Forward pass"

Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="Checkpoint to read: a folder, or a .gguf file.")
]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, or NAME.gguf.")]
To = Annotated[
    Target | None,
    typer.Option(
        "--to", help="Layout; `gguf` where DST says so, else `hf`.", rich_help_panel=OUTPUT
    ),
]
DType = Annotated[
    TargetDType | None,
    typer.Option(
        "--dtype", help="What to store weights in; kept by default.", rich_help_panel=OUTPUT
    ),
]
Formats = Annotated[
    str | None, typer.Option("--formats", metavar="PATH", help="Family file or folder of your own.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="A config.json in place of what SRC says of its model."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One key of that config. Repeatable."),
]
FromMainParams = Annotated[
    bool,
    typer.Option(
        "--from-main-params",
        help="Read the optimizer's FP32 weights instead of their roundings.",
        rich_help_panel=MEGATRON,
    ),
]
SpecOption = Annotated[
    Spec,
    typer.Option("--spec", help="Megatron's layers: their names differ.", rich_help_panel=MEGATRON),
]
SingletonExperts = Annotated[
    bool,
    typer.Option(
        "--singleton-experts",
        help="A tensor for each expert, instead of all in one.",
        rich_help_panel=MEGATRON,
    ),
]
Experts = Annotated[
    bool | None,
    typer.Option(
        "--grouped-gemm/--sequential",
        help="How the files of ranks name experts; grouped for TE, sequential for local layers.",
        rich_help_panel=MEGATRON,
    ),
]
Fused = Annotated[
    bool,
    typer.Option(
        "--legacy-grouped-gemm",
        help="All experts of a rank in `weight1` and `weight2`, as Megatron's option of that name.",
        rich_help_panel=MEGATRON,
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp",
        "--target-tensor-parallel-size",
        metavar="N",
        help="Tensor parallel ranks.",
        rich_help_panel=MEGATRON,
    ),
]
PipelineParallel = Annotated[
    int,
    typer.Option(
        "--pp",
        "--target-pipeline-parallel-size",
        metavar="N",
        help="Pipeline stages.",
        rich_help_panel=MEGATRON,
    ),
]
ExpertParallel = Annotated[
    int,
    typer.Option(
        "--ep",
        "--target-expert-parallel-size",
        metavar="N",
        help="Expert parallel ranks.",
        rich_help_panel=MEGATRON,
    ),
]
ExpertTensorParallel = Annotated[
    int,
    typer.Option(
        "--etp",
        metavar="N",
        help="Ranks that split an expert's tensors; as many as `--tp` by default.",
        rich_help_panel=MEGATRON,
    ),
]
VirtualPipeline = Annotated[
    int,
    typer.Option(
        "--vpp", metavar="N", help="Model chunks on a pipeline stage.", rich_help_panel=MEGATRON
    ),
]
PipelineLayers = Annotated[
    str,
    typer.Option(
        "--pp-layers",
        metavar="N,N,...",
        help="Decoder layers of each stage; as many on all by default.",
        rich_help_panel=MEGATRON,
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
SplitMaxTensors = Annotated[
    int,
    typer.Option(
        "--split-max-tensors",
        metavar="N",
        min=0,
        help="Tensors in a file; 0 is no limit.",
        rich_help_panel=GGUF,
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
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="REGEX=TYPE",
        help="Another type for some tensors, the first match counts. Repeatable.",
        rich_help_panel=GGUF,
    ),
]
TensorTypeFile = Annotated[
    Path | None,
    typer.Option(
        "--tensor-type-file",
        metavar="FILE",
        help="A file of REGEX=TYPE, after those of `--tensor-type`.",
        rich_help_panel=GGUF,
    ),
]
TokenizerPre = Annotated[
    str,
    typer.Option(
        "--tokenizer-pre",
        metavar="NAME",
        help="How llama.cpp splits text; known for Ling's tokenizer.",
        rich_help_panel=GGUF,
    ),
]
MetadataText = Annotated[
    list[str] | None,
    typer.Option(
        "--metadata",
        metavar="KEY=TEXT",
        help="A text of your own, such as general.quantized_by=ME. Repeatable.",
        rich_help_panel=GGUF,
    ),
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
        "--allow-requantize",
        help="Round what is quantized a second time.",
        rich_help_panel=OUTPUT,
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
    gguf: GgufOptions | None = None,
    megatron: MegatronOptions | None = None,
) -> ConvertOptions:
    """Return what the options of `plan`, `convert` and `quantize` ask for together."""
    return ConvertOptions(
        layout=to,
        dtype=dtype,
        fp8=_fp8_options(scheme, dialect, scale, scale_dtype, ignore),
        gguf=gguf or GgufOptions(),
        megatron=megatron or MegatronOptions(),
        mtp=mtp.value,
        max_shard_bytes=shard_bytes(max_shard_size),
        drop=tuple(drop or ()),
        allow_nonfinite=allow_nonfinite,
        allow_requantize=allow_requantize,
    )


def shard_bytes(text: str) -> int | None:
    """Return the largest size of a file; None leaves it to the layout."""
    return parse_size(text) if text else None


def layout_of(to: Target | None, destination: Path) -> str:
    """Return the layout that is asked for, in words or by the name of DST."""
    return to or (Target.GGUF if destination.suffix == SUFFIX else Target.HF)


def gguf_options(
    outtype: str,
    tensor_type: list[str] | None,
    tensor_type_file: Path | None,
    tokenizer_pre: str,
    metadata: list[str] | None,
    split_max_tensors: int,
) -> GgufOptions:
    """Return the GGUF part of a request."""
    words = [*(tensor_type or ()), *(_words(tensor_type_file) if tensor_type_file else ())]
    return GgufOptions(
        outtype=outtype.lower(),
        tensor_types=tuple(_pair("--tensor-type", word, "REGEX=TYPE") for word in words),
        tokenizer_pre=tokenizer_pre,
        metadata=tuple(_pair("--metadata", text, "KEY=TEXT") for text in metadata or ()),
        max_shard_tensors=split_max_tensors,
    )


def megatron_options(
    spec: Spec,
    singleton_experts: bool,
    grouped_gemm: bool | None,
    fused: bool,
    parallel: tuple[int, int, int, int, int],
    pp_layers: str,
) -> MegatronOptions:
    """Return the Megatron part of a request; `parallel` is tp, pp, ep, etp and vpp."""
    tp, pp, ep, etp, vpp = parallel
    try:
        layers = tuple(int(word) for word in pp_layers.split(",")) if pp_layers else ()
    except ValueError as exc:
        raise UsageError(f"`--pp-layers {pp_layers}` are not whole numbers") from exc
    grouped = spec == Spec.TE if grouped_gemm is None else grouped_gemm
    names = ExpertNames.GROUPED if grouped else ExpertNames.SEQUENTIAL
    return MegatronOptions(
        spec.value,
        singleton_experts,
        ExpertNames.FUSED.value if fused else names.value,
        Parallel(tp, pp, ep, etp or tp, vpp, layers),
    )


def given(
    config: Path | None, settings: list[str] | None, *, main_params: bool = False
) -> Given | None:
    """Return what the user says of SRC, or None when that is nothing."""
    if config is None and not settings and not main_params:
        return None
    pairs = [_pair("--set", text, "KEY=VALUE") for text in settings or ()]
    values = {key: _value(text) for key, text in pairs}
    return Given(_read_config(config) if config else None, values, main_params)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"`--config {path}` cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise UsageError(f"`--config {path}` is not a JSON object")
    return value


def _value(text: str) -> Any:
    """Return a number, a switch or any other JSON value; what is none is a word."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _words(path: Path) -> list[str]:
    """Return the words of a text file."""
    try:
        return path.read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}") from exc


def _pair(option: str, text: str, form: str) -> tuple[str, str]:
    left, sign, right = text.partition("=")
    if not (left and sign and right):
        raise UsageError(f"`{option} {text}`", hint=f"write it as `{option} {form}`")
    return left, right


def resources(jobs: int, max_memory: str) -> Resources:
    """Return the run's limits."""
    return Resources(jobs=jobs, max_memory_bytes=parse_size(max_memory))
