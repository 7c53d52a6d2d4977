"""The plots of a verdict, by name, as SVG."""

import math
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from lingconv.verification.reports.drawing import BLUE, ORANGE, picture, put_labels
from lingconv.verification.verdict import ForwardFigures, TensorFigures, Verdict

_EQUAL = ListedColormap([(0.5, 0.55, 0.6, 0.28)])  # a grey that suits light and dark pages
_BLOCK = re.compile(r"(layers|mtp)\.(\d+)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(.+)")


def depth(forward: ForwardFigures) -> str:
    """Draw the cosine similarity of hidden states, stage by stage."""

    def draw(axes: Axes) -> None:
        places = range(len(forward.layers))
        for values, label, colour in (
            ([layer.mean_cosine for layer in forward.layers], "mean over tokens", BLUE),
            ([layer.min_cosine for layer in forward.layers], "worst token", ORANGE),
        ):
            axes.plot(places, values, "o-", color=colour, label=label, markersize=3)
        axes.set_ylabel("cosine")
        _name_stages(axes, [layer.name for layer in forward.layers])
        axes.legend()

    return picture(draw, 2.6, "depth")


def flips(forward: ForwardFigures) -> str:
    """Draw the share of tokens with different experts, layer by layer."""
    routed = [layer for layer in forward.layers if layer.flipped_tokens is not None]

    def draw(axes: Axes) -> None:
        shares = [100 * (layer.flipped_tokens or 0.0) for layer in routed]
        axes.bar(range(len(routed)), shares, color=BLUE)
        axes.set_ylabel("tokens with other experts, %")
        axes.set_ylim(0, max(1.0, *shares) * 1.05)
        _name_stages(axes, [layer.name for layer in routed])

    return picture(draw, 2.2, "flips") if routed else ""


def positions(forward: ForwardFigures) -> str:
    """Draw the KLD at each position."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(forward.logits.per_position)), forward.logits.per_position, color=BLUE)
        axes.set_xlabel("token position")
        axes.set_ylabel("KLD, nats")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return picture(draw, 2.2, "positions")


def kinds(tensors: Sequence[TensorFigures]) -> str:
    """Draw the relative error by layer and kind of tensor; experts are combined."""
    cells: dict[tuple[str, str], list[float]] = {}
    for item in tensors:
        row, kind = _place(item.name)
        cells.setdefault((_EXPERT.sub(r"experts.\2", kind), row), []).append(item.rel_error)
    merged = {place: float(np.sqrt(np.mean(np.square(values)))) for place, values in cells.items()}
    return _heat_map(merged, "kinds", "layer")


def experts(tensors: Sequence[TensorFigures]) -> str:
    """Draw the relative error of every expert of every layer; its three matrices are combined."""
    cells: dict[tuple[str, str], list[float]] = {}
    for item in tensors:
        row, kind = _place(item.name)
        match = _EXPERT.fullmatch(kind)
        if match:
            cells.setdefault((row, match[1]), []).append(item.rel_error)
    merged = {place: float(np.sqrt(np.mean(np.square(values)))) for place, values in cells.items()}
    return _heat_map(merged, "experts", "expert") if merged else ""


def scales(histogram: Mapping[int, int]) -> str:
    """Draw the histogram of FP8 scales over octaves."""
    if not histogram:
        return ""

    def draw(axes: Axes) -> None:
        octaves = sorted(histogram)
        axes.bar(octaves, [histogram[octave] for octave in octaves], color=BLUE, width=0.9)
        axes.set_xlabel("scale, log2")
        axes.set_ylabel("blocks")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return picture(draw, 2.2, "scales")


def errors(tensors: Sequence[TensorFigures]) -> str:
    """Draw the histogram of tensors' relative errors, one colour for each pair of encodings."""
    groups: dict[str, list[float]] = {}
    for item in tensors:
        if item.rel_error and math.isfinite(item.rel_error):
            label = f"{item.source} to {item.target}"
            groups.setdefault(label, []).append(math.log10(item.rel_error))
    if not groups:
        return ""

    def draw(axes: Axes) -> None:
        every = [value for values in groups.values() for value in values]
        bins = np.linspace(min(every) - 0.01, max(every) + 0.01, 41).tolist()
        colours = mpl.colormaps["tab10"].colors  # type: ignore[attr-defined]
        for (label, values), colour in zip(groups.items(), colours, strict=False):
            axes.hist(
                values, bins=bins, label=f"{label} ({len(values):,})", color=colour, alpha=0.8
            )
        axes.set_xlabel("relative error of a tensor, log10")
        axes.set_ylabel("tensors")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return picture(draw, 2.4, "errors")


def pictures(verdict: Verdict) -> dict[str, str]:
    """Return name -> SVG of all plots for which the verdict has data."""
    drawn = {
        "kinds": kinds(verdict.tensors) if verdict.tensors else "",
        "experts": experts(verdict.tensors),
        "errors": errors(verdict.tensors),
        "scales": scales(verdict.scale_histogram),
    }
    if verdict.forward is not None:
        drawn["depth"] = depth(verdict.forward)
        drawn["flips"] = flips(verdict.forward)
        drawn["positions"] = positions(verdict.forward)
    return {name: svg for name, svg in drawn.items() if svg}


def _place(name: str) -> tuple[str, str]:
    """Return a tensor's layer (as a label) and its kind."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return "model", name
    return (match[2] if match[1] == "layers" else f"mtp {match[2]}"), match[3]


def _natural(label: str) -> tuple[bool, int, str]:
    """Return a sort key that puts 2 before 10, and other texts last."""
    return not label.isdigit(), int(label) if label.isdigit() else 0, label


def _heat_map(cells: Mapping[tuple[str, str], float], name: str, columns_are: str) -> str:
    rows = list(dict.fromkeys(row for row, _ in cells))
    if name == "experts":
        rows.sort(key=_natural)
    columns = sorted({column for _, column in cells}, key=_natural)
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), value in cells.items():
        grid[rows.index(row), columns.index(column)] = value
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(np.isinf(grid), 10.0, grid))
    exact = np.isneginf(logs)
    logs[exact] = np.nan

    def draw(axes: Axes) -> None:
        axes.imshow(np.where(exact, 1.0, np.nan), aspect="auto", cmap=_EQUAL)
        if np.isfinite(logs).any():
            low, high = float(np.nanmin(logs)), float(np.nanmax(logs))
            middle = (low + high) / 2
            half = max((high - low) / 2, 0.05)
            image = axes.imshow(
                logs, aspect="auto", cmap="plasma", vmin=middle - half, vmax=middle + half
            )
            bar = axes.figure.colorbar(image, ax=axes, pad=0.01, shrink=0.9)
            bar.set_label("log10" if len(rows) < 8 else "relative error, log10")
            bar.outline.set_visible(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel(columns_are)
        put_labels(axes.xaxis, columns, 24)
        put_labels(axes.yaxis, rows, 32)
        if name == "experts":
            axes.set_ylabel("layer")

    return picture(draw, min(7.0, 1.1 + 0.19 * len(rows)), name, grid=False)


def _name_stages(axes: Axes, names: Sequence[str]) -> None:
    """Label the stages of a forward pass below the axis: layers by number, others by name."""
    labels = [name.removeprefix("layers.").replace("mtp.", "mtp ") for name in names]
    put_labels(axes.xaxis, [label.replace("embedding", "emb") for label in labels], 24)
    axes.set_xlabel("layer")
