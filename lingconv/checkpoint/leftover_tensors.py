"""Stored tensors that the layout does not have: why each is there, and what to do about it.

Some are left out with a reason; the others are faults, each with its own way out.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.stored_tensor import StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import SCALE_SUFFIXES
from lingconv.errors import Fault
from lingconv.model.family import Family, Role
from lingconv.model.layout import HF, Layout

# Scales that are measured on a text, as vLLM, ModelOpt and llm-compressor name them.
_CALIBRATED = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale", ".kv_scale")
CALIBRATED = "a calibrated scale of activations or of the KV cache, and no weight"
_SAME_AS_EMBEDDING = "the head is tied, and these are the embedding's bytes"
_CHUNK_BYTES = 8 << 20


class Leftovers(NamedTuple):
    """Tensors that are left out, each with the reason, and faults of the others."""

    dropped: Mapping[str, str]
    faults: list[Fault]


def sort_leftovers(
    checkpoint: Checkpoint,
    family: Family,
    layout: Layout,
    used: Collection[str],
    is_told: Callable[[str], bool],
) -> Leftovers:
    """Return why the tensors of a checkpoint that are not in `used` are there.

    `is_told` says of a missing tensor whether the fault that it is missing with is told already.
    """
    tensors = checkpoint.tensors
    dropped: dict[str, str] = {}
    faults: list[Fault] = []
    names = sorted(tensors.keys() - set(used))
    for name in names:
        reason = family.drop_reason(name, layout.name)
        if name.endswith(_CALIBRATED):
            reason = reason or CALIBRATED
        if reason is None and _is_copy_of_embedding(tensors[name], checkpoint, layout):
            reason = _SAME_AS_EMBEDDING
        if reason is not None:
            dropped[name] = reason
        elif suffix := next((end for end in SCALE_SUFFIXES if name.endswith(end)), ""):
            owner = name.removesuffix(suffix)
            if owner in tensors or not is_told(owner):
                faults.append(_fault_of_scale(tensors[name], suffix, tensors.get(owner)))
        else:
            faults.append(_fault_of_stranger(tensors[name], layout, family))
    return Leftovers(dropped, faults)


def _fault_of_scale(held: StoredTensor, suffix: str, owner: StoredTensor | None) -> Fault:
    """Return what is wrong with a scale that no weight has."""
    if owner is None:
        return Fault("scale", "scale of a weight that is not there", held.file, held.name)
    message = f"scale of a weight that is {owner.dtype}, not FP8"
    hint = f"leave it out, if the weights are right as they are: `drop=*{suffix}`"
    kind = "scale" if owner.dtype == DType.F8_E4M3 else "extra tensor"
    return Fault(kind, message, held.file, held.name, hint=hint)


def _fault_of_stranger(held: StoredTensor, layout: Layout, family: Family) -> Fault:
    described = "config.json" if layout.base == HF else "its metadata"
    message = f"is no tensor of {family.title} by {described}"
    hint = "pass `drop=PATTERN` to leave tensors out knowingly"
    return Fault("extra tensor", message, held.file, held.name, hint=hint)


def _is_copy_of_embedding(held: StoredTensor, checkpoint: Checkpoint, layout: Layout) -> bool:
    """Return whether a tensor has the bytes of the embedding, in a model whose head is tied.

    Only files of this machine are read for that.
    """
    roles = {tensor.role: name for name, tensor in layout.tensors.items()}
    embedding = checkpoint.tensors.get(roles.get(Role.EMBEDDING, ""))
    alike = (
        embedding is not None
        and Role.HEAD not in roles
        and (held.dtype, held.shape) == (embedding.dtype, embedding.shape)
    )
    if not alike or embedding is None or checkpoint.storage.parallel_reads > 1:
        return False
    read = checkpoint.storage.read
    for done in range(0, held.nbytes, _CHUNK_BYTES):
        count = min(_CHUNK_BYTES, held.nbytes - done)
        mine = read(held.file, held.offset + done, count)
        if mine != read(embedding.file, embedding.offset + done, count):
            return False
    return True
