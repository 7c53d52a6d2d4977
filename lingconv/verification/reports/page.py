"""Self-contained HTML pages: no network, no script; for light and dark screens and paper."""

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from lingconv.errors import UsageError
from lingconv.storage.local_files import replace_file
from lingconv.storage.local_output import explained_writing


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
    """Write a page atomically."""
    with explained_writing(path):
        replace_file(path, [html.encode()])
