"""A recognised checkpoint: its family, the role of each stored tensor, and the faults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lingconv.containers.checkpoint import Checkpoint
from lingconv.encodings.dtypes import DType
from lingconv.encodings.quantization_config import StatedQuantization
from lingconv.errors import Fault, unusable
from lingconv.model.family import Family, PhysicalName
from lingconv.model.layout import MEGATRON, Layout, PhysicalTensor
from lingconv.plans.tensor_map import Locator, StoredMatrix


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """A checkpoint with its stored tensors matched to a layout; `faults` are the mismatches."""

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
        """The dtype of the weights of a Megatron model, whatever single ones are stored in.

        Megatron's local layers store norms in F32 beside BF16 matrices. None for checkpoints that
        lingconv wrote and for all other layouts, where every tensor has its intended dtype.
        """
        if self.layout.base != MEGATRON or self.checkpoint.is_recorded:
            return None
        named = self.checkpoint.config.get("torch_dtype") or self.checkpoint.config.get("dtype")
        return {"bfloat16": DType.BF16, "float16": DType.F16, "float32": DType.F32}.get(str(named))

    def tensor(self, name: str) -> PhysicalTensor | None:
        """Return the physical tensor of this name, or None when the layout has none."""
        return self.layout.tensors.get(PhysicalName(name))

    def locator(self) -> "Locator":
        """Return the Locator of this checkpoint's logical tensors."""
        return Locator(self.layout.addresses(), self.stored)


def refuse_faults(model: Model, excused: Callable[[Fault], bool] = lambda fault: False) -> None:
    """Raise CheckpointError with every fatal fault of `model` that is not excused."""
    fatal = [fault for fault in model.faults if fault.fatal and not excused(fault)]
    if fatal:
        raise unusable(model.checkpoint.storage.uri, fatal)
