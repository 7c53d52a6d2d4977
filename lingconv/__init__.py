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
    pass
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
    from lingconv.execution.plan_share import Part
    from lingconv.execution.progress import Progress
    from lingconv.execution.resources import Resources
    from lingconv.plans.checkpoint_weights import Weighting, by_decay, by_hand, mean
    from lingconv.plans.options import ConvertOptions, Fp8Options, GgufOptions
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

# Where the names above are, those first that cost the least to import.
_HOMES = (
    "errors",
    "execution.progress",
    "plans.options",
    "verification.progress",
    "verification.options",
    "storage.upload_target",
    "plans.checkpoint_weights",
    "execution.plan_share",
    "execution.resources",
    "plans.plan",
    "checkpoint.inspection",
    "execution.engine",
    "api",
)


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: `lingconv --help` needs next to nothing."""
    if name in _HOMES:
        return import_module(f"lingconv.{name}")
    if name in __all__:
        for home in _HOMES:
            found = vars(import_module(f"lingconv.{home}"))
            if name in found:
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
