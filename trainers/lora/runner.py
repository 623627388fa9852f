"""Runs a stream through the base model: forward to hidden states, backward from their gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from trainers.engine import Kept, Warm
from trainers.lora import adamw
from trainers.lora.attention import packed as packed_attention
from trainers.lora.bank import Slot, padded
from trainers.lora.head import Targets
from trainers.lora.linear import PackedGroup
from trainers.lora.stream import Part, Span, Stream, lay, on_cpu
from trainers.models import Base
from trainers.splits import Split


class Runner(Protocol):
    """What an engine needs of a device. `shared`: a stream's room is shared out among trials."""

    shared: bool
    kept: Kept  # what `recover` would give back
    warm: Warm  # see Engine

    def seat(self, index: int, slot: Slot | None) -> None:
        """Puts a trial's buffers in a slot, or frees it."""

    def reach(self, longest: int) -> None:
        """Makes sure that examples of so many tokens can be run."""

    def load(self, split: Split, parts: Sequence[Part]) -> tuple[Stream, Targets]:
        """Lays the parts out on the device."""

    def forward(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the stream, detached."""

    def backward(self, stream: Stream, gradient: torch.Tensor) -> None:
        """Adds the adapters' gradients to the slots, from the gradient [T, d] of the last forward's hidden states."""

    def step(self, slots: Sequence[Slot], rates: Sequence[float]) -> torch.Tensor:
        """Takes an optimizer step of each slot at its rate, after which gradients are zero.

        Returns the gradients' norms before they were clipped, [slots].
        """

    def ready(self) -> None:
        """Tells that the model was found to be right: from here on speed counts."""

    def recover(self) -> None:
        """Forgets a forward that came to nothing, and gives back its memory and what is kept for speed alone."""


class CpuRunner:
    """Eager, one slot's tokens after the other's; streams are as long as their tokens.

    Together they would save nothing here, and torch rounds the last elements of a tensor, those short of a whole
    vector, in another way than the others: what a model computes between its linear layers would differ by a bit with
    how many tokens the neighbours have.
    """

    shared = False
    kept = Kept()
    warm = Warm()

    def __init__(self, base: Base, groups: list[PackedGroup], slots: int) -> None:
        self._base = base
        self._groups = groups
        self._slots = slots
        self._forwards: list[tuple[Stream, torch.Tensor]] = []

    def seat(self, index: int, slot: Slot | None) -> None:
        """Nothing: a stream's spans name their slots."""

    def reach(self, longest: int) -> None:
        """Nothing: a stream has room for whatever is in it."""

    def load(self, split: Split, parts: Sequence[Part]) -> tuple[Stream, Targets]:
        """Lays the parts out."""
        double = self._base.model.dtype == torch.float64
        laid = lay(split, parts, self._slots, np.float64 if double else np.float32)
        rank = max([padded(1), *(padded(part.slot.rank) for part in parts if part.slot is not None)])
        scored = laid.scored
        targets = Targets(
            *(torch.from_numpy(array) for array in (scored.predict, scored.targets, scored.owners, scored.weights))
        )
        return on_cpu(laid, parts, rank), targets

    def forward(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of the stream, detached."""
        self._forwards = []
        found = []
        for part in slot_by_slot(stream):
            self._run_through(part)
            with self.engaged():
                hidden = self.body(part, training)
            found.append(hidden.detach())
            if training:
                self._forwards.append((part, hidden))
        return torch.cat(found)

    def backward(self, stream: Stream, gradient: torch.Tensor) -> None:
        """Adds the adapters' gradients to the slots."""
        forwards, self._forwards = self._forwards, []
        for (part, hidden), slope in zip(forwards, gradient.split([p.tokens for p, _ in forwards]), strict=True):
            self._run_through(part)
            hidden.backward(slope)

    def step(self, slots: Sequence[Slot], rates: Sequence[float]) -> torch.Tensor:
        """Takes an optimizer step of each slot, one after the other."""
        return torch.stack([adamw.step(slot, rate) for slot, rate in zip(slots, rates, strict=True)])

    def engaged(self) -> AbstractContextManager[None]:
        """The model as `body` runs it, also for the recomputation in a backward pass."""
        return packed_attention(self._base.model)

    def body(self, stream: Stream, training: bool = True) -> torch.Tensor:
        """Hidden states [T, d] of one slot's stream, with their graph. Only while `engaged`."""
        embedded = self._base.model.get_input_embeddings()(stream.ids)
        hidden: torch.Tensor = self._base.decoder(
            inputs_embeds=embedded.requires_grad_(training),
            position_ids=stream.positions,
            use_cache=False,
            cu_seq_lens_q=stream.lengths,
            examples=stream.examples,
        ).last_hidden_state[0]
        return hidden

    def pace(self) -> None:
        """Nothing: the CPU is never behind."""

    def ready(self) -> None:
        """Nothing: it is as fast as it gets."""

    def recover(self) -> None:
        """Forgets a forward that came to nothing."""
        self._forwards = []

    def _run_through(self, stream: Stream) -> None:
        for group in self._groups:
            group.stream = stream


def slot_by_slot(stream: Stream) -> Iterator[Stream]:
    """Streams of one slot's tokens each, in their order."""
    first = 0
    for span, count in zip(stream.spans, stream.examples, strict=True):
        lengths = stream.lengths[first : first + count + 1]
        rows = slice(span.start, span.end)
        keys = span.keys if stream.dropout else None
        yield replace(
            stream,
            tokens=span.end - span.start,
            ids=stream.ids[:, rows],
            positions=stream.positions[:, rows],
            lengths=lengths - lengths[0],
            longest=int(lengths.diff().max()),
            spans=[Span(span.slot, 0, span.end - span.start, keys)],
            examples=[count],
            rounded=stream.rounded and (span.slot is None or span.slot.rounds),
        )
        first += count
