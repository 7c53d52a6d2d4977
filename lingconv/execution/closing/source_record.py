"""The record (lingconv.json) of a source: another program may have written it, or a stranger."""

import json
from typing import Any

MAX_RECORD_BYTES = 10_000_000
_MAX_ANCESTORS = 100


def parse_record(data: bytes) -> dict[str, Any] | None:
    """Return the record in `data`, its ancestors inside; None for what lingconv did not write.

    Every record has a `source` that is text; ancestors that have none are left out.
    """
    if len(data) > MAX_RECORD_BYTES:
        return None
    try:
        value = json.loads(data)
        json.dumps(value)  # as deep as it can be written, too
    except (ValueError, RecursionError):
        return None
    return _checked(value, _MAX_ANCESTORS)


def _checked(value: Any, ancestors: int) -> dict[str, Any] | None:
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        return None
    if not _are_sources(value.get("sources", [])):
        return None
    record = {key: kept for key, kept in value.items() if key != "source_record"}
    if ancestors and (before := _checked(value.get("source_record"), ancestors - 1)):
        record["source_record"] = before
    return record


def _are_sources(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(source, dict) and isinstance(source.get("uri"), str) for source in value
    )
