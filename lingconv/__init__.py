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
    from lingconv.engine import Result
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
    from lingconv.inspection import Report
    from lingconv.options import (
        ConvertOptions,
        ForwardOptions,
        Fp8Options,
        GgufOptions,
        PublishOptions,
        VerifyOptions,
    )
    from lingconv.part import Part
    from lingconv.plans import Plan
    from lingconv.progress import Progress, Watcher
    from lingconv.resources import Resources
    from lingconv.weighting import Weighting, by_decay, by_hand, mean

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
    "progress",
    "options",
    "weighting",
    "part",
    "resources",
    "plans",
    "inspection",
    "engine",
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
