"""Options of verifications and of forward passes: frozen values, checked once."""

from dataclasses import dataclass, field
from enum import StrEnum

from lingconv.plans.options import Mtp, _check_word


class Compute(StrEnum):
    """`--compute`: the dtype of a forward pass's activations and products."""

    F32 = "f32"
    BF16 = "bf16"


class Activations(StrEnum):
    """`--activations`: as computed, or rounded to FP8 before every FP8 weight, as serving does."""

    PLAIN = "plain"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """Options of a forward pass; each of them changes the result slightly."""

    compute: str = Compute.F32
    activations: str = Activations.PLAIN
    device: str = "cpu"
    mtp: bool = True

    def check(self) -> None:
        """Raise UsageError for unknown values."""
        _check_word("compute", self.compute, list(Compute))
        _check_word("activations", self.activations, list(Activations))


class Level(StrEnum):
    """`--level`: how deep a verification looks; each level includes the ones before it."""

    BYTES = "bytes"
    TENSORS = "tensors"
    FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Options of a verification; None and empty strings mean the documented defaults."""

    level: str = ""
    forward: ForwardOptions = field(default_factory=ForwardOptions)
    pin_routing: bool = False
    mtp: str = ""
    max_rel_error: float | None = None
    min_cosine: float | None = None
    max_mean_kld: float | None = None

    def check(self) -> None:
        """Raise UsageError for unknown values or contradictory combinations."""
        _check_word("level", self.level or Level.FORWARD, list(Level))
        _check_word("mtp", self.mtp or Mtp.KEEP, list(Mtp))
        self.forward.check()
