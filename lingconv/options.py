"""What the user may ask of a conversion: one frozen value, checked once.

Everything here changes the output; what a conversion is asked for is part of a run's identity.
Threads, memory and progress do not, and live with the engine.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from lingconv.dtypes import DType
from lingconv.encodings.quantization_config import COMPRESSED_TENSORS, FP8
from lingconv.errors import UsageError

DEFAULT_SHARD_BYTES = 10_000_000_000


class TargetDType(StrEnum):
    """`--dtype`: what the weights are to be stored in."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"
    FP8 = "fp8"


class Scheme(StrEnum):
    """`--scheme`: how many weights share a scale."""

    BLOCK = "block"
    CHANNEL = "channel"


class Mtp(StrEnum):
    """`--mtp`: what happens to multi-token-prediction layers."""

    KEEP = "keep"
    DROP = "drop"
    ONLY = "only"


class Compute(StrEnum):
    """`--compute`: the dtype of a forward pass's activations and products."""

    F32 = "f32"
    BF16 = "bf16"


class Activations(StrEnum):
    """`--activations`: as computed, or rounded to FP8 before every FP8 weight, as serving does."""

    PLAIN = "plain"
    FP8 = "fp8"


SCALE_F32 = "f32"
SCALE_UE8M0 = "ue8m0"
SCALE_DTYPES = {"f32": DType.F32, "bf16": DType.BF16, "e8m0": DType.F8_E8M0}


@dataclass(frozen=True, slots=True)
class Fp8Options:
    """How weights are quantized; empty strings stand for the scheme's own default."""

    scheme: str = Scheme.BLOCK
    dialect: str = ""
    scale: str = SCALE_F32
    scale_rules: tuple[tuple[str, str], ...] = ()
    scale_dtype: str = ""
    ignore: tuple[str, ...] = ()

    @property
    def resolved_dialect(self) -> str:
        """The dialect: block scales default to `fp8`, channel scales to compressed-tensors."""
        return self.dialect or (FP8 if self.scheme == Scheme.BLOCK else COMPRESSED_TENSORS)

    @property
    def resolved_scale_dtype(self) -> DType:
        """The dtype that scales are stored in: what each dialect's own tool writes."""
        usual = "f32" if self.resolved_dialect == FP8 else "bf16"
        return SCALE_DTYPES[self.scale_dtype or usual]

    def check(self, policies: Iterable[str]) -> None:
        """Raise UsageError for values or combinations that no runtime reads."""
        known = (SCALE_F32, SCALE_UE8M0, *policies)
        for policy in (self.scale, *(policy for _, policy in self.scale_rules)):
            if policy not in known:
                raise UsageError(f"no scale policy `{policy}`", hint=f"one of {', '.join(known)}")
        _check_word("scheme", self.scheme, list(Scheme))
        _check_word("dialect", self.resolved_dialect, [FP8, COMPRESSED_TENSORS])
        _check_word("scale-dtype", self.scale_dtype or "f32", list(SCALE_DTYPES))
        if self.scheme == Scheme.CHANNEL and self.resolved_dialect == FP8:
            raise UsageError(
                "the `fp8` dialect has no per-channel scales",
                hint=f"leave `--dialect` out, or pass `--dialect {COMPRESSED_TENSORS}`",
            )
        if self.resolved_scale_dtype == DType.F8_E8M0:
            if self.resolved_dialect != FP8:
                raise UsageError("only the `fp8` dialect stores F8_E8M0 scales")
            if self.scale != SCALE_UE8M0 or any(p != SCALE_UE8M0 for _, p in self.scale_rules):
                raise UsageError(
                    "F8_E8M0 holds powers of two only", hint="add `--scale ue8m0` for all weights"
                )


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """A whole request. `dtype` empty keeps every encoding as it is found."""

    layout: str = "hf"
    dtype: str = ""
    fp8: Fp8Options = field(default_factory=Fp8Options)
    mtp: str = Mtp.KEEP
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    drop: tuple[str, ...] = ()
    allow_nonfinite: bool = False
    allow_requantize: bool = False

    def check(self, policies: Iterable[str]) -> None:
        """Raise UsageError for what cannot be carried out; `policies` are the family's own."""
        _check_word("to", self.layout, ["hf"])
        _check_word("mtp", self.mtp, list(Mtp))
        if self.dtype:
            _check_word("dtype", self.dtype, list(TargetDType))
        if self.max_shard_bytes < 1:
            raise UsageError("`--max-shard-size` must be positive")
        self.fp8.check(policies)
        if self.dtype != TargetDType.FP8 and self.fp8 != Fp8Options():
            raise UsageError(
                "`--scheme`, `--dialect`, `--scale`, `--scale-dtype` and `--ignore` are for FP8",
                hint="add `--dtype fp8`",
            )

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ConvertOptions":
        """Build from what `to_json` returned (lists are tuples again)."""
        fields = dict(value)
        fp8 = dict(fields.pop("fp8"))
        fp8["scale_rules"] = tuple((pattern, policy) for pattern, policy in fp8["scale_rules"])
        fp8["ignore"] = tuple(fp8["ignore"])
        return cls(**{**fields, "drop": tuple(fields["drop"])}, fp8=Fp8Options(**fp8))


@dataclass(frozen=True, slots=True)
class ForwardOptions:
    """How a forward pass computes; all of it changes the result a little."""

    compute: str = Compute.F32
    activations: str = Activations.PLAIN
    device: str = "cpu"
    mtp: bool = True

    def check(self) -> None:
        """Raise UsageError for words that mean nothing here."""
        _check_word("compute", self.compute, list(Compute))
        _check_word("activations", self.activations, list(Activations))


class Level(StrEnum):
    """`--level`: how deep a verification looks; each level includes the ones before it."""

    BYTES = "bytes"
    TENSORS = "tensors"
    FORWARD = "forward"


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """How two checkpoints are compared; None and empty words stand for the documented defaults."""

    level: str = ""
    forward: ForwardOptions = field(default_factory=ForwardOptions)
    pin_routing: bool = False
    mtp: str = ""
    max_rel_error: float | None = None
    min_cosine: float | None = None
    max_mean_kld: float | None = None

    def check(self) -> None:
        """Raise UsageError for what cannot be compared that way."""
        _check_word("level", self.level or Level.FORWARD, list(Level))
        _check_word("mtp", self.mtp or Mtp.KEEP, list(Mtp))
        self.forward.check()


def _check_word(option: str, word: str, known: Iterable[str]) -> None:
    words = [str(each) for each in known]
    if word not in words:
        raise UsageError(f"`--{option}` is `{word}`", hint=f"one of {', '.join(words)}")
