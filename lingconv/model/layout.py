"""Layouts: the map from logical rows to rows of physical tensors.

An address is a physical tensor's name and a run of its rows. Logical tensors that share a name are
concatenated rows of that tensor, in the order of the family file: Q, K and V in a fused matrix are
three addresses, and so are stacked experts; the two differ only in the shape that files state.
Some are interleaved: Megatron's fused matrix holds a group's queries, its key and its value, then
the next group's.
This module has names and shapes; it opens no file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lingconv.errors import UsageError
from lingconv.model.family import (
    Family,
    LogicalName,
    LogicalTensor,
    PhysicalName,
    Role,
    Shape,
    Transposition,
)
from lingconv.model.parallelism import RankShard, RankShare

# Names of layouts in family files; refinements are appended with a `+`.
HF = "hf"
GGUF = "gguf"
MEGATRON = "megatron"


class Rows(NamedTuple):
    """Rows of a physical tensor from `start` on: a logical tensor's rows from `first` on."""

    logical: LogicalName
    start: int
    num_rows: int
    first: int = 0


def count_rows(parts: Iterable[Rows]) -> dict[LogicalName, int]:
    """Return the number of rows of each logical tensor in `parts`."""
    counts: dict[LogicalName, int] = {}
    for rows in parts:
        counts[rows.logical] = counts.get(rows.logical, 0) + rows.num_rows
    return counts


class PhysicalTensor(NamedTuple):
    """A tensor as a layout names it, the logical rows in it, and their common role.

    `shape` is that of the matrix of all rows; `stack` is 0, or the number of matrices stacked in
    it. On a rank that has a share of the columns, they start at `first_col`. `transposition` is how
    the matrices are transposed, if they are. Runtimes make one matrix of all with the same `fused`,
    if it is not empty.
    """

    name: PhysicalName
    shape: Shape
    role: Role
    keep_dtype: bool
    mtp: bool
    stack: int
    rows: tuple[Rows, ...]
    first_col: int = 0
    transposition: Transposition = Transposition.NONE
    fused: str = ""

    @property
    def height(self) -> int:
        """Number of rows of one stacked matrix."""
        return self.shape[0] // (self.stack or 1)

    @property
    def stored_shape(self) -> Shape:
        """The shape that files state: a stack has an axis of its own, unless it is transposed."""
        if self.transposition == Transposition.WIDE:
            return (*self.shape[1:], self.shape[0])
        if self.transposition == Transposition.TALL:
            return (self.stack * self.shape[1], self.height)
        if self.transposition == Transposition.DEEP:
            return (self.stack, self.shape[1], self.height)
        return stacked_shape(self.shape, self.stack)

    def logical_shapes(self) -> dict[LogicalName, Shape]:
        """Return the shapes of the logical tensors in it, by name."""
        return {name: (count, *self.shape[1:]) for name, count in count_rows(self.rows).items()}


