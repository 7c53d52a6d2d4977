"""The small files of a checkpoint: config.json, the index, lingconv.json, what Megatron wants."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from lingconv.containers.hf.safetensors import INDEX_NAME, SINGLE_NAME
from lingconv.containers.hf.writer import index_json
from lingconv.containers.megatron.args import ITERATION
from lingconv.containers.megatron.closing_files import (
    _EMPTY_STATE,
    _STATES_NAME,
    ITERATION_FOLDER,
    _common,
    num_states,
    objects_of,
    tensors_of,
)
from lingconv.containers.megatron.dcp_metadata import (
    COMMON_NAME,
    FORMAT,
    FORMAT_NAME,
    METADATA_NAME,
    write_metadata,
)
from lingconv.containers.megatron.reader import TRACKER_NAME
from lingconv.plans.options import Target
from lingconv.plans.plan import Plan
from lingconv.storage.file_names import CARD_NAME, CONFIG_NAME, RECORD_NAME


def closing_files(
    plan: Plan, source_record: Mapping[str, Any] | None, base_card: str, version: str
) -> dict[str, bytes]:
    """Return the files that make a checkpoint complete, in the order they are to be written.

    `source_record` and `base_card` are the lingconv.json and the README.md of the base.
    """
    makers: dict[str, Callable[[], bytes]] = {
        INDEX_NAME: lambda: index_json(plan),
        RECORD_NAME: lambda: record_json(plan, source_record, version),
        CARD_NAME: lambda: _card(plan, source_record, base_card, version),
        CONFIG_NAME: lambda: _json(plan.config),
        ITERATION_FOLDER + COMMON_NAME: lambda: _common(plan),
        ITERATION_FOLDER + FORMAT_NAME: lambda: json.dumps(FORMAT).encode(),
        ITERATION_FOLDER + _STATES_NAME: lambda: _EMPTY_STATE * num_states(plan),
        ITERATION_FOLDER + METADATA_NAME: lambda: write_metadata(
            tensors_of(plan), objects_of(plan)
        ),
        TRACKER_NAME: lambda: f"{ITERATION}\n".encode(),
    }
    return {name: makers[name]() for name in closing_names(plan)}


def closing_names(plan: Plan) -> list[str]:
    """Return the names of those files: GGUF needs none, a single safetensors file no index."""
    if plan.options.layout == Target.GGUF:
        return []
    card = [CARD_NAME] if plan.weighting else []
    if plan.options.layout == Target.MEGATRON:
        inner = (_STATES_NAME, COMMON_NAME, FORMAT_NAME, METADATA_NAME)
        own = [ITERATION_FOLDER + name for name in inner]
        return [*own, RECORD_NAME, *card, CONFIG_NAME, TRACKER_NAME]
    if plan.options.layout == Target.RANKS:
        return [RECORD_NAME, *card, CONFIG_NAME, TRACKER_NAME]
    single = [file.name for file in plan.files] == [SINGLE_NAME]
    index = [] if single else [INDEX_NAME]
    return [*index, RECORD_NAME, *card, CONFIG_NAME]


def record_of(plan: Plan, source_record: Mapping[str, Any] | None, version: str) -> dict[str, Any]:
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
        "revision": plan.sources[-1].revision,
        "family": plan.family,
        "plan_digest": plan.digest,
        "options": plan.options.to_json(),
        "encodings": plan.encodings,
        "dropped": reasons,
    }
    if plan.weighting:
        record["weighting"] = plan.weighting
        record["sources"] = [
            {"uri": source.uri, "revision": source.revision, "weight": source.weight}
            for source in plan.sources
        ]
    if source_record is not None:
        record["source_record"] = source_record
    return record


def record_json(plan: Plan, source_record: Mapping[str, Any] | None, version: str) -> bytes:
    """Return lingconv.json."""
    return _json(record_of(plan, source_record, version))


def _card(
    plan: Plan, source_record: Mapping[str, Any] | None, base_card: str, version: str
) -> bytes:
    from lingconv.execution.closing import (
        model_card as card,  # with huggingface_hub, which nothing else here needs
    )

    described = card.CardInputs(record_of(plan, source_record, version), plan.config, base_card)
    return card.model_card(described).encode()


_ESCAPED = "backslashreplace"  # gives \\udXXX, as JSON does


def _json(value: Any) -> bytes:
    # Halves of characters, and bytes of names that are no UTF-8, stay JSON's escapes.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", _ESCAPED)
