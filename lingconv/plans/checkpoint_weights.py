"""Weights of an average of checkpoints, equivalent to a decay of the learning rate.

Averaging checkpoints n, n+1 ... n+k of a run at constant learning rate with weights c_0 ... c_k
gives the model that a decaying run would have reached, where w_i is the share of the peak learning
rate between checkpoints n+i-1 and n+i (WSM, arXiv 2507.17634):

    w_i = c_i + ... + c_k        c_k = w_k,   c_j = w_j - w_(j+1),   c_0 = 1 - w_1

Any decay 1 >= w_1 >= ... >= w_k >= 0 gives weights that are not negative and sum to one. The decays
below are sampled at t = i / (k+1), so that the linear one is the plain mean.
"""

import csv
import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lingconv.errors import UsageError

# How far from 1 the sum of weights may be, for they are written as rounded decimals.
_TOLERANCE = 1e-6


class Decay(StrEnum):
    """`--decay`: the shape of the learning rate's fall, from 1 at t = 0."""

    LINEAR = "linear"  # 1 - t
    COSINE = "cosine"  # (1 + cos(pi t)) / 2
    ONE_MINUS_SQRT = "one-minus-sqrt"  # 1 - sqrt(t), the WSM paper's inverse square root
    INVERSE_SQRT = "inverse-sqrt"  # 1 / sqrt(1 + i), of the number of the checkpoint
    EXPONENTIAL = "exponential"  # end^t


_SHAPES: dict[Decay, Callable[[float], float]] = {
    Decay.LINEAR: lambda t: 1.0 - t,
    Decay.COSINE: lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
    Decay.ONE_MINUS_SQRT: lambda t: 1.0 - math.sqrt(t),
}
DEFAULT_EXPONENTIAL_END = 0.1


class Weighting(NamedTuple):
    """Weights of checkpoints, oldest first, the equivalent decay w_1 ... w_k, and its name."""

    name: str
    weights: tuple[float, ...]
    decay: tuple[float, ...]

    @classmethod
    def of_decay(cls, name: str, decay: Sequence[float]) -> "Weighting":
        """Return the weights of k+1 checkpoints that are equivalent to the decay w_1 ... w_k.

        Raises UsageError unless 1 >= w_1 >= ... >= w_k >= 0.
        """
        ladder = (1.0, *decay, 0.0)
        for place, (before, after) in enumerate(pairwise(ladder), 1):
            if not before >= after:
                raise UsageError(
                    f"{name}: value {place} is {after}, after {before}",
                    hint="a decay falls from 1 to 0, or stays where it is",
                )
        return cls(name, tuple(before - after for before, after in pairwise(ladder)), tuple(decay))

    @classmethod
    def of_weights(cls, name: str, weights: Sequence[float]) -> "Weighting":
        """Return the given weights. Raises UsageError unless they sum to one."""
        negative = [weight for weight in weights if not weight >= 0]
        total = math.fsum(weights)
        if negative:
            raise UsageError(f"a weight is {negative[0]}", hint="weights are not negative")
        if not abs(total - 1) <= _TOLERANCE:
            raise UsageError(
                f"the weights sum to {total:.9g}, not to 1",
                hint="write fractions where decimals do not fit: 1/3,1/3,1/3",
            )
        return cls(name, tuple(weights), decay_of(weights))


def decay_of(weights: Sequence[float]) -> tuple[float, ...]:
    """Return the decay w_1 ... w_k that is equivalent to weights c_0 ... c_k."""
    return tuple(math.fsum(weights[i:]) for i in range(1, len(weights)))


def mean(count: int) -> Weighting:
    """Return the plain mean of `count` checkpoints."""
    return Weighting.of_weights("mean", [1 / count] * count)


