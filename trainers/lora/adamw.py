"""A trial's optimizer step: its gradient clipped as by clip_grad_norm_, its weights as by torch.optim.AdamW.

The kernels are torch's own, without the optimizer around them, which spends ten times as long on each of many trials.
On a GPU trainers/lora/adamw_kernels.py takes the steps of all trials at once.
"""

from __future__ import annotations

import torch

from trainers.checkpoints import MOMENTS
from trainers.lora.bank import Slot

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own
NORM_EPSILON = 1e-6  # clip_grad_norm_'s


@torch.no_grad()
def step(slot: Slot, rate: float) -> torch.Tensor:
    """Takes one step at this rate; the gradient is zero then. Returns its norm before clipping, [].

    A norm that is NaN makes the weights so.
    """
    slot.steps += 1
    norm = torch.linalg.vector_norm(slot.gradient)
    slot.gradient.mul_(torch.clamp(slot.config.clip_norm / (norm + NORM_EPSILON), max=1.0))
    torch._fused_adamw_(
        [slot.weights],
        [slot.gradient],
        *([slot.moments[name]] for name in MOMENTS),
        [],
        [torch.tensor(float(slot.steps))],
        lr=rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=slot.config.weight_decay,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )
    slot.gradient.zero_()
    slot.round()
    return norm
