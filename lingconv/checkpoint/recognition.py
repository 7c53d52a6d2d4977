"""A Model from a checkpoint's headers: the format identifies it, the tensors are matched."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lingconv.checkpoint.config_suggestions import with_suggestions
from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.checkpoint.tensor_matching import Matcher
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.registry import format_named
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.model.family import Family
from lingconv.model.layout import Layout


def recognise(
    checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides | None = None
) -> Model:
    """Return the Model of a checkpoint, each stored tensor matched with one of its layout.

    Raises CheckpointError if its config names no known architecture or lacks required keys; all
    other problems are faults of the returned Model.
    """
    form = format_named(checkpoint.format)
    given = overrides or SourceOverrides()
    identity = form.identify(checkpoint, families, given)
    matcher = Matcher(identity.checkpoint, identity.family, identity.layout)
    matcher.match()

    def layout_under(settings: Mapping[str, Any]) -> Layout:
        changed = replace(given, settings={**given.settings, **settings})
        return form.identify(checkpoint, families, changed).layout

    faults = with_suggestions(matcher.faults, identity.family, identity.symbols, layout_under)
    return Model(
        checkpoint=identity.checkpoint,
        family=identity.family,
        architecture=identity.architecture,
        symbols=identity.symbols,
        layout=identity.layout,
        stored=matcher.stored,
        dropped=matcher.dropped,
        stated=matcher.stated,
        faults=(*identity.checkpoint.faults, *faults),
    )
