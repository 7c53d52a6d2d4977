"""The HTML report on a verdict."""

import json
from collections.abc import Iterator
from pathlib import Path

from lingconv.verification.reports import page as pages
from lingconv.verification.verdict import TensorFigures, Verdict
from lingconv.version import __version__

_MOST = 100
_WORST = 25
# Name of a plot -> its title and description, in the order of the page.
_PICTURES = {
    "depth": (
        "Hidden states along the depth",
        "Cosine between the two models' hidden states after each layer. It falls slowly where"
        " rounding adds up, and suddenly where something is wrong.",
    ),
    "flips": (
        "Router flips",
        "Tokens whose set of experts changed. Rounding flips those whose choice was close: a few"
        " per cent in trained models, many with random weights.",
    ),
    "positions": ("KLD per token position", "Divergence of the next-token distributions."),
    "kinds": (
        "Error by layer and kind of tensor",
        "Relative error of the numbers, log10; grey is bit for bit equal. Experts of a layer are"
        " taken together.",
    ),
    "experts": (
        "Experts against layers",
        "Relative error of each expert's three matrices together; grey is equal.",
    ),
    "errors": ("Distribution of errors", "Relative error of each tensor that changed."),
    "scales": ("Distribution of FP8 scales", "Blocks whose scale lies in each octave."),
}


def write(verdict: Verdict, path: Path) -> None:
    """Write the report on `verdict`; needs the extra `report`."""
    pages.check()
    pages.write(render(verdict), path)


def render(verdict: Verdict) -> str:
    """Return the report as HTML."""
    from lingconv.verification.reports.verdict_plots import pictures

    drawn = pictures(verdict)
    return pages.render(
        "verdict.html.jinja",
        verdict=verdict,
        answer="yes" if verdict.ok else "no",
        headline=_headline(verdict),
        facts=list(_facts(verdict)),
        pictures=[
            {"title": title, "caption": caption, "svg": drawn[name]}
            for name, (title, caption) in _PICTURES.items()
            if name in drawn
        ],
        encodings=verdict.by_encoding(),
        worst=_worst(verdict),
        recipe=_recipe(verdict),
        most=_MOST,
        version=__version__,
    )


def _headline(verdict: Verdict) -> str:
    if verdict.ok:
        what = {"relayout": "the same numbers, bit for bit", "fp8": "as close as FP8 can be"}
        return f"Yes: {what.get(verdict.kind, 'as close as rounding allows')}"
    count = len(verdict.findings)
    return f"No: {count:,} finding{'s' if count > 1 else ''}"


def _facts(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """Yield the headline numbers, each with its name."""
    yield "tensors compared", f"{len(verdict.tensors):,}"
    yield "of them equal", f"{sum(item.equal for item in verdict.tensors):,}"
    rounded = [item for item in verdict.tensors if not item.equal]
    if rounded:
        yield "worst relative error", f"{max(item.rel_error for item in rounded):.3g}"
    if verdict.forward is not None:
        logits = verdict.forward.logits
        yield f"mean KLD, {verdict.forward.tokens} tokens", f"{logits.mean_kld:.3g}"
        yield "same top p", f"{logits.same_top_p:.1%}"
        lowest = min(layer.mean_cosine for layer in verdict.forward.layers)
        yield "lowest cosine of hidden states", f"{lowest:.5f}"
    yield "level", verdict.level


def _worst(verdict: Verdict) -> list[TensorFigures]:
    changed = [item for item in verdict.tensors if not item.equal]
    return sorted(changed, key=lambda item: (item.ok, -item.rel_error))[:_WORST]


def _recipe(verdict: Verdict) -> str:
    """Return the options of the conversion that wrote DST, and the thresholds, as text."""
    recipe = {"made with": dict(verdict.recipe) or "no record", "held to": dict(verdict.thresholds)}
    return json.dumps(recipe, indent=2)
