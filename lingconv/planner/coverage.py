"""Coverage, the plan's ledger: each source tensor is read once or dropped with a reason.

Every target is filled.
"""

from collections.abc import Iterable, Iterator

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.model.family import PhysicalName
from lingconv.model.layout import Layout
from lingconv.planner.sources import SourceModel
from lingconv.plans.plan import Dropped, Transfer
from lingconv.plans.tensor_map import MatrixSlice


def dropped(origin: SourceModel, layout: Layout) -> Iterator[Dropped]:
    """Yield the source tensors and files that no target needs, each with the reason."""
    for name, nbytes, reason in _left_out(origin.model, layout):
        yield Dropped(name, nbytes * len(origin.sources), reason)


def _left_out(model: Model, layout: Layout) -> Iterator[Dropped]:
    stored = model.checkpoint.tensors
    kept = {rows.logical for tensor in layout.tensors.values() for rows in tensor.rows}
    for tensor in model.layout.tensors.values():
        if tensor.name in model.stored and tensor.rows[0].logical not in kept:
            for name in model.stored[tensor.name].encoding.names(tensor.name):
                yield Dropped(name, stored[name].nbytes, "left out by `--mtp`")
    for name, why in model.dropped.items():
        yield Dropped(name, stored[name].nbytes, why)
    for fault in model.faults:
        if fault.kind == "extra tensor":
            yield Dropped(fault.tensor, stored[fault.tensor].nbytes, "left out by `--drop`")
    for name, (stat, why) in model.checkpoint.ignored.items():
        yield Dropped(name, stat.size, why)
    for kind, held in model.checkpoint.left_out.items():
        entries = f"{held.entries:,} entries"
        yield Dropped(entries, held.nbytes, f"{kind}, no part of the model")


def check_targets(transfers: Iterable[Transfer]) -> None:
    """Raise AssertionError unless every source of every target fills all of it."""
    for transfer in transfers:
        for term in transfer.terms:
            filled = sum(segment.num_rows * segment.num_cols for segment in term.segments)
            if filled != transfer.rows * transfer.cols:
                raise AssertionError(f"{transfer.target.name}: {filled} elements are not all")


def check_sources(
    origin: SourceModel, layout: Layout, transfers: Iterable[Transfer], left_out: Iterable[Dropped]
) -> None:
    """Make sure that every tensor of an origin's checkpoints is read in full once, or dropped.

    A tensor that is taken from the base alone counts as read: the plan lists each of them.
    """
    used = {item.name: 1 for item in left_out}
    elements: dict[str, int] = {}
    for transfer in transfers:
        for segment in _segments(origin, layout, transfer):
            name = segment.source.name
            found = segment.num_rows * segment.num_cols
            elements[name] = elements.get(name, 0) + found
    for source in origin.model.stored.values():
        if elements.get(source.name) == source.rows * source.cols:
            for name in source.encoding.names(source.name):
                used[name] = used.get(name, 0) + 1
    wrong = [name for name in origin.model.checkpoint.tensors if used.get(name) != 1]
    if wrong:
        raise AssertionError(f"not read exactly once: {wrong[:10]}")


def _segments(origin: SourceModel, layout: Layout, transfer: Transfer) -> Iterable[MatrixSlice]:
    for term in transfer.terms:
        if term.sources[-1] in origin.sources:
            return term.segments
    return origin.locator.segments(layout.tensors[PhysicalName(transfer.target.name)].rows)
