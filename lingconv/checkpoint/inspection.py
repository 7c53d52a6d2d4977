"""The report of `inspect` on a checkpoint; reads headers only, so it is instant at any size."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.containers.checkpoint import LeftOut
from lingconv.encodings import quantization_config
from lingconv.errors import Fault
from lingconv.model.family import Role

SCHEMA = "lingconv.inspect/1"


@dataclass(frozen=True, slots=True)
class Report:
    """The facts about a checkpoint, and its faults and warnings."""

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
    left_out: Mapping[str, LeftOut]
    side_files: tuple[str, ...]
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        """Whether a conversion would accept it."""
        return not any(fault.fatal for fault in self.faults)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values["left_out"] = {kind: held._asdict() for kind, held in self.left_out.items()}
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
    encodings = Counter(stored.encoding for stored in model.stored.values())
    parameters = _parameters(model)
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
    return Report(
        source=checkpoint.storage.uri,
        family=model.family.title,
        architecture=model.architecture,
        layout=model.layout.name,
        encodings={encoding.label: number for encoding, number in encodings.items()},
        dtypes=dtypes,
        parameters=sum(parameters[False].values()),
        active_parameters=_active(parameters[False], model.symbols),
        mtp_parameters=sum(parameters[True].values()),
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
        left_out=checkpoint.left_out,
        side_files=tuple(checkpoint.side_files),
        faults=model.faults,
    )


def _parameters(model: Model) -> dict[bool, Counter[Role]]:
    """Return the number of parameters by role, in MTP layers (True) and others (False)."""
    counts: dict[bool, Counter[Role]] = {False: Counter(), True: Counter()}
    for name in model.stored:
        tensor = model.layout.tensors[name]
        counts[tensor.mtp][tensor.role] += prod(tensor.shape)
    return counts


def _active(parameters: Mapping[Role, int], symbols: Mapping[str, Any]) -> int:
    """Return the number of active parameters of a token, embeddings included."""
    experts = parameters[Role.EXPERT]
    chosen: int = experts * symbols["experts_per_token"] // max(1, symbols["experts"])
    return sum(parameters.values()) - experts + chosen
