"""Ling 2.0 (BailingMoeV2) as formulas: one function for each part of the model.

Source: models/modeling_bailing_moe_v2.py in github.com/inclusionAI/Ling-V2 at af8837e, and
arXiv 2510.22115 section 2. Shapes, as suffixes of names:

    B batch    S positions    T = B x S tokens    H hidden    V vocabulary
    N query heads    K key/value heads    G = N / K    D head_dim    R rotary_dim
    E experts    A experts per token

`w` are the weights of one layer: `w["q_norm"]` is a small tensor, `w.linear("q", x)` is
x W^T (+ bias), with W streamed through memory a few rows at a time.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from lingconv.model.symbol_rules import rope_stretch, yarn_magnitude

Symbols = Mapping[str, Any]


class Weights(Protocol):
    """The weights of one layer, by the names of the family file."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a small tensor."""

    def __contains__(self, name: str) -> bool:
        """Return whether this layer has such a tensor."""

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return x W^T, plus the bias if there is one."""

    def choose(self, experts: Iterable[int]) -> None:
        """Announce the experts that are going to be used, in this order."""


class Rope(NamedTuple):
    """Cosines and sines of every position, one for each pair of rotated dimensions."""

    cos_SR: Tensor
    sin_SR: Tensor


class Routing(NamedTuple):
    """The output of a router: raw logits, the chosen experts, and their shares."""

    logits_BSE: Tensor
    topk_BSA: Tensor
    shares_BSA: Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight over the last axis; the product comes after the down-cast."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * normed.to(x.dtype)


def rope(positions: int, config: Symbols, dtype: torch.dtype, device: str) -> Rope:
    """Return the rotations of positions 0, 1, ...: theta_j = base^(-2j / R), or those of YaRN."""
    frequencies, magnitude = _frequencies(config)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    angles_SR = torch.cat([angles, angles], dim=-1)
    cos, sin = angles_SR.cos() * magnitude, angles_SR.sin() * magnitude
    return Rope(cos.to(device, dtype), sin.to(device, dtype))


def _frequencies(config: Symbols) -> tuple[Tensor, float]:
    """Return theta_j and the factor on cos and sin, for contexts that are stretched as well.

    YaRN as in arXiv 2309.00071, section 3, with the ends of the ramp rounded to whole dimensions as
    in Hugging Face's modeling_rope_utils.py.
    """
    rotary_dim, base = config["rotary_dim"], config["rope_theta"]
    theta = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if config["rope_scaling"] == "linear":
        return theta / rope_stretch(config), 1.0
    if config["rope_scaling"] != "yarn":
        return theta, 1.0
    original, factor = config["yarn_original_positions"], rope_stretch(config)

    def dimension(rotations: float) -> float:
        """Return the dimension that turns this many times within the original context."""
        turns = original / (rotations * 2 * math.pi)
        return float(rotary_dim * math.log(turns) / (2 * math.log(base)))

    low = max(math.floor(dimension(config["yarn_beta_fast"])), 0)
    high = min(math.ceil(dimension(config["yarn_beta_slow"])), rotary_dim - 1)
    places = torch.arange(rotary_dim // 2, dtype=torch.float32)
    stretched = ((places - low) / max(high - low, 0.001)).clamp(0, 1)
    magnitude = config["yarn_attention_factor"] or yarn_magnitude(factor)
    return theta / factor * stretched + theta * (1 - stretched), magnitude


def rotate(x_BNSD: Tensor, rope: Rope) -> Tensor:
    """Return x with dimensions (i, i + R/2) of the first R rotated (NeoX pairing), others kept."""
    rotary_dim = rope.cos_SR.shape[-1]
    turned, passed = x_BNSD[..., :rotary_dim], x_BNSD[..., rotary_dim:]
    left, right = turned.chunk(2, dim=-1)
    crossed = torch.cat([-right, left], dim=-1)
    return torch.cat([turned * rope.cos_SR + crossed * rope.sin_SR, passed], dim=-1)


def attention(x_BSH: Tensor, w: Weights, rope: Rope, config: Symbols) -> Tensor:
    """Return causal grouped-query attention: head n reads key/value head n // G."""
    head_dim, eps = config["head_dim"], config["rms_norm_eps"]
    q_BNSD, k_BKSD, v_BKSD = (
        w.linear(name, x_BSH).unflatten(-1, (-1, head_dim)).transpose(1, 2) for name in "qkv"
    )
    if "q_norm" in w:
        q_BNSD = rms_norm(q_BNSD, w["q_norm"], eps)
        k_BKSD = rms_norm(k_BKSD, w["k_norm"], eps)
    q_BNSD, k_BKSD = rotate(q_BNSD, rope), rotate(k_BKSD, rope)
    q_BKGSD = q_BNSD.unflatten(1, (k_BKSD.shape[1], -1))
    out_BKGSD = torch.empty_like(q_BKGSD)
    positions = x_BSH.shape[1]
    future_SS = torch.ones(positions, positions, dtype=torch.bool, device=x_BSH.device).triu(1)
    for head in range(k_BKSD.shape[1]):  # one at a time: the scores of all of them would be large
        k_B1DS = k_BKSD[:, head, None].transpose(-1, -2)
        scores_BGSS = q_BKGSD[:, head] @ k_B1DS / math.sqrt(head_dim)
        scores_BGSS = scores_BGSS.masked_fill(future_SS, -math.inf)
        shares_BGSS = scores_BGSS.softmax(-1, dtype=torch.float32).to(x_BSH.dtype)
        out_BKGSD[:, head] = shares_BGSS @ v_BKSD[:, head, None]
    out_BSO = out_BKGSD.flatten(1, 2).transpose(1, 2).flatten(2)
    return w.linear("o", out_BSO)


