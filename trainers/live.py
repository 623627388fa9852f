"""A live trial, as the worker knows it: who it is, how far it came, what was measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.engine import Engine, Position
from trainers.messages import Admit, Method, TrialConfig

_NS_PER_MS = 1_000_000


@dataclass
class LiveTrial:
    """A trial in a slot. `train_*`, `*ed_ns` and `loss_*` cover the time since it was admitted or evaluated."""

    config: TrialConfig
    attempt: str
    folder: Path
    at: Position
    until_tokens: int | None
    examine: bool = False  # at its end
    standing: bool = False  # evaluated, until it is told what next
    saved: str | None = None  # the newest checkpoint
    saved_step: int = -1
    saved_mark_ns: int = 0  # the worker's trained time at that checkpoint
    train_tokens: int = 0
    train_ns: int = 0  # what it was charged of the time that it trained
    warm_ns: int = 0  # of that, what went into compiling and capturing,
    warm_tokens: int = 0  # and the tokens that were trained on the way
    passed_ns: int = 0  # that time, whoever was charged it
    shared_ns: int = 0  # that time, times the trials that trained in it
    batches_ns: int = 0  # that time, times their batch sizes together
    loss_sum: float = 0.0
    loss_steps: int = 0
    shown_step: int = 0  # of the last Progress

    @classmethod
    def admitted(cls, command: Admit, at: Position, trained_ns: int) -> LiveTrial:
        """A trial that came in, when the worker had trained for `trained_ns`: what it was resumed from is saved."""
        trial = cls(command.config, command.attempt, Path(command.folder), at, command.until_tokens, command.examine)
        trial.saved, trial.saved_step = command.resume, at.step if command.resume else -1
        trial.saved_mark_ns, trial.shown_step = trained_ns, at.step
        return trial

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.config.number

    @property
    def centre(self) -> str:
        """Its cost centre."""
        return f"trial:{self.number}"

    def arrived(self) -> bool:
        """Says whether it stands at its target or its end."""
        return self.at.done or (self.until_tokens is not None and self.at.tokens >= self.until_tokens)

    def measured(self) -> dict[str, Any]:
        """The fields of Evaluated that say what was trained, how long it took, and beside how many: the mean."""
        passed = self.passed_ns
        return {
            "train_loss": self.train_loss,
            "train_tokens": self.train_tokens,
            "train_ms": self.train_ns // _NS_PER_MS,
            "warm_ms": self.warm_ns // _NS_PER_MS,
            "warm_tokens": self.warm_tokens,
            "width": self.shared_ns / passed if passed else 1.0,
            "shared_batch": self.batches_ns / passed if passed else float(self.config.batch_size),
        }

    def take_loss(self, engine: Engine) -> float:
        """Takes in the mean training loss of the steps since the last call, nan if there were none, and returns it."""
        mean = engine.train_loss(self.number)
        steps = self.at.step - self.shown_step
        self.shown_step = self.at.step
        if steps and not math.isnan(mean):
            self.loss_sum += mean * steps
            self.loss_steps += steps
        return mean

    @property
    def train_loss(self) -> float:
        """The mean training loss; nan if nothing was trained."""
        return self.loss_sum / self.loss_steps if self.loss_steps else math.nan

    def begin_again(self) -> None:
        """Sets the measured figures to zero, after they were reported."""
        self.train_tokens = self.train_ns = self.passed_ns = self.shared_ns = self.batches_ns = 0
        self.loss_steps = self.warm_ns = self.warm_tokens = 0
        self.loss_sum = 0.0

    def place(self) -> dict[str, Any]:
        """Returns the fields that every TrialEvent has."""
        return {"trial": self.number, "attempt": self.attempt, "step": self.at.step, "tokens": self.at.tokens}

    def forget_later_checkpoints(self) -> None:
        """Removes checkpoints that a life which ended unheard left: as the newest they would push out good ones."""
        for path in self.folder.glob("ckpt-*"):
            if int(path.name.removeprefix("ckpt-")) > self.at.step:
                shutil.rmtree(path)


def nowhere(command: Admit) -> dict[str, Any]:
    """The fields that every TrialEvent has, of a trial that did not come in."""
    return {"trial": command.config.number, "attempt": command.attempt, "step": 0, "tokens": 0}


def refused(command: Admit, engines: Mapping[str, Engine], trials: int, present: Method | None) -> str | None:
    """Why a worker that has so many trials of the `present` method can't take another one in; None if it can."""
    method = command.config.method
    engine = engines.get(method)
    if engine is None:
        return f"this worker has no engine for {method} training"
    if trials and method != present:
        return f"this worker trains {present} trials; {method} must wait until its slots are free"
    if trials >= engine.slots:
        return f"all {engine.slots} slots are taken"
    if command.resume is not None and not Path(command.resume).is_dir():
        return f"there is no checkpoint at {command.resume}"
    return None
