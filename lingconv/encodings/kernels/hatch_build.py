"""The build hook that compiles the kernels for a wheel; only hatchling runs it."""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    """Adds compiled kernels to wheels. In a checkout, kernels are compiled on their first call."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels, and tag the wheel for this Python and machine."""
        if version == "editable":
            return
        sys.path.insert(0, self.root)
        # The compiling process needs the import path of this one.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        from lingconv.encodings.kernels.aot_build import build

        self._folder = Path(tempfile.mkdtemp()) / "prebuilt"
        build(self._folder)
        build_data["force_include"][str(self._folder)] = "lingconv/encodings/kernels/prebuilt"
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled kernels, which are in the wheel now."""
        if version != "editable":
            shutil.rmtree(self._folder.parent)
