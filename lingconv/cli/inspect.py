"""`lingconv inspect`: what is this checkpoint?"""

from typing import TYPE_CHECKING

import lingconv
from lingconv.cli.common_options import DisplayFlags, Formats, Source, SourceFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.terminal import columns, terminal
from lingconv.cli.units import count, file_size
from lingconv.errors import CheckpointError, Fault, shared_hint

if TYPE_CHECKING:
    from lingconv.checkpoint.inspection import Report

_MAX_FAULTS = 10


@grouped
def inspect(
    source: Source,
    formats: Formats = None,
    *,
    said: SourceFlags,
    printed: DisplayFlags,
) -> None:
    """Say what a checkpoint is, and everything odd about it. Reads headers only.

    Example: `lingconv inspect Ling-mini-2.0`
    """
    report = lingconv.api.inspect(source, formats=formats, given=said.given())
    terminal.result(_lines(report, verbose=printed.verbose), report.to_json(), report.architecture)
    if not report.sound:
        fatal = [fault for fault in report.faults if fault.fatal]
        plural = "s" if len(fatal) > 1 else ""
        raise CheckpointError(f"{report.source} has {len(fatal)} fault{plural}", hint=_hint(fatal))


def _hint(faults: list[Fault]) -> str:
    return shared_hint(faults) or "mend or fetch again what is named above"


def _lines(report: "Report", *, verbose: bool) -> list[str]:
    moe_layers = report.layers - report.dense_layers
    quantization = report.quantization or {}
    return [
        report.source,
        *columns(
            [
                ("family", f"{report.family}  ({report.architecture})"),
                ("layout", report.layout),
                (
                    "encoding",
                    ", ".join(f"{n:,} x {label}" for label, n in report.encodings.items()),
                ),
                (
                    "parameters",
                    f"{count(report.parameters)}, {count(report.active_parameters)} active"
                    + (f", + {count(report.mtp_parameters)} MTP" if report.mtp_layers else ""),
                ),
                (
                    "layers",
                    f"{report.dense_layers} dense + {moe_layers} MoE ({report.experts} experts)"
                    f" + {report.mtp_layers} MTP",
                ),
                ("rotary", f"{report.rotary_dim} dimensions"),
                ("tensors", f"{report.tensors:,} in {report.shards} shards"),
                ("bytes", f"{file_size(report.tensor_bytes)}  ({report.tensor_bytes:,})"),
                (
                    "dtypes",
                    ", ".join(f"{name} {file_size(size)}" for name, size in report.dtypes.items()),
                ),
                ("quantization", str(quantization.get("quant_method", ""))),
                ("left out", _left_out(report)),
                ("other files", ", ".join(report.side_files)),
            ]
        ),
        *_fault_lines(report, verbose=verbose),
    ]


def _left_out(report: "Report") -> str:
    return ", ".join(
        f"{kind} {file_size(held.nbytes)} in {held.entries:,} entries"
        for kind, held in report.left_out.items()
    )


def _fault_lines(report: "Report", *, verbose: bool) -> list[str]:
    if not report.faults:
        return ["  nothing odd"]
    shown = report.faults if verbose else report.faults[:_MAX_FAULTS]
    shared = shared_hint([fault for fault in report.faults if fault.fatal])
    lines = [
        f"  {'FAULT' if fault.fatal else 'odd  '}  {fault.with_hint(shared)}" for fault in shown
    ]
    if len(shown) < len(report.faults):
        lines.append(f"  ... and {len(report.faults) - len(shown)} more (-v or --json show all)")
    return lines
