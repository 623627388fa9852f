"""Full-parameter training in the base model's own weights, one trial at a time, into transformers folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM

from trainers.checkpoints import load_tensors, save_tensors
from trainers.messages import TrialConfig
from trainers.models import Base
from trainers.splits import Split
from trainers.training import SlotEngine

MASTERS = "masters.safetensors"


class FullEngine(SlotEngine):
    """One full-parameter trial in the base model's own weights.

    Where those are in bf16, the optimizer steps fp32 masters, whose gradients are gathered in fp32 as backward yields
    them; after each step the weights are their rounding. A copy of the base weights waits on the CPU from the first
    trial on and is put back when a trial leaves.
    """

    method = "full"

    def __init__(
        self, base: Base, train: Split, validation: Split, rung_rows: int, micro_tokens: int | None = None
    ) -> None:
        super().__init__(base, train, validation, rung_rows, micro_tokens)
        self._pristine: dict[str, torch.Tensor] = {}
        self._masters: dict[str, nn.Parameter] = {}
        self._hooks: list[RemovableHandle] = []

    def _weights(self) -> dict[str, nn.Parameter]:
        """The model's parameters; tied ones once."""
        return dict(self.base.model.named_parameters())

    def _open(self, config: TrialConfig, checkpoint: Path | None) -> dict[str, nn.Parameter]:
        weights = self._weights()
        if not self._pristine:
            self._pristine = {name: w.detach().to("cpu", copy=True) for name, w in weights.items()}
        saved = None if checkpoint is None else self._saved(checkpoint)
        self.base.model.requires_grad_(True)
        for name, weight in weights.items():
            if weight.dtype == torch.float32:
                self._masters[name] = weight
            else:
                self._masters[name] = master = nn.Parameter(weight.detach().float())
                self._hooks.append(weight.register_post_accumulate_grad_hook(_gather_into(master)))
        if saved is not None:
            with torch.no_grad():
                for name, master in self._masters.items():
                    master.copy_(saved[name])
            self._stepped()
        return self._masters

    def _saved(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """A checkpoint's weights in fp32 under the model's parameter names, on the CPU."""
        if (checkpoint / MASTERS).exists():
            return load_tensors(checkpoint / MASTERS)
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        return {name: weight.detach() for name, weight in model.named_parameters()}

    @torch.no_grad()
    def _stepped(self) -> None:
        for name, weight in self._weights().items():
            if self._masters[name] is not weight:
                weight.copy_(self._masters[name])

    @torch.no_grad()
    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._masters = [], {}
        self.base.model.zero_grad(set_to_none=True)
        self.base.model.requires_grad_(False)
        self.base.model.eval()
        self._put(self._pristine)

    @torch.no_grad()
    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        weights = self._weights()
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)

    def _write(self, folder: Path) -> None:
        self.base.model.save_pretrained(folder)
        self.base.tokenizer.save_pretrained(folder)
        if any(self._masters[name] is not weight for name, weight in self._weights().items()):
            save_tensors(folder / MASTERS, self._masters)

    @contextmanager
    def _base_weights(self) -> Iterator[None]:
        live = {name: weight.detach().to("cpu", copy=True) for name, weight in self._weights().items()}
        self._put(self._pristine)
        try:
            yield
        finally:
            self._put(live)


def _gather_into(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """A hook that moves a weight's gradient onto its fp32 master, so that it is added up there, not in bf16."""

    def gather(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return gather