def by_decay(name: str, count: int, end: float | None = None) -> Weighting:
    """Return the weights of `count` checkpoints for a decay that falls to `end` of the peak.

    `end` defaults to 0, for the exponential decay to 0.1. Raises UsageError for a `name` that is
    not in `Decay`, and for an `end` that is not a share.
    """
    if name not in list(Decay):
        raise UsageError(f"no decay is called `{name}`", hint=f"one of {', '.join(Decay)}")
    decay = Decay(name)
    if end is None:
        end = DEFAULT_EXPONENTIAL_END if decay == Decay.EXPONENTIAL else 0.0
    if not 0 <= end <= 1 or (decay == Decay.EXPONENTIAL and end == 0):
        raise UsageError(f"`decay_to={end}` is no share of the peak that this decay can fall to")
    values = [_value(decay, i, count, end) for i in range(1, count)]
    return Weighting.of_decay(f"{decay} decay", values)


def _value(decay: Decay, i: int, count: int, end: float) -> float:
    """Return w_i: the learning rate between checkpoints i-1 and i, as a share of its peak."""
    t = i / count
    if decay == Decay.EXPONENTIAL:
        return float(end**t)
    shape = 1 / math.sqrt(1 + i) if decay == Decay.INVERSE_SQRT else _SHAPES[decay](t)
    return end + (1.0 - end) * shape


def by_file(path: Path, count: int) -> Weighting:
    """Return the weights for a file with w_1 ... w_k, one number per line; `#` begins a comment.

    Raises UsageError unless the file has k = count - 1 numbers.
    """
    lines = [line.partition("#")[0].strip() for line in _read(path).splitlines()]
    values = [_number(line, str(path)) for line in lines if line]
    if len(values) != count - 1:
        raise UsageError(
            f"{path} has {len(values)} values, {count} checkpoints need {count - 1}",
            hint="one for each step from a checkpoint to the next: the learning rate there, as a"
            " share of its peak",
        )
    return Weighting.of_decay(path.name, values)


def by_hand(text: str, count: int) -> Weighting:
    """Return the weights in a comma-separated text: `0.25,0.75` or `1/3,2/3`."""
    weights = [_number(word, "`weights`") for word in text.split(",")]
    if len(weights) != count:
        raise UsageError(f"`weights` has {len(weights)} numbers for {count} checkpoints")
    return Weighting.of_weights("weighted average", weights)


def best(
    names: Sequence[str], scores: Path, count: int, *, lower_is_better: bool = False
) -> list[int]:
    """Return the indices in `names` of the `count` checkpoints with the best scores, in order.

    `scores` is a CSV file with the columns checkpoint (path, or last part of it) and score, with or
    without a header. Of equal scores the later checkpoint wins. Raises UsageError for a checkpoint
    without a score.
    """
    found = _read_scores(scores)
    values = []
    for name in names:
        keys = [name, Path(name).name]
        known = [found[key] for key in dict.fromkeys(keys) if key in found]
        if not known:
            raise UsageError(f"{scores} has no score for {name}")
        values.append(known[0])
    if not 1 <= count <= len(names):
        raise UsageError(f"`top={count}`: there are {len(names)} checkpoints")
    sign = -1 if lower_is_better else 1
    ranked = sorted(range(len(names)), key=lambda place: (sign * values[place], place))
    return sorted(ranked[-count:])


def _read_scores(path: Path) -> dict[str, float]:
    rows = [row for row in csv.reader(_read(path).splitlines()) if row]
    columns = (0, 1)
    if rows and len(rows[0]) > 1 and not _is_number(rows[0][1]):
        header = [word.strip().lower() for word in rows.pop(0)]
        columns = (0, header.index("score") if "score" in header else 1)
    found: dict[str, float] = {}
    for row in rows:
        if len(row) <= max(columns):
            raise UsageError(f"{path}: `{','.join(row)}` is no checkpoint with its score")
        name, text = (row[column].strip() for column in columns)
        if name in found:
            raise UsageError(f"{path} has two scores for {name}")
        found[name] = _number(text, str(path))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}") from exc


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str, where: str) -> float:
    """Return a finite number, which may be a fraction."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError) as exc:
        raise UsageError(f"{where}: `{text}` is not a number") from exc
