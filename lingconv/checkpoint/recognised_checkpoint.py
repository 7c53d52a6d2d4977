"""A checkpoint joined with its family: what each stored tensor is, and what does not fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lingconv.containers.checkpoint import Checkpoint
from lingconv.encodings.dtypes import DType
from lingconv.encodings.quantization_config import StatedQuantization
from lingconv.errors import CheckpointError, Fault
from lingconv.model.family import Family, PhysicalName
from lingconv.model.layout import MEGATRON, Layout, PhysicalTensor
from lingconv.plans.tensor_map import Locator, StoredMatrix


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """A checkpoint that was understood, as far as it could be; `faults` hold the rest."""

    checkpoint: Checkpoint
    family: Family
    architecture: str
    symbols: Mapping[str, Any]
    layout: Layout
    stored: Mapping[PhysicalName, StoredMatrix]
    dropped: Mapping[str, str]
    stated: StatedQuantization | None
    faults: tuple[Fault, ...]

    def __repr__(self) -> str:
        return f"<Model {self.checkpoint.storage.uri!r}: {self.architecture}, {self.layout.name}>"

    @property
    def own_dtype(self) -> DType | None:
        """The dtype that Megatron's weights are meant to be in, whatever single ones are kept in.

        Its local layers keep norms in F32 beside BF16 matrices. None for what lingconv wrote, as
        for all other layouts: there every tensor is in the dtype that it is to have.
        """
        if self.layout.base != MEGATRON or self.checkpoint.is_recorded:
            return None
        named = self.checkpoint.config.get("torch_dtype") or self.checkpoint.config.get("dtype")
        return {"bfloat16": DType.BF16, "float16": DType.F16, "float32": DType.F32}.get(str(named))

    def tensor(self, name: str) -> PhysicalTensor | None:
        """Return the physical tensor of this name, or None when the layout has none."""
        return self.layout.tensors.get(PhysicalName(name))

    def locator(self) -> "Locator":
        """Return what finds the rows of logical tensors in this checkpoint."""
        return Locator(self.layout.addresses(), self.stored)


def refuse_faults(model: Model, excused: Callable[[Fault], bool] = lambda fault: False) -> None:
    """Raise CheckpointError with every fatal fault of `model` that is not excused."""
    fatal = [fault for fault in model.faults if fault.fatal and not excused(fault)]
    if fatal:
        plural = "s" if len(fatal) > 1 else ""
        raise CheckpointError(
            f"{model.checkpoint.storage.uri} has {len(fatal)} fault{plural}", faults=fatal
        )