def stacked_shape(shape: Shape, stack: int) -> Shape:
    """Return the shape [stack, rows / stack, cols] of a stack; with `stack` 0, `shape` itself."""
    return (stack, shape[0] // stack, *shape[1:]) if stack else shape


class Address(NamedTuple):
    """The place of logical rows: `num_rows` rows of physical tensor `name` from row `start`."""

    name: PhysicalName
    start: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All physical tensors of one model in one layout, in canonical order."""

    name: str
    tensors: Mapping[PhysicalName, PhysicalTensor]

    @property
    def base(self) -> str:
        """The layout's name without refinements."""
        return self.name.split("+")[0]

    def addresses(self) -> dict[LogicalName, tuple[Address, ...]]:
        """Return the addresses of each logical tensor, in row order: `tensors` inverted."""
        found: dict[LogicalName, tuple[Address, ...]] = {}
        for tensor in self.tensors.values():
            for rows in tensor.rows:
                address = Address(tensor.name, rows.start, rows.num_rows)
                found[rows.logical] = (*found.get(rows.logical, ()), address)
        return found


def build_layout(
    family: Family, symbols: Mapping[str, Any], name: str, part: RankShard | None = None
) -> Layout:
    """Return the layout `name` of the model that `symbols` describe, or of a rank's shard of it.

    Raises UsageError if a tensor cannot be split evenly over the ranks.
    """
    members: dict[PhysicalName, list[LogicalTensor]] = {}
    for logical in family.expand(symbols, name, part):
        members.setdefault(logical.address, []).append(logical)
    return Layout(name, {address: _join(logicals, part) for address, logicals in members.items()})


def _join(members: list[LogicalTensor], part: RankShard | None) -> PhysicalTensor:
    """Return the physical tensor that `members` share, or a shard's part of it.

    Members are concatenated, or interleaved in groups (Q, K and V of Megatron, here with 2
    key-value heads and 2 query heads for each; a letter is a head):

        concatenated   Q Q Q Q K K V V
        interleaved    Q Q K V Q Q K V

    Concatenated members are split over ranks one by one, interleaved ones together: a rank gets
    whole groups, or, if there are more ranks than groups, a piece of one.
    """
    first = members[0]
    by_rows, by_columns = _shares(first, part)
    for member in members:
        if (member.shape[1:], member.role) != (first.shape[1:], first.role):
            raise ValueError(f"{member.name} cannot share {first.address}: other width or role")
    if first.groups > 1:
        rows = _share_of(_interleaved(members), by_rows, first)
    else:
        rows = [
            each
            for member in members
            for each in _share_of([_all_rows(member)], by_rows, first, _padded(member, part))
        ]
    rows = _one_behind_the_other(rows)
    height = sum(each.num_rows for each in rows)
    if part is not None and by_rows.size > 1 and first.role in (Role.EMBEDDING, Role.HEAD):
        height = part.vocabulary // by_rows.size
    width = tuple(_divided(first, cols, by_columns.size) for cols in first.shape[1:])
    return PhysicalTensor(
        first.address,
        (height, *width),
        first.role,
        first.keep_dtype,
        first.mtp,
        first.stack,
        tuple(rows),
        by_columns.rank * width[0] if width else 0,
        first.transposition,
        first.fused if all(member.fused == first.fused for member in members) else "",
    )


def _all_rows(member: LogicalTensor) -> Rows:
    return Rows(member.name, 0, member.shape[0])


def _interleaved(members: list[LogicalTensor]) -> list[Rows]:
    """Return the rows of all members, group by group."""
    counts = [member.shape[0] // member.groups for member in members]
    return [
        Rows(member.name, 0, count, group * count)
        for group in range(members[0].groups)
        for member, count in zip(members, counts, strict=True)
    ]


def _padded(member: LogicalTensor, part: RankShard | None) -> int:
    """Return the number of rows of a tensor, in a shard with the padding of the vocabulary."""
    vocabulary = member.role in (Role.EMBEDDING, Role.HEAD)
    return part.vocabulary if part is not None and vocabulary else member.shape[0]


def _share_of(
    rows: list[Rows], share: RankShare, logical: LogicalTensor, total: int = 0
) -> list[Rows]:
    """Return the part `share` of consecutive `rows`, cut into equal parts.

    If there are fewer than `total` rows, the rest is padding.
    """
    if share.size == 1:
        return rows
    count = _divided(logical, total or sum(each.num_rows for each in rows), share.size)
    top, found = share.rank * count, []
    position = 0
    for each in rows:
        begin = max(top - position, 0)
        end = min(top + count - position, each.num_rows)
        if begin < end:
            found.append(each._replace(first=each.first + begin, num_rows=end - begin))
        position += each.num_rows
    if not found:
        raise UsageError(f"{logical.name} has no rows for the last of {share.size} ranks")
    return found


def _one_behind_the_other(rows: list[Rows]) -> list[Rows]:
    placed, start = [], 0
    for each in rows:
        placed.append(each if each.start == start else each._replace(start=start))
        start += each.num_rows
    return placed


_WHOLE = RankShare(0, 1)


def _shares(logical: LogicalTensor, part: RankShard | None) -> tuple[RankShare, RankShare]:
    """Return the shares of a tensor's rows and of its columns in a shard."""
    if part is None or not logical.split:
        return _WHOLE, _WHOLE
    share = part.expert if logical.is_expert else part.dense
    return (share, _WHOLE) if logical.split == "rows" else (_WHOLE, share)


def _divided(logical: LogicalTensor, size: int, parts: int) -> int:
    if size % parts:
        raise UsageError(
            f"{logical.name} {list(logical.shape)} cannot be split over {parts} ranks",
            hint="choose a `parallel.tp` (or `parallel.etp`) that divides heads, key-value heads"
            " and widths",
        )
    return size // parts
