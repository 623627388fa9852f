"""The weights that a full-parameter trial trains: the base model's own, with fp32 masters where those are in bf16.

While a trial is in them, a copy of the base weights waits on the host (pinned, where there is a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM

from trainers.checkpoints import CheckpointError, load_tensors
from trainers.models import Base

MASTERS = "masters.safetensors"


class Weights(Protocol):
    """One process's part of a trial's weights. `base` is the model they are in; `masters` are fp32, by parameter.

    `compiled`: the model's layers compile themselves.
    """

    base: Base
    masters: dict[str, nn.Parameter]
    compiled: bool

    @property
    def kept_bytes(self) -> int:
        """Of the device, from one trial to the next."""

    def open(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """Puts the base weights in, or those of a checkpoint (fp32, on the host, by parameter)."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function that runs `base.decoder` and reads `base.head.weight`."""

    def gradients(self) -> list[torch.Tensor]:
        """Gives the masters the gradients that backward passes left, and returns them."""

    def stepped(self) -> None:
        """Brings the model up to date with its masters; their gradients are gone."""

    def gather(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """The whole of a tensor that is laid out as a master is, where the checkpoint is written; elsewhere None."""

    def scatter(self, name: str, whole: torch.Tensor | None, into: torch.Tensor) -> None:
        """Copies this process's part of a whole tensor, which only the first process needs to have."""

    def without_trial(self) -> AbstractContextManager[None]:
        """The base model as it was before the trial, for the time of the context."""

    def close(self) -> None:
        """Takes the trial out, also after an `open` that failed half-way."""

    def forget(self) -> None:
        """Gives back what is kept from one trial to the next; between trials."""


class Pristine:
    """The base weights, to be put back to the bit."""

    def __init__(self, base: Base) -> None:
        """Copies nothing yet."""
        self._base = base
        self._kept: dict[str, torch.Tensor] = {}

    def keep(self) -> Mapping[str, torch.Tensor]:
        """Copies the weights to the host, the first time; returns the copies by parameter (tied ones once)."""
        if not self._kept:
            pinned = self._base.device.type == "cuda"
            for name, weight in self._base.model.named_parameters():
                copy = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pinned)
                self._kept[name] = copy.copy_(weight.detach())
        return self._kept

    @torch.no_grad()
    def put(self) -> None:
        """Writes the base weights back into the model, if they were ever kept."""
        for name, weight in self._base.model.named_parameters():
            if name in self._kept:
                weight.copy_(self._kept[name], non_blocking=True)

    def leave(self) -> None:
        """Takes the weights off the device: the model can't be used until they `return_`."""
        kept = self.keep()
        if self._base.device.type != "cpu":
            for name, weight in self._base.model.named_parameters():
                weight.data = kept[name]

    def return_(self) -> None:
        """Brings the weights back onto the device."""
        for _, weight in self._base.model.named_parameters():
            weight.data = weight.data.to(self._base.device)


class Resident:
    """Implements `Weights` in the base model itself, in one process.

    With fixed gradients a weight that a step does not reach has a gradient of zero, and none otherwise: AdamW then
    steps it by its moments and its decay.

    Where the weights are in bf16, the optimizer steps fp32 masters, whose gradients are gathered in fp32 as backward
    yields them; after each step the weights are their rounding.
    """

    compiled = False

    def __init__(self, base: Base, fixed: bool = False) -> None:
        """`fixed` gradients stay where they are, from one trial to the next, as graphs need them."""
        self.base = base
        self.masters: dict[str, nn.Parameter] = {}
        self.pristine = Pristine(base)
        self._fixed = fixed
        self._gradients: dict[str, torch.Tensor] = {}
        self._rounded: list[nn.Parameter] = []  # weights that are not their own masters, in the masters' order
        self._hooks: list[RemovableHandle] = []

    def open(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """See Weights."""
        self.pristine.keep()
        self.base.model.requires_grad_(True)
        for name, weight in self.base.model.named_parameters():
            if weight.dtype == torch.float32:
                self.masters[name] = weight
            else:
                self.masters[name] = master = nn.Parameter(weight.detach().float())
                self._rounded.append(weight)
                self._hooks.append(weight.register_post_accumulate_grad_hook(_gather_into(master)))
        if self._fixed:
            for name, master in self.masters.items():
                if name not in self._gradients:
                    self._gradients[name] = torch.empty_like(master)
                master.grad = self._gradients[name].zero_()  # the trial before may have left in the middle of a step
        if saved is not None:
            check(self.masters, saved)
            with torch.no_grad():
                for name, master in self.masters.items():
                    master.copy_(saved[name])
            self._round()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Weights."""
        return function(*arguments)

    def gradients(self) -> list[torch.Tensor]:
        """See Weights."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def stepped(self) -> None:
        """See Weights."""
        if self._fixed:
            torch._foreach_zero_(list(self._gradients.values()))
        else:
            for master in self.masters.values():
                master.grad = None
        self._round()

    @property
    def kept_bytes(self) -> int:
        """See Weights."""
        return sum(gradient.nbytes for gradient in self._gradients.values())

    def forget(self) -> None:
        """See Weights."""
        self._gradients = {}

    def without_graphs(self) -> None:
        """From the next trial on gradients are made as they come."""
        self._fixed = False
        self.forget()

    @torch.no_grad()
    def _round(self) -> None:
        if self._rounded:
            torch._foreach_copy_(self._rounded, list(self.masters.values()))

    def gather(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor: all of it is here."""
        return tensor

    @torch.no_grad()
    def scatter(self, name: str, whole: torch.Tensor | None, into: torch.Tensor) -> None:
        """See Weights."""
        assert whole is not None
        into.copy_(whole)

    @contextmanager
    def without_trial(self) -> Iterator[None]:
        """The base model as it was before the trial, for the time of the context."""
        live = [] if self._rounded else [weight.detach().to("cpu", copy=True) for weight in self.masters.values()]
        if self.masters:
            self.pristine.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, tensor in zip(self.masters.values(), live, strict=False):
                    weight.copy_(tensor)
            self._round()

    def close(self) -> None:
        """See Weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._rounded, self.masters = [], [], {}
        model = self.base.model
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)
        model.eval()
        self.pristine.put()


def _gather_into(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A hook that moves a weight's gradient onto its fp32 master, so that it is added up there, not in bf16."""

    def gather(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return gather


def check(into: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor]) -> None:
    """Raises CheckpointError where saved weights are of another model."""
    wrong = [name for name in into if name not in saved or saved[name].shape != into[name].shape]
    if wrong:
        raise CheckpointError(f"the checkpoint is of another model ({wrong[0]} is missing or of another shape)")


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights in fp32 by parameter, on the host. Raises CheckpointError, OSError or ValueError."""
    if (checkpoint / MASTERS).exists():
        return load_tensors(checkpoint / MASTERS)
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return {name: weight.detach() for name, weight in model.named_parameters()}
