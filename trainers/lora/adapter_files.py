"""A slot's adapter as a standard PEFT folder, for others, and its state as flat buffers, to be read back."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from trainers.checkpoints import (
    MOMENTS,
    OPTIMIZER,
    CheckpointError,
    State,
    load_tensors,
    read_state,
    save_tensors,
)
from trainers.lora.bank import Layout, Slot, check, initial
from trainers.messages import TrialConfig

ADAPTER = "adapter_model.safetensors"
WEIGHTS = "weights"
PIECE = 1 << 22  # bytes that are copied from a GPU at a time


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
    """A slot's weights and AdamW's moments (none before the first step), as they are when `ready`."""

    weights: torch.Tensor
    moments: dict[str, torch.Tensor]
    ready: torch.cuda.Event | None = None

    @classmethod
    def of(cls, slot: Slot, *, still: bool) -> Buffers:
        """Takes down what the slot holds now: copies, for which nobody waits here, or what is `still`, itself."""
        weights, moments = slot.weights, dict(slot.moments) if slot.steps else {}
        if not still:
            weights, moments = _copy(weights), {name: _copy(moment) for name, moment in moments.items()}
        ready = None
        if slot.weights.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        return cls(weights, moments, ready)

    def on_host(self) -> Buffers:
        """The same when it is there, on the host; for any thread.

        In a stream of its own a copy may be waited for: one of high priority, as those of the usual pool are handed
        out in turn, and graphs are captured in one of them.
        """
        if self.ready is None:
            return self
        if not self.weights.is_cuda:
            self.ready.synchronize()
            return Buffers(self.weights, self.moments)
        with torch.cuda.stream(torch.cuda.Stream(self.weights.device, priority=-1)):
            torch.cuda.current_stream().wait_event(self.ready)
            return Buffers(piecewise(self.weights), {name: piecewise(each) for name, each in self.moments.items()})


_own = threading.local()  # .pinned: this thread's, of PIECE bytes


def piecewise(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host of a flat tensor, which is waited for, through pinned memory that is the thread's own.

    While a GPU copies into other memory, no thread launches anything; and allocating as much pinned memory as a
    checkpoint needs stops all for tens to hundreds of milliseconds (docs/log.md).
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    if not hasattr(_own, "pinned"):
        _own.pinned = torch.empty(PIECE, dtype=torch.uint8, pin_memory=tensor.is_cuda)
    pinned = _own.pinned.view(tensor.dtype)
    for piece, source in zip(copy.split(len(pinned)), tensor.split(len(pinned)), strict=True):
        landed = pinned[: len(source)].copy_(source, non_blocking=True)
        if tensor.is_cuda:
            there = torch.cuda.Event(blocking=True)
            there.record()
            there.synchronize()
        piece.copy_(landed)
    return copy


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    # A copy that the host does not wait for lands in pinned memory.
    return tensor.to("cpu", non_blocking=True, copy=True)


def write_adapter(folder: Path, slot: Slot, name: str, endings: list[str], buffers: Buffers) -> None:
    """Writes the two files of a PEFT adapter of the model `name`, for modules with these name endings.

    PEFT's own saving asks the hub about embeddings and adds a model card.
    """
    save_tensors(folder / ADAPTER, named(slot, buffers.weights))
    config = lora_config(slot.config, endings)
    config.inference_mode = True
    config.base_model_name_or_path = name
    config.save_pretrained(str(folder))


def _entry(config: TrialConfig, name: str) -> str:
    """What a buffer is called in a file: it says of which adapter it is, which its size alone does not."""
    return f"{config.targets}.r{config.rank}.{name}"


def write_state_of(folder: Path, slot: Slot, buffers: Buffers) -> None:
    """Writes the weights and AdamW's moments, each as the buffer that it is: what a slot is filled from again.

    By linear layer, as others read an adapter, they are hundreds of tensors, which take ten times longer to name than
    to copy. The buffer's layout follows from model, targets and rank (trainers/lora/bank.py).
    """
    tensors = {WEIGHTS: buffers.weights, **buffers.moments}
    save_tensors(folder / OPTIMIZER, {_entry(slot.config, name): tensor for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Content:
    """What a trial's slot is to be filled with, on the host, and how far the trial is."""

    state: State
    weights: torch.Tensor
    moments: dict[str, torch.Tensor]  # none before the first step


def content_of(config: TrialConfig, layout: Layout, rows: int, checkpoint: Path | None) -> Content:
    """Makes a fresh trial's content, or reads it, in any thread; `rows` is how many there are to train on.

    Raises CheckpointError where the checkpoint is of another trial or other data, ValueError for a configuration that
    is none.
    """
    if checkpoint is None:
        return Content(State(config, 0, 0, rows), initial(config, layout), {})
    check(config, layout)
    state = read_state(checkpoint, config, rows)
    # Copied: what safetensors loads may be a view of the file, which is read when somebody looks, and AdamW writes.
    tensors = {entry: tensor.clone() for entry, tensor in load_tensors(checkpoint / OPTIMIZER).items()}
    names = (WEIGHTS, *(MOMENTS if state.step else ()))
    assert config.targets is not None and config.rank is not None
    shape = torch.Size([layout.elements(config.targets, config.rank)])
    if {entry: tensor.shape for entry, tensor in tensors.items()} != {_entry(config, name): shape for name in names}:
        raise CheckpointError(f"{checkpoint / OPTIMIZER}: is of an adapter of other modules or rank")
    found = {name: tensors[_entry(config, name)] for name in names}
    return Content(state, found.pop(WEIGHTS), found)


def fill(slot: Slot, content: Content) -> None:
    """Puts the content into the trial's slot."""
    slot.put(content.weights)
    slot.steps = content.state.step
    for name, moment in content.moments.items():
        slot.moments[name].copy_(moment)
