"""The result of a verification: plain values, for the terminal, programs and the report."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from lingconv.errors import Fault

SCHEMA = "lingconv.verify/1"


class Finding(NamedTuple):
    """One reason for a negative verdict. `tensor` is a logical name, or empty."""

    kind: str
    tensor: str
    message: str

    def __str__(self) -> str:
        """Return the finding on one line."""
        return f"{self.tensor}: {self.message}" if self.tensor else self.message


class WorstBlock(NamedTuple):
    """The block of DST's stored tensor with the largest relative error; ends are exclusive."""

    stored: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    rel_error: float


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """The errors of one logical tensor.

    `rel_error` is |difference| / |source| in the Frobenius norm, `snr_db` the same in decibels
    (infinite if nothing differs). Counts are of elements: `beyond` the limit of a single element,
    `zeroed` in DST only, `saturated` above FP8's range at their scale, `nonfinite` NaN or Inf on
    one side only, `shared_nonfinite` on both.
    """

    name: str
    role: str
    source: str
    target: str
    elements: int
    max_abs: float
    rel_error: float
    cosine: float
    snr_db: float
    beyond: int
    zeroed: int
    saturated: int
    nonfinite: int
    shared_nonfinite: int
    allowed: float
    ok: bool
    worst_block: WorstBlock | None

    @property
    def equal(self) -> bool:
        """Whether the tensor has no difference at all."""
        return self.rel_error == 0 and not self.beyond and not self.nonfinite


class EncodingFigures(NamedTuple):
    """All tensors with one pair of encodings: their number, the number equal, the worst one."""

    source: str
    target: str
    tensors: int
    equal: int
    worst: TensorFigures


@dataclass(frozen=True, slots=True)
class ScaleFigures:
    """The scales of one stored FP8 tensor: the numbers of wrong ones, and the first of these.

    `unfit` to the weights of their blocks, `mislabelled` (no powers of two although the config says
    `ue8m0`), `invalid` (zero, negative, NaN or Inf).
    """

    name: str
    blocks: int
    unfit: int
    mislabelled: int
    invalid: int
    example: str


@dataclass(frozen=True, slots=True)
class LogitFigures:
    """The difference between two sets of logits, with llama.cpp's names; KLD in nats.

    `per_position` is the KLD at each position, averaged over rows.
    """

    mean_kld: float
    max_kld: float
    kld_999: float
    kld_990: float
    median_kld: float
    rms_dp: float
    same_top_p: float
    per_position: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """One stage of both forward passes: cosine of the hidden states, and routing.

    `flipped_tokens` is the share of tokens whose set of experts changed, `flipped_experts` the
    share of choices that changed; both None without a router.
    """

    name: str
    mean_cosine: float
    min_cosine: float
    flipped_tokens: float | None
    flipped_experts: float | None


@dataclass(frozen=True, slots=True)
class ForwardFigures:
    """The differences between both forward passes over the same tokens."""

    tokens: int
    pinned: bool
    layers: tuple[LayerFigures, ...]
    logits: LogitFigures
    mtp_logits: tuple[LogitFigures, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """The answer of a verification, with all figures and findings behind it."""

    source: str
    target: str
    level: str
    kind: str
    findings: tuple[Finding, ...]
    tensors: tuple[TensorFigures, ...]
    scales: tuple[ScaleFigures, ...]
    forward: ForwardFigures | None
    thresholds: Mapping[str, float]
    warnings: tuple[Fault, ...]
    scale_histogram: Mapping[int, int]
    bytes_read: int
    seconds: float
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        answer = "yes" if self.ok else f"no, {len(self.findings)} findings"
        return f"<Verdict {self.source!r} -> {self.target!r}: {answer}, level {self.level}>"

    @property
    def ok(self) -> bool:
        """Whether DST matches SRC within the thresholds."""
        return not self.findings

    def by_encoding(self) -> list[EncodingFigures]:
        """Return the figures of each pair of encodings."""
        groups: dict[tuple[str, str], list[TensorFigures]] = {}
        for item in self.tensors:
            groups.setdefault((item.source, item.target), []).append(item)
        return [
            EncodingFigures(
                *encodings,
                tensors=len(items),
                equal=sum(item.equal for item in items),
                worst=max(items, key=lambda item: item.rel_error),
            )
            for encodings, items in groups.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as JSON values; infinite numbers and NaN become null."""
        value = {name: getattr(self, name) for name in self.__slots__}
        value["findings"] = [finding._asdict() for finding in self.findings]
        value["tensors"] = [_figures(item) for item in self.tensors]
        value["scales"] = [asdict(item) for item in self.scales]
        value["forward"] = asdict(self.forward) if self.forward else None
        value["warnings"] = [str(fault) for fault in self.warnings]
        value["scale_histogram"] = {str(k): v for k, v in sorted(self.scale_histogram.items())}
        answer: dict[str, Any] = _finite({"schema": SCHEMA, "ok": self.ok, **value})
        return answer


def _figures(item: TensorFigures) -> dict[str, Any]:
    value = asdict(item)
    value["worst_block"] = item.worst_block._asdict() if item.worst_block else None
    return value


def _finite(value: Any) -> Any:
    """Return a value with null in place of Infinity and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
