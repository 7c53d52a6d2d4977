"""Patterns that name weights, in options and in what a checkpoint's config lists.

A checkpoint's patterns are a stranger's: they are matched in bounded time (`NameMatcher`), and what
cannot be read is told beside what was found.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from lingconv.encodings.name_matcher import NameMatcher, TooCostly
from lingconv.encodings.regular_expression import Node, parse_glob, parse_regex
from lingconv.errors import UsageError

_REGEX = "re:"
_GLOB_CHARS = "*?["


class Selection(NamedTuple):
    """The names that patterns fit, and what is wrong with patterns that were passed over."""

    names: frozenset[str]
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name pattern: exact, a shell glob, or `re:` and a regular expression.

    The last is compared as compressed-tensors compares it: from the start of the name, and the rest
    may follow. Module paths and weight names are both accepted.
    """

    text: str

    def matches(self, name: str) -> bool:
        """Return whether a physical weight name, or its module's path, fits.

        Raises UsageError for an expression that is not read. For many names use `among`.
        """
        return bool(self.among((name,)))

    def among(self, names: Collection[str]) -> frozenset[str]:
        """Return those of `names` that fit. Raises UsageError for an expression not read."""
        found = select((self.text,), names)
        if found.faults:
            raise UsageError(
                found.faults[0], hint="write the names as a list of globs, or a simpler expression"
            )
        return found.names


def among(patterns: Iterable[Pattern], names: Collection[str]) -> frozenset[str]:
    """Return those of `names` that any of a user's patterns fits; raises as `Pattern.among`."""
    return frozenset().union(*(pattern.among(names) for pattern in patterns))


def select(texts: Iterable[str], names: Collection[str]) -> Selection:
    """Return which of `names`, or of their modules' paths, fit any of the patterns."""
    patterns = dict.fromkeys(texts)
    exact = {text for text in patterns if _is_exact(text)}
    found = {name for name in names if name in exact or _module(name) in exact}
    faults: list[str] = []
    others = [text for text in patterns if text not in exact]
    if others:
        rest = [name for name in names if name not in found]
        found |= _select_matching(others, rest, faults)
    return Selection(frozenset(found), tuple(faults))


def _select_matching(texts: Iterable[str], names: Iterable[str], faults: list[str]) -> set[str]:
    matcher = NameMatcher(dict.fromkeys(form for name in names for form in (name, _module(name))))
    ends = 0
    for text in texts:
        try:
            ends |= matcher.places(_parse(text))
        except ValueError as exc:
            faults.append(f"pattern `{text}` is not a regular expression that is read: {exc}")
        except TooCostly:
            faults.append(f"pattern `{text}` takes too long to be matched with all names")
            break
    fitting = set(matcher.names_at(ends))
    return {name for name in names if name in fitting or _module(name) in fitting}


def _parse(text: str) -> Node:
    is_regex = text.startswith(_REGEX)
    return parse_regex(text.removeprefix(_REGEX)) if is_regex else parse_glob(text)


def _is_exact(text: str) -> bool:
    return not text.startswith(_REGEX) and not any(char in text for char in _GLOB_CHARS)


def _module(name: str) -> str:
    return name.removesuffix(".weight")
