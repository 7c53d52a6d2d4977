"""What a person or a program sees: results on stdout, everything else on stderr.

Nothing that a file or a server says reaches a stream but through `visible`, or as ASCII JSON.

Every command builds its result as text and as JSON values and hands both to `output`.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lingconv.cli.visible_text import visible
from lingconv.errors import CheckpointError, LingconvError
from lingconv.version import __version__

_MAX_DETAILS = 10


# An option and its value, as the core names them; keys of files stand alone.
_SETTING = re.compile(r"`[a-z_][a-z_.]*=[^`]*`")


class Terminal:
    """The streams, and how much is to be said on them."""

    def __init__(self) -> None:
        self.json = False
        # Shows what the core says of options as flags; set by whoever has the commands.
        self.spell: Callable[[str], str] = str
        self.quiet = False
        self.verbose = False

    def result(
        self, text: Sequence[str], value: Mapping[str, Any], essence: str | Sequence[str]
    ) -> None:
        """Print a command's result: lines for people, a document (`--json`) or its essence (-q)."""
        if self.json:
            print(json.dumps(value, indent=2))  # noqa: T201 - ASCII, and names in full
        else:
            short = [essence] if isinstance(essence, str) else essence
            for line in short if self.quiet else text:
                print(visible(line))  # noqa: T201 - the one place that prints results
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something about the run."""
        if not self.quiet:
            self._say(visible(text))

    def event(self, name: str, **values: Any) -> None:
        """Tell a program what happens, on a line of its own."""
        if not self.quiet:
            self._say(json.dumps({"event": name, **values}))

    def warning(self, text: str) -> None:
        """Say what is odd, but not in the way: of options, those with a value are ways out."""
        shown = _SETTING.sub(lambda found: self.spell(found[0]), text)
        self._say(f"{_paint('warning', '33')}: {visible(shown)}")

    def error(self, error: LingconvError) -> None:
        """Say what went wrong, where, and what to do."""
        spell = spelling(error, self.spell)
        self._say(f"{_paint('error', '31')}: {visible(spell(error.message))}")
        shown = error.details if self.verbose else error.details[:_MAX_DETAILS]
        for detail in shown:
            self._say(f"  {visible(spell(detail))}")
        if len(error.details) > len(shown):
            self._say(f"  ... and {len(error.details) - len(shown)} more (-v shows all)")
        if self.verbose and error.__cause__ is not None:
            self._say(f"  caused by: {visible(repr(error.__cause__))}")
        if error.hint:
            self._say(f"{_paint('hint', '36')}: {visible(self.spell(error.hint))}")
        if self.json:
            self._say(json.dumps({"error": _error_json(error, self.spell)}))

    def bug(self) -> None:
        """Show the error that is being handled, which is not in the tree, and ask for a report."""
        for line in traceback.format_exc().splitlines():
            self._say(visible(line))
        self._say(
            f"{_paint('error', '31')}: this is a bug in lingconv {__version__}; please report it"
            " with the lines above and the output of `lingconv env`"
        )

    def _say(self, text: str) -> None:
        # In one write, so that threads do not talk into each other's lines.
        print(f"{text}\n", end="", file=sys.stderr)  # noqa: T201 - the one place that talks


def spelling(error: LingconvError, spell: Callable[[str], str]) -> Callable[[str], str]:
    """Return how the text of an error, other than its hint, is to be shown.

    What is wrong with a checkpoint is told in the words of its files, whose keys may have the names
    of options.
    """
    return str if isinstance(error, CheckpointError) else spell


def _error_json(error: LingconvError, spell: Callable[[str], str]) -> dict[str, Any]:
    shown = spelling(error, spell)
    value: dict[str, Any] = {
        "type": type(error).__name__,
        "exit_code": error.exit_code,
        "message": shown(error.message),
        "details": [shown(detail) for detail in error.details],
        "hint": spell(error.hint),
    }
    if isinstance(error, CheckpointError):
        value["faults"] = [
            {"kind": f.kind, "file": f.file, "tensor": f.tensor, "message": f.message}
            for f in error.faults
        ]
    return value


def wants_colour(stream: Any) -> bool:
    """Return whether a stream is to be coloured: a terminal, and nobody said no."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()


def _paint(word: str, code: str) -> str:
    return f"\x1b[1;{code}m{word}\x1b[0m" if wants_colour(sys.stderr) else word


def columns(rows: Iterable[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Return label-and-value lines with the values aligned; rows without a value are left out."""
    kept = [(label, value) for label, value in rows if value]
    width = max((len(label) for label, _ in kept), default=0)
    return [f"{indent}{label:<{width}}  {value}" for label, value in kept]


terminal = Terminal()
