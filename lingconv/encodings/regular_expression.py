"""Regular expressions and globs as trees, for a matcher that cannot be made to run for long.

Read is what Python's `re` reads, less what has no automaton (backreferences, conditions), less what
cuts a search short (atomic groups, possessive repetitions), and less flags other than a leading
`(?i)`. Lazy repetitions fit what greedy ones fit. Nothing is expanded: a repetition is two numbers.
"""

import re
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeAlias

MAX_LENGTH = 100_000
MAX_DEPTH = 40
_COUNTS = re.compile(r"\{(\d{0,9})(,?)(\d{0,9})\}")
_GROUP_NAME = re.compile(r"\?P<[A-Za-z_]\w{0,99}>")

Kind = Callable[[str], bool]
_KINDS: Final[dict[str, Kind]] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
}
_CONTROLS: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
_HEX: Final = {"x": 2, "u": 4, "U": 8}


class Chars(NamedTuple):
    """One character: in a range or of a kind, or none of these if `negated`."""

    ranges: tuple[tuple[str, str], ...] = ()
    kinds: tuple[tuple[str, bool], ...] = ()  # letter of _KINDS, wanted or not
    negated: bool = False
    ignore_case: bool = False

    def contains(self, char: str) -> bool:
        """Return whether a character fits."""
        forms = (char, char.lower(), char.upper()) if self.ignore_case else (char,)
        return any(map(self._holds, forms)) != self.negated

    def _holds(self, char: str) -> bool:
        in_range = any(first <= char <= last for first, last in self.ranges)
        return in_range or any(_KINDS[kind](char) == wanted for kind, wanted in self.kinds)


class Sequence(NamedTuple):
    """One part after another."""

    parts: tuple["Node", ...]


class Choice(NamedTuple):
    """Any one of the parts."""

    parts: tuple["Node", ...]


class Repeat(NamedTuple):
    """A part from `low` to `high` times; without a limit if None."""

    part: "Node"
    low: int
    high: int | None


class Edge(NamedTuple):
    """A place between characters."""

    kind: Literal["start", "end", "boundary", "inside"]


class Look(NamedTuple):
    """A place where the part fits, ahead or behind; or where it does not."""

    part: "Node"
    ahead: bool
    wanted: bool


Node: TypeAlias = Chars | Sequence | Choice | Repeat | Edge | Look

ANY = Chars(negated=True)
_DOT = Chars((("\n", "\n"),), negated=True)
_LOOKS: Final = {
    "?=": (True, True),
    "?!": (True, False),
    "?<=": (False, True),
    "?<!": (False, False),
}
_EDGES: Final[dict[str, Edge]] = {
    "A": Edge("start"), "Z": Edge("end"), "b": Edge("boundary"), "B": Edge("inside"),
}  # fmt: skip
_NAMED_KINDS: Final = {
    **{kind: Chars(kinds=((kind, True),)) for kind in _KINDS},
    **{kind.upper(): Chars(kinds=((kind, False),)) for kind in _KINDS},
}


