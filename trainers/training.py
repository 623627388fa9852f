"""What both engines share: the step, the schedule, clipping, evaluation, targets, checkpoints and failures.

An engine of one slot is this class plus which parameters it trains and how they are put in, written and taken out.
What a trial trains depends on its configuration and the data alone: dropout is reseeded at every step from seed and
step, so a restored trial needs no stored random state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import nn

from trainers.checkpoints import (
    CheckpointError,
    State,
    holds,
    load_optimizer,
    read_state,
    save_optimizer,
    write_folder,
    write_state,
)
from trainers.engine import Evaluation, Position, TrialFailed
from trainers.loss import completion_nll, flat_batch
from trainers.messages import FailureCode, Method, TrialConfig
from trainers.models import Base, ModelError
from trainers.splits import Split, batches, cut

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


def make_optimizer(config: TrialConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with torch's defaults; weight decay on matrices alone, not on norms and biases, as the HF Trainer does."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, fused=fused)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory; the CPU's allocator says so only in its text."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass(kw_only=True)
class Run:
    """How far a trial in a slot is; `batches` are the rows of each optimizer step."""

    config: TrialConfig
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


@dataclass(kw_only=True)
class Trial(Run):
    """The trial in the slot. `parameters` are what the optimizer steps, under the names its checkpoint uses."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW


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


