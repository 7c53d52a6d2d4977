"""Quantization of activations as in FP8 serving: e4m3 with a dynamic scale for each group."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lingconv.encodings import Encoding
from lingconv.encodings.dtypes import E4M3_MAX

_MIN_AMAX = 1e-10  # as SGLang's and vLLM's per-token-group kernels clamp it


def fake_quantize(x: Tensor, weights: Encoding) -> Tensor:
    """Return x [..., I], rounded to e4m3 and back, as float32.

    Groups are those of serving with such weights: as wide as the weights' blocks, or the whole
    token if weights have a scale per row. With power-of-two weight scales (ue8m0), the activations'
    scales are powers of two as well.
    """
    width = x.shape[-1]
    group = weights.scale_width(width)
    groups = pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=_MIN_AMAX) / E4M3_MAX
    if weights.has_power_of_two_scales:
        scale = scale.log2().ceil().exp2()
    codes = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)[..., :width]
