"""`lingconv env`: what a bug report needs. No secrets, no paths."""

import platform

from lingconv.cli.common_options import DisplayFlags
from lingconv.cli.option_groups import grouped
from lingconv.cli.terminal import columns, terminal
from lingconv.storage.machine import num_processors
from lingconv.version import __version__

_PACKAGES = ("numpy", "numba", "torch", "safetensors", "huggingface-hub", "gguf", "typer", "rich")


@grouped
def env(printed: DisplayFlags) -> None:
    """Print versions and the machine's kind, for bug reports."""
    values = {
        "lingconv": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": str(num_processors()),
        **{name: _version(name) for name in _PACKAGES},
    }
    terminal.result(
        columns(values.items(), ""), {"schema": "lingconv.env/1", **values}, __version__
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # slow, and for this only

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
