"""Sums over the strips of a comparison, and the figures that are computed from them.

Sums are kept per block: the blocks of the target's encoding, or 128 x 128.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lingconv.encodings.base import Limit
from lingconv.encodings.kernels import compare as kernel
from lingconv.model.family import LogicalName
from lingconv.plans.tensor_map import StoredMatrix
from lingconv.verification.pairing import Pair
from lingconv.verification.scales import ScaleCounts
from lingconv.verification.verdict import ScaleFigures, TensorFigures, WorstBlock

Array = np.ndarray[Any, Any]

_LARGEST = {kernel.WORST, kernel.PEAK}
_ADDED = [number for number in range(kernel.NUM_SUMS) if number not in _LARGEST]


def matrix(stored: StoredMatrix) -> tuple[int, int]:
    """Return rows and columns; a vector has one column, a scalar one row as well."""
    rows = stored.shape[0] if stored.shape else 1
    return rows, math.prod(stored.shape[1:])


def blocks(stored: StoredMatrix) -> tuple[int, int]:
    """Return rows and columns of the blocks for which sums are kept."""
    return stored.encoding.blocks(stored.height, matrix(stored)[1])


@dataclass(slots=True)
class Total:
    """The sums of one logical tensor so far, and its worst block."""

    sums: Array = field(default_factory=lambda: np.zeros(kernel.NUM_SUMS, np.float64))
    worst: WorstBlock | None = None

    def add(self, grid: Array, worst: WorstBlock | None) -> None:
        """Add the sums of some blocks."""
        flat = grid.reshape(-1, kernel.NUM_SUMS)
        self.sums[_ADDED] += flat[:, _ADDED].sum(0)
        for number in _LARGEST:
            self.sums[number] = max(self.sums[number], flat[:, number].max(initial=0.0))
        if worst and (self.worst is None or worst.rel_error > self.worst.rel_error):
            self.worst = worst


def worst_block(target: StoredMatrix, first: int, sums: Array) -> WorstBlock | None:
    """Return the block with the largest relative error, or None if nothing differs."""
    noise, signal = sums[:, :, kernel.NOISE], sums[:, :, kernel.SIGNAL]
    if not noise.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.sqrt(noise / signal)
    errors[np.isnan(errors)] = 0.0
    row, col = np.unravel_index(int(errors.argmax()), errors.shape)
    rows, cols = matrix(target)
    block_rows, block_cols = blocks(target)
    if cols == 1:
        begin = first + int(col) * block_cols
        return WorstBlock(
            target.name, (begin, min(begin + block_cols, rows)), (0, 1), float(errors[row, col])
        )
    top, left = first + int(row) * block_rows, int(col) * block_cols
    return WorstBlock(
        target.name,
        (top, min(top + block_rows, rows)),
        (left, min(left + block_cols, cols)),
        float(errors[row, col]),
    )


def tensor_figures(pair: Pair, name: LogicalName, total: Total, limit: Limit) -> TensorFigures:
    """Return the figures of logical tensor `name` of a pair."""
    sums = total.sums
    signal, dot, noise = sums[kernel.SIGNAL], sums[kernel.DOT], sums[kernel.NOISE]
    other = max(
        noise + 2 * dot - signal, 0.0
    )  # |right|^2 = |left - right|^2 + 2 left.right - |left|^2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        rel_error = 0.0 if noise == 0 else float(np.sqrt(noise / signal))
        cosine = float(dot / np.sqrt(signal * other)) if signal or other else 1.0
        snr_db = math.inf if noise == 0 else float(10 * np.log10(signal / noise))
    beyond, nonfinite = int(sums[kernel.BEYOND]), int(sums[kernel.NONFINITE])
    elements = pair.num_rows[name] * matrix(pair.target)[1]
    within = math.sqrt(noise) <= limit.allowed(float(signal), elements)
    ok = not beyond and not nonfinite and within
    return TensorFigures(
        name=name,
        role=pair.role,
        source=pair.segments[0].source.encoding.label,
        target=pair.target.encoding.label,
        elements=elements,
        max_abs=float(sums[kernel.WORST]),
        rel_error=rel_error,
        cosine=cosine,
        snr_db=snr_db,
        beyond=beyond,
        zeroed=int(sums[kernel.ZEROED]),
        saturated=int(sums[kernel.SATURATED]),
        nonfinite=nonfinite,
        shared_nonfinite=int(sums[kernel.SHARED_NONFINITE]),
        allowed=limit.rel_error,
        ok=ok,
        worst_block=total.worst,
    )


def scale_figures(name: str, counts: Sequence[ScaleCounts]) -> ScaleFigures:
    """Return the figures of a stored tensor's scales from those of its strips."""
    examples = [count.example for count in counts if count.example]
    first = min(examples, default=None)
    return ScaleFigures(
        name=name,
        blocks=sum(count.blocks for count in counts),
        unfit=sum(count.unfit for count in counts),
        mislabelled=sum(count.mislabelled for count in counts),
        invalid=sum(count.invalid for count in counts),
        example=f"scale [{first[0]}, {first[1]}] {first[2]}" if first else "",
    )
