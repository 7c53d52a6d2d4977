"""The sources of a plan: a checkpoint, or several that are averaged."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from math import prod
from typing import NamedTuple

from lingconv.checkpoint.recognised_checkpoint import Model, refuse_faults
from lingconv.errors import CheckpointError, Fault
from lingconv.model.layout import PhysicalTensor
from lingconv.plans.plan import Source, Term
from lingconv.plans.tensor_map import Locator


class Average(NamedTuple):
    """Checkpoints of one model, oldest first, and their weights, which sum to one.

    The last one is the base: the target takes from it what is not averaged. `weighting` names how
    the weights were chosen, and is empty if there is only one checkpoint.
    """

    models: tuple[Model, ...]
    weights: tuple[float, ...] = (1.0,)
    weighting: str = ""

    @property
    def base(self) -> Model:
        """The last checkpoint, whose config and small files the target gets."""
        return self.models[-1]

    def sources(self) -> tuple[Source, ...]:
        """Return the checkpoints as the sources of a plan."""
        checkpoints = [model.checkpoint for model in self.models]
        return tuple(
            Source(
                checkpoint.storage.uri,
                {**checkpoint.shards, **checkpoint.side_files},
                weight,
                checkpoint.revision,
                checkpoint.checksums,
            )
            for checkpoint, weight in zip(checkpoints, self.weights, strict=True)
        )


class SourceModel(NamedTuple):
    """Consecutive checkpoints that store every tensor in the same place of the same file."""

    sources: tuple[int, ...]
    model: Model
    locator: Locator


class Sources:
    """All checkpoints that are read; consecutive ones with equal headers are one SourceModel."""

    def __init__(self, average: Average) -> None:
        numbered = list(enumerate(average.models))
        self.all = tuple(
            SourceModel(tuple(number for number, _ in alike), alike[0][1], alike[0][1].locator())
            for alike in (
                list(group) for _, group in groupby(numbered, key=lambda item: id(item[1].stored))
            )
        )
        self.last = len(average.models) - 1

    def __iter__(self) -> Iterator[SourceModel]:
        """Return an iterator over the SourceModels."""
        return iter(self.all)

    def terms(self, tensor: PhysicalTensor) -> tuple[Term, ...]:
        """Return the terms that fill a tensor, of all checkpoints."""
        cols = prod(tensor.shape[1:])
        return tuple(
            Term(origin.sources, origin.locator.window(tensor.rows, tensor.first_col, cols))
            for origin in self.all
        )

    def base_terms(self, tensor: PhysicalTensor) -> tuple[Term, ...]:
        """Return the terms that fill a tensor, of the base alone."""
        return (self.terms(tensor)[-1]._replace(sources=(self.last,)),)


def refuse_all_faults(models: Sequence[Model], excused: Callable[[Model, Fault], bool]) -> None:
    """Raise CheckpointError with every fatal fault of the checkpoints that is not excused."""
    found: list[Fault] = []
    for model in models:
        try:
            refuse_faults(model, partial(excused, model))
        except CheckpointError as exc:
            if len(models) == 1:
                raise
            where = model.checkpoint.storage.uri
            found += [
                replace(fault, file=f"{where}/{fault.file}".rstrip("/")) for fault in exc.faults
            ]
    if found:
        raise CheckpointError(f"the checkpoints have {len(found)} faults", faults=found)
