"""What runtimes would make of a planned checkpoint, and its files do not show: warnings."""

from collections.abc import Iterator, Sequence

from lingconv.model.family import PhysicalName, Role
from lingconv.model.layout import HF, Layout
from lingconv.plans.plan import Transfer
from lingconv.plans.runtimes import fusing


def runtime_warnings(layout: Layout, transfers: Sequence[Transfer]) -> Iterator[str]:
    """Yield what runtimes refuse or misread, of a target in Hugging Face's layout."""
    if layout.base == HF and any(t.target.encoding.has_scales for t in transfers):
        yield from _split_sets(layout, transfers)
        yield from _part_blocks(layout, transfers)


def _split_sets(layout: Layout, transfers: Sequence[Transfer]) -> Iterator[str]:
    """Yield the first set of matrices that runtimes make one of and that are stored unlike."""
    sets: dict[str, dict[str, list[str]]] = {}
    for transfer in transfers:
        tensor = layout.tensors[PhysicalName(transfer.target.name)]
        name = transfer.target.name
        key = tensor.fused
        if tensor.role == Role.EXPERT:  # all experts of a layer are one matrix
            key = name.partition(".experts.")[0] + ".experts"
        if key:
            encodings = sets.setdefault(key, {})
            encodings.setdefault(transfer.target.encoding.label, []).append(name)
    split = [encodings for encodings in sets.values() if len(encodings) > 1]
    if split:
        kinds = ", ".join(f"{names[0]} is {label}" for label, names in split[0].items())
        yield (
            f"{len(split):,} sets of matrices are stored unlike ({kinds}), and {fusing()} make one"
            " matrix of each: they refuse it, or load codes without scales. Quantize or ignore the"
            " whole set: all experts of a layer, gate with up, q with k and v"
        )


def _part_blocks(layout: Layout, transfers: Sequence[Transfer]) -> Iterator[str]:
    """Yield the first experts that do not consist of whole blocks of rows."""
    for transfer in transfers:
        multiple = transfer.target.encoding.row_multiple
        tensor = layout.tensors[PhysicalName(transfer.target.name)]
        if tensor.role == Role.EXPERT and multiple > 1 and tensor.height % multiple:
            yield (
                f"{transfer.target.name} has {tensor.height:,} rows, which are not whole blocks of"
                f" {multiple}: {fusing()} refuse such experts. `scheme=channel` has no such limit,"
                " and `ignore=*.experts.*` leaves them as they are"
            )
            return
