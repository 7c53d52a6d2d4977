"""The step of building a wheel that compiles the kernels; hatchling runs it, lingconv never."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    """Puts compiled kernels into wheels. A checkout compiles what it calls, when it calls it."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say that the wheel is for the Python and the machine that build it."""
        if version == "editable":
            return
        sys.path.insert(0, self.root)
        # Whoever compiles is a process of its own, and has to see what this one was given.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        from lingconv.encodings.kernels.aot_build import build

        self._folder = Path(tempfile.mkdtemp()) / "prebuilt"
        build(self._folder)
        build_data["force_include"][str(self._folder)] = "lingconv/encodings/kernels/prebuilt"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what is in the wheel now."""
        if version != "editable":
            shutil.rmtree(self._folder.parent)
