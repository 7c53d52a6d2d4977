"""Pairs of stored tensors in DST with the rows of SRC that belong in them; findings for the rest.

Headers only. Each checkpoint is mapped to logical tensors by its own layout.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.encodings.name_pattern import select
from lingconv.errors import LingconvError
from lingconv.model.family import LogicalName, Role
from lingconv.model.layout import Rows, count_rows
from lingconv.plans.options import Mtp
from lingconv.plans.tensor_map import Locator, MatrixSlice, StoredMatrix
from lingconv.storage.file_names import RECORD_NAME
from lingconv.verification.verdict import Finding

# Symbols that `--mtp` changes on purpose.
_MTP_SYMBOLS = {
    Mtp.KEEP: frozenset[str](),
    Mtp.DROP: frozenset({"mtp_layers", "all_layers"}),
    Mtp.ONLY: frozenset({"layers", "dense_layers", "all_layers", "whole", "own_head"}),
}


class Pair(NamedTuple):
    """A stored matrix of DST, the logical tensors in it, and the rows of SRC they come from."""

    target: StoredMatrix
    role: Role
    keep_dtype: bool
    rows: tuple[Rows, ...]
    segments: tuple[MatrixSlice, ...]

    @property
    def num_rows(self) -> dict[LogicalName, int]:
        """Number of rows of each logical tensor in the matrix."""
        return count_rows(self.rows)


def pair_up(source: Model, target: Model, mtp: Mtp) -> tuple[list[Pair], list[Finding]]:
    """Return the pairs that can be compared, and a finding for every tensor that cannot.

    `mtp` is the `--mtp` of the conversion from `source` to `target`.
    """
    expected = _expected(source, mtp)
    findings = [*_config_findings(source, target, mtp), *_fault_findings(target)]
    pairs: list[Pair] = []
    locator, shapes = source.locator(), _logical_shapes(target)
    for tensor in target.layout.tensors.values():
        stored = target.stored.get(tensor.name)
        fits = [expected.get(name) == shape for name, shape in tensor.logical_shapes().items()]
        if stored is None or not all(fits):
            continue
        segments = locator.segments(tensor.rows)
        encodings = [stored.encoding, *(segment.source.encoding for segment in segments)]
        if all(encoding.is_decodable for encoding in encodings):
            pairs.append(Pair(stored, tensor.role, tensor.keep_dtype, tensor.rows, segments))
        else:
            labels = " and ".join(dict.fromkeys(encoding.label for encoding in encodings))
            message = f"is stored as {labels}, which cannot be read as numbers"
            findings.append(Finding("dtype", stored.name, message))
    if not pairs:
        findings.insert(0, Finding("config", "", "SRC and DST are different models: nothing fits"))
    findings += _name_findings(expected, shapes, target.locator())
    return pairs, _without_duplicates(findings)


def recorded_mtp(recipe: Mapping[str, Any]) -> Mtp:
    """Return the `--mtp` that a recipe records; `keep` if it records none."""
    with suppress(ValueError):
        return Mtp(recipe.get("mtp", Mtp.KEEP))
    return Mtp.KEEP


def recorded_drops(recipe: Mapping[str, Any]) -> list[str]:
    """Return the `--drop` patterns that a recipe records."""
    drop = recipe.get("drop")
    texts = drop if isinstance(drop, list) else []
    return [text for text in texts if isinstance(text, str)]


def allows_nonfinite(recipe: Mapping[str, Any]) -> bool:
    """Return whether a recipe records that NaN and Inf were allowed."""
    return recipe.get("allow_nonfinite") is True


def read_recipe(target: Model) -> Mapping[str, Any]:
    """Return the options of the conversion that wrote DST, from lingconv.json; {} without one."""
    with suppress(LingconvError, ValueError):
        record = json.loads(target.checkpoint.storage.read(RECORD_NAME))
        if isinstance(record, dict) and isinstance(record.get("options"), dict):
            return dict(record["options"])
    return {}


def _logical_shapes(model: Model) -> dict[LogicalName, tuple[int, ...]]:
    return {
        name: shape
        for tensor in model.layout.tensors.values()
        for name, shape in tensor.logical_shapes().items()
    }


def _expected(source: Model, mtp: Mtp) -> dict[LogicalName, tuple[int, ...]]:
    """Return the shapes of the logical tensors that DST must have, by name."""
    wanted = {Mtp.KEEP: (False, True), Mtp.DROP: (False,), Mtp.ONLY: (True,)}[mtp]
    return {
        name: shape
        for tensor in source.layout.tensors.values()
        if tensor.mtp in wanted
        for name, shape in tensor.logical_shapes().items()
    }


def _config_findings(source: Model, target: Model, mtp: Mtp) -> Iterator[Finding]:
    """Yield the numbers and switches that differ in DST's config."""
    if source.family.name != target.family.name:
        yield Finding("config", "", f"SRC is {source.family.title}, DST is {target.family.title}")
    for symbol, value in source.symbols.items():
        other = target.symbols.get(symbol)
        if other != value and symbol not in _MTP_SYMBOLS[mtp]:
            key = target.family.key(symbol, target.layout.name)
            yield Finding("config", "", f"config: `{key}` is {value} in SRC, {other} in DST")


def _fault_findings(target: Model) -> Iterator[Finding]:
    """Yield DST's own faults, including labels that contradict the data."""
    for fault in target.faults:
        if fault.fatal or fault.kind == "quantization config":
            tensor = target.tensor(fault.tensor)
            name = tensor.rows[0].logical if tensor and len(tensor.rows) == 1 else fault.tensor
            where = f"{fault.file}: " if fault.file else ""
            yield Finding(fault.kind, name, f"{where}{fault.message}")
    scaled = {name for name, item in target.stored.items() if item.encoding.has_scales}
    kept = select(target.stated.kept_modules if target.stated else (), scaled)
    for name in target.stored:
        if name in kept.names:
            message = "is FP8, but the config lists it among the modules that are not converted"
            yield Finding("label", name, message)


def _name_findings(
    expected: Mapping[LogicalName, tuple[int, ...]],
    found: Mapping[LogicalName, tuple[int, ...]],
    locator: Locator,
) -> Iterator[Finding]:
    for name, shape in expected.items():
        if name not in found:
            yield Finding("missing tensor", name, f"{list(shape)} of SRC is not in DST")
        elif found[name] != shape:
            message = f"has shape {list(found[name])}, SRC has {list(shape)}"
            yield Finding("shape", name, message)
        elif not locator.holds(name):
            yield Finding("missing tensor", name, f"{list(shape)} of SRC is not in DST")
    for name in found.keys() - expected.keys():
        yield Finding("extra tensor", name, "is in DST, but not in SRC")


def _without_duplicates(findings: list[Finding]) -> list[Finding]:
    """Return the first finding of each tensor: later ones have the same cause."""
    seen: set[str] = set()
    kept = []
    for finding in findings:
        if not finding.tensor or finding.tensor not in seen:
            kept.append(finding)
        seen.add(finding.tensor)
    return kept