class SlotEngine(ABC):
    """An engine of one slot; implements `trainers.engine.Engine` but for what a subclass trains."""

    slots = 1
    method: Method

    def __init__(
        self, base: Base, train: Split, validation: Split, rung_rows: int, micro_tokens: int | None = None
    ) -> None:
        self.base = base
        self.train = train
        self.validation = validation
        self.rung_rows = rung_rows
        self.micro_tokens = micro_tokens or MICRO_TOKENS[base.device.type]
        self._trial: Trial | None = None

    @abstractmethod
    def _open(self, config: TrialConfig, checkpoint: Path | None) -> dict[str, nn.Parameter]:
        """Puts the trial's weights into the model, fresh or from a checkpoint; returns what is to be trained."""

    @abstractmethod
    def _close(self) -> None:
        """Makes the base model what it was, also after an `_open` that failed half-way."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Writes the trial's weights as a standard folder."""

    @abstractmethod
    def _base_weights(self) -> AbstractContextManager[None]:
        """The base model without the trial, for the time of the context."""

    @abstractmethod
    def _stepped(self) -> None:
        """Brings the model up to date after an optimizer step."""

    def admit(self, config: TrialConfig, checkpoint: Path | None, until_tokens: int | None) -> Position:
        """Puts the trial in the slot. Raises TrialFailed; RuntimeError where the slot or the base model is taken."""
        if self.base.busy:
            raise RuntimeError(f"trial {config.number} has no free slot")
        if config.method != self.method:
            raise RuntimeError(f"trial {config.number} is of method {config.method}, this engine of {self.method}")
        self.base.busy = True
        failure: TrialFailed | None = None
        try:
            self._trial = self._build(config, checkpoint)
        except (CheckpointError, ModelError, OSError, SafetensorError, ValueError) as error:
            failure = TrialFailed(config.number, "error", str(error))
        except RuntimeError as error:
            code: FailureCode = "out_of_memory" if is_out_of_memory(error) else "error"
            failure = TrialFailed(config.number, code, str(error).splitlines()[0])
        if failure is not None or self._trial is None:
            self._release()
            raise failure or RuntimeError("no trial was built")
        self._trial.until_tokens = until_tokens
        return self._trial.position

    def _build(self, config: TrialConfig, checkpoint: Path | None) -> Trial:
        if config.examples < 1 or config.batch_size < 1:
            raise ValueError(f"examples {config.examples} and batch_size {config.batch_size} must be at least 1")
        rows = self.train.rows
        state = State(config, 0, 0, rows) if checkpoint is None else read_state(checkpoint, config, rows)
        parameters = self._open(config, checkpoint)
        optimizer = make_optimizer(config, list(parameters.values()))
        if checkpoint is not None:
            load_optimizer(checkpoint, optimizer, parameters, state.step)
        return Trial(
            config=config,
            batches=batches(config, rows),
            parameters=parameters,
            optimizer=optimizer,
            step=state.step,
            tokens=state.tokens,
        )

    def target(self, trial: int, until_tokens: int | None) -> None:
        """Sets where the trial stands still next; None is its end."""
        self._of(trial).until_tokens = until_tokens

    def position(self, trial: int) -> Position:
        """Where the trial stands."""
        return self._of(trial).position

    def train_loss(self, trial: int) -> float:
        """Mean training loss (nats a completion token) over the steps since the last call; nan if there were none."""
        return self._of(trial).take_loss()

    def occupancy(self) -> float:
        """Real tokens over tokens computed: examples lie end to end, nothing is padded."""
        return 1.0

    def advance(self, pause: Callable[[], bool]) -> list[int]:
        """Trains until the trial arrives at its target or `pause()` is true after a step.

        Returns the trial if it stands at its target. Raises TrialFailed; the slot is free then.
        """
        trial = self._trial
        if trial is None:
            return []
        self.base.model.train()
        while not trial.arrived:
            self._step(trial)
            if pause():
                break
        return [trial.config.number] if trial.arrived else []

    def _step(self, trial: Trial) -> None:
        """One optimizer step. A loss or gradient that is not finite, or a lack of memory, ends the trial instead."""
        config, step = trial.config, trial.step
        failure: tuple[FailureCode, str] | None = None
        rows = trial.batches[step]
        try:
            loss = self._gradients(config, step, rows)
            parameters = list(trial.parameters.values())
            norm = float(nn.utils.clip_grad_norm_(parameters, config.clip_norm))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                failure = ("diverged", f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}")
            else:
                for group in trial.optimizer.param_groups:
                    group["lr"] = rate(config, step, len(trial.batches))
                trial.optimizer.step()
                trial.optimizer.zero_grad(set_to_none=True)
                self._stepped()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = ("out_of_memory", f"step {step + 1}: {str(error).splitlines()[0]}")
        if failure is not None:
            # Outside the except block, whose traceback would keep the tensors of the failed step alive.
            self.drop(config.number)
            raise TrialFailed(config.number, *failure)
        trial.step += 1
        trial.tokens += int(self.train.lengths[rows].sum())
        trial.losses.append(loss)

    def _gradients(self, config: TrialConfig, step: int, rows: NDArray[np.int64]) -> float:
        """Accumulates the gradient of the batch's mean loss over completion tokens; returns that loss."""
        torch.manual_seed(derive_seed(config.seed, DROPOUT, step))
        completion = sum(int(self.train[int(row)].mask.sum()) for row in rows)
        total = torch.zeros((), device=self.base.device)
        for part in cut(rows.tolist(), self.train.lengths, self.micro_tokens):
            batch = flat_batch([self.train[row] for row in part], self.base.device)
            loss = completion_nll(self.base.decoder, self.base.head, batch) / completion
            loss.backward()
            total += loss.detach()
        return float(total)

    def evaluate(self, trial: int | None, rows: int | None) -> Evaluation:
        """Loss on the first `rows` validation rows (None: all) with the trial's weights; None is the base model.

        Raises TrialFailed (the slot is free then) where a trial's loss is not finite or memory runs out.
        """
        count = self.validation.rows if rows is None else min(rows, self.validation.rows)
        failure: tuple[FailureCode, str] | None = None
        try:
            if trial is None and self._trial is not None:
                with self._base_weights():
                    result = self._evaluate(count)
            else:
                result = self._evaluate(count)
        except RuntimeError as error:
            if trial is None or not is_out_of_memory(error):
                raise
            failure = ("out_of_memory", f"evaluation: {str(error).splitlines()[0]}")
        if failure is None and trial is not None and not math.isfinite(result.nll):
            failure = ("diverged", f"evaluation: loss {result.nll:g}")
        if failure is not None and trial is not None:
            self.drop(trial)
            raise TrialFailed(trial, *failure)
        return result

    @torch.no_grad()
    def _evaluate(self, count: int) -> Evaluation:
        self.base.model.eval()

        def nll(part: list[int]) -> torch.Tensor:
            batch = flat_batch([self.validation[row] for row in part], self.base.device)
            return completion_nll(self.base.decoder, self.base.head, batch)

        return evaluation(self.validation, self.rung_rows, count, self.micro_tokens, nll)

    def checkpoint(self, trial: int, folder: Path) -> None:
        """Writes the trial whole into `folder`, or nothing. Raises OSError."""
        live = self._of(trial)
        state = State(live.config, live.step, live.tokens, self.train.rows)
        if holds(folder, state):
            # A trial that repeats a stretch after a crash arrives at checkpoints that are there already.
            return
        with write_folder(folder) as temporary:
            self._write(temporary)
            save_optimizer(temporary, live.optimizer, live.parameters)
            write_state(temporary, state)

    def snapshot(self, trial: int) -> Callable[[Path], None] | None:
        """None: nobody else trains while its only trial is written."""
        self._of(trial)
        return None

    def drop(self, trial: int) -> None:
        """Frees the slot. The base model is as it was, to the bit."""
        self._of(trial)
        self._release()

    def _release(self) -> None:
        self._trial = None
        self._close()
        self.base.busy = False
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()

    def _of(self, trial: int) -> Trial:
        if self._trial is None or self._trial.config.number != trial:
            raise KeyError(f"trial {trial} is in no slot of this engine")
        return self._trial
