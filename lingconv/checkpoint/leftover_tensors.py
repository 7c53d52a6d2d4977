"""Stored tensors that the layout does not have: why each is there, and what to do about it.

Some are left out with a reason; the others are faults, each with its own way out.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from lingconv.containers.checkpoint import Checkpoint
from lingconv.containers.stored_tensor import StoredTensor
from lingconv.encodings.dtypes import DType
from lingconv.encodings.fp8 import SCALE_SUFFIXES
from lingconv.errors import CheckpointError, Fault
from lingconv.model.family import Family, Role
from lingconv.model.layout import HF, Layout, build_layout
from lingconv.model.symbols import Symbol

# Scales that are measured on a text, as vLLM, ModelOpt and llm-compressor name them.
_CALIBRATED = (".input_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale", ".kv_scale")
CALIBRATED = "a calibrated scale of activations or of the KV cache, and no weight"
_SAME_AS_EMBEDDING = "the head is tied, and these are the embedding's bytes"
_MOST_LAYERS = 3  # of MTP
_CHUNK_BYTES = 8 << 20


class Leftovers(NamedTuple):
    """Tensors that are left out, each with the reason, and faults of the others."""

    dropped: Mapping[str, str]
    faults: list[Fault]


def sort_leftovers(
    checkpoint: Checkpoint,
    family: Family,
    layout: Layout,
    symbols: Mapping[str, Any],
    used: Collection[str],
) -> Leftovers:
    """Return why the tensors of a checkpoint that are not in `used` are there."""
    tensors = checkpoint.tensors
    dropped: dict[str, str] = {}
    faults: list[Fault] = []
    names = sorted(tensors.keys() - set(used))
    settings = _Settings(family, layout, symbols, checkpoint.config) if names else None
    for name in names:
        reason = family.drop_reason(name, layout.name)
        if name.endswith(_CALIBRATED):
            reason = reason or CALIBRATED
        if reason is None and _is_copy_of_embedding(tensors[name], checkpoint, layout):
            reason = _SAME_AS_EMBEDDING
        if reason is not None:
            dropped[name] = reason
        elif (scale := _fault_of_scale(tensors[name], tensors)) is not None:
            faults.append(scale)
        else:
            faults.append(_fault_of_stranger(tensors[name], layout, family, settings))
    return Leftovers(dropped, faults)


def _fault_of_scale(held: StoredTensor, tensors: Mapping[str, StoredTensor]) -> Fault | None:
    """Return what is wrong with a scale that no weight has, or None for another tensor."""
    suffix = next((end for end in SCALE_SUFFIXES if held.name.endswith(end)), "")
    if not suffix:
        return None
    owner = tensors.get(held.name.removesuffix(suffix))
    if owner is None:
        return Fault("scale", "scale of a weight that is not there", held.file, held.name)
    message = f"scale of a weight that is {owner.dtype}, not FP8"
    hint = f"leave it out, if the weights are right as they are: `drop=*{suffix}`"
    kind = "scale" if owner.dtype == DType.F8_E4M3 else "extra tensor"
    return Fault(kind, message, held.file, held.name, hint=hint)


def _fault_of_stranger(
    held: StoredTensor, layout: Layout, family: Family, settings: "_Settings | None"
) -> Fault:
    described = "config.json" if layout.base == HF else "its metadata"
    message = f"is no tensor of {family.title} by {described}"
    hint = "pass `drop=PATTERN` to leave tensors out knowingly"
    setting = settings.that_has(held.name) if settings else ""
    if setting:
        message += f", unless `{setting.replace('=', '` is `')}`"
        hint = f"to keep it, pass `settings={setting}`"
        if settings is not None and settings.brings_one(setting):
            hint += f"; to leave it out, `drop={held.name}`"
    return Fault("extra tensor", message, held.file, held.name, hint=hint)


class _Settings:
    """Keys of config.json that would bring more tensors if they were set otherwise."""

    def __init__(
        self, family: Family, layout: Layout, symbols: Mapping[str, Any], config: Mapping[str, Any]
    ) -> None:
        self._found: dict[str, str] = {}
        if layout.base != HF:
            return
        for key, value in _alternatives(family.symbols, symbols):
            try:
                other = family.resolve({**config, key: value}, HF)
                names = build_layout(family, other, layout.name).tensors
            except CheckpointError:
                continue
            text = str(value).lower() if isinstance(value, bool) else str(value)
            for name in names.keys() - layout.tensors.keys():
                self._found.setdefault(name, f"{key}={text}")

    def brings_one(self, setting: str) -> bool:
        """Return whether a setting brings a single tensor."""
        return sum(found == setting for found in self._found.values()) == 1

    def that_has(self, name: str) -> str:
        """Return the setting, `KEY=VALUE`, with which the model has a tensor; or nothing."""
        return self._found.get(name, "")


def _alternatives(
    known: Collection[Symbol], symbols: Mapping[str, Any]
) -> Iterator[tuple[str, bool | int]]:
    """Yield other values of the switches, and of what config.json counts none of, by key."""
    for symbol in known:
        value, keys = symbols.get(symbol.name), symbol.keys.get(HF, ())
        if not keys or symbol.rule:
            continue
        if isinstance(value, bool):
            yield keys[0], not value
        elif value == 0 and symbol.default == 0 and isinstance(symbol.default, int):
            for count in range(1, _MOST_LAYERS + 1):
                yield keys[0], count


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
