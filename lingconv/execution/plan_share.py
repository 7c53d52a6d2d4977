"""Shares of a plan: `--part 3/16` does the third of sixteen, for as many machines at once."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lingconv.errors import UsageError

if TYPE_CHECKING:
    from lingconv.plans.plan import OutputFile


@dataclass(frozen=True, slots=True)
class PlanShare:
    """The share `index` of `count`, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "PlanShare":
        """Return the part that `I/N` writes; raise UsageError when there is none."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= part.index <= part.count:
            raise UsageError(
                f"`--part {text}`", hint="write it as `--part I/N`, with I from 1 to N"
            )
        return part

    def __str__(self) -> str:
        """Return the part as it stands in the names of its files."""
        return f"{self.index}-of-{self.count}"

    def of(self, files: "Sequence[OutputFile]") -> "list[OutputFile]":
        """Return the files of the share: neighbours, about as many bytes as the others have.

        Each file belongs to the share that holds its middle byte.
        """
        total = sum(file.nbytes for file in files)
        mine, end = [], 0
        for file in files:
            middle = end + file.nbytes / 2
            end += file.nbytes
            if min(self.count, int(middle * self.count / total) + 1) == self.index:
                mine.append(file)
        return mine
