"""Where formats are found: those that come with lingconv, and those of other packages.

Another package adds a format by an entry point of the group `lingconv.containers` that names its
CheckpointFormat value. A format is imported when it is asked for.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from lingconv.containers.base import CheckpointFormat, Match
from lingconv.errors import UsageError
from lingconv.plans.plan import OutputFile
from lingconv.storage import Storage

ENTRY_POINTS = "lingconv.containers"

_BUILT_IN = {
    "safetensors": "lingconv.containers.hf.format:SAFETENSORS",
    "gguf": "lingconv.containers.gguf.format:GGUF_FILES",
    "torch_dist": "lingconv.containers.megatron.format:TORCH_DIST",
    "torch": "lingconv.containers.megatron.format:RANK_FILES",
}


@cache
def format_named(name: str) -> CheckpointFormat:
    """Return the format of this name; raise UsageError when no installed package has it."""
    if name in _BUILT_IN:
        module, _, value = _BUILT_IN[name].partition(":")
        return cast("CheckpointFormat", getattr(import_module(module), value))
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return cast("CheckpointFormat", point.load())
    raise UsageError(f"no format is called `{name}`", hint="install the package that brings it")


def format_of(file: OutputFile) -> CheckpointFormat:
    """Return the format that a file of a plan is in."""
    return format_named(file.container)


def format_for(layout: str) -> CheckpointFormat:
    """Return the format that writes a layout (`--to`); raise UsageError when none does."""
    known: list[str] = []
    for form in formats():
        if layout in form.layouts:
            return form
        known += form.layouts
    raise UsageError(f"`layout` is `{layout}`", hint=f"one of {', '.join(known)}")


def formats() -> Iterator[CheckpointFormat]:
    """Yield all formats, built-in ones first: looking for others takes tens of milliseconds."""
    yield from built_in()
    yield from _others()


def built_in() -> Iterator[CheckpointFormat]:
    """Yield the formats that come with lingconv."""
    return map(format_named, _BUILT_IN)


def _others() -> Iterator[CheckpointFormat]:
    for point in entry_points(group=ENTRY_POINTS):
        if point.name not in _BUILT_IN:
            yield format_named(point.name)


def detect(storage: Storage, file: str = "") -> tuple[CheckpointFormat, tuple[str, ...]]:
    """Return the format of what a storage holds, and the places of its checkpoints there.

    `file` is one that was named. Formats of other packages are asked where no built-in one finds
    anything. A folder without weights is taken for one of Hugging Face, whose reader says what it
    lacks. Raises UsageError when two formats are as sure as each other.
    """
    for group in (built_in, _others):
        found = [(form, match) for form in group() if (match := form.detect(storage, file))]
        if found:
            return _best(storage, found)
    return format_named("safetensors"), ("",)


def _best(
    storage: Storage, found: Sequence[tuple[CheckpointFormat, Match]]
) -> tuple[CheckpointFormat, tuple[str, ...]]:
    """Return what scores highest."""
    best = max(match.score for _, match in found)
    matches = [(form, match) for form, match in found if match.score == best]
    if len(matches) > 1:
        raise UsageError(
            f"{storage.uri} holds checkpoints in several formats",
            details=[f"{form.name}: {', '.join(match.places)}" for form, match in matches],
            hint="name the folder or the file of one of them",
        )
    form, match = matches[0]
    return form, match.places
