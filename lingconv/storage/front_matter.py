"""The YAML between two lines of dashes at the head of a model card, bounded before it is built.

YAML repeats by reference: nine short lines can stand for a billion items. What the references come
to is counted over the events of the parser, which makes nothing of them.
"""

import re
from typing import Any, NamedTuple

from lingconv.errors.value_kinds import shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ITEMS = 100_000
# As huggingface_hub finds it (repocard.py: REGEX_YAML_BLOCK).
_HEAD = re.compile(r"\s*---(?:\r\n|\r|\n)")
_TAIL = re.compile(r"(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")


class FrontMatterError(ValueError):
    """Front matter that is no mapping of a reasonable size; the text goes on where it is named."""


class Card(NamedTuple):
    """A model card: its front matter as YAML, empty where it has none, and the text behind it."""

    yaml: str
    text: str


def split_card(card: str) -> Card:
    """Return the two parts of a card."""
    head = _HEAD.match(card)
    tail = _TAIL.search(card, head.end() - 1) if head else None
    if head is None or tail is None:
        return Card("", card)
    return Card(card[head.end() : tail.start()], card[tail.end() :])


def load_front_matter(text: str, *, as_text: bool = False) -> dict[str, Any]:
    """Return the mapping that front matter holds.

    With `as_text` numbers, dates and switches stay the words that they are written as: a version
    1.10 is not 1.1. Raises FrontMatterError for what is no such mapping, or stands for too much.
    """
    import yaml

    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise FrontMatterError(f"has more than {MAX_BYTES:,} bytes")
    try:
        _check_extent(text)
        loaded = yaml.load(text, Loader=_text_loader() if as_text else yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as exc:
        if isinstance(exc, FrontMatterError):
            raise
        raise FrontMatterError(f"is no YAML: {' '.join(str(exc).split())[:200]}") from exc
    if loaded is None:
        return {}
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise FrontMatterError(f"is {shown(loaded)}, not keys with values")
    return loaded


def _check_extent(text: str) -> None:
    """Count what the YAML stands for, every reference as all that it refers to."""
    import yaml

    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise FrontMatterError("refers to itself, or to nothing")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(event.anchor, None)
            open_.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = total - before
        if total > MAX_ITEMS or len(open_) > MAX_DEPTH:
            raise FrontMatterError(f"stands for over {MAX_ITEMS:,} values, or is too deep")


def _text_loader() -> Any:
    """Return a loader to which every scalar is a text but for null."""
    import yaml

    class TextLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Knows null, and no other type of scalar."""

    TextLoader.yaml_implicit_resolvers = {
        letter: [rule for rule in rules if rule[0].endswith((":null", ":merge"))]
        for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return TextLoader