def mlp(x: Tensor, w: Weights, part: str = "") -> Tensor:
    """Return W_down(silu(W_gate x) * (W_up x))."""
    gate = silu(w.linear(f"{part}gate", x))
    return w.linear(f"{part}down", gate * w.linear(f"{part}up", x))


def route(x_BSH: Tensor, w: Weights, config: Symbols, pinned_BSA: Tensor | None = None) -> Routing:
    """Return the routing: A experts per token, of the groups whose two best experts score highest.

    The bias affects the choice alone. `pinned_BSA` replaces the choice, not the shares.
    """
    logits_BSE = w.linear("router", x_BSH.float())
    softmax = config["score_function"] == "softmax"
    scores_BSE = logits_BSE.softmax(-1) if softmax else logits_BSE.sigmoid()
    if pinned_BSA is None:
        choice_BSE = scores_BSE + w["expert_bias"].float() if "expert_bias" in w else scores_BSE
        if config["expert_groups"] > 1:
            choice_BSE = _within_groups(choice_BSE, config)
        topk_BSA = choice_BSE.topk(config["experts_per_token"], dim=-1).indices
    else:
        topk_BSA = pinned_BSA
    shares_BSA = scores_BSE.gather(-1, topk_BSA)
    if config["experts_per_token"] > 1 and config["norm_topk_prob"]:
        shares_BSA = shares_BSA / (shares_BSA.sum(-1, keepdim=True) + 1e-20)
    return Routing(logits_BSE, topk_BSA, shares_BSA * config["routed_scaling_factor"])


def _within_groups(choice_BSE: Tensor, config: Symbols) -> Tensor:
    """Return the scores with every expert outside of the chosen groups at minus infinity."""
    groups_BSGe = choice_BSE.unflatten(-1, (config["expert_groups"], -1))
    best = min(2, groups_BSGe.shape[-1])
    value_BSG = groups_BSGe.topk(best, dim=-1).values.sum(-1)
    chosen_BSg = value_BSG.topk(config["groups_per_token"], dim=-1).indices
    outside_BSG = torch.ones_like(value_BSG, dtype=torch.bool).scatter(-1, chosen_BSg, value=False)
    return groups_BSGe.masked_fill(outside_BSG[..., None], -math.inf).flatten(-2)


def moe(
    x_BSH: Tensor, w: Weights, config: Symbols, pinned_BSA: Tensor | None = None
) -> tuple[Tensor, Routing]:
    """Return the chosen experts' outputs, weighted and summed in float32, plus the shared one's."""
    routing = route(x_BSH, w, config, pinned_BSA)
    chosen = torch.unique(routing.topk_BSA).tolist()
    w.choose(chosen)
    shared_BSH = mlp(x_BSH, w, "shared.") if "shared.gate" in w else torch.zeros_like(x_BSH)
    x_TH, topk_TA = x_BSH.flatten(0, 1), routing.topk_BSA.flatten(0, 1)
    shares_TA = routing.shares_BSA.flatten(0, 1)
    sum_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert in chosen:
        token, place = (topk_TA == expert).nonzero(as_tuple=True)
        out = mlp(x_TH[token], w, f"experts.{expert}.").float()
        sum_TH.index_add_(0, token, out * shares_TA[token, place, None])
    return sum_TH.to(x_BSH.dtype).view_as(x_BSH) + shared_BSH, routing


def decoder_layer(
    x_BSH: Tensor, w: Weights, rope: Rope, config: Symbols, pinned_BSA: Tensor | None = None
) -> tuple[Tensor, Routing | None]:
    """Return x + attention(norm(x)), plus the feed-forward of its norm; and the routing."""
    eps = config["rms_norm_eps"]
    x_BSH = x_BSH + attention(rms_norm(x_BSH, w["attention_norm"], eps), w, rope, config)
    normed_BSH = rms_norm(x_BSH, w["mlp_norm"], eps)
    if "router" in w:
        out_BSH, routing = moe(normed_BSH, w, config, pinned_BSA)
        return x_BSH + out_BSH, routing
    return x_BSH + mlp(normed_BSH, w), None


def mtp_input(embeds_BSH: Tensor, x_BSH: Tensor, w: Weights, config: Symbols) -> Tensor:
    """Return the input of an MTP layer, from the next token's embedding and the output so far."""
    eps = config["rms_norm_eps"]
    both = [rms_norm(embeds_BSH, w["enorm"], eps), rms_norm(x_BSH, w["hnorm"], eps)]
    return w.linear("eh_proj", torch.cat(both, dim=-1))


def next_ids(ids_BS: Tensor) -> Tensor:
    """Return the ids shifted one place to the left, with a 0 at the end: MTP's input."""
    return pad(ids_BS[:, 1:], (0, 1))
