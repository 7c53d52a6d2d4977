"""lingconv: converts, quantizes and checks very large checkpoints, streamed in bounded memory.

The verbs of the command line, as functions:

    >>> import lingconv
    >>> report = lingconv.inspect("Ling-mini-2.0")                            # doctest: +SKIP
    >>> result = lingconv.quantize("Ling-mini-2.0", "Ling-mini-2.0-FP8")      # doctest: +SKIP
"""

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
from lingconv.engine import Resources, Result
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
from lingconv.plan import Plan
from lingconv.progress import Progress, Watcher
from lingconv.version import __version__
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
