"""Layouts: which physical tensor holds which logical rows.

An address is a physical tensor's name and a run of its rows. Logical tensors that share a name are
that tensor's rows, one behind the other, in the order of the family file: Q, K and V in a fused
matrix are three addresses, and so are experts that are stacked: only the shape tells. This module
knows names and shapes; it opens no file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lingconv.family import Family, LogicalName, LogicalTensor, PhysicalName, Role, Shape


class Rows(NamedTuple):
    """The logical tensor that fills rows `start` to `start + num_rows` of a physical tensor."""

    logical: LogicalName
    start: int
    num_rows: int


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


def stacked_shape(shape: Shape, stack: int) -> Shape:
    """Return the shape of `stack` equal matrices whose rows make `shape`; 0 for a lone matrix."""
    return (stack, shape[0] // stack, *shape[1:]) if stack else shape


class Address(NamedTuple):
    """Where a logical tensor lives: `num_rows` rows of physical tensor `name` from row `start`."""

    name: PhysicalName
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All physical tensors of one model in one layout, in canonical order."""

    name: str
    tensors: Mapping[PhysicalName, PhysicalTensor]

    def addresses(self) -> dict[LogicalName, Address]:
        """Return where each logical tensor lives: the inverse of `tensors`."""
        return {
            rows.logical: Address(tensor.name, rows.start, rows.num_rows)
            for tensor in self.tensors.values()
            for rows in tensor.rows
        }


def build_layout(family: Family, symbols: Mapping[str, Any], name: str) -> Layout:
    """Return the layout `name` of the model that `symbols` describe."""
    tensors: dict[PhysicalName, PhysicalTensor] = {}
    for logical in family.expand(symbols, name):
        held = tensors.get(logical.address)
        tensors[logical.address] = _first(logical) if held is None else _append(held, logical)
    return Layout(name, tensors)


def _first(logical: LogicalTensor) -> PhysicalTensor:
    return PhysicalTensor(
        logical.address,
        logical.shape,
        logical.role,
        logical.keep_dtype,
        logical.mtp,
        int(logical.stacked),
        (Rows(logical.name, 0, logical.shape[0]),),
    )


def _append(held: PhysicalTensor, logical: LogicalTensor) -> PhysicalTensor:
    if held.shape[1:] != logical.shape[1:] or held.role != logical.role:
        raise ValueError(f"{logical.name} cannot share {held.name}: other width or role")
    start, count = held.shape[0], logical.shape[0]
    return PhysicalTensor(
        held.name,
        (start + count, *held.shape[1:]),
        held.role,
        held.keep_dtype,
        held.mtp,
        held.stack + logical.stacked,
        (*held.rows, Rows(logical.name, start, count)),
    )
