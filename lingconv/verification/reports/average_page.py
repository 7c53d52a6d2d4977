"""The HTML report on an average: the weights, and the learning-rate decay they correspond to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lingconv.plans.checkpoint_weights import decay_of
from lingconv.plans.plan import Plan
from lingconv.verification.reports import page as pages
from lingconv.version import __version__

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write(plan: Plan, destination: str, path: Path) -> None:
    """Write the report on the plan of an average; needs the extra `report`."""
    pages.check()
    pages.write(render(plan, destination), path)


def render(plan: Plan, destination: str) -> str:
    """Return the report as HTML."""
    weights = [source.weight for source in plan.sources]
    decay = [1.0, *decay_of(weights)]
    return pages.render(
        "average.html.jinja",
        headline=f"{plan.weighting.capitalize()} of {len(plan.sources)} checkpoints",
        destination=destination,
        facts=list(_facts(plan)),
        pictures=[
            {
                "title": "Weights",
                "caption": "What each checkpoint contributes, oldest first.",
                "svg": _bars(weights),
            },
            {
                "title": "Learning rate",
                "caption": "The decay that the weights stand for (WSM, arXiv 2507.17634): the share"
                " of its peak, from each checkpoint to the next.",
                "svg": _steps(decay),
            },
        ],
        rows=[
            {
                "name": source.uri,
                "revision": source.revision,
                "weight": f"{source.weight:.6f}",
                "decay": f"{rate:.4f}",
            }
            for source, rate in zip(plan.sources, decay, strict=True)
        ],
        recipe=json.dumps({"plan": plan.digest, "options": plan.options.to_json()}, indent=2),
        version=__version__,
    )


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    weights = [source.weight for source in plan.sources]
    yield "checkpoints", f"{len(weights)}"
    # 1 / sum of squares: the number of equal weights that would average out noise as well.
    yield "effective number", f"{1 / sum(weight**2 for weight in weights):.2f}"
    yield "read", f"{plan.read_bytes / 1e9:,.3g} GB"
    yield "written", f"{plan.write_bytes / 1e9:,.3g} GB"
    yield "stored as", ", ".join(plan.encodings)


def _bars(weights: list[float]) -> str:
    from lingconv.verification.reports.drawing import BLUE, picture, put_labels

    def draw(axes: "Axes") -> None:
        axes.bar(range(len(weights)), weights, color=BLUE)
        axes.set_ylabel("weight")
        put_labels(axes.xaxis, [str(place) for place in range(len(weights))], 32)
        axes.set_xlabel("checkpoint")

    return picture(draw, 2.4, "weights")


def _steps(decay: list[float]) -> str:
    from lingconv.verification.reports.drawing import ORANGE, picture, put_labels

    def draw(axes: "Axes") -> None:
        axes.stairs(decay, range(-1, len(decay)), color=ORANGE, linewidth=2, baseline=None)
        axes.set_ylabel("share of the peak")
        axes.set_ylim(0, 1.05)
        put_labels(axes.xaxis, [str(place) for place in range(len(decay))], 32)
        axes.set_xlabel("checkpoint")

    return picture(draw, 2.4, "decay")
