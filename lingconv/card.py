"""The model card of an average: whose it is, and with which weights."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from lingconv.plan import Plan, Source
from lingconv.provenance import repository_of

_TAGS = ("merge", "lingconv")


def average_card(plan: Plan, base_card: str, version: str) -> str:
    """Return README.md: what was done, above the base's card; its front matter's keys are kept."""
    data, text = _parse(base_card)
    repositories = list(dict.fromkeys(filter(None, (repository_of(s.uri) for s in plan.sources))))
    if repositories:
        data["base_model"] = repositories
        data["base_model_relation"] = "merge"
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or ()), *_TAGS]))
    front = ModelCardData(ignore_metadata_errors=True, **data).to_yaml()
    return f"---\n{front}\n---\n{_section(plan, version)}\n{text.strip()}".strip() + "\n"


def _parse(card: str) -> tuple[dict[str, Any], str]:
    """Return the front matter of a card and its text; what cannot be parsed is all text."""
    if not card.startswith("---"):
        return {}, card
    try:
        parsed = ModelCard(card, ignore_metadata_errors=True)
    except (YAMLError, ValueError, TypeError):
        return {}, card
    data: dict[str, Any] = parsed.data.to_dict()  # type: ignore[no-untyped-call]
    return data, parsed.text


def _section(plan: Plan, version: str) -> str:
    """Return the part of the card that says what was done."""
    rows = "\n".join(_row(source) for source in plan.sources)
    encodings = ", ".join(plan.encodings())
    return f"""
# An average of {len(plan.sources)} checkpoints

{plan.weighting.capitalize()}, summed in float64 and rounded once, stored as {encodings}.
Made by lingconv {version}, plan `{plan.digest}`.

| checkpoint | revision | weight |
|---|---|---:|
{rows}
"""


def _row(source: Source) -> str:
    name = repository_of(source.uri) or source.uri.rstrip("/").rpartition("/")[2]
    return f"| {name} | {source.revision or '-'} | {source.weight:.9g} |"
