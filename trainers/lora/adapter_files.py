"""A slot's adapter as a standard PEFT folder with its optimizer state: written from flat buffers and read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from trainers.checkpoints import MOMENTS, OPTIMIZER, CheckpointError, load_tensors, save_tensors
from trainers.lora.bank import Slot
from trainers.messages import TrialConfig
from trainers.models import Base, target_modules

ADAPTER = "adapter_model.safetensors"


def lora_config(config: TrialConfig, endings: list[str]) -> LoraConfig:
    """PEFT's configuration of a trial, for modules with these name endings. Raises ValueError without rank or alpha."""
    if config.rank is None or config.alpha is None:
        raise ValueError(f"trial {config.number}: LoRA needs rank and alpha")
    # PEFT types alpha as an integer but takes any number; whole ones are written as the integers that readers expect.
    alpha: Any = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        target_modules=endings,
        lora_dropout=config.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


def named(slot: Slot, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of one of a slot's buffers under the names that PEFT's files use, as views."""
    parts = {}
    for name, first, second in slot.pairs(buffer):
        parts[f"base_model.model.{name}.lora_A.weight"] = first
        parts[f"base_model.model.{name}.lora_B.weight"] = second
    return parts


@dataclass(frozen=True)
class Buffers:
    """A slot's weights and AdamW's moments (none before the first step), taken down on the host."""

    weights: torch.Tensor
    moments: dict[str, torch.Tensor]
    arrived: torch.cuda.Event | None  # when the copies are there

    @classmethod
    def of(cls, slot: Slot) -> Buffers:
        """Copies what the slot holds now. A GPU makes the copies when its turn is; nothing waits for it here."""
        state = slot.optimizer.state.get(slot.weights, {})
        weights = _copy(slot.weights.detach())
        moments = {moment: _copy(state[moment]) for moment in MOMENTS if moment in state}
        arrived = None
        if slot.weights.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        return cls(weights, moments, arrived)

    def wait(self) -> None:
        """Waits until the copies are there."""
        if self.arrived is not None:
            self.arrived.synchronize()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # A copy that the host does not wait for lands in pinned memory.
    return tensor.to("cpu", non_blocking=True, copy=True)


def write_adapter(folder: Path, slot: Slot, base: Base, buffers: Buffers) -> None:
    """Writes the two files of a PEFT adapter. PEFT's own saving asks the hub about embeddings and adds a model card."""
    buffers.wait()
    save_tensors(folder / ADAPTER, named(slot, buffers.weights))
    assert slot.config.targets is not None
    config = lora_config(slot.config, target_modules(base.model, slot.config.targets))
    config.inference_mode = True
    config.base_model_name_or_path = base.name
    config.save_pretrained(str(folder))


def write_optimizer(folder: Path, slot: Slot, buffers: Buffers) -> None:
    """Writes AdamW's moments under the parameters' names; none before the first step."""
    buffers.wait()
    tensors = {
        f"{name}.{moment}": part
        for moment, buffer in buffers.moments.items()
        for name, part in named(slot, buffer).items()
    }
    save_tensors(folder / OPTIMIZER, tensors)


@torch.no_grad()
def read_adapter(folder: Path, slot: Slot) -> None:
    """Fills a slot's weights from a PEFT adapter. Raises CheckpointError where it is of other modules or rank."""
    tensors = load_tensors(folder / ADAPTER)
    mine = named(slot, slot.weights)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in mine.items()}:
        raise CheckpointError(f"{folder / ADAPTER}: is an adapter of other modules or rank")
    for name, part in mine.items():
        part.copy_(tensors[name])
    slot.refresh()


@torch.no_grad()
def read_optimizer(folder: Path, slot: Slot, step: int) -> None:
    """Gives AdamW its moments and step count back. Raises CheckpointError where they are of other parameters."""
    if step == 0:
        return
    tensors = load_tensors(folder / OPTIMIZER)
    moments = {moment: torch.zeros_like(slot.weights.detach()) for moment in MOMENTS}
    parts = {f"{n}.{moment}": part for moment in MOMENTS for n, part in named(slot, moments[moment]).items()}
    if tensors.keys() != parts.keys():
        raise CheckpointError(f"{folder / OPTIMIZER}: is of other parameters")
    for name, part in parts.items():
        part.copy_(tensors[name])
    device = slot.weights.device
    slot.optimizer.state[slot.weights] = {"step": torch.tensor(float(step), device=device), **moments}
