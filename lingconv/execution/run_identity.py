"""The identity of a run, which must be equal to resume it, and the differences between two."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lingconv.execution.closing.closing_files import closing_names
from lingconv.plans.plan import Plan

COMMITS = "commits"


def run_identity(
    plan: Plan, version: str, commits: Mapping[str, str], *, headers_only: bool
) -> dict[str, Any]:
    """Return the identity of a run, which must be equal to resume: source, options, plan, tool.

    `commits` are the commits of Hub addresses; a resumed run reads the same ones.
    """
    identity = {
        "lingconv": version.split(".")[0],
        "digest": plan.digest,
        "source_files": {name: list(stat) for name, stat in plan.source_files.items()},
        "options": {**plan.options.to_json(), "headers_only": headers_only},
        "family": plan.family,
        COMMITS: dict(commits),
        "outputs": [*(file.name for file in plan.files), *plan.side_files, *closing_names(plan)],
    }
    return dict(json.loads(json.dumps(identity)))  # tuples become lists, as in the file


def is_same_run(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether a record is that of the wanted run.

    Commits are not compared: the identity lists their files.
    """
    return all(held.get(name) == wanted[name] for name in wanted if name != COMMITS)


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterable[str]:
    """Yield the differences between two identities, as text."""
    for name, old, new in _changed(held.get("options"), wanted["options"]):
        yield f"option {name}: was {json.dumps(old)}, now {json.dumps(new)}"
    for name, old, new in _changed(held.get("source_files"), wanted["source_files"]):
        was = "not there" if old is None else f"{old[0]:,} bytes"
        now = "not there" if new is None else f"{new[0]:,} bytes"
        note = ", changed since" if was == now else ""
        yield f"source {name}: was {was}, now {now}{note}"
    for name in ("family", "lingconv"):
        if held.get(name) != wanted[name]:
            yield f"{name}: was {held.get(name)}, now {wanted[name]}"
    if held.get("digest") != wanted["digest"]:
        yield f"plan: was {str(held.get('digest'))[:12]}, now {wanted['digest'][:12]}"


def _changed(old: Any, new: Mapping[str, Any]) -> Iterable[tuple[str, Any, Any]]:
    old = old if isinstance(old, dict) else {}
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changed(before, after)
        elif before != after:
            yield name, before, after
