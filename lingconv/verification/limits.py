"""Limits of the error of a tensor: they follow from its two encodings and nothing else.

Copied numbers have to be equal, bit for bit. Rounded ones may be off by that rounding, which each
encoding states (`Encoding.error_limit`).

    to        from           relative     relative error of the whole tensor
    ---------------------------------------------------------------------------
    any       same numbers   0            0          (equal bits)
    bf16      f32, f16       2^-8         2^-8
    bf16      fp8            2^-7         2^-8       (equal bits at level `bytes`)
    f16       any            2^-11        2^-9       (weights may be subnormal in F16)
    f32       fp8            2^-22        2^-22
    fp8       plain          0.07         0.04       rounding to nearest: at most 2^-4, and 0.0361
    fp8       fp8            0.14         0.08       (rounded twice)
    ggml      any            a share of the block's largest magnitude, and what F16 scales lose
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from lingconv.encodings import Encoding
from lingconv.encodings.base import EXACT, Limit
from lingconv.verification.options import VerifyOptions
from lingconv.verification.verdict import TensorFigures


def limit_for(source: Encoding, target: Encoding, *, keep_dtype: bool) -> Limit:
    """Return the limit for numbers that were converted from `source` to `target`.

    `keep_dtype`: the family file says that this tensor is never rounded.
    """
    return EXACT if keep_dtype else target.error_limit(source)


class Thresholds(NamedTuple):
    """The thresholds for a whole checkpoint, by the kind of its conversion.

    `max_rel_error` replaces the limits of rounded tensors, unless it is None; the others are for
    the forward pass: the lowest mean cosine of any stage's hidden states, and the mean KLD in nats.
    """

    kind: str
    max_rel_error: float | None
    min_cosine: float
    max_mean_kld: float

    def accepts(self, item: TensorFigures) -> bool:
        """Return whether a tensor is within its limit, or within `max_rel_error` if given."""
        if self.max_rel_error is None or item.allowed == 0.0:
            return item.ok
        return item.rel_error <= self.max_rel_error and not item.nonfinite

    def to_json(self) -> dict[str, float]:
        """Return the thresholds as JSON values."""
        numbers = self._asdict()
        numbers.pop("kind")
        return {name: value for name, value in numbers.items() if value is not None}


# (free routing, pinned routing): router flips change a token's output even if all weights are
# within their limits, so the thresholds of the free pass are loose.
_FORWARD = {
    "relayout": ((1 - 1e-6, 1e-7), (1 - 1e-6, 1e-7)),
    "rounded": ((0.97, 0.02), (0.999, 0.001)),
    "fp8": ((0.9, 0.15), (0.98, 0.02)),
    "few bits": ((0.3, 2.0), (0.5, 1.0)),
}


# Kinds of conversions, by the largest relative error that any tensor is allowed.
_KINDS = {"relayout": 0.0, "rounded": 0.03, "fp8": 0.09, "few bits": math.inf}


def thresholds_for(tensors: Iterable[TensorFigures], options: VerifyOptions) -> Thresholds:
    """Return the thresholds for the kind of conversion; the user's own numbers override them."""
    largest = max((item.allowed for item in tensors), default=0.0)
    kind = next(kind for kind, highest in _KINDS.items() if largest <= highest)
    cosine, kld = _FORWARD[kind][options.pin_routing]
    return Thresholds(
        kind,
        options.max_rel_error,
        cosine if options.min_cosine is None else options.min_cosine,
        kld if options.max_mean_kld is None else options.max_mean_kld,
    )
