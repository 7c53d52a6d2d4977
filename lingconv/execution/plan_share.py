"""Shares of a plan: `--part 3/16` writes the third of sixteen, each on a machine of its own."""

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
        """Return the share of the text `I/N`; raises UsageError unless 1 <= I <= N."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        part = cls(int(found[1]), int(found[2])) if found else cls(0, 0)
        if not 1 <= part.index <= part.count:
            raise UsageError(f"`part={text}`", hint="write it as `part=I/N`, with I from 1 to N")
        return part

    def __str__(self) -> str:
        """Return the share as it is written in the names of its state files."""
        return f"{self.index}-of-{self.count}"

    def of(self, files: "Sequence[OutputFile]") -> "list[OutputFile]":
        """Return the files of the share: consecutive ones, about 1/count of all bytes.

        Each file belongs to the share that contains its middle byte.
        """
        total = sum(file.nbytes for file in files)
        mine, end = [], 0
        for file in files:
            middle = end + file.nbytes / 2
            end += file.nbytes
            if min(self.count, int(middle * self.count / total) + 1) == self.index:
                mine.append(file)
        return mine
