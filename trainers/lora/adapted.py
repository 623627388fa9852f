"""One trial's adapter behind the plain linear layers, for what a packed stream cannot run: generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainers.lora.bank import Slot


@contextmanager
def adapted(slot: Slot) -> Iterator[None]:
    """The model with a slot's adapter, without dropout, for the time of the context; its layers are not packed then."""
    linears = {
        name: linear for group in slot.layout.groups for name, linear in zip(group.names, group.linears, strict=True)
    }
    handles = [
        linears[name].register_forward_hook(_adding(first, second, slot.scale))
        for name, first, second in slot.pairs(slot.copy)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(
    first: torch.Tensor, second: torch.Tensor, scale: float
) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], torch.Tensor]:
    """A hook that adds scale * B (A x) to a layer's output."""

    def add(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = inputs[0]
        return output + ((x.to(first.dtype) @ first.T) @ second.T * scale).to(output.dtype)

    return add
