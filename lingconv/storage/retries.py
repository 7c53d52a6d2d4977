"""What is said of a request that failed and is made again: nobody is to wait in silence.

Each one is a warning of the logger `lingconv.retries`, whose only argument is the `Retry`. Python
shows warnings on stderr unless a program takes them; the command line makes notes and events of
them.
"""

import logging
from typing import NamedTuple

LOGGER = "lingconv.retries"
_log = logging.getLogger(LOGGER)


class Retry(NamedTuple):
    """A request that failed: where, why, and when it is made again.

    `place` is an address or the name of a host. `wait_s` is in seconds, None where a client does
    not say it; `failures` counts those in a row, of `most` that are allowed, 0 where it is unknown.
    """

    place: str
    reason: str
    wait_s: float | None = None
    failures: int = 0
    most: int = 0

    def __str__(self) -> str:
        """Return it as a line."""
        when = "" if self.wait_s is None else f" in {self.wait_s:.1f} s"
        count = f" (failure {self.failures} of {self.most})" if self.most else ""
        return f"{self.place}: {self.reason}; trying again{when}{count}"


def tell(retry: Retry) -> None:
    """Tell of a retry, before it is waited for."""
    _log.warning("%s", retry)
