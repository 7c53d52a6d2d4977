"""How far a number may be from what it was: decided by the two encodings, nothing else.

What only moved has to be equal, bit for bit. What was rounded may be off by that rounding: by a
share of itself, and by an absolute step where numbers are subnormal. For FP8 a little more is
allowed than rounding to nearest needs, because llm-compressor rounds quotients to BF16 before it
rounds them to e4m3, which moves about 3 % of its codes by one step.

    to        from           relative     relative error of the whole tensor
    ---------------------------------------------------------------------------
    any       same numbers   0            0          (equal bits)
    bf16      f32, f16       2^-8         2^-8
    bf16      fp8            2^-7         2^-8       (equal bits at level `bytes`)
    f16       any            2^-11        2^-9       (weights may be subnormal in F16)
    f32       fp8            2^-22        2^-22
    fp8       plain          0.07         0.04       rounding to nearest: at most 2^-4, and 0.0361
    fp8       fp8            0.14         0.08       (rounded twice)
    ggml      any            _TO_GGML                (a share of the block's largest magnitude)

In ggml's blocks an element may be off by a share of the largest magnitude in its block, and by what
an F16 scale cannot express; FP8 weights are rounded to BF16 before. The numbers are a third above
the largest that normal, Laplace, Student's t (2 and 3), uniform, log-normal, sparse and
all-positive weights came to.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from lingconv.encodings import Encoding, Fp8, Ggml, Plain
from lingconv.encodings.dtypes import DType, GgmlType
from lingconv.verification.options import VerifyOptions
from lingconv.verification.verdict import TensorFigures

_FP8_SUBNORMAL_STEP = 2.0**-9
_F16_SUBNORMAL = 2.0**-24


class Limit(NamedTuple):
    """What a tensor may deviate by.

    An element by `relative` x |element| + `floor`, where `floor` counts in scales for FP8, and for
    ggml's blocks in the largest magnitude of the block; the whole tensor by `rel_error`, the
    Frobenius norm of the difference over that of the source.
    """

    relative: float
    floor: float
    rel_error: float

    @property
    def exact(self) -> bool:
        """Whether nothing may differ."""
        return self.rel_error == 0.0


EXACT = Limit(0.0, 0.0, 0.0)
_TO_BF16 = Limit(2.0**-8 * 1.001, 1e-38, 2.0**-8)
_FP8_TO_BF16 = Limit(2.0**-7, 1e-38, 2.0**-8)
_TO_F16 = Limit(2.0**-11 * 1.001, _F16_SUBNORMAL, 2.0**-9)
_FP8_TO_F32 = Limit(2.0**-22, 1e-38, 2.0**-22)
_TO_FP8 = Limit(0.07, _FP8_SUBNORMAL_STEP, 0.04)
_FP8_TO_FP8 = Limit(0.14, 2 * _FP8_SUBNORMAL_STEP, 0.08)
# Share of the block's largest magnitude, relative error of the whole tensor.
_TO_GGML = {
    GgmlType.Q8_0: (0.0065, 0.018),
    GgmlType.Q6_K: (0.036, 0.044),
    GgmlType.Q5_1: (0.045, 0.075),
    GgmlType.Q5_0: (0.085, 0.09),
    GgmlType.Q5_K: (0.1, 0.065),
    GgmlType.Q4_1: (0.09, 0.16),
    GgmlType.Q4_0: (0.17, 0.17),
    GgmlType.Q4_K: (0.17, 0.125),
    GgmlType.IQ4_NL: (0.18, 0.14),
    GgmlType.IQ4_XS: (0.2, 0.14),
    GgmlType.MXFP4: (0.34, 0.24),
    GgmlType.Q3_K: (0.37, 0.25),
    GgmlType.Q2_K: (0.85, 0.5),
}
# Ternary types, and those that are only read: a block's largest magnitude bounds what can be said.
_COARSEST = (1.0, 1.0)
# A scale below F16's smallest step is lost, with a block of numbers up to 2^8 times as large.
GGML_STEP = 2.0**-17
_HOLDS = {
    DType.F32: (DType.BF16, DType.F16, DType.F32),
    DType.BF16: (DType.BF16,),
    DType.F16: (DType.F16,),
}


def limit_for(source: Encoding, target: Encoding, *, keep_dtype: bool) -> Limit:
    """Return the limit for numbers that were `source` and are `target` now.

    `keep_dtype`: the family says that this tensor is never rounded.
    """
    if keep_dtype or _same_numbers(source, target):
        return EXACT
    if isinstance(target, Ggml):
        share, rel_error = _TO_GGML.get(target.type, _COARSEST)
        through_bf16 = 2.0**-8 if isinstance(source, Fp8) else 0.0
        return Limit(through_bf16, share, rel_error)
    if isinstance(target, Fp8):
        return _FP8_TO_FP8 if isinstance(source, Fp8) else _TO_FP8
    if isinstance(source, Fp8):
        limits = {DType.BF16: _FP8_TO_BF16, DType.F16: _TO_F16, DType.F32: _FP8_TO_F32}
        return limits.get(target.dtype, EXACT)
    return {DType.BF16: _TO_BF16, DType.F16: _TO_F16}.get(target.dtype, EXACT)


def _same_numbers(source: Encoding, target: Encoding) -> bool:
    """Return whether `target` holds every number of `source`."""
    if isinstance(source, Plain) and isinstance(target, Plain):
        return source.dtype in _HOLDS.get(target.dtype, (target.dtype,))
    return target.can_hold(source)


class Thresholds(NamedTuple):
    """What a whole checkpoint is held to, by what was done to it.

    `max_rel_error` replaces the limits of tensors that were rounded, where it is not None; the rest
    is for the forward pass: the lowest mean cosine of any stage's hidden states, and the mean KLD.
    """

    kind: str
    max_rel_error: float | None
    min_cosine: float
    max_mean_kld: float

    def accepts(self, item: TensorFigures) -> bool:
        """Return whether a tensor came through well enough."""
        if self.max_rel_error is None or item.allowed == 0.0:
            return item.ok
        return item.rel_error <= self.max_rel_error and not item.nonfinite

    def to_json(self) -> dict[str, float]:
        """Return the numbers that a verdict was measured by."""
        numbers = self._asdict()
        numbers.pop("kind")
        return {name: value for name, value in numbers.items() if value is not None}


# (free routing, pinned routing): a token whose experts changed is far off without any fault of the
# weights, so that little can be asked of the free pass.
_FORWARD = {
    "relayout": ((1 - 1e-6, 1e-7), (1 - 1e-6, 1e-7)),
    "rounded": ((0.97, 0.02), (0.999, 0.001)),
    "fp8": ((0.9, 0.15), (0.98, 0.02)),
    "few bits": ((0.3, 2.0), (0.5, 1.0)),
}


# By the largest relative error that any tensor is allowed.
_KINDS = {"relayout": 0.0, "rounded": 0.03, "fp8": 0.09, "few bits": math.inf}


def thresholds_for(tensors: Iterable[TensorFigures], options: VerifyOptions) -> Thresholds:
    """Return the defaults for what was done, with the user's own numbers in place of them."""
    largest = max((item.allowed for item in tensors), default=0.0)
    kind = next(kind for kind, highest in _KINDS.items() if largest <= highest)
    cosine, kld = _FORWARD[kind][options.pin_routing]
    return Thresholds(
        kind,
        options.max_rel_error,
        cosine if options.min_cosine is None else options.min_cosine,
        kld if options.max_mean_kld is None else options.max_mean_kld,
    )
