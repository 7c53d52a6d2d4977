"""The small files of a checkpoint: config.json, the index, lingconv.json, what Megatron wants."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from lingconv.containers.base import ClosingFiles
from lingconv.containers.registry import format_for
from lingconv.plans.plan import Plan
from lingconv.storage.file_names import CARD_NAME, CONFIG_NAME, RECORD_NAME


def closing_files(
    plan: Plan, source_record: Mapping[str, Any] | None, base_card: str, version: str
) -> dict[str, bytes]:
    """Return the files that make a checkpoint complete, in the order they are to be written.

    `source_record` and `base_card` are the lingconv.json and the README.md of the base.
    """
    common: dict[str, Callable[[], bytes]] = {
        RECORD_NAME: lambda: record_json(plan, source_record, version),
        CARD_NAME: lambda: _card(plan, source_record, base_card, version),
        CONFIG_NAME: lambda: _json(plan.config),
    }
    own = _own_files(plan)
    makers = {**own.before, **common, **own.after}
    return {name: makers[name]() for name in closing_names(plan)}


def closing_names(plan: Plan) -> list[str]:
    """Return the names of those files: none where weights are a checkpoint by themselves."""
    own = _own_files(plan)
    if format_for(plan.options.layout).is_self_contained:
        return [*own.before, *own.after]
    card = [CARD_NAME] if plan.weighting else []
    return [*own.before, RECORD_NAME, *card, CONFIG_NAME, *own.after]


def _own_files(plan: Plan) -> ClosingFiles:
    """Return the small files that only the plan's format has."""
    return format_for(plan.options.layout).closing_files(plan)


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
