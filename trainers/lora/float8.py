"""Products with the frozen base in 8-bit floats (e4m3; Micikevicius et al., "FP8 Formats for Deep Learning", 2022).

Each row of x has a scale of its own that takes its largest value to the format's largest, and so has each output
feature of W; products are summed in fp32 and scaled back. A token's scale is read off that token alone, so a trial
computes the same whoever its neighbours are. In the gradient of x, W has a scale for each input feature, and a token's
gradients of all linears of a group share one, so that one product sums over all of them.

Adapters, their gradients and all between the linears stay in bf16. So do the base's weights, beside the rounded ones:
what is judged, written or generated is computed with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainers.messages import FP8_CAPABILITY
from trainers.named import ModelError

FORMAT = torch.float8_e4m3fn
LARGEST = 448.0  # of the format
TINY = 1e-30  # of a row, where all of it is zero
SHARE, NATS = 0.05, 0.2  # how far a loss may be from that by whole weights: as in loss.TOLERANCE
_MULTIPLE = 16  # of a product's inner and outer size (cuBLAS and CUTLASS read 16 bytes at a time)


@dataclass(frozen=True)
class Rounded:
    """A matrix in 8-bit floats: `codes` [rows, k], and `scales` fp32 [rows, 1] that they are to be multiplied by."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def value(self) -> torch.Tensor:
        """What it stands for, in the precision of its scales."""
        return self.codes.to(self.scales.dtype) * self.scales


def rounded(x: torch.Tensor) -> Rounded:
    """Rounds the rows of x [rows, k]; one that holds an infinity or NaN is NaN. On a GPU: float8_kernels."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    scales = wide.abs().amax(1, keepdim=True).clamp(min=TINY) / LARGEST
    return Rounded((wide / scales).to(FORMAT), scales)


def product(x: Rounded, weights: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """x W^T [rows, outputs] for W [outputs, k]."""
    if x.codes.device.type == "cpu":
        return (x.value @ weights.value.T).to(dtype)
    scales = weights.scales.view(1, -1)
    return torch._scaled_mm(
        x.codes, weights.codes.T, scale_a=x.scales, scale_b=scales, out_dtype=dtype, use_fast_accum=True
    )


@dataclass(frozen=True)
class Weights:
    """A group's frozen weights: of each linear [outputs, inputs], and all of them turned, [inputs, sum of outputs]."""

    forward: list[Rounded]
    backward: Rounded

    @classmethod
    def of(cls, linears: Sequence[nn.Linear]) -> Weights | None:
        """Rounds them; None where their sizes are none that a GPU multiplies."""
        sizes = [size for linear in linears for size in linear.weight.shape]
        if any(size % _MULTIPLE for size in sizes):
            return None
        turned = torch.cat([linear.weight.detach() for linear in linears]).T.contiguous()
        return cls([rounded(linear.weight.detach()) for linear in linears], rounded(turned))


def check_device(name: str, device: torch.device) -> None:
    """Raises ModelError for a GPU without such products: a launch refuses it, a resume may find itself on one."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ModelError(
            f"{name}: trials in fp8 can't train on {torch.cuda.get_device_name(device)}; resume on a GPU of compute "
            "capability 8.9 or more"
        )


def compare(name: str, whole: float, found: float, tokens: int) -> None:
    """Compares the base model's loss (nats) over so many tokens, by its whole weights and by the rounded ones.

    Raises ModelError where they are so far apart that trials would learn to mend the rounding.
    """
    if not abs(found - whole) <= SHARE * whole + NATS * math.sqrt(tokens):
        raise ModelError(
            f"{name}: its loss is {found / tokens:.4f} in 8-bit floats, {whole / tokens:.4f} in bf16; "
            "use search.precision: bf16"
        )
