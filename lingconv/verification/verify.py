"""A whole verification: pair tensors, compare them, run both models, diagnose, decide."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lingconv.checkpoint.recognised_checkpoint import Model, refuse_faults
from lingconv.encodings.name_pattern import select
from lingconv.errors import CheckpointError, Fault
from lingconv.model.family import LogicalName
from lingconv.plans.options import Mtp
from lingconv.verification.diagnosis import ErrorDiagnosis
from lingconv.verification.limits import Thresholds, thresholds_for
from lingconv.verification.options import Level, VerifyOptions
from lingconv.verification.pairing import (
    allows_nonfinite,
    pair_up,
    read_recipe,
    recorded_drops,
    recorded_mtp,
)
from lingconv.verification.progress import Watcher
from lingconv.verification.shared_scales import shared_scale_findings
from lingconv.verification.tensors import Comparison
from lingconv.verification.verdict import (
    Finding,
    ForwardFigures,
    ScaleFigures,
    TensorFigures,
    Verdict,
)

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of a checkpoint below which both forward passes take a few minutes on a small machine.
FORWARD_BYTES = 100_000_000_000
_EXPLAINED = 12
_ORDER = ("config", "label", "quantization config", "missing tensor", "extra tensor", "shape")
_LAST = ("source", "scale", "value", "forward")


def verify(
    source: Model,
    target: Model,
    ids_BS: "Tensor | None",
    options: VerifyOptions,
    jobs: int,
    watcher: Watcher,
) -> Verdict:
    """Return the verdict on whether `target` is a right conversion of `source`.

    `ids_BS` are the tokens of both forward passes, needed at level `forward` alone.
    Raises CheckpointError if `source` itself has fatal faults.
    """
    started = time.monotonic()
    recipe = read_recipe(target)
    mtp = Mtp(options.mtp) if options.mtp else recorded_mtp(recipe)
    source = _without(source, mtp, recorded_drops(recipe))
    refuse_faults(source)
    pairs, findings = pair_up(source, target, mtp)
    findings += shared_scale_findings(target)
    comparison = Comparison(source, target, pairs, only_exact=options.level == Level.BYTES)
    watcher.stage("tensors", comparison.nbytes)
    comparison.run(jobs, watcher)
    tensors, scales = comparison.figures(), comparison.scale_figures()
    thresholds = thresholds_for(tensors, options)
    values = [*_scale_findings(scales), *_value_findings(tensors, thresholds)]
    findings += _explain(values, source, target)
    unsound = [*_nonfinite_findings(tensors)]
    if not allows_nonfinite(recipe):
        findings += unsound
    forward = None
    if options.level == Level.FORWARD and ids_BS is not None:
        forward, failed = _forward(source, target, ids_BS, options, mtp, watcher, findings)
        findings += failed or _forward_findings(forward, thresholds)
    return Verdict(
        source=source.checkpoint.storage.uri,
        target=target.checkpoint.storage.uri,
        level=_level_reached(options, forward, findings),
        kind=thresholds.kind,
        findings=tuple(sorted(findings, key=_rank)),
        tensors=tuple(tensors),
        scales=tuple(scales),
        forward=forward,
        thresholds=thresholds.to_json(),
        warnings=(
            *(fault for fault in target.faults if not fault.fatal),
            *(Fault(f.kind, f.message, tensor=f.tensor, fatal=False) for f in unsound),
        ),
        scale_histogram=comparison.scale_histogram,
        bytes_read=comparison.bytes_read,
        seconds=time.monotonic() - started,
        recipe=recipe,
    )


def _level_reached(
    options: VerifyOptions, forward: ForwardFigures | None, findings: Sequence[Finding]
) -> str:
    """Return the level that was asked for, or `tensors` if there was no decoder to run."""
    skipped = options.level == Level.FORWARD and forward is None and not findings
    return Level.TENSORS if skipped else options.level


def _without(source: Model, mtp: Mtp, drops: Iterable[str]) -> Model:
    """Return SRC without the faults of tensors that the conversion left out."""
    extra = {fault.tensor for fault in source.faults if fault.kind == "extra tensor"}
    dropped = select(drops, extra).names

    def left_out(fault: Fault) -> bool:
        if fault.kind == "extra tensor":
            return fault.tensor in dropped
        tensor = source.tensor(fault.tensor)
        return mtp == Mtp.DROP and tensor is not None and tensor.mtp

    return replace(source, faults=tuple(fault for fault in source.faults if not left_out(fault)))


def default_level(source: Model, target: Model) -> Level:
    """Return `forward` if both passes take a few minutes at most, else `tensors`."""
    nbytes = sum(
        tensor.nbytes for model in (source, target) for tensor in model.checkpoint.tensors.values()
    )
    return Level.FORWARD if nbytes <= FORWARD_BYTES else Level.TENSORS


def _scale_findings(scales: Iterable[ScaleFigures]) -> list[Finding]:
    findings = []
    for item in scales:
        bad = item.unfit + item.mislabelled + item.invalid
        if bad:
            message = f"{bad:,} of {item.blocks:,} scales are wrong: {item.example}"
            findings.append(Finding("scale", item.name, message))
    return findings


def _nonfinite_findings(tensors: Iterable[TensorFigures]) -> Iterator[Finding]:
    """Yield the tensors that are as broken in SRC as in DST."""
    for item in tensors:
        if item.shared_nonfinite:
            count = f"{item.shared_nonfinite:,} of {item.elements:,} elements"
            yield Finding("source", item.name, f"{count} are NaN or Inf, in SRC already")


def _value_findings(tensors: Iterable[TensorFigures], thresholds: Thresholds) -> list[Finding]:
    wrong = [item for item in tensors if not thresholds.accepts(item)]
    wrong.sort(key=lambda item: -(item.rel_error if item.rel_error == item.rel_error else 1e300))
    return [Finding("value", item.name, _describe(item)) for item in wrong]


def _describe(item: TensorFigures) -> str:
    """Return a text on how a tensor exceeds its limit."""
    if item.nonfinite:
        return f"{item.nonfinite:,} of {item.elements:,} elements are NaN or Inf on one side only"
    where = ""
    if item.worst_block:
        (top, bottom), (left, right) = item.worst_block.rows, item.worst_block.cols
        where = f", worst in rows {top}-{bottom - 1}, columns {left}-{right - 1}"
    if item.allowed == 0.0:
        return (
            f"{item.beyond:,} of {item.elements:,} elements differ, none may"
            f" ({item.source} -> {item.target}; relative error {item.rel_error:.3g}{where})"
        )
    return (
        f"relative error {item.rel_error:.3g}, {item.allowed:.3g} is allowed for {item.source} ->"
        f" {item.target}; {item.beyond:,} of {item.elements:,} elements are too far off{where}"
    )


def _explain(findings: Sequence[Finding], source: Model, target: Model) -> list[Finding]:
    """Return the findings, the first ones of each kind of tensor with a diagnosis."""
    explained = []
    seen: dict[str, int] = {}
    with ErrorDiagnosis(source, target) as detective:
        for finding in findings:
            family = re.sub(r"\d+", "N", finding.tensor)
            seen[family] = seen.get(family, 0) + 1
            message = finding.message
            if finding.kind == "value" and seen[family] <= 2 and len(seen) <= _EXPLAINED:
                reason = detective.explain(LogicalName(finding.tensor))
                message = f"{reason}; {message}" if reason else message
            explained.append(finding._replace(message=message))
    return explained


def _forward(
    source: Model,
    target: Model,
    ids_BS: "Tensor",
    options: VerifyOptions,
    mtp: Mtp,
    watcher: Watcher,
    findings: Sequence[Finding],
) -> tuple[ForwardFigures | None, list[Finding]]:
    """Return the figures of both forward passes, and findings; no figures if DST cannot be run."""
    from lingconv.verification.forward import compare_forward

    if any(finding.kind not in _LAST for finding in findings) or mtp == Mtp.ONLY:
        return None, []
    try:
        figures = compare_forward(
            source, target, ids_BS, options.forward, watcher, pin_routing=options.pin_routing
        )
    except CheckpointError as exc:
        return None, [Finding("forward", "", str(exc.message))]
    return figures, []


def _forward_findings(forward: ForwardFigures | None, thresholds: Thresholds) -> list[Finding]:
    if forward is None:
        return []
    findings = []
    lowest = min(forward.layers, key=lambda layer: layer.mean_cosine)
    if not lowest.mean_cosine >= thresholds.min_cosine:
        message = (
            f"hidden states of {lowest.name} have cosine {lowest.mean_cosine:.6f},"
            f" {thresholds.min_cosine} is called for"
        )
        findings.append(Finding("forward", "", message))
    for name, figures in (
        ("logits", forward.logits),
        *((f"MTP logits {i}", item) for i, item in enumerate(forward.mtp_logits)),
    ):
        if not figures.mean_kld <= thresholds.max_mean_kld:
            message = (
                f"{name}: mean KLD {figures.mean_kld:.3g}, {thresholds.max_mean_kld} is allowed"
            )
            findings.append(Finding("forward", "", message))
    return findings


def _rank(finding: Finding) -> int:
    """Return the sort key of a finding: broken files first, causes before their consequences."""
    order = (*_ORDER, *_LAST)
    return order.index(finding.kind) if finding.kind in order else -1
