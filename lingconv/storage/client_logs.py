"""Retries that clients make by themselves, overheard in what they log: they wait in silence else.

A client logs why a request failed, then that it is made again; both lines are of one thread. What
it logs shows no more of itself than before: links are signed, and levels are the user's.
"""

import logging
import re
import threading
from collections.abc import Callable
from typing import NamedTuple

from lingconv.storage.retries import Retry, tell


class Overheard(NamedTuple):
    """How the lines of a client are told apart: one that says why, and one that it tries again.

    Both have the groups `reason`, `host`, `wait`, `failures` and `most`, each where it is known;
    `place` stands where no host is. A client may log to several `loggers`.
    """

    loggers: tuple[str, ...]
    place: str
    failed: re.Pattern[str]
    again: re.Pattern[str]


class _Listener(logging.Filter):
    def __init__(
        self, overheard: Overheard, level: int, clean: Callable[[str], str], last: threading.local
    ) -> None:
        super().__init__()
        self._overheard = overheard
        self._level = level
        self._clean = clean
        self._last = last

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell of a retry; let pass what the logger showed before."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text} {record.exc_info[1]}"
        known = getattr(self._last, "known", {})
        if failed := self._overheard.failed.search(text):
            known = self._last.known = failed.groupdict()
        if again := self._overheard.again.search(text):
            tell(self._retry({**known, **again.groupdict()}))
        return record.levelno >= self._level

    def _retry(self, known: dict[str, str | None]) -> Retry:
        wait = known.get("wait")
        return Retry(
            known.get("host") or self._overheard.place,
            self._clean(known.get("reason") or "") or "a request failed",
            float(wait) if wait else None,
            int(known.get("failures") or 0),
            int(known.get("most") or 0),
        )


def listen(overheard: Overheard, level: int, clean: Callable[[str], str]) -> None:
    """Tell of the retries that a client logs at `level`; `clean` strikes out secrets."""
    last = threading.local()
    for logger in map(logging.getLogger, overheard.loggers):
        if any(isinstance(each, _Listener) for each in logger.filters):
            continue
        shown = logger.getEffectiveLevel()
        logger.addFilter(_Listener(overheard, shown, clean, last))
        logger.setLevel(min(level, shown))
