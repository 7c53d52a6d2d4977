"""`lingconv plan`: an exact dry run. `convert --dry-run` prints the same."""

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lingconv import api
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
    VirtualPipeline,
    gguf_options,
    given,
    layout_of,
    megatron_options,
    request,
    resources,
)
from lingconv.cli.output import columns, output
from lingconv.cli.units import file_size, memory_size
from lingconv.engine import Resources
from lingconv.errors import UsageError
from lingconv.machine import free_bytes
from lingconv.options import AUTO, Mtp, Scheme, Spec
from lingconv.plan import Plan
from lingconv.strips import peak_memory

_MAX_FILES = 10
SCHEMA = "lingconv.dry-run/1"


def plan(
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
    plan_file: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Save the plan as JSON.")
    ] = None,
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
    """Show exactly what `convert` would do: files, bytes, memory, disk, and what is left out.

    Example: `lingconv plan Ling-1T Ling-1T-FP8 --dtype fp8`
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
    built = api.plan(
        source,
        options,
        destination=destination,
        formats=formats,
        given=given(config, settings, main_params=from_main_params),
    )
    if plan_file is not None:
        save(built, plan_file)
    show(built, destination, resources(jobs, max_memory), verbose=verbose)


def save(plan: Plan, path: Path) -> None:
    """Write a plan as JSON."""
    try:
        path.write_text(jsonlib.dumps(plan.to_json()) + "\n", "utf-8")
    except OSError as exc:
        raise UsageError(f"{path} cannot be written: {exc.strerror}") from exc


def show(plan: Plan, destination: Path, limits: Resources, *, verbose: bool) -> None:
    """Print a plan for people or as JSON."""
    jobs, buffers = peak_memory(plan, limits.resolved_jobs, limits.max_memory_bytes)
    summary = {
        "schema": SCHEMA,
        "source": plan.source,
        "destination": str(destination),
        "digest": plan.digest,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "free_bytes": free_bytes(destination),
        "jobs": jobs,
        "buffer_bytes": buffers,
        "total_parameters": plan.total_parameters,
        "encodings": plan.encodings(),
        "files": [{"name": file.name, "bytes": file.nbytes} for file in plan.files],
        "side_files": plan.side_files,
        "dropped": [item._asdict() for item in plan.dropped],
        "warnings": list(plan.warnings),
    }
    output.result(_lines(plan, summary, verbose=verbose), summary, plan.digest)
    for warning in plan.warnings:
        output.warning(warning)


def _lines(plan: Plan, summary: dict[str, Any], *, verbose: bool) -> list[str]:
    enough = summary["free_bytes"] >= plan.write_bytes
    shown = plan.files if verbose else plan.files[:_MAX_FILES]
    lines = [
        f"{plan.source} -> {summary['destination']}",
        *columns(
            [
                (
                    "encodings",
                    ", ".join(f"{n:,} x {label}" for label, n in plan.encodings().items()),
                ),
                ("read", file_size(plan.read_bytes)),
                ("write", f"{file_size(plan.write_bytes)} in {len(plan.files)} weight files"),
                (
                    "disk",
                    f"{file_size(plan.write_bytes)} needed, {file_size(summary['free_bytes'])} free"
                    + ("" if enough else ": NOT ENOUGH"),
                ),
                (
                    "memory",
                    f"{memory_size(summary['buffer_bytes'])} of buffers, {summary['jobs']} jobs",
                ),
                ("plan", plan.digest),
            ]
        ),
        *columns([(file.name, file_size(file.nbytes)) for file in shown], indent="    "),
    ]
    if len(shown) < len(plan.files):
        lines.append(f"    ... and {len(plan.files) - len(shown)} more (-v or --json show all)")
    return [*lines, *_dropped_lines(plan)]


def _dropped_lines(plan: Plan) -> list[str]:
    if not plan.dropped:
        return ["  nothing is left out"]
    reasons: dict[str, list[int]] = {}
    for item in plan.dropped:
        reasons.setdefault(item.reason, []).append(item.nbytes)
    return [
        f"  left out: {len(sizes)} with {file_size(sum(sizes))} ({reason})"
        for reason, sizes in reasons.items()
    ]
