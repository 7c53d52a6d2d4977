"""The small files of a checkpoint: config.json, the index, lingconv.json."""

import json
from collections.abc import Mapping
from typing import Any

from lingconv.checkpoint import CONFIG_NAME, RECORD_NAME
from lingconv.containers.safetensors import INDEX_NAME, SINGLE_NAME
from lingconv.options import Target
from lingconv.plan import Plan


def last_files(
    plan: Plan, source_record: Mapping[str, Any] | None, version: str
) -> dict[str, bytes]:
    """Return the files that make a checkpoint complete, in the order they are to be written."""
    makers = {
        INDEX_NAME: lambda: index_json(plan),
        RECORD_NAME: lambda: _json(_record(plan, source_record, version)),
        CONFIG_NAME: lambda: _json(plan.config),
    }
    return {name: makers[name]() for name in last_names(plan)}


def last_names(plan: Plan) -> list[str]:
    """Return the names of those files: GGUF needs none, a single safetensors file no index."""
    if plan.options.layout == Target.GGUF:
        return []
    single = [file.name for file in plan.files] == [SINGLE_NAME]
    return [RECORD_NAME, CONFIG_NAME] if single else [INDEX_NAME, RECORD_NAME, CONFIG_NAME]


def index_json(plan: Plan) -> bytes:
    """Return the index: where each tensor is, true bytes, logical parameters without scales."""
    weight_map = {spec.name: file.name for file in plan.files for spec in file.tensors}
    # Same text as json.dumps(..., indent=2, sort_keys=True), which takes ten times as long.
    lines = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(weight_map[name])}" for name in sorted(weight_map)
    )
    return (
        "{\n"
        '  "metadata": {\n'
        f'    "total_parameters": {plan.total_parameters},\n'
        f'    "total_size": {plan.tensor_bytes}\n'
        "  },\n"
        '  "weight_map": {\n'
        f"{lines}\n"
        "  }\n"
        "}\n"
    ).encode()


def _record(plan: Plan, source_record: Mapping[str, Any] | None, version: str) -> dict[str, Any]:
    """Return lingconv.json: where these weights come from and what was done to them."""
    reasons: dict[str, dict[str, int]] = {}
    for item in plan.dropped:
        entry = reasons.setdefault(item.reason, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += item.nbytes
    record: dict[str, Any] = {
        "schema": "lingconv.record/1",
        "lingconv": version,
        "source": plan.source,
        "family": plan.family,
        "plan_digest": plan.digest,
        "options": plan.options.to_json(),
        "encodings": plan.encodings(),
        "dropped": reasons,
    }
    if source_record is not None:
        record["source_record"] = source_record
    return record


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
