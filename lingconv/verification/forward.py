"""Both forward passes side by side, stage by stage, over the same tokens."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lingconv.checkpoint.recognised_checkpoint import Model
from lingconv.verification.logits import compare_logits
from lingconv.verification.options import ForwardOptions
from lingconv.verification.progress import Watcher
from lingconv.verification.reference.forward import ForwardPass, Step, mtp_count
from lingconv.verification.verdict import ForwardFigures, LayerFigures


def compare_forward(
    source: Model,
    target: Model,
    ids_BS: Tensor,
    options: ForwardOptions,
    watcher: Watcher,
    *,
    pin_routing: bool,
) -> ForwardFigures:
    """Return the differences between the forward passes of two models, stage by stage.

    With `pin_routing` the target's routers take the source's choices, so that router flips do not
    hide errors of the weights.
    """
    mtp = options.mtp and mtp_count(source) == mtp_count(target)
    options = replace(options, mtp=mtp)
    pinned: dict[str, Tensor] = {}
    layers = []
    with (
        ForwardPass(source, ids_BS, options) as one,
        ForwardPass(target, ids_BS, options, pinned) as other,
    ):
        other_steps = other.steps()
        for step in one.steps():
            if pin_routing and step.routing is not None:
                pinned[step.name] = step.routing.topk_BSA
            layers.append(_compare_step(step, next(other_steps)))
            watcher.stage(f"forward {step.name}")
        watcher.stage("forward head")
        ours, theirs = one.logits(), other.logits()
    figures = [compare_logits(a.cpu(), b.cpu(), ids_BS) for a, b in zip(ours, theirs, strict=True)]
    return ForwardFigures(
        ids_BS.numel(), pin_routing, tuple(layers), figures[0], tuple(figures[1:])
    )


def _compare_step(source: Step, target: Step) -> LayerFigures:
    cosine = torch.cosine_similarity(
        source.hidden_BSH.double().flatten(0, 1), target.hidden_BSH.double().flatten(0, 1), dim=-1
    ).clamp(-1, 1)
    flips = _flips(source, target)
    return LayerFigures(
        source.name,
        float(cosine.mean()),
        float(cosine.min()),
        flips["tokens"],
        flips["experts"],
    )


def _flips(source: Step, target: Step) -> Mapping[str, float | None]:
    """Return the share of tokens, and the share of choices, with different experts."""
    if source.routing is None or target.routing is None:
        return {"tokens": None, "experts": None}
    ours = source.routing.topk_BSA.flatten(0, 1)
    theirs = target.routing.topk_BSA.flatten(0, 1)
    kept_TA = (ours[:, :, None] == theirs[:, None, :]).any(-1)
    return {
        "tokens": float((~kept_TA.all(-1)).double().mean()),
        "experts": float((~kept_TA).double().mean()),
    }
