"""What is this checkpoint? Headers only, so instant at any size."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from lingconv.encodings import quantization_config
from lingconv.errors import Fault
from lingconv.family import PhysicalName, Role
from lingconv.model import Model

SCHEMA = "lingconv.inspect/1"


@dataclass(frozen=True, slots=True)
class Report:
    """The facts about a checkpoint, and everything odd about it."""

    source: str
    family: str
    architecture: str
    layout: str
    encodings: dict[str, int]
    dtypes: dict[str, int]
    parameters: int
    active_parameters: int
    mtp_parameters: int
    layers: int
    dense_layers: int
    mtp_layers: int
    experts: int
    rotary_dim: int
    tensors: int
    tensor_bytes: int
    file_bytes: int
    shards: int
    quantization: dict[str, Any] | None
    side_files: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        """Whether a conversion would accept it."""
        return not any(fault.fatal for fault in self.faults)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["side_files"] = list(self.side_files)
        values["faults"] = [
            {
                "kind": fault.kind,
                "fatal": fault.fatal,
                "file": fault.file,
                "tensor": fault.tensor,
                "message": fault.message,
            }
            for fault in self.faults
        ]
        return {"schema": SCHEMA, "sound": self.sound, **values}


def inspect_model(model: Model) -> Report:
    """Return the report on a recognised checkpoint."""
    checkpoint = model.checkpoint
    encodings: dict[str, int] = {}
    for stored in model.stored.values():
        encodings[stored.encoding.label] = encodings.get(stored.encoding.label, 0) + 1
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
    return Report(
        source=checkpoint.storage.uri,
        family=model.family.title,
        architecture=model.architecture,
        layout=model.layout.name,
        encodings=encodings,
        dtypes=dtypes,
        parameters=sum(count for _, count, mtp in _counts(model) if not mtp),
        active_parameters=_active(model),
        mtp_parameters=sum(count for _, count, mtp in _counts(model) if mtp),
        layers=model.symbols["layers"],
        dense_layers=model.symbols["dense_layers"],
        mtp_layers=model.symbols["mtp_layers"],
        experts=model.symbols["experts"],
        rotary_dim=model.symbols["rotary_dim"],
        tensors=len(checkpoint.tensors),
        tensor_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        file_bytes=sum(stat.size for stat in checkpoint.shards.values()),
        shards=len(checkpoint.shards),
        quantization=checkpoint.config.get(quantization_config.KEY),
        side_files=tuple(checkpoint.side_files),
        faults=model.faults,
    )


def _counts(model: Model) -> Iterator[tuple[Role, int, bool]]:
    """Yield role, parameters and MTP membership of each tensor that is there."""
    for name in model.stored:
        tensor = model.layout.tensors[PhysicalName(name)]
        yield tensor.role, prod(tensor.shape), tensor.mtp


def _active(model: Model) -> int:
    """Return the parameters that one token passes through, embeddings included, MTP not."""
    experts = sum(count for role, count, mtp in _counts(model) if role == Role.EXPERT and not mtp)
    others = sum(count for role, count, mtp in _counts(model) if role != Role.EXPERT and not mtp)
    return others + experts * model.symbols["experts_per_token"] // model.symbols["experts"]
