"""A Model from a checkpoint's headers: the format identifies it, the tensors are matched."""

from collections.abc import Sequence

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.checkpoint.tensor_matching import Matcher
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.registry import format_named
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.model.family import Family


def recognise(
    checkpoint: Checkpoint, families: Sequence[Family], overrides: SourceOverrides | None = None
) -> Model:
    """Return the Model of a checkpoint, each stored tensor matched with one of its layout.

    Raises CheckpointError if its config names no known architecture or lacks required keys; all
    other problems are faults of the returned Model.
    """
    form = format_named(checkpoint.format)
    identity = form.identify(checkpoint, families, overrides or SourceOverrides())
    matcher = Matcher(identity.checkpoint, identity.family, identity.layout, identity.symbols)
    matcher.match()
    return Model(
        checkpoint=identity.checkpoint,
        family=identity.family,
        architecture=identity.architecture,
        symbols=identity.symbols,
        layout=identity.layout,
        stored=matcher.stored,
        dropped=matcher.dropped,
        stated=matcher.stated,
        faults=(*identity.checkpoint.faults, *matcher.faults),
    )
