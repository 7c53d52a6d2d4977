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
"""

from collections.abc import Iterable
from typing import NamedTuple

from lingconv.dtypes import DType
from lingconv.encodings import Encoding, Fp8, Plain
from lingconv.options import VerifyOptions
from lingconv.verification.verdict import TensorFigures

_FP8_SUBNORMAL_STEP = 2.0**-9
_F16_SUBNORMAL = 2.0**-24


class Limit(NamedTuple):
    """What a tensor may deviate by.

    An element by `relative` x |element| + `floor`, where `floor` counts in scales for FP8; the
    whole tensor by `rel_error`, the Frobenius norm of the difference over that of the source.
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
}


def thresholds_for(tensors: Iterable[TensorFigures], options: VerifyOptions) -> Thresholds:
    """Return the defaults for what was done, with the user's own numbers in place of them."""
    largest = max((item.allowed for item in tensors), default=0.0)
    kind = "relayout" if largest == 0 else "rounded" if largest < _TO_FP8.rel_error else "fp8"
    cosine, kld = _FORWARD[kind][options.pin_routing]
    return Thresholds(
        kind,
        options.max_rel_error,
        cosine if options.min_cosine is None else options.min_cosine,
        kld if options.max_mean_kld is None else options.max_mean_kld,
    )