def parse_regex(text: str) -> Node:
    """Return a regular expression as a tree. Raises ValueError that says what is not read."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_LENGTH:,} are read")
    ignore_case = text.startswith("(?i)")
    return _Parser(text, 4 if ignore_case else 0, ignore_case=ignore_case).parse()


def parse_glob(text: str) -> Node:
    """Return a shell glob (`*`, `?`, `[a-z]`, `[!a-z]`) that has to fit all of a name."""
    parts: list[Node] = []
    at = 0
    while at < len(text):
        char = text[at]
        close = text.find("]", at + (3 if text[at + 1 : at + 2] == "!" else 2))
        if char == "[" and close > 0:
            parts.append(_glob_class(text[at + 1 : close]))
            at = close
        elif char == "*":
            parts.append(Repeat(ANY, 0, None))
        else:
            parts.append(ANY if char == "?" else _literal(char))
        at += 1
    return Sequence((*parts, Edge("end")))


def _glob_class(text: str) -> Chars:
    negated = text.startswith("!")
    rest = text[negated:]
    ranges = []
    while rest:
        is_range = len(rest) > 2 and rest[1] == "-"
        ranges.append((rest[0], rest[2] if is_range else rest[0]))
        rest = rest[3 if is_range else 1 :]
    return Chars(tuple(ranges), negated=negated)


def _literal(char: str) -> Chars:
    return Chars(((char, char),))


class _Parser:
    """Recursive descent over one text."""

    def __init__(self, text: str, at: int, *, ignore_case: bool) -> None:
        self._text = text
        self._at = at
        self._ignore_case = ignore_case
        self._depth = 0

    def parse(self) -> Node:
        found = self._choice()
        if self._at < len(self._text):
            raise ValueError(f"`)` at {self._at} closes nothing")
        return found

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise ValueError("it ends in the midst of something")
        self._at += 1
        return char

    def _takes(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _choice(self) -> Node:
        parts = [self._sequence()]
        while self._takes("|"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._peek() not in ("", "|", ")"):
            part = self._part()
            repeated = self._counts()
            if repeated is not None:
                part = self._repeat(part, *repeated)
            parts.append(part)
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _counts(self) -> tuple[int, int | None] | None:
        """Return the repetition that is stated here, or None where there is none."""
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._takes(sign):
                return counts
        found = _COUNTS.match(self._text, self._at)
        if found is None or found[0] == "{}":
            return None
        self._at = found.end()
        low = int(found[1] or 0)
        high = int(found[3]) if found[3] else (None if found[2] else low)
        if high is not None and high < low:
            raise ValueError(f"`{found[0]}` is no repetition")
        return low, high

    def _repeat(self, part: Node, low: int, high: int | None) -> Node:
        self._takes("?")
        if self._peek() == "+":
            raise ValueError("possessive repetitions are not followed")
        if self._counts() is not None:
            raise ValueError(f"two repetitions in a row at {self._at}")
        if isinstance(part, Repeat) and (part.low, part.high, low, high) == (0, None, 0, None):
            return part
        return Repeat(part, low, high)

    def _part(self) -> Node:
        char = self._next()
        if char in "*+?":
            raise ValueError(f"nothing to repeat at {self._at - 1}")
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        simple: dict[str, Node] = {".": _DOT, "^": Edge("start"), "$": Edge("end")}
        return simple.get(char) or self._one(char)

    def _one(self, char: str) -> Chars:
        return _literal(char)._replace(ignore_case=self._ignore_case)

    def _group(self) -> Node:
        look = next((mark for mark in _LOOKS if self._takes(mark)), None)
        if look is None and self._peek() == "?" and not self._takes("?:"):
            found = _GROUP_NAME.match(self._text, self._at)
            if found is None:
                what = self._text[self._at - 1 : self._at + 3]
                raise ValueError(f"groups that begin with `{what}` are not followed")
            self._at = found.end()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"its groups are more than {MAX_DEPTH} deep")
        part = self._choice()
        if not self._takes(")"):
            raise ValueError("a group is not closed")
        self._depth -= 1
        return part if look is None else Look(part, *_LOOKS[look])

    def _escape(self) -> Node:
        char = self._next()
        if char in _EDGES:
            return _EDGES[char]
        return _NAMED_KINDS.get(char) or self._one(self._escaped(char))

    def _escaped(self, char: str) -> str:
        """Return the character that a backslash and `char` (and what follows) stand for."""
        if char.isdigit():
            raise ValueError("backreferences are not followed")
        if char in _HEX:
            digits = self._text[self._at : self._at + _HEX[char]]
            self._at += _HEX[char]
            if (
                not re.fullmatch(rf"[0-9A-Fa-f]{{{_HEX[char]}}}", digits)
                or int(digits, 16) > 0x10FFFF
            ):
                raise ValueError(f"`\\{char}{digits}` is no character")
            return chr(int(digits, 16))
        if char.isascii() and char.isalpha() and char not in _CONTROLS:
            raise ValueError(f"`\\{char}` means nothing")
        return _CONTROLS.get(char, char)

    def _class(self) -> Chars:
        negated = self._takes("^")
        ranges: list[tuple[str, str]] = []
        kinds: list[tuple[str, bool]] = []
        first = True
        while first or self._peek() != "]":
            first = False
            low = self._class_item()
            if isinstance(low, Chars):
                kinds += low.kinds
                continue
            high: str | Chars = low
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._class_item()
            if isinstance(high, Chars) or high < low:
                raise ValueError(f"a range that ends before {self._at} is none")
            ranges.append((low, high))
        self._at += 1
        return Chars(tuple(ranges), tuple(kinds), negated, self._ignore_case)

    def _class_item(self) -> str | Chars:
        char = self._next()
        if char != "\\":
            return char
        char = self._next()
        if char == "b":
            return "\b"
        return _NAMED_KINDS.get(char) or self._escaped(char)
