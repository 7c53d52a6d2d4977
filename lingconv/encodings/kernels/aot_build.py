"""Ahead-of-time compilation of all kernels, when a wheel is built."""

import json
import os
import pickle
import platform
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from lingconv.encodings.kernels.aot import (
    _MANIFEST,
    _OTHERS,
    _SOURCES,
    LEVELS,
    CpuLevel,
    _file_name,
    _manifest,
)


def build(folder: Path) -> None:
    """Compile all kernels into `folder`, for every level of this machine's CPU architecture.

    Raises CalledProcessError if numba fails to compile one.
    """
    folder.mkdir(parents=True)
    levels = LEVELS.get(platform.machine(), ())
    started = [_start(level, folder) for level in levels]
    for process in started:
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, process.args)
    (folder / _MANIFEST).write_text(json.dumps(_manifest(), indent=1))


def _start(level: CpuLevel, folder: Path) -> "subprocess.Popen[bytes]":
    """Return a process that compiles for one level; numba has one target CPU per process."""
    features = [*(f"+{name}" for name in level.features), *filter(None, [level.tuning])]
    target = {"NUMBA_CPU_NAME": level.cpu, "NUMBA_CPU_FEATURES": ",".join(features)}
    command = [
        sys.executable,
        "-m",
        "lingconv.encodings.kernels.aot_build",
        str(folder / level.cpu),
    ]
    return subprocess.Popen(command, env=os.environ | target)


def _build_level(folder: Path) -> None:
    """Compile every kernel for the CPU in numba's environment variables."""
    from lingconv.encodings.kernels.jit import kernels

    for path in _SOURCES.glob("*.py"):
        if path.stem not in _OTHERS:
            import_module(f"lingconv.encodings.kernels.{path.stem}")
    folder.mkdir()
    for dispatcher, types in kernels():
        dispatcher._cache.disable()
        dispatcher.compile(types)
        compiled = dispatcher.overloads[types]
        path = folder / _file_name(dispatcher.py_func, types)
        path.write_bytes(pickle.dumps(compiled._reduce()))


if __name__ == "__main__":
    _build_level(Path(sys.argv[1]))
