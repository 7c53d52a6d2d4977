"""Diagnosis of wrong tensors: one sentence on where their numbers come from.

A few rows of the wrong tensor are searched in SRC: rescaled, in another tensor of the same shape,
in other rows of the same matrix, transposed.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, Self

import numpy as np

from lingconv.checkpoint.decoder import Decoder
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.model.family import LogicalName
from lingconv.plans.tensor_map import Locator
from lingconv.storage.aligned_buffers import Arena
from lingconv.storage.open_files import OpenFiles

Array = np.ndarray[Any, Any]

_SAME = 0.98  # cosine above which two rows are the same row, rounded
_SAMPLE = 3
_CHUNK_ELEMENTS = 1 << 20
_MAX_TRANSPOSED = 1 << 24  # elements of a square matrix that is read as a whole


class ErrorDiagnosis:
    """Finds the origin of wrong tensors; a context manager, because it opens files."""

    def __init__(self, source: Model, target: Model) -> None:
        self._source = _Rows(source)
        self._target = _Rows(target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._source.close()
        self._target.close()

    def explain(self, name: LogicalName) -> str:
        """Return a sentence on the origin of the numbers in DST's tensor `name`, or ''."""
        rows, _ = self._target.shape(name)
        places = sorted({rows // 4, rows // 2, rows - 1 - rows // 8})[:_SAMPLE]
        sample = self._target.read_at(name, places)
        if not np.isfinite(sample).all():
            return "holds NaN or Inf"
        if not sample.any():
            return "its sampled rows are all zero"
        return (
            self._rescaled(name, places, sample)
            or self._moved(name, places, sample)
            or self._reordered(name, places, sample)
            or self._transposed(name, places, sample)
        )

    def _rescaled(self, name: LogicalName, places: Sequence[int], sample: Array) -> str:
        original = self._source.read_at(name, places)
        if _cosine(original, sample) < _SAME:
            return ""
        ratio = float(np.linalg.norm(sample) / np.linalg.norm(original))
        if 0.9 < ratio < 1.1:
            return ""
        return f"is {ratio:.4g} times as large: a scale was lost, or applied twice"

    def _moved(self, name: LogicalName, places: Sequence[int], sample: Array) -> str:
        def likeness(other: LogicalName) -> float:
            return _cosine(self._source.read_at(other, places[:1]), sample[:1])

        best = max(self._source.like(name), key=likeness, default=None)
        if best and _cosine(self._source.read_at(best, places), sample) >= _SAME:
            return f"holds what SRC has as {best}"
        return ""

    def _reordered(self, name: LogicalName, places: Sequence[int], sample: Array) -> str:
        """Return '', or the row of the whole stored matrix in SRC that a sampled row equals."""
        if self._source.shape(name)[1] == 1:
            return ""
        found: dict[int, tuple[LogicalName, int]] = {}
        for other in self._source.neighbours(name):
            for first, chunk in self._source.chunks(other):
                cosines = _unit(sample) @ _unit(chunk).T
                for number, row in enumerate(cosines.argmax(1)):
                    if cosines[number, row] >= _SAME:
                        found[number] = other, first + int(row)
        for number, (other, row) in sorted(found.items()):
            if (other, row) != (name, places[number]):
                where = f"row {row}" if other == name else f"row {row} of {other}"
                return f"its row {places[number]} is SRC's {where}: rows are in another order"
        return ""

    def _transposed(self, name: LogicalName, places: Sequence[int], sample: Array) -> str:
        rows, cols = self._source.shape(name)
        if rows != cols or rows * cols > _MAX_TRANSPOSED:
            return ""
        whole = np.concatenate([chunk for _, chunk in self._source.chunks(name)])
        if _cosine(np.ascontiguousarray(whole[:, list(places)].T), sample) >= _SAME:
            return "is transposed"
        return ""


class _Rows:
    """Rows of logical tensors as float32."""

    def __init__(self, model: Model) -> None:
        self._files = OpenFiles(model.checkpoint.storage)
        self._decoder = Decoder(Arena(), self._files)
        self._locator: Locator = model.locator()
        self._shapes: dict[LogicalName, tuple[int, int]] = {}
        self._groups: dict[LogicalName, list[LogicalName]] = {}
        for tensor in model.layout.tensors.values():
            shapes = tensor.logical_shapes()
            for name, shape in shapes.items():
                self._shapes[name] = shape[0], prod(shape[1:])
                self._groups[name] = list(shapes)

    def close(self) -> None:
        self._files.__exit__()

    def shape(self, name: LogicalName) -> tuple[int, int]:
        return self._shapes[name]

    def read(self, name: LogicalName, first: int, count: int) -> Array:
        values = np.empty((count, self._shapes[name][1]), np.float32)
        self._decoder.fill(self._locator.whole(name), first, values)
        return values

    def read_at(self, name: LogicalName, places: Iterable[int]) -> Array:
        """Return some rows; of a vector all elements, because single ones identify nothing."""
        rows, cols = self._shapes[name]
        if cols == 1:
            return self.read(name, 0, rows).reshape(1, -1)
        return np.concatenate([self.read(name, place, 1) for place in places])

    def chunks(self, name: LogicalName) -> Iterator[tuple[int, Array]]:
        rows, cols = self._shapes[name]
        step = max(1, _CHUNK_ELEMENTS // cols)
        for first in range(0, rows, step):
            yield first, self.read(name, first, min(step, rows - first))

    def like(self, name: LogicalName) -> list[LogicalName]:
        """Return the other tensors of the same shape, those with similar names first."""
        shape, words = self._shapes[name], set(name.split("."))
        others = [
            other
            for other, found in self._shapes.items()
            if found == shape and other != name and self._locator.holds(other)
        ]
        return sorted(others, key=lambda other: -len(words & set(other.split("."))))

    def neighbours(self, name: LogicalName) -> list[LogicalName]:
        """Return the tensors that share a stored matrix with this one, itself included."""
        return [other for other in self._groups[name] if self._locator.holds(other)]


def _cosine(left: Array, right: Array) -> float:
    """Return the cosine of two sets of rows, each flattened and with its mean subtracted.

    Norms have elements close to one: with their means, all would look alike.
    """
    one, other = left - left.mean(dtype=np.float64), right - right.mean(dtype=np.float64)
    norms = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(np.vdot(one, other)) / norms if norms else 0.0


def _unit(rows: Array) -> Array:
    """Return rows scaled to length one; rows of zeros are kept."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms == 0, 1, norms))
