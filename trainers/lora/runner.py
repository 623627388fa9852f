"""Runs a stream through the base model: forward to hidden states, backward from their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from trainers.lora.attention import packed as packed_attention
from trainers.lora.bank import Slot, padded
from trainers.lora.head import Targets
from trainers.lora.linear import PackedGroup
from trainers.lora.stream import Part, Stream, lay, on_cpu
from trainers.models import Base
from trainers.splits import Split


class Runner(Protocol):
    """What an engine needs of a device. `shared`: a stream's room is shared out among trials."""

    shared: bool

    def seat(self, index: int, slot: Slot | None) -> None:
        """Puts a trial's buffers in a slot, or frees it."""

    def load(self, split: Split, parts: Sequence[Part]) -> tuple[Stream, Targets]:
        """Lays the parts out on the device."""

    def forward(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the stream, detached."""

    def backward(self, stream: Stream, gradient: torch.Tensor) -> None:
        """Adds the adapters' gradients to the slots, from the gradient [T, d] of the last forward's hidden states."""

    def recover(self) -> None:
        """Forgets a forward that came to nothing, and gives its memory back."""


class CpuRunner:
    """Eager, slot by slot where bits could depend on a neighbour; streams are as long as their tokens."""

    shared = False

    def __init__(self, base: Base, groups: list[PackedGroup]) -> None:
        self._base = base
        self._groups = groups
        self._spare = 0
        self._hidden: torch.Tensor | None = None
        self._slots: dict[int, Slot] = {}

    def seat(self, index: int, slot: Slot | None) -> None:
        """Puts a trial's buffers in a slot, or frees it."""
        if slot is None:
            self._slots.pop(index, None)
        else:
            self._slots[index] = slot

    def load(self, split: Split, parts: Sequence[Part]) -> tuple[Stream, Targets]:
        """Lays the parts out."""
        spare = max([0, *self._slots]) + 1
        laid = lay(split, parts, spare)
        rank = max([padded(1), *(padded(part.slot.rank) for part in parts if part.slot is not None)])
        scored = laid.scored
        targets = Targets(
            *(torch.from_numpy(array) for array in (scored.predict, scored.targets, scored.owners, scored.weights))
        )
        return on_cpu(laid, parts, rank), targets

    def forward(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the stream, detached."""
        for group in self._groups:
            group.stream = stream
        embedded = self._base.model.get_input_embeddings()(stream.ids)
        with packed_attention(self._base.model):
            hidden = self._base.decoder(
                inputs_embeds=embedded.requires_grad_(training),
                position_ids=stream.positions,
                use_cache=False,
                cu_seq_lens_q=stream.lengths,
                examples=stream.examples,
            ).last_hidden_state[0]
        self._hidden = hidden if training else None
        return hidden.detach()

    def backward(self, stream: Stream, gradient: torch.Tensor) -> None:
        """Adds the adapters' gradients to the slots."""
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        hidden.backward(gradient)

    def recover(self) -> None:
        """Forgets a forward that came to nothing."""
        self._hidden = None
