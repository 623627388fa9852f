"""Optimizer steps of many trials at once: gradients clipped as by clip_grad_norm_, weights as by torch.optim.AdamW.

The kernels are torch's own. An optimizer for each trial would spend ten times as long around its kernel as for it, and
in a pack of short examples thirty trials take a step every 20 ms. So norms, clips and what follows a step are lists of
tensors, and only AdamW itself is called for each trial, as its kernel takes one rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainers.checkpoints import MOMENTS
from trainers.lora.bank import Slot

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own
_NORM_EPSILON = 1e-6  # clip_grad_norm_'s


@torch.no_grad()
def update(slots: Sequence[Slot], rates: Sequence[float]) -> list[torch.Tensor]:
    """Takes one step of each slot at its rate; gradients are zero then. Returns their norms before clipping, [] each.

    Nothing waits for a device. A norm that is NaN stays one, and makes the weights so.
    """
    gradients = [slot.gradient for slot in slots]
    norms = torch._foreach_norm(gradients)
    shares = torch._foreach_add(norms, _NORM_EPSILON)
    torch._foreach_reciprocal_(shares)
    torch._foreach_mul_(shares, [slot.config.clip_norm for slot in slots])
    torch._foreach_clamp_max_(shares, 1.0)
    torch._foreach_mul_(gradients, shares)
    for slot, rate in zip(slots, rates, strict=True):
        _step(slot, rate)
    torch._foreach_zero_(gradients)
    rounded = [slot for slot in slots if slot.copy is not slot.weights]
    if rounded:
        torch._foreach_copy_([slot.copy for slot in rounded], [slot.weights for slot in rounded])
    return list(norms)


def _step(slot: Slot, rate: float) -> None:
    if slot.steps is None:
        slot.remember(0, {name: torch.zeros_like(slot.weights) for name in MOMENTS})
    assert slot.steps is not None
    slot.steps += 1
    torch._fused_adamw_(
        [slot.weights],
        [slot.gradient],
        *([slot.moments[name]] for name in MOMENTS),
        [],
        [slot.steps],
        lr=rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=slot.config.weight_decay,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )
