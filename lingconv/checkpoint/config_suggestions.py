"""Keys of the config under which tensors that are left over belong to the model.

A head that is stored although the config ties it, norms of a switch that is off, MTP layers whose
number got lost: to leave such tensors out would lose trained weights, to set the key loses nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from json import dumps
from typing import Any, NamedTuple

from lingconv.errors import CheckpointError, Fault, UsageError
from lingconv.model.family import Family
from lingconv.model.layout import HF, Layout

_MTP_LAYERS = "mtp_layers"
_MOST_MTP_LAYERS = 16
# Returns the layout of the checkpoint with keys of its config set otherwise.
LayoutUnder = Callable[[Mapping[str, Any]], Layout]


class _Suggestion(NamedTuple):
    key: str
    stated: Any
    value: Any
    layout: Layout
    is_alone: bool  # whether it makes a single tensor expected


def with_suggestions(
    faults: Sequence[Fault], family: Family, symbols: Mapping[str, Any], layout_under: LayoutUnder
) -> list[Fault]:
    """Return the faults; those of extra tensors say which key of the config makes them expected."""
    extra = {fault.tensor for fault in faults if fault.kind == "extra tensor"}
    if not extra:
        return [*faults]
    found = [*_suggestions(extra, family, symbols, layout_under)]
    return [_explained(fault, found) for fault in faults]


def _explained(fault: Fault, found: Sequence[_Suggestion]) -> Fault:
    if fault.kind != "extra tensor":
        return fault
    for each in found:
        if fault.tensor in each.layout.tensors:
            message = f"{fault.message}, where `{each.key}` is {dumps(each.stated)}"
            hint = f"`settings={each.key}={dumps(each.value)}` takes it as a part of the model"
            if each.is_alone:
                hint += f", `drop={fault.tensor}` leaves it out"
            return replace(fault, message=message, hint=hint)
    return fault


def _suggestions(
    extra: set[str], family: Family, symbols: Mapping[str, Any], layout_under: LayoutUnder
) -> Iterator[_Suggestion]:
    """Yield the single keys, and the values, under which some of `extra` are expected."""
    for symbol in family.symbols:
        if HF not in symbol.keys or symbol.rule:
            continue
        stated = symbols[symbol.name]
        key = symbol.key(HF)
        best, most = None, 0
        for value in _other_values(symbol.name, stated):
            layout = _layout(layout_under, {key: value})
            count = len(extra & layout.tensors.keys()) if layout is not None else 0
            if layout is None or count <= most:
                break
            best, most = _Suggestion(key, stated, value, layout, count == 1), count
        if best is not None:
            yield best


def _other_values(name: str, stated: Any) -> Iterator[Any]:
    """Yield what a switch, or the number of MTP layers, might be instead."""
    if isinstance(stated, bool):
        yield not stated
    elif name == _MTP_LAYERS:
        yield from range(stated + 1, stated + 1 + _MOST_MTP_LAYERS)


def _layout(layout_under: LayoutUnder, settings: Mapping[str, Any]) -> Layout | None:
    try:
        return layout_under(settings)
    except (CheckpointError, UsageError):
        return None
