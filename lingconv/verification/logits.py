"""Differences between two sets of logits, with the names and formulas of llama.cpp.

Source: tools/perplexity/perplexity.cpp (`--kl-divergence`) in github.com/ggml-org/llama.cpp. KLD is
sum p log(p / q) in nats, p from SRC and q from DST; dp is q - p of the actual next token; "same top
p" is the share of positions with the same most likely token.
"""

import torch
from torch import Tensor

from lingconv.verification.verdict import LogitFigures


def compare_logits(source_BSV: Tensor, target_BSV: Tensor, ids_BS: Tensor) -> LogitFigures:
    """Return the figures over all positions; `ids_BS` are the input tokens of the logits."""
    kld, dp, same = [], [], []
    for row in range(ids_BS.shape[0]):
        for position in range(ids_BS.shape[1]):
            log_p = source_BSV[row, position].double().log_softmax(-1)
            log_q = target_BSV[row, position].double().log_softmax(-1)
            kld.append(float((log_p.exp() * (log_p - log_q)).sum().clamp(min=0)))
            same.append(bool(log_p.argmax() == log_q.argmax()))
            if position + 1 < ids_BS.shape[1]:
                following = ids_BS[row, position + 1]
                dp.append(float(log_q[following].exp() - log_p[following].exp()))
    klds = torch.tensor(kld, dtype=torch.float64)
    dps = torch.tensor(dp or [0.0], dtype=torch.float64)
    return LogitFigures(
        mean_kld=float(klds.mean()),
        max_kld=float(klds.max()),
        kld_999=float(klds.quantile(0.999)),
        kld_990=float(klds.quantile(0.99)),
        median_kld=float(klds.quantile(0.5)),
        rms_dp=float(dps.square().mean().sqrt()),
        same_top_p=sum(same) / len(same),
        per_position=tuple(klds.view(ids_BS.shape).mean(0).tolist()),
    )
