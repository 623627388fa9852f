"""Finds a model's linear layers and which of them read the same input, by looking at one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainers.lora.bank import Group
from trainers.models import Base, layer_linears


@torch.no_grad()
def find_groups(base: Base) -> list[Group]:
    """The linear layers of the decoder's layers, those of one kind that read one tensor in succession together.

    Found by module and by what happens, never by a model's name.
    """
    linears = layer_linears(base.model)
    names = {id(linear): name for name, (linear, _) in linears.items()}
    calls: list[tuple[str, torch.Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append((names[id(module)], inputs[0]))

    handles = [linear.register_forward_pre_hook(note) for linear, _ in linears.values()]
    try:
        base.decoder(input_ids=torch.zeros((1, 2), dtype=torch.long, device=base.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = {name: place for place, name in enumerate(linears)}
    groups: list[Group] = []
    read: torch.Tensor | None = None
    for name, given in calls:
        linear, kind = linears[name]
        if groups and given is read and kind == groups[-1].kind and given.shape[-1] == linear.in_features:
            last = groups[-1]
        else:
            last = Group(len(groups), kind, [], [], [])
            groups.append(last)
        last.names.append(name)
        last.linears.append(linear)
        last.order.append(order[name])
        read = given
    return groups
