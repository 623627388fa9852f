"""The Engine protocol: trains every admitted trial over one base model.

Nothing above it depends on the number of slots.

Torch-free, so that `replay.py` and tests can implement it without a model. An engine raises TrialFailed for what
concerns one trial; that trial's slot is free afterwards and its neighbours are untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainers.messages import FailureCode, TrialConfig
from trainers.splits import Split


class TrialFailed(Exception):
    """One trial cannot go on; `code` says why in a word, the message in a sentence."""

    def __init__(self, trial: int, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.trial = trial
        self.code = code


@dataclass(frozen=True)
class Position:
    """How far a trial is, over all its attempts."""

    step: int
    tokens: int
    done: bool  # the run is complete: step == ceil(examples / batch_size)


@dataclass(frozen=True)
class Evaluation:
    """Sums of negative log-likelihoods (nats) over completion tokens, over the rung rows and over all rows seen."""

    rung_nll: float
    rung_tokens: int
    nll: float
    completion_tokens: int
    input_tokens: int  # input tokens that were run through the model


@dataclass(frozen=True)
class Kept:
    """Bytes of the device that an engine keeps between trials for speed alone: tensors, and what graphs compute in."""

    allocated: int = 0
    in_graphs: int = 0


@dataclass(frozen=True)
class Warm:
    """Streams that were compiled for, or captured, or launched before that: they tell of no speed."""

    ns: int = 0
    tokens: int = 0  # real ones, of all trials

    def since(self, other: Warm) -> Warm:
        """What came after; nothing where the count began anew."""
        return Warm(max(self.ns - other.ns, 0), max(self.tokens - other.tokens, 0))


class Engine(Protocol):
    """Trains trials of one method. `slots` is how many at once."""

    slots: int

    @property
    def warm(self) -> Warm:
        """What went into compiling and capturing of the time in which it trained, since the start."""

    def prepare(self, config: TrialConfig, checkpoint: Path | None) -> Callable[[], None] | None:
        """What makes ready, in any thread and while others train, what `admit` of the same two needs; None: nothing.

        It raises nothing: what it met, `admit` meets again, and says. The slot is not taken before.
        """

    def admit(self, config: TrialConfig, checkpoint: Path | None, until_tokens: int | None) -> Position:
        """Puts the trial in a slot, from its checkpoint or fresh. Raises TrialFailed."""

    def target(self, trial: int, until_tokens: int | None) -> None:
        """Sets where the trial stands still next: at the first step with tokens >= until_tokens; None is its end."""

    def advance(self, pause: Callable[[], bool]) -> list[int]:
        """Trains all admitted trials short of their targets until one arrives, or `pause()` is true after a step.

        Returns the trials that stand at their targets. Raises TrialFailed for one trial at a time; where several
        failed, the next calls raise for the others. Where nobody arrived the last steps may still be under way on the
        device: what reads them waits.
        """

    def finish(self) -> None:
        """Waits for the steps that `advance` left under way: what comes next shall not be charged for them, or puts
        trials aside that may have failed in them. Raises TrialFailed as `advance` does."""

    def position(self, trial: int) -> Position:
        """Where the trial stands."""

    def train_loss(self, trial: int) -> float:
        """Mean training loss over the steps since the last call; nan if there were none."""

    def occupancy(self) -> float:
        """Real tokens of training over tokens computed, since the start; 1 where nothing is padded, nan before."""

    def evaluate(self, trial: int | None, rows: int | None) -> Evaluation:
        """Loss on the first `rows` validation rows (None: all) with the trial's weights; None is the base model.

        Raises TrialFailed; the trial's slot is free then.
        """

    def score(self, trial: int | None, split: Split, rows: Sequence[int]) -> NDArray[np.float64]:
        """Negative log-likelihood (nats) of each row's completion, float64 [rows], with the trial's weights.

        None is the base model. Raises TrialFailed as `evaluate` does.
        """

    def generate(
        self, trial: int | None, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """Greedy continuations of prompts (token ids), each up to an end token, which is left out.

        `ends` are ids of end tokens besides those that the tokenizer and the model's generation config name. Raises
        TrialFailed as `evaluate` does.
        """

    def checkpoint(self, trial: int, folder: Path) -> None:
        """Writes the trial whole into the new folder: standard PEFT or transformers files, optimizer and position.

        Of a full-parameter trial at its end the model and the position alone.

        Written under a temporary name, fsynced, renamed. Raises OSError; then nothing is left of it.
        """

    def snapshot(self, trial: int, *, still: bool) -> Callable[[Path], None] | None:
        """Takes down what `checkpoint` would write now; what is returned writes it, from any thread.

        `still`: the trial does not train, and keeps its slot, until that is done, so that nothing needs to be copied.
        None where that is not worth it: an engine of one slot has nobody to train meanwhile.
        """

    def drop(self, trial: int) -> None:
        """Frees the trial's slot. The base model is as it was."""

    def kept(self) -> Kept:
        """What `rest` would give back."""

    def rest(self) -> None:
        """Gives back what is kept for speed alone: another engine needs the device. Nobody is in a slot."""
