"""The command line: the only place that prints, and the only one that exits."""

import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from lingconv.errors import SAME_COMMAND, Interrupted, LingconvError

INTERNAL_ERROR = 70
TERMINATED = 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM, heard wherever Ctrl-C would be."""


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    global _told_to_end
    _told_to_end = True
    raise _Terminated


_told_to_end = False


def _leave(error: Interrupted) -> NoReturn:
    """Exit at once: an upload that is on its way would be waited for, and nothing needs its end."""
    from lingconv.cli.terminal import terminal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    terminal.error(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(TERMINATED if _told_to_end else error.exit_code)


def _run() -> int:
    """Return the exit code of the command that sys.argv names."""
    # From here on a signal is answered; what is imported takes the most of a short command.
    from lingconv.cli.app import app
    from lingconv.cli.option_flags import speller
    from lingconv.cli.retry_notes import hear_retries
    from lingconv.cli.terminal import terminal

    terminal.spell = speller(app, sys.argv[1:])
    hear_retries()
    try:
        app()
    except SystemExit as exc:
        if exc.code == Interrupted.exit_code:  # Typer's answer to KeyboardInterrupt
            raise KeyboardInterrupt from exc
        sys.stdout.flush()
        return int(exc.code or 0)
    return 0


def main() -> NoReturn:
    """Run the command line and exit with the code that `lingconv.errors` documents."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        from lingconv.cli.output_streams import open_standard_streams

        open_standard_streams()
        # Headers of a trillion parameters are a million small objects without a cycle among them;
        # the collector would look through all of them again and again, for half of the planning.
        gc.set_threshold(10_000_000, 50, 50)
        code = _run()
    except Interrupted as exc:
        _leave(exc)
    except KeyboardInterrupt:
        _leave(Interrupted("interrupted", hint=SAME_COMMAND))
    except LingconvError as exc:
        code = _told(exc)
    except Exception:
        code = _told(None)
    sys.exit(code)


def _told(error: LingconvError | None) -> int:
    """Return the exit code of an error, None for one that is a bug, when it has been told."""
    from lingconv.cli.terminal import terminal

    if error is None:
        terminal.bug()
        return INTERNAL_ERROR
    terminal.error(error)
    return error.exit_code
