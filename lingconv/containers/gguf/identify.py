"""Which model a GGUF file holds: by its key-values, shown with the files that Hugging Face has."""

from collections.abc import Sequence
from dataclasses import replace

from lingconv.containers.base import Identity
from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.gguf.to_hf import (
    plain_values,
    rebuild_files,
    special_ids,
    well_typed,
)
from lingconv.containers.hf.config import rebuild_config
from lingconv.encodings.dtypes import DType
from lingconv.errors import CheckpointError
from lingconv.errors.value_kinds import shown
from lingconv.model.family import Family, GgufModel
from lingconv.model.layout import GGUF, build_layout
from lingconv.storage.overlay import Overlay


def identify(checkpoint: Checkpoint, families: Sequence[Family]) -> Identity:
    """Return the model that `general.architecture` names.

    Raises CheckpointError when no family has it, or when key-values are missing.
    """
    metadata = checkpoint.metadata or {}
    values = plain_values(metadata)
    family, arch = _find_family(checkpoint, values.get("general.architecture"), families)
    described_in = next(iter(checkpoint.shards))
    symbols = family.resolve(values, GGUF, names=checkpoint.tensors, file=described_in)
    typed, odd = well_typed(metadata, described_in)
    files, faults = rebuild_files(typed, arch.tokenizer)
    matrices = [tensor.dtype for tensor in checkpoint.tensors.values() if len(tensor.shape) > 2]
    dtype = matrices[0] if matrices and isinstance(matrices[0], DType) else DType.BF16
    storage = Overlay(checkpoint.storage, list(checkpoint.shards), files)
    converted = replace(
        checkpoint,
        storage=storage,
        config=rebuild_config(family, arch.of, symbols, dtype, special_ids(typed)),
        side_files={name: storage.stat(name) for name in files},
        faults=(*checkpoint.faults, *odd, *faults),
    )
    return Identity(converted, family, arch.of, symbols, build_layout(family, symbols, GGUF))


def _find_family(
    checkpoint: Checkpoint, named: object, families: Sequence[Family]
) -> tuple[Family, GgufModel]:
    """Return the family of a GGUF architecture, and what it says of GGUF."""
    known = {family.gguf.architecture: (family, family.gguf) for family in families if family.gguf}
    if isinstance(named, str) and named in known:
        return known[named]
    raise CheckpointError(
        f"{checkpoint.storage.uri} has the unknown GGUF architecture {shown(named)}",
        faults=checkpoint.faults,
        details=[f"known: {name}" for name in known] + [str(f) for f in checkpoint.faults],
        hint="describe the model in a family file and pass it with `formats=PATH`",
    )
