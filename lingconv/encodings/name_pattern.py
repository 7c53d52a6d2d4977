"""Patterns that name weights, in options and in `ignore` lists."""

import fnmatch
import re
from dataclasses import dataclass

from lingconv.errors import UsageError


@dataclass(frozen=True, slots=True)
class Pattern:
    """A name pattern: exact, a shell glob, or `re:` and a regular expression.

    The last is compared as compressed-tensors compares it: from the start of the name, and the rest
    may follow. Module paths and weight names are both accepted.
    """

    text: str

    def matches(self, name: str) -> bool:
        """Return whether a physical weight name, or its module's path, fits."""
        names = (name, name.removesuffix(".weight"))
        if self.text.startswith("re:"):
            return any(self._regex().match(candidate) for candidate in names)
        return any(fnmatch.fnmatchcase(candidate, self.text) for candidate in names)

    def _regex(self) -> re.Pattern[str]:
        try:
            return re.compile(self.text.removeprefix("re:"))
        except re.error as exc:
            raise UsageError(f"pattern `{self.text}` is not a regular expression: {exc}") from exc
