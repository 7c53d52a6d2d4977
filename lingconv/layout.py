"""Layouts: which physical tensor holds which logical rows.

An address is a physical tensor's name and runs of its rows. Logical tensors that share a name are
that tensor's rows, one behind the other, in the order of the family file: Q, K and V in a fused
matrix are three addresses, and so are experts that are stacked: only the shape tells. Some take
turns: Megatron's fused matrix holds a group's queries, its key and its value, then the next group.
This module knows names and shapes; it opens no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lingconv.family import Family, LogicalName, LogicalTensor, PhysicalName, Role, Shape


class Rows(NamedTuple):
    """Rows of a physical tensor from `start` on: those of a logical tensor from `first` on."""

    logical: LogicalName
    start: int
    num_rows: int
    first: int = 0


def count_rows(parts: Iterable[Rows]) -> dict[LogicalName, int]:
    """Return how many rows of each logical tensor there are."""
    counts: dict[LogicalName, int] = {}
    for rows in parts:
        counts[rows.logical] = counts.get(rows.logical, 0) + rows.num_rows
    return counts


class PhysicalTensor(NamedTuple):
    """A tensor as a layout names it, the logical rows that it is made of, and their common role.

    `shape` is that of the matrix of all rows; `stack` is 0, or how many matrices are stacked in it.
    """

    name: PhysicalName
    shape: Shape
    role: Role
    keep_dtype: bool
    mtp: bool
    stack: int
    rows: tuple[Rows, ...]

    @property
    def stored_shape(self) -> Shape:
        """The shape as files state it: a stack has an axis of its own."""
        return stacked_shape(self.shape, self.stack)

    def logical_shapes(self) -> dict[LogicalName, Shape]:
        """Return the logical tensors in it, each with its shape."""
        return {name: (count, *self.shape[1:]) for name, count in count_rows(self.rows).items()}


def stacked_shape(shape: Shape, stack: int) -> Shape:
    """Return the shape of `stack` equal matrices whose rows make `shape`; 0 for a lone matrix."""
    return (stack, shape[0] // stack, *shape[1:]) if stack else shape


class Address(NamedTuple):
    """Where logical rows live: `num_rows` rows of physical tensor `name` from row `start`."""

    name: PhysicalName
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All physical tensors of one model in one layout, in canonical order."""

    name: str
    tensors: Mapping[PhysicalName, PhysicalTensor]

    def addresses(self) -> dict[LogicalName, tuple[Address, ...]]:
        """Return where each logical tensor lives, in the order of its rows: `tensors` inverted."""
        found: dict[LogicalName, tuple[Address, ...]] = {}
        for tensor in self.tensors.values():
            for rows in tensor.rows:
                address = Address(tensor.name, rows.start, rows.num_rows)
                found[rows.logical] = (*found.get(rows.logical, ()), address)
        return found


def build_layout(family: Family, symbols: Mapping[str, Any], name: str) -> Layout:
    """Return the layout `name` of the model that `symbols` describe."""
    members: dict[PhysicalName, list[LogicalTensor]] = {}
    for logical in family.expand(symbols, name):
        members.setdefault(logical.address, []).append(logical)
    return Layout(name, {address: _join(logicals) for address, logicals in members.items()})


def _join(members: list[LogicalTensor]) -> PhysicalTensor:
    """Return the physical tensor that `members` share."""
    first = members[0]
    rows: list[Rows] = []
    start = 0
    for turn in range(first.turns):
        for member in members:
            if (member.shape[1:], member.role) != (first.shape[1:], first.role):
                raise ValueError(f"{member.name} cannot share {first.address}: other width or role")
            count = member.shape[0] // first.turns
            rows.append(Rows(member.name, start, count, turn * count))
            start += count
    return PhysicalTensor(
        first.address,
        (start, *first.shape[1:]),
        first.role,
        first.keep_dtype,
        first.mtp,
        first.stack,
        tuple(rows),
    )
