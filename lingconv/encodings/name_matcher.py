"""Which of many names a pattern fits: all names at once, a bit for each place in them.

A set of places is one large integer; a step over a character is an AND and a shift, and a repeated
character one addition that carries through it (R. Cameron et al., "Bitwise data parallelism in
regular expression matching", PACT 2014). There is no way back to be tried, so a pattern costs its
length, and a repetition of groups at most as many rounds as the longest name has characters. What
can still be piled up, groups within groups, is counted, and ends at `MAX_WORK`.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from itertools import accumulate
from operator import or_

from lingconv.encodings.regular_expression import Chars, Choice, Edge, Look, Node, Repeat, Sequence

MAX_WORK = 3 * 10**11  # places looked at: seconds
_WORK_OF_A_STEP = 10_000  # what a step costs with the shortest of names
_WORK_OF_A_MASK = 50  # a place of a mask is so much dearer than a place of a step
_MASKS_KEPT = 64


class TooCostly(Exception):
    """Patterns that would keep a machine busy: more than `MAX_WORK`."""


class _Digits(dict[int, str]):
    """Says for each character whether it fits, as a binary digit; asked once for each."""

    def __init__(self, fits: Callable[[str], bool]) -> None:
        super().__init__()
        self._fits = fits

    def __missing__(self, code: int) -> str:
        self[code] = digit = str(int(self._fits(chr(code))))
        return digit


class NameMatcher:
    """The names to be matched, each followed by one place more: its end.

    Bit p of a set is place p; places count through all names, from the first character of the
    first. Nothing crosses an end, because no character is there.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._text = "\n".join([*self._names, ""])[::-1]
        self._letters = set(self._text)
        self._all = (1 << len(self._text)) - 1
        self._ends = int("".join("0" * len(n) + "1" for n in self._names)[::-1] or "0", 2)
        self._inside = self._all & ~self._ends
        self._starts = (self._ends << 1 | bool(self._names)) & self._all
        self._masks: dict[Chars, int] = {}
        self._work = 0

    def places(self, pattern: Node) -> int:
        """Return the ends of the names that the pattern fits from their start. Raises TooCostly."""
        return _run(self._step(pattern, self._starts, back=False), self._inside) & self._ends

    def names_at(self, ends: int) -> list[str]:
        """Return the names that have these ends."""
        if not ends:
            return []
        digits = f"{ends:0{len(self._text)}b}"[::-1]
        last = accumulate(len(name) + 1 for name in self._names)
        return [name for name, at in zip(self._names, last, strict=True) if digits[at - 1] == "1"]

    def _count(self, factor: int = 1) -> None:
        self._work += len(self._text) * factor + _WORK_OF_A_STEP
        if self._work > MAX_WORK:
            raise TooCostly

    def _step(self, node: Node, places: int, *, back: bool) -> int:
        """Return where one gets from `places` through a node; to the left if `back`."""
        self._count()
        if not places:
            return 0
        if isinstance(node, Chars):
            mask = self._mask(node)
            return (places >> 1) & mask if back else (places & mask) << 1
        if isinstance(node, Sequence):
            parts = reversed(node.parts) if back else node.parts
            return reduce(lambda at, part: self._step(part, at, back=back), parts, places)
        if isinstance(node, Choice):
            return reduce(or_, (self._step(part, places, back=back) for part in node.parts))
        if isinstance(node, Repeat):
            return self._repeat(node, places, back=back)
        return places & (self._edge(node) if isinstance(node, Edge) else self._look(node))

    def _repeat(self, node: Repeat, places: int, *, back: bool) -> int:
        for _ in range(node.low):
            further = self._step(node.part, places, back=back)
            if further == places:  # and so it would be from now on
                break
            places = further
            if not places:
                return 0
        if node.high is None and isinstance(node.part, Chars):
            mask = self._mask(node.part)
            return self._run_back(places, mask) if back else _run(places, mask)
        return self._up_to(node, places, back=back)

    def _up_to(self, node: Repeat, places: int, *, back: bool) -> int:
        """Return where up to high - low further turns lead; each goes on from new places only."""
        new = places
        turns = 0
        while new and (node.high is None or turns < node.high - node.low):
            new = self._step(node.part, new, back=back) & ~places
            places |= new
            turns += 1
        return places

    def _run_back(self, places: int, mask: int) -> int:
        """Return `places` and all that lead to them over characters of `mask`: 1, 2, 4 ... long."""
        length = 1
        while mask:
            self._count()
            places |= (places >> length) & mask
            mask &= mask >> length
            length *= 2
        return places

    def _edge(self, node: Edge) -> int:
        if node.kind in ("start", "end"):
            return self._starts if node.kind == "start" else self._ends
        words = self._mask(Chars(kinds=(("w", True),)))
        boundaries = words ^ (words << 1)
        return boundaries if node.kind == "boundary" else self._all & ~boundaries

    def _look(self, node: Look) -> int:
        found = self._step(node.part, self._all, back=node.ahead)
        return found if node.wanted else self._all & ~found

    def _mask(self, chars: Chars) -> int:
        """Return the places whose character fits."""
        if chars not in self._masks:
            self._count(_WORK_OF_A_MASK)
            if len(self._masks) >= _MASKS_KEPT:
                self._masks.clear()
            self._masks[chars] = int(self._digits(chars) or "0", 2) & ~self._ends
        return self._masks[chars]

    def _digits(self, chars: Chars) -> bytes | str:
        if self._text.isascii():
            table = bytearray(b"0" * 256)
            for char in self._letters:
                table[ord(char)] += chars.contains(char)
            return self._text.encode("ascii").translate(table)
        return self._text.translate(_Digits(chars.contains))


def _run(places: int, mask: int) -> int:
    """Return `places` and all that one gets to from them over characters of `mask`."""
    return (((places & mask) + mask) ^ mask) | places
