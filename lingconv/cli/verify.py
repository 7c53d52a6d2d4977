"""`lingconv verify`: is this checkpoint what that one became?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lingconv
from lingconv.cli.common_options import DisplayFlags, Formats, Jobs, Source, SourceFlags
from lingconv.cli.forward import ActivationsOption, Chat, ComputeOption, Device, Prompt, Tokens
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_watcher
from lingconv.cli.terminal import columns, terminal
from lingconv.cli.units import file_size
from lingconv.plans.options import Mtp
from lingconv.verification.options import Activations, Compute, ForwardOptions, Level, VerifyOptions

if TYPE_CHECKING:
    from lingconv.verification.verdict import ForwardFigures, Verdict

ANSWER_IS_NO = 1
THRESHOLDS = "Thresholds"
_MAX_FINDINGS = 10

Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Write a report to look at: one HTML file."),
]


@grouped
def verify(
    source: Source,
    target: Annotated[
        str, typer.Argument(metavar="DST", help="The checkpoint that SRC became, named likewise.")
    ],
    level: Annotated[
        Level | None,
        typer.Option(
            "--level",
            help="How deep to look; `forward` by default, `tensors` where that would take long.",
        ),
    ] = None,
    report: Report = None,
    mtp: Annotated[
        Mtp | None,
        typer.Option("--mtp", help="What was meant to happen to MTP layers; DST's record knows."),
    ] = None,
    max_rel_error: Annotated[
        float | None,
        typer.Option(
            "--max-rel-error",
            metavar="X",
            help="Of a tensor that was rounded, in place of its encoding's own limit.",
            rich_help_panel=THRESHOLDS,
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            "--min-cosine",
            metavar="X",
            help="Of any layer's hidden states.",
            rich_help_panel=THRESHOLDS,
        ),
    ] = None,
    max_mean_kld: Annotated[
        float | None,
        typer.Option(
            "--max-mean-kld", metavar="X", help="Of the logits.", rich_help_panel=THRESHOLDS
        ),
    ] = None,
    pin_routing: Annotated[
        bool, typer.Option("--pin-routing", help="DST's routers take SRC's choices.")
    ] = False,
    prompt: Prompt = None,
    chat: Chat = False,
    tokens: Tokens = None,
    compute: ComputeOption = Compute.F32,
    activations: ActivationsOption = Activations.PLAIN,
    device: Device = "cpu",
    jobs: Jobs = 0,
    formats: Formats = None,
    *,
    said: SourceFlags,
    printed: DisplayFlags,
) -> None:
    """Prove that DST is what SRC became: tensor by tensor, and in what both compute.

    Exit code 0 for yes, 1 for no. Examples: `lingconv verify Ling-1T Ling-1T-FP8 --level tensors`,
    `lingconv verify Ling-mini-2.0 out --report report.html`
    """
    options = VerifyOptions(
        level=level.value if level else "",
        forward=ForwardOptions(compute.value, activations.value, device),
        pin_routing=pin_routing,
        mtp=mtp.value if mtp else "",
        max_rel_error=max_rel_error,
        min_cosine=min_cosine,
        max_mean_kld=max_mean_kld,
    )
    if report is not None:
        lingconv.api.check_report()
    with make_watcher("verify") as watcher:
        verdict = lingconv.api.verify(
            source,
            target,
            options,
            prompt=prompt,
            chat=chat,
            tokens=tokens,
            formats=formats,
            given=said.given(),
            jobs=jobs,
            watcher=watcher,
        )
    conclude(verdict, report, verbose=printed.verbose)


def conclude(verdict: "Verdict", report: Path | None, *, verbose: bool) -> None:
    """Print a verdict, write the report, and exit with 1 when the answer is no."""
    terminal.result(
        lines(verdict, verbose=verbose), verdict.to_json(), "yes" if verdict.ok else "no"
    )
    if report is not None:
        lingconv.api.write_report(verdict, report)
        terminal.note(f"report: {report}")
    if not verdict.ok:
        raise typer.Exit(ANSWER_IS_NO)


def lines(verdict: "Verdict", *, verbose: bool) -> list[str]:
    """Return a verdict for people: the answer, the culprits, then the figures."""
    answer = "YES, proven" if verdict.ok else f"NO, {len(verdict.findings):,} findings"
    found = verdict.findings if verbose else verdict.findings[:_MAX_FINDINGS]
    rest = len(verdict.findings) - len(found)
    return [
        f"{answer}: {verdict.source} -> {verdict.target} ({verdict.kind}, level {verdict.level})",
        *(f"  {finding.kind:<14} {finding}" for finding in found),
        *([f"  ... and {rest:,} more (-v or --json show all)"] if rest else []),
        *_tensor_lines(verdict),
        *(_forward_lines(verdict.forward) if verdict.forward else []),
        *columns(
            [
                ("compared", f"{file_size(verdict.bytes_read)}, {_time(verdict)}"),
                (
                    "held to",
                    ", ".join(f"{name} {value:g}" for name, value in verdict.thresholds.items()),
                ),
            ]
        ),
    ]


def _time(verdict: "Verdict") -> str:
    """Return how long it took, and the speed where nothing but reading was done."""
    if verdict.forward is not None:
        return f"{verdict.seconds:.1f} s with both forward passes"
    rate = verdict.bytes_read / max(verdict.seconds, 1e-9)
    return f"{verdict.seconds:.1f} s ({file_size(rate)}/s)"


def _tensor_lines(verdict: "Verdict") -> list[str]:
    """Return a line for each pair of encodings: how many tensors, and the worst of them."""
    rows = []
    for group in verdict.by_encoding():
        state = "all equal" if group.equal == group.tensors else f"{group.equal:,} equal"
        if group.worst.rel_error:
            state += (
                f"; worst {group.worst.name}: relative error {group.worst.rel_error:.3g},"
                f" SNR {group.worst.snr_db:.1f} dB"
            )
        number = f"{group.tensors:,} tensor{'s' if group.tensors > 1 else ''}"
        rows.append((f"{group.source} -> {group.target}", f"{number}, {state}"))
    return columns(rows)


def _forward_lines(forward: "ForwardFigures") -> list[str]:
    logits = forward.logits
    lowest = min(forward.layers, key=lambda layer: layer.mean_cosine)
    flips = [layer for layer in forward.layers if layer.flipped_tokens is not None]
    routing = "pinned to SRC's"
    if flips and not forward.pinned:
        most = max(flips, key=lambda layer: layer.flipped_tokens or 0.0)
        routing = f"at most {most.flipped_tokens:.1%} of the tokens flipped, in {most.name}"
    return columns(
        [
            ("hidden states", f"lowest mean cosine {lowest.mean_cosine:.6f}, {lowest.name}"),
            ("routing", routing if flips else ""),
            (
                "logits",
                f"mean KLD {logits.mean_kld:.6f}, maximum {logits.max_kld:.4f},"
                f" 99.9% {logits.kld_999:.4f}, median {logits.median_kld:.6f},"
                f" RMS dp {logits.rms_dp:.3%}, same top p {logits.same_top_p:.1%}"
                f"  ({forward.tokens} tokens)",
            ),
            *(
                (
                    f"MTP {i} logits",
                    f"mean KLD {item.mean_kld:.6f}, same top p {item.same_top_p:.1%}",
                )
                for i, item in enumerate(forward.mtp_logits)
            ),
        ]
    )
