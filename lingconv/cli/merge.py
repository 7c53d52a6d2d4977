"""`lingconv merge`: experts into one tensor for each layer, checkpoints into their average."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

import lingconv
from lingconv.cli import convert
from lingconv.cli import plan as plan_command
from lingconv.cli.command_classes import Command, Group
from lingconv.cli.common_options import (
    Destination,
    DisplayFlags,
    Formats,
    Fresh,
    FromMainParams,
    HubFlags,
    Recheck,
    ResourceFlags,
    Source,
    SourceFlags,
    Verify,
)
from lingconv.cli.convert_options import ConvertFlags, DType, ExpertsAs, OutputFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.progress_display import make_progress
from lingconv.cli.terminal import terminal
from lingconv.errors import UsageError
from lingconv.plans import checkpoint_weights as weighting
from lingconv.plans.checkpoint_weights import Decay, Weighting
from lingconv.plans.options import DEFAULT_MERGED, Target

WEIGHTS = "Weights"
_BAR_WIDTH = 40

app = typer.Typer(cls=Group, no_args_is_help=True, help="Merge experts, or average checkpoints.")


@app.command(cls=Command)
@grouped
def experts(
    source: Source,
    destination: Destination,
    experts_as: ExpertsAs = DEFAULT_MERGED,
    split: Annotated[
        bool, typer.Option("--split", help="The other way: a tensor for each expert.")
    ] = False,
    dtype: DType = None,
    *,
    written: OutputFlags,
    verify: Verify = False,
    fresh: Fresh = False,
    recheck: Recheck = False,
    limits: ResourceFlags,
    hub: HubFlags,
    formats: Formats = None,
    said: SourceFlags,
    printed: DisplayFlags,
) -> None:
    """Stack the experts of each layer into one tensor, MTP layers included.

    Dtypes are kept unless `--dtype` names another. The same as `convert --to hf-merged`, and
    `convert --to hf` with `--split`.

    Examples: `lingconv merge experts Ling-1T-FP8 out --experts-as transformers`,
    `lingconv merge experts out Ling-1T-FP8 --split`
    """
    options = replace(
        written.options(),
        layout=Target.HF if split else Target.HF_MERGED,
        merged=experts_as,
        dtype=dtype or "",
    )
    convert.run(
        source,
        destination,
        options,
        hub.resources(limits),
        hub.publish.options,
        formats=formats,
        given=said.given(),
        fresh=fresh,
        recheck=recheck,
        verify=verify,
    )


@dataclass(frozen=True, slots=True)
class WeightFlags:
    """How checkpoints are weighed."""

    decay: Annotated[
        Decay | None,
        typer.Option(
            "--decay",
            help="Weights that stand for a decay of the learning rate (WSM); linear is the mean.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    decay_to: Annotated[
        float | None,
        typer.Option(
            "--decay-to",
            metavar="SHARE",
            help="Where the decay ends, as a share of its peak; 0, for exponential 0.1.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    decay_file: Annotated[
        Path | None,
        typer.Option(
            "--decay-file",
            metavar="FILE",
            help="A decay of your own: a share of the peak for each step from one to the next.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="The weights themselves, such as 1/4,1/4,1/2.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    mean: Annotated[
        bool, typer.Option("--mean", help="Equal weights.", rich_help_panel=WEIGHTS)
    ] = False
    top: Annotated[
        int,
        typer.Option(
            "--top",
            metavar="N",
            min=0,
            help="Only the N best by validation score, as Ling 2.0 did with 32; needs `--scores`.",
            rich_help_panel=WEIGHTS,
        ),
    ] = 0
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="FILE",
            help="CSV: checkpoint (path or name), score.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    lower_is_better: Annotated[
        bool,
        typer.Option("--lower-is-better", help="Scores are losses.", rich_help_panel=WEIGHTS),
    ] = False

    def chosen(self, sources: list[str]) -> list[str]:
        """Return the checkpoints that take part, in their order."""
        if bool(self.top) != (self.scores is not None):
            raise UsageError("`--top` and `--scores` belong together")
        if self.scores is None:
            return sources
        places = weighting.best(
            sources, self.scores, self.top, lower_is_better=self.lower_is_better
        )
        return [sources[place] for place in places]

    def weighting(self, count: int) -> Weighting:
        """Return the weights of `count` checkpoints."""
        ways = [self.decay, self.decay_file, self.weights, self.mean or None]
        asked = sum(way is not None for way in ways)
        if asked > 1 or (not asked and not self.top):
            raise UsageError(
                "say once how the checkpoints are weighed",
                hint="`--mean`, `--decay NAME`, `--decay-file FILE` or `--weights W,W,...`",
            )
        if self.decay_to is not None and self.decay is None:
            raise UsageError("`--decay-to` is for `--decay`")
        if self.decay is not None:
            return weighting.by_decay(self.decay, count, self.decay_to)
        if self.decay_file is not None:
            return weighting.by_file(self.decay_file, count)
        if self.weights is not None:
            return weighting.by_hand(self.weights, count)
        return weighting.mean(count)


@app.command(cls=Command)
@grouped
def checkpoints(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SRC...", help="Checkpoints of one training run, oldest first."),
    ],
    destination: Destination,
    by: WeightFlags,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN",
            help="Take these tensors from the last checkpoint instead. Repeatable.",
            rich_help_panel=WEIGHTS,
        ),
    ] = None,
    *,
    asked: ConvertFlags,
    dry_run: Annotated[
        bool, typer.Option("-n", "--dry-run", help="Show weights and plan, and stop.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Show the weights in an HTML file."),
    ] = None,
    fresh: Fresh = False,
    recheck: Recheck = False,
    limits: ResourceFlags,
    hub: HubFlags,
    formats: Formats = None,
    said: SourceFlags,
    from_main_params: FromMainParams = False,
    printed: DisplayFlags,
) -> None:
    """Average checkpoints of one model, and convert the average in the same pass.

    Sums are float64, rounded once. What the target is to be is said as for `convert`.

    Examples: `lingconv merge checkpoints iter_* out --decay cosine`,
    `lingconv merge checkpoints iter_* out --top 32 --scores scores.csv --dtype fp8`
    """
    chosen = by.chosen(sources)
    weights = by.weighting(len(chosen))
    if report is not None:
        lingconv.api.check_report()
    options = replace(asked.options(destination), exclude=tuple(exclude or ()))
    given = said.given(main_params=from_main_params)
    for line in _weight_lines(chosen, weights):
        terminal.note(line)
    if dry_run:
        built, _ = lingconv.api.plan_average(
            chosen, weights, options, destination=destination, formats=formats, given=given
        )
        plan_command.show(built, destination, hub.resources(limits), verbose=printed.verbose)
        return
    with make_progress() as progress:
        result = lingconv.api.merge_checkpoints(
            chosen,
            destination,
            weights,
            options,
            report=report,
            formats=formats,
            given=given,
            resources=hub.resources(limits),
            progress=progress,
            fresh=fresh,
            recheck=recheck,
            publish=hub.publish.options,
        )
    convert.show(result, more=_in_json(chosen, weights))


def _weight_lines(sources: list[str], weights: Weighting) -> list[str]:
    """Return a table and a plot of the weights."""
    block = "\u2588" if "utf" in (sys.stderr.encoding or "").lower() else "#"
    width = max(len(source) for source in sources)
    rates = (1.0, *weights.decay)
    largest = max(weights.weights)
    lines = [f"{weights.name} of {len(sources)} checkpoints: learning rate, weight"]
    for source, weight, rate in zip(sources, weights.weights, rates, strict=True):
        bar = block * round(_BAR_WIDTH * weight / largest)
        lines.append(f"  {source:<{width}}  {rate:6.4f}  {weight:8.6f}  {bar}")
    return lines


def _in_json(sources: list[str], weights: Weighting) -> dict[str, Any]:
    return {
        "weighting": weights.name,
        "sources": [
            {"uri": source, "weight": weight}
            for source, weight in zip(sources, weights.weights, strict=True)
        ],
    }
