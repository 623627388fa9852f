"""What both engines share: seeds, the schedule, how far a trial is, how an evaluation is summed up.

What a trial trains depends on its configuration and the data alone: dropout is reseeded at every step from seed and
step, so a restored trial needs no stored random state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.engine import Evaluation, Position
from trainers.health import Health
from trainers.messages import TrialConfig
from trainers.splits import Split, cut

INITIALISATION, DROPOUT = 1, 2  # what a seed is drawn for
# Input tokens run through the model at once. Attention over a flat batch costs the square of its length, which the
# launches it saves outweigh on a GPU alone.
MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}


def derive_seed(seed: int, *key: int) -> int:
    """A 63-bit seed from a trial's seed and what it is for; the same on every machine."""
    return int(np.random.SeedSequence((seed, *key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def rate(config: TrialConfig, step: int, steps: int) -> float:
    """The learning rate of a step (counted from 0): linear warm-up over a share of the steps, linear decay to zero.

    As transformers' `get_linear_schedule_with_warmup`, except that warm-up starts one step up: there, the first step
    has rate 0 and is paid for nothing.
    """
    warm = math.ceil(config.warmup * steps)
    factor = (step + 1) / warm if step < warm else (steps - step) / (steps - warm)
    return config.learning_rate * factor


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; the CPU's allocator says so only in its text."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass(kw_only=True)
class Run:
    """How far a trial in a slot is; `batches` are the rows of each optimizer step."""

    config: TrialConfig
    health: Health
    batches: list[NDArray[np.int64]]
    step: int = 0
    tokens: int = 0
    until_tokens: int | None = None
    losses: list[float] = field(default_factory=list)

    @property
    def position(self) -> Position:
        """How far it is."""
        return Position(self.step, self.tokens, self.step == len(self.batches))

    @property
    def arrived(self) -> bool:
        """Whether it stands at its target."""
        return self.position.done or (self.until_tokens is not None and self.tokens >= self.until_tokens)

    def take_loss(self) -> float:
        """Mean training loss over the steps since the last call; nan if there were none."""
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        self.losses.clear()
        return mean


class Late:
    """Figures on their way to the host: nothing waits for a GPU until they are read."""

    def __init__(self, figures: torch.Tensor) -> None:
        """Sends a tensor on its way."""
        self._figures = figures.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if figures.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[float]:
        """Waits for the figures and returns them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[float] = self._figures.tolist()
        return found


def evaluation(
    split: Split, rung_rows: int, count: int, micro_tokens: int, nll: Callable[[list[int]], torch.Tensor]
) -> Evaluation:
    """Sums up what `nll` says of the first `count` rows, a part of at most `micro_tokens` at a time.

    The rung rows form parts of their own, so that their loss is the same to the bit whether or not more follow.
    """
    rung = min(rung_rows, count)
    sums = []
    for rows in (range(rung), range(rung, count)):
        parts = [nll(part).double() for part in cut(rows, split.lengths, micro_tokens)]
        sums.append(float(sum(parts)) if parts else 0.0)
    return Evaluation(
        rung_nll=sums[0],
        rung_tokens=int(split.mask[: split.offsets[rung]].sum()),
        nll=sums[0] + sums[1],
        completion_tokens=int(split.mask[: split.offsets[count]].sum()),
        input_tokens=int(split.offsets[count]),
    )
