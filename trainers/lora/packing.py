"""The trials of a pack, and which examples go into a stream: whole ones, of one trial's batch or shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from trainers.lora.bank import Slot
from trainers.training import Run


@dataclass
class Batch:
    """What is left of one optimizer step: rows of the training split by their place in the batch, and their tokens."""

    rows: list[int]
    lengths: list[int]
    left: list[int] = field(default_factory=list)
    fresh: bool = True  # nothing of it was taken yet

    def __post_init__(self) -> None:
        """At first all is left."""
        self.left = list(range(len(self.rows)))

    @property
    def empty(self) -> bool:
        """Whether every example was taken."""
        return not self.left

    def take(self, budget: int) -> list[int]:
        """Takes places in their order while they fit into `budget` tokens, but at least one; returns them."""
        taken, room = [], budget
        while self.left and (not taken or self.lengths[self.left[0]] <= room):
            place = self.left.pop(0)
            room -= self.lengths[place]
            taken.append(place)
        self.fresh = False
        return taken

    def fill(self, room: int) -> list[int]:
        """Takes the places that fit into `room` tokens, the longest first; returns them in their order."""
        taken = []
        for place in sorted(self.left, key=lambda p: -self.lengths[p]):
            if self.lengths[place] <= room:
                room -= self.lengths[place]
                taken.append(place)
        gone = set(taken)
        self.left = [place for place in self.left if place not in gone]
        self.fresh = self.fresh and not taken
        return sorted(taken)


@dataclass(kw_only=True)
class Live(Run):
    """A trial in a slot; `batch` is what is left of its present optimizer step."""

    index: int
    slot: Slot
    batch: Batch | None = None


@dataclass
class Report:
    """Figures of optimizer steps on their way to the host: (trial, step) each, and [loss, gradient norm] of each."""

    steps: list[tuple[Live, int]]
    figures: torch.Tensor
    arrived: torch.cuda.Event | None


def turns(training: Sequence[Live]) -> list[Live]:
    """Who puts examples into the next stream, the first one first: batches that were begun, then who has trained least.

    A stream is of one precision, so those of the other one wait for theirs.
    """
    order = sorted(training, key=lambda live: (live.batch is not None and live.batch.fresh, live.tokens))
    return [live for live in order if live.slot.rounds == order[0].slot.rounds]


def share(batches: Sequence[Batch], budget: int) -> list[list[int]]:
    """Fills a stream of `budget` tokens from batches in their order; returns the places taken of each.

    A batch that fits goes in whole; what is left of the room is filled with the longest examples that fit. At least
    one example is taken, however long.
    """
    taken: list[list[int]] = [[] for _ in batches]
    room = budget
    for chosen, batch in zip(taken, batches, strict=True):
        places = batch.fill(room)
        room -= sum(batch.lengths[place] for place in places)
        chosen += places
    if not any(taken):
        taken[0] += batches[0].take(0)
    return taken
