"""Ahead-of-time compiled kernels, which are part of wheels.

    prebuilt/manifest.json     versions that compiled them, and the digest of their sources
    prebuilt/x86-64-v3/NAME    numba's serialized form of one kernel for some types

They are compiled when a wheel is built (`hatch_build.py`), and used only if Python, numba and the
digest of the kernels' sources are the same.
"""

import hashlib
import json
import pickle
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

_SOURCES: Final = Path(__file__).parent
_SHIPPED: Final = _SOURCES / "prebuilt"
_MANIFEST: Final = "manifest.json"
_OTHERS: Final = (
    "__init__",
    "aot_build",
    "fp8_triton",
    "hatch_build",
)  # modules without kernels


@dataclass(frozen=True, slots=True)
class CpuLevel:
    """A level of CPUs: LLVM's name, the features that all of them have, and LLVM's tuning."""

    cpu: str
    features: tuple[str, ...]
    tuning: str = ""


_V3 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse4.2")
_V4 = (*_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_VBMI = (*_V4, "avx512vbmi")  # Ice Lake, Zen 4 and later: see fp8_table.py
# The best one first. Levels of the x86-64 psABI: https://gitlab.com/x86-psABIs/x86-64-ABI
LEVELS: Final[Mapping[str, tuple[CpuLevel, ...]]] = {
    "x86_64": (CpuLevel("x86-64-v4", _VBMI, "-prefer-256-bit"), CpuLevel("x86-64-v3", _V3)),
    "aarch64": (CpuLevel("generic", ("neon",)),),
}


class ShippedKernels:
    """The compiled kernels for one level of CPUs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, function: Callable[..., Any], types: Any) -> Any:
        """Return the data from which numba restores a compiled function, or None if missing."""
        try:
            return pickle.loads((self._folder / _file_name(function, types)).read_bytes())
        except FileNotFoundError:
            return None


def _file_name(function: Callable[..., Any], types: Any) -> str:
    digest = hashlib.sha256(str(types).encode()).hexdigest()[:16]
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}-{digest}"


@cache
def shipped_for_this_machine() -> ShippedKernels | None:
    """Return the compiled kernels for this CPU, Python and numba, or None."""
    try:
        if json.loads((_SHIPPED / _MANIFEST).read_text()) != _manifest():
            return None
    except FileNotFoundError:
        return None
    from llvmlite.binding import get_host_cpu_features

    has = get_host_cpu_features()
    for level in LEVELS.get(platform.machine(), ()):
        if all(has.get(name) for name in level.features):
            return ShippedKernels(_SHIPPED / level.cpu)
    return None


@cache
def sources_digest() -> str:
    """Return the digest of all sources of the kernels."""
    sources = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


def _manifest() -> dict[str, str]:
    import numba

    return {
        "numba": numba.__version__,
        "python": f"{sys.implementation.cache_tag} {sys.platform}",
        "sources": sources_digest(),
    }
