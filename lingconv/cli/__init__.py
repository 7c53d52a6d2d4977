"""The command line: the only place that prints, and the only one that exits."""

import gc
import os
import signal
import sys
import traceback
from types import FrameType

from lingconv.cli.app import app
from lingconv.cli.terminal import terminal
from lingconv.errors import Interrupted, LingconvError

INTERNAL_ERROR = 70
TERMINATED = 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM, heard wherever Ctrl-C would be."""


def _leave(code: int) -> None:
    """Exit at once: an upload that is on its way would be waited for, and nothing needs its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run the command line and exit with the code that `lingconv.errors` documents."""
    # Headers of a trillion parameters are a million small objects without a cycle among them; the
    # collector would look through all of them again and again, for half of the planning time.
    gc.set_threshold(10_000_000, 50, 50)
    terminated = False

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise _Terminated

    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        app()
    except Interrupted as exc:
        terminal.error(exc)
        _leave(TERMINATED if terminated else exc.exit_code)
    except LingconvError as exc:
        terminal.error(exc)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        _leave(TERMINATED if terminated else Interrupted.exit_code)
    except BrokenPipeError:
        # The reader of stdout went away (`| head`): not worth a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        terminal.bug()
        sys.exit(INTERNAL_ERROR)
