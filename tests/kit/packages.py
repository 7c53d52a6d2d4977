"""Packages of somebody else, installed for one test: a module and its entry point."""

import sys

from lingconv import encodings
from lingconv.containers import registry

# What remembers which package brought what.
_REMEMBERED = (encodings._kind_named, registry.format_named)


def install(monkeypatch, folder, source, *, group, name, value):
    """Put a module `toy_NAME` with an entry point below a folder that Python looks into."""
    module = f"toy_{name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(source)
    about = folder / f"{module}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{value}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)


def forget():
    """Look for packages anew: what an earlier test installed is gone."""
    for remembered in _REMEMBERED:
        remembered.cache_clear()
    for module in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[module]
