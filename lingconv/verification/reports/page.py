"""Self-contained HTML pages: no network, no script; for light and dark screens and paper."""

import re
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lingconv.errors import UsageError
from lingconv.storage.local_files import replace_file
from lingconv.storage.local_output import explained_writing

# Controls but line end and tab, what has no width or turns the direction, and halves of characters.
_NO_LETTERS = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def check() -> None:
    """Raise UsageError if matplotlib, which draws the plots, is not installed."""
    if find_spec("matplotlib") is None:
        raise UsageError(
            "reports are drawn by matplotlib, which is not installed",
            hint="pip install 'lingconv[report]'",
        )


def render(template: str, **values: Any) -> str:
    """Return a page from one of this folder's templates, with all values escaped."""
    folder = files("lingconv.verification.reports")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
    )
    return environment.get_template(template).render(**values)


def write(html: str, path: Path) -> None:
    """Write a page atomically; characters that are no letters in names are escaped."""
    shown = _NO_LETTERS.sub(lambda found: f"\\u{ord(found[0]):04x}", html)
    with explained_writing(path):
        replace_file(path, [shown.encode()])
