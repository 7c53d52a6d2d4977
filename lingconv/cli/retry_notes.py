"""What the command line says of requests that failed and are made again: a note, or an event."""

import logging

from lingconv.cli.terminal import terminal
from lingconv.storage.retries import LOGGER, Retry


class RetryNotes(logging.Handler):
    """Takes what `lingconv.storage.retries` logs; above live bars, for they own stderr then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        for retry in record.args or ():
            if isinstance(retry, Retry):
                _say(retry)


def _say(retry: Retry) -> None:
    if not terminal.json:
        terminal.note(str(retry))
        return
    wait_s = None if retry.wait_s is None else round(retry.wait_s, 3)
    terminal.event("retry", **retry._replace(wait_s=wait_s)._asdict())


def hear_retries() -> None:
    """Let this process say of each retry."""
    logger = logging.getLogger(LOGGER)
    logger.propagate = False
    logger.handlers = [RetryNotes()]
