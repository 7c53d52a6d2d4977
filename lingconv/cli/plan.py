"""`lingconv plan`: an exact dry run. `convert --dry-run` prints the same."""

import json as jsonlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import lingconv
from lingconv.cli.common_options import (
    Destination,
    DisplayFlags,
    Formats,
    FromMainParams,
    HubFlags,
    ResourceFlags,
    Source,
    SourceFlags,
)
from lingconv.cli.convert_options import ConvertFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.terminal import columns, terminal
from lingconv.cli.units import duration, file_size, memory_size, parse_rate
from lingconv.errors import UsageError
from lingconv.execution.request import RunRequest
from lingconv.execution.resources import Resources
from lingconv.storage.machine import free_bytes

if TYPE_CHECKING:
    from lingconv.execution.estimate import Estimate
    from lingconv.plans.plan import Plan

_MAX_FILES = 10
SCHEMA = "lingconv.dry-run/1"


ESTIMATE = "Estimate"


@dataclass(frozen=True, slots=True)
class EstimateFlags:
    """What is to be predicted."""

    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Time a sample of the work here, and say what all of it takes.",
            rich_help_panel=ESTIMATE,
        ),
    ] = False
    machines: Annotated[
        int,
        typer.Option(
            "--machines", metavar="N", min=1, help="Like this one.", rich_help_panel=ESTIMATE
        ),
    ] = 1
    network: Annotated[
        str,
        typer.Option(
            "--network",
            metavar="RATE",
            help="Of each machine: 10Gbit, 400MB ...",
            rich_help_panel=ESTIMATE,
        ),
    ] = ""
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="Rates of a machine: read from FILE, or measured and written to it.",
            rich_help_panel=ESTIMATE,
        ),
    ] = None

    def asked(self, plan: "Plan", destination: str, resources: Resources) -> "Estimate | None":
        """Return the estimate, if one is asked for."""
        if not (self.estimate or self.profile):
            return None
        return lingconv.api.estimate(
            plan,
            destination,
            resources,
            machines=self.machines,
            network_bytes_per_s=parse_rate(self.network) if self.network else 0.0,
            profile=self.profile,
        )


@grouped
def plan(
    source: Source,
    destination: Destination,
    asked: ConvertFlags,
    plan_file: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Save the plan as JSON.")
    ] = None,
    *,
    limits: ResourceFlags,
    hub: HubFlags,
    words: EstimateFlags,
    formats: Formats = None,
    said: SourceFlags,
    from_main_params: FromMainParams = False,
    printed: DisplayFlags,
) -> None:
    """Show exactly what `convert` would do: files, bytes, memory, disk, and what is left out.

    Example: `lingconv plan Ling-1T Ling-1T-FP8 --dtype fp8`
    """
    built = lingconv.api.plan(
        source,
        asked.options(destination),
        destination=destination,
        formats=formats,
        given=said.given(main_params=from_main_params),
    )
    if plan_file is not None:
        save(built, plan_file)
    resources = hub.resources(limits)
    show(
        built,
        destination,
        resources,
        verbose=printed.verbose,
        estimate=words.asked(built, destination, resources),
    )


def save(plan: "Plan", path: Path) -> None:
    """Write a plan as JSON."""
    try:
        path.write_text(jsonlib.dumps(plan.to_json()) + "\n", "utf-8")
    except OSError as exc:
        raise UsageError(f"{path} cannot be written: {exc.strerror}") from exc


def show(
    plan: "Plan",
    destination: str,
    limits: Resources,
    *,
    verbose: bool,
    estimate: "Estimate | None" = None,
) -> None:
    """Print a plan for people or as JSON."""
    from lingconv.execution.destination import (
        Destination,  # what reads and writes, `--help` does without
    )
    from lingconv.plans.lowering import peak_memory

    jobs, buffers = peak_memory(plan, limits.resolved_jobs, limits.max_memory_bytes)
    folder, needed_bytes = Destination(destination, RunRequest(limits)).disk(plan)
    summary = {
        "schema": SCHEMA,
        "source": plan.source,
        "destination": destination,
        "digest": plan.digest,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "disk_bytes": needed_bytes,
        "free_bytes": free_bytes(folder),
        "jobs": jobs,
        "buffer_bytes": buffers,
        "total_parameters": plan.total_parameters,
        "encodings": plan.encodings,
        "files": [{"name": file.name, "bytes": file.nbytes} for file in plan.files],
        "side_files": plan.side_files,
        "dropped": [item._asdict() for item in plan.dropped],
        "warnings": list(plan.warnings),
    }
    lines = _lines(plan, summary, verbose=verbose)
    if estimate is not None:
        summary["estimate"] = asdict(estimate)
        lines += _estimate_lines(estimate)
    terminal.result(lines, summary, plan.digest)
    for warning in plan.warnings:
        terminal.warning(warning)


def _lines(plan: "Plan", summary: dict[str, Any], *, verbose: bool) -> list[str]:
    enough = summary["free_bytes"] >= summary["disk_bytes"]
    shown = plan.files if verbose else plan.files[:_MAX_FILES]
    lines = [
        f"{plan.source} -> {summary['destination']}",
        *columns(
            [
                (
                    "encodings",
                    ", ".join(f"{n:,} x {label}" for label, n in plan.encodings.items()),
                ),
                ("read", file_size(plan.read_bytes)),
                ("write", f"{file_size(plan.write_bytes)} in {len(plan.files)} weight files"),
                (
                    "disk",
                    f"{file_size(summary['disk_bytes'])} needed,"
                    f" {file_size(summary['free_bytes'])} free"
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


def _estimate_lines(estimate: "Estimate") -> list[str]:
    """Return what a run is going to take."""
    where = f" on each of {estimate.machines} machines" if estimate.machines > 1 else ""
    network = ""
    if estimate.network_in_bytes or estimate.network_out_bytes:
        network = (
            f"{file_size(estimate.network_in_bytes)} in,"
            f" {file_size(estimate.network_out_bytes)} out"
        )
        if estimate.network_s:
            network += f": {duration(estimate.network_s)}"
    return columns(
        [
            ("takes", f"{duration(estimate.seconds)}{where}"),
            ("converting", duration(estimate.convert_s)),
            ("network", network),
            ("process", f"{memory_size(estimate.rss_bytes)} of memory in all"),
        ]
    )


def _dropped_lines(plan: "Plan") -> list[str]:
    if not plan.dropped:
        return ["  nothing is left out"]
    reasons: dict[str, list[int]] = {}
    for item in plan.dropped:
        reasons.setdefault(item.reason, []).append(item.nbytes)
    return [
        f"  left out: {len(sizes)} with {file_size(sum(sizes))} ({reason})"
        for reason, sizes in reasons.items()
    ]
