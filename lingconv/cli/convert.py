"""`lingconv convert`: from any checkpoint to another layout, dtype or shard size."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lingconv import api
from lingconv.cli import plan as plan_command
from lingconv.cli import verify as verify_command
from lingconv.cli.options import (
    AllowNonfinite,
    AllowRequantize,
    ConfigFile,
    Destination,
    Dialect,
    Drop,
    DType,
    ExpertParallel,
    Experts,
    ExpertTensorParallel,
    Formats,
    Fresh,
    FromMainParams,
    Fused,
    Ignore,
    Jobs,
    Json,
    MaxMemory,
    MaxShardSize,
    MetadataText,
    MtpOption,
    OutType,
    PipelineLayers,
    PipelineParallel,
    Quiet,
    Scale,
    ScaleDtype,
    SchemeOption,
    Settings,
    SingletonExperts,
    Source,
    SpecOption,
    SplitMaxTensors,
    TensorParallel,
    TensorType,
    TensorTypeFile,
    To,
    TokenizerPre,
    Verbose,
    Verify,
    VirtualPipeline,
    gguf_options,
    given,
    layout_of,
    megatron_options,
    request,
    resources,
)
from lingconv.cli.output import output
from lingconv.cli.progress import make_progress, make_watcher
from lingconv.cli.units import file_size
from lingconv.engine import Resources, Result
from lingconv.options import AUTO, ConvertOptions, Mtp, Scheme, Spec, VerifyOptions
from lingconv.recognise import Given

if TYPE_CHECKING:
    from lingconv.verification.verdict import Verdict

SCHEMA = "lingconv.convert/1"


def convert(
    source: Source,
    destination: Destination,
    to: To = None,
    dtype: DType = None,
    max_shard_size: MaxShardSize = "",
    mtp: MtpOption = Mtp.KEEP,
    drop: Drop = None,
    scheme: SchemeOption = Scheme.BLOCK,
    dialect: Dialect = "",
    scale: Scale = None,
    scale_dtype: ScaleDtype = "",
    ignore: Ignore = None,
    outtype: OutType = AUTO,
    tensor_type: TensorType = None,
    tensor_type_file: TensorTypeFile = None,
    tokenizer_pre: TokenizerPre = "",
    metadata: MetadataText = None,
    split_max_tensors: SplitMaxTensors = 0,
    spec: SpecOption = Spec.TE,
    singleton_experts: SingletonExperts = False,
    grouped_gemm: Experts = None,
    legacy_grouped_gemm: Fused = False,
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    ep: ExpertParallel = 1,
    etp: ExpertTensorParallel = 0,
    vpp: VirtualPipeline = 1,
    pp_layers: PipelineLayers = "",
    allow_nonfinite: AllowNonfinite = False,
    allow_requantize: AllowRequantize = False,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Show the plan and stop.")
    ] = False,
    verify: Verify = False,
    fresh: Fresh = False,
    jobs: Jobs = 0,
    max_memory: MaxMemory = "1GiB",
    formats: Formats = None,
    config: ConfigFile = None,
    settings: Settings = None,
    from_main_params: FromMainParams = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a checkpoint. The same command resumes a run that was stopped.

    Examples: `lingconv convert Ling-1T-FP8 Ling-1T --dtype bf16`,
    `lingconv convert Ling-1T-FP8 Ling-1T-Q4_K_M.gguf --outtype q4_k_m --split-max-size 50GB`
    """
    options = request(
        to=layout_of(to, destination),
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
        gguf=gguf_options(
            outtype, tensor_type, tensor_type_file, tokenizer_pre, metadata, split_max_tensors
        ),
        megatron=megatron_options(
            spec,
            singleton_experts,
            grouped_gemm,
            legacy_grouped_gemm,
            (tp, pp, ep, etp, vpp),
            pp_layers,
        ),
    )
    limits, said = (
        resources(jobs, max_memory),
        given(config, settings, main_params=from_main_params),
    )
    if dry_run:
        built = api.plan(source, options, destination=destination, formats=formats, given=said)
        plan_command.show(built, destination, limits, verbose=verbose)
        return
    run(
        source,
        destination,
        options,
        limits,
        formats=formats,
        said=said,
        fresh=fresh,
        verify=verify,
    )


def run(
    source: Path,
    destination: Path,
    options: ConvertOptions,
    limits: Resources,
    *,
    formats: str | None,
    said: Given | None = None,
    fresh: bool,
    verify: bool,
) -> None:
    """Convert with progress on stderr, prove the result if `verify`, and print both."""
    with make_progress() as progress:
        result = api.convert(
            source,
            destination,
            options,
            formats=formats,
            given=said,
            resources=limits,
            progress=progress,
            fresh=fresh,
        )
    verdict = None
    if verify:
        with make_watcher("verify") as watcher:
            verdict = api.verify(
                source,
                result.destination,
                VerifyOptions(mtp=options.mtp),
                formats=formats,
                given=said,
                jobs=limits.jobs,
                watcher=watcher,
            )
    show(result, verdict)


def show(result: Result, verdict: "Verdict | None" = None) -> None:
    """Print what a run did and what came of it; exit with 1 when the proof failed."""
    rate = result.bytes_written / result.seconds if result.seconds else 0.0
    found = result.files_found_finished
    line = (
        f"{result.destination}: nothing to do, all {found} weight files are there"
        if not result.files_written
        else f"{result.destination}: {result.files_written} weight files,"
        f" {file_size(result.bytes_written)} in {result.seconds:.1f} s ({file_size(rate)}/s)"
        + (f", {found} were there" if found else "")
    )
    value: dict[str, Any] = {
        "schema": SCHEMA,
        "destination": result.destination,
        "digest": result.digest,
        "files_written": result.files_written,
        "files_found_finished": found,
        "bytes_written": result.bytes_written,
        "seconds": round(result.seconds, 3),
        "warnings": list(result.warnings),
    }
    proof = []
    if verdict is not None:
        value["verdict"] = verdict.to_json()
        proof = verify_command.lines(verdict, verbose=output.verbose)
    output.result([line, *proof], value, result.destination)
    for warning in result.warnings:
        output.warning(warning)
    if verdict is not None and not verdict.ok:
        raise typer.Exit(verify_command.ANSWER_IS_NO)
