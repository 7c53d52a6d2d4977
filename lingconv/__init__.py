"""lingconv: converts, quantizes and checks very large checkpoints, streamed in bounded memory.

The verbs of the command line, as functions:

    >>> import lingconv
    >>> report = lingconv.inspect("Ling-mini-2.0")                            # doctest: +SKIP
    >>> result = lingconv.quantize("Ling-mini-2.0", "Ling-mini-2.0-FP8")      # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lingconv.version import __version__

if TYPE_CHECKING:
    from lingconv import api as api
    from lingconv.api import (
        convert,
        diff,
        finish,
        forward,
        inspect,
        merge_checkpoints,
        plan,
        push,
        quantize,
        synth,
        verify,
    )
    from lingconv.checkpoint.inspection import Report
    from lingconv.errors import (
        CheckpointError,
        DestinationError,
        Fault,
        Interrupted,
        LingconvError,
        NetworkError,
        PermissionDenied,
        ResourceError,
        UsageError,
    )
    from lingconv.execution.engine import Result
    from lingconv.execution.plan_share import PlanShare as Part
    from lingconv.execution.progress import Progress
    from lingconv.execution.resources import Resources
    from lingconv.plans.checkpoint_weights import Weighting, by_decay, by_hand, mean
    from lingconv.plans.options import ConvertOptions, FourBitOptions, Fp8Options, GgufOptions
    from lingconv.plans.plan import Plan
    from lingconv.storage.upload_target import PublishOptions
    from lingconv.verification.options import ForwardOptions, VerifyOptions
    from lingconv.verification.progress import Watcher

__all__ = [
    "CheckpointError",
    "ConvertOptions",
    "DestinationError",
    "Fault",
    "ForwardOptions",
    "FourBitOptions",
    "Fp8Options",
    "GgufOptions",
    "Interrupted",
    "LingconvError",
    "NetworkError",
    "Part",
    "PermissionDenied",
    "Plan",
    "Progress",
    "PublishOptions",
    "Report",
    "ResourceError",
    "Resources",
    "Result",
    "UsageError",
    "VerifyOptions",
    "Watcher",
    "Weighting",
    "__version__",
    "by_decay",
    "by_hand",
    "convert",
    "diff",
    "finish",
    "forward",
    "inspect",
    "mean",
    "merge_checkpoints",
    "plan",
    "push",
    "quantize",
    "synth",
    "verify",
]

# Modules that hold public names, and those names. A module is imported when a name of it is first
# asked for: `lingconv --help` needs next to nothing.
_HOMES = {
    "errors": (
        "CheckpointError", "DestinationError", "Fault", "Interrupted", "LingconvError",
        "NetworkError", "PermissionDenied", "ResourceError", "UsageError",
    ),
    "execution.progress": ("Progress",),
    "execution.plan_share": ("PlanShare",),
    "execution.resources": ("Resources",),
    "execution.engine": ("Result",),
    "checkpoint.inspection": ("Report",),
    "plans.options": ("ConvertOptions", "FourBitOptions", "Fp8Options", "GgufOptions"),
    "plans.checkpoint_weights": ("Weighting", "by_decay", "by_hand", "mean"),
    "plans.plan": ("Plan",),
    "storage.upload_target": ("PublishOptions",),
    "verification.options": ("ForwardOptions", "VerifyOptions"),
    "verification.progress": ("Watcher",),
    "api": (
        "convert", "diff", "finish", "forward", "inspect", "merge_checkpoints", "plan", "push",
        "quantize", "synth", "verify",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
# Public names that are spelled otherwise where they are defined.
_ALIASES = {"Part": "PlanShare"}


def __getattr__(name: str) -> object:
    """Import a public name, or the module `api`, on first use."""
    if name == "api":
        return import_module("lingconv.api")
    defined = _ALIASES.get(name, name)
    if name in __all__ and defined in _MODULE_OF:
        return getattr(import_module(f"lingconv.{_MODULE_OF[defined]}"), defined)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "api"]
