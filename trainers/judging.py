"""Judging: what a worker says of a trial that arrived, and of the base model, and whose time that took.

`Examiner` says what a model makes of rows; `Judge` asks it, charges the time, and answers in the fields of the events.
Torch-free. `data.test` is opened by `examine` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainers.engine import Engine, TrialFailed
from trainers.live import LiveTrial
from trainers.messages import Method, Scores
from trainers.meter import Meter
from trainers.metrics import MetricError

_NS_PER_MS = 1_000_000
_DECAY = 0.9  # of the longest that judging took, with every one that takes less
_RUNG = "rung"  # the kind of a judgement before a trial's end


@dataclass(frozen=True)
class Judgement:
    """Loss over the rung rows and over all rows that were looked at, and the input tokens that were run.

    Nats a completion token; where the metric is accuracy, the cross-entropy normalised over the choices, nats a row,
    and `right` says by row whether the true choice was the likeliest one.
    """

    rung_loss: float
    loss: float
    input_tokens: int
    right: list[float] | None = None


@dataclass(frozen=True)
class Measured:
    """The user's metric over all validation rows, with its standard error; tokens that were read or generated."""

    metric: float | None = None
    error: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Examination:
    """Scores by split, and the tokens that were read or generated."""

    scores: dict[str, Scores] = field(default_factory=dict)
    tokens: int = 0


class Examiner(Protocol):
    """Says what a model makes of the prepared rows; `trial` None is the base model.

    Raises TrialFailed, which frees the trial's slot, and MetricError, which does not.
    """

    def evaluate(self, engine: Engine, trial: int | None, rows: int | None) -> Judgement:
        """Judges the first `rows` validation rows (None: all), the rung rows first."""

    def measure(self, engine: Engine, trial: int, judgement: Judgement) -> Measured:
        """The metric over all validation rows; `judgement` is over all of them too."""

    def examine(self, engine: Engine, trial: int | None) -> Examination:
        """Scores every test row and, where there are some, every retention row."""

    def majority(self) -> dict[str, float]:
        """By split, what always giving the training rows' most frequent completion would score; {} without a metric."""


class Judge:
    """Judges trials and the base model; the fields it returns are those of the events in trainers/messages.py."""

    def __init__(self, examiner: Examiner, meter: Meter, rung_rows: int) -> None:
        self._examiner = examiner
        self._meter = meter
        self._rung_rows = rung_rows
        self._base: dict[str, Any] | None = None
        self._base_scores: dict[str, Any] | None = None
        self._longest_ms: dict[str, int] = {}  # by what was done: see `known`

    def longest_ms(self, trial: LiveTrial | None, guess: int) -> int:
        """The longest in ms that judging took lately: such a trial as this one, or any, examinations included, where
        none like it was judged or it is None; `guess` before the first."""
        longest = max(self._longest_ms.values(), default=guess)
        return longest if trial is None else self._longest_ms.get(_kind(trial), longest)

    def known(self, trial: LiveTrial) -> bool:
        """Says whether one like it was judged before, so that it is known how long that takes."""
        return _kind(trial) in self._longest_ms

    def trial(self, engine: Engine, trial: LiveTrial) -> dict[str, Any]:
        """Judges a trial that stands at a rung or at its end, and charges it the time. Raises TrialFailed."""
        final, method = trial.at.done, trial.config.method
        measured, examination = Measured(), Examination()
        with self._meter.on(trial.centre):
            started_ns = self._meter.now_ns()
            judgement = self._examiner.evaluate(engine, trial.number, None if final else self._rung_rows)
            self._meter.work("evaluate", method, judgement.input_tokens)
            if not math.isfinite(judgement.rung_loss):
                engine.drop(trial.number)
                raise TrialFailed(trial.number, "diverged", f"the validation loss is {judgement.rung_loss}")
            evaluated_ns = self._meter.now_ns()
            try:
                if final:
                    measured = self._examiner.measure(engine, trial.number, judgement)
                if final and trial.examine:
                    examination = self._examiner.examine(engine, trial.number)
            except MetricError as error:
                engine.drop(trial.number)
                raise TrialFailed(trial.number, "error", str(error)) from error
            self._meter.work("evaluate", method, measured.tokens + examination.tokens)
        ended_ns = self._meter.now_ns()
        kind, took_ms = _kind(trial), (ended_ns - started_ns) // _NS_PER_MS
        # The first of a kind may compile, or capture; that must not count as the usual time for ever.
        self._longest_ms[kind] = max(round(self._longest_ms.get(kind, 0) * _DECAY), took_ms)
        return {
            "loss": judgement.rung_loss,
            "full_loss": judgement.loss if final else None,
            "final": final,
            "evaluate_tokens": judgement.input_tokens,
            "evaluate_ms": (evaluated_ns - started_ns) // _NS_PER_MS,
            "metric": measured.metric,
            "metric_error": measured.error,
            "scores": examination.scores,
            "examine_ms": (ended_ns - evaluated_ns) // _NS_PER_MS,
        }

    def base(self, engine: Engine, method: Method) -> dict[str, Any]:
        """Fields of BaseEvaluated; the second time from memory. The time is charged to `load`."""
        if self._base is not None:
            return self._base | {"evaluate_ms": 0}
        started_ns = self._meter.now_ns()
        with self._meter.on("load"):
            found = self._examiner.evaluate(engine, None, None)
            self._meter.work("evaluate", method, found.input_tokens)
        self._base = {"loss": found.loss, "rung_loss": found.rung_loss, "tokens": found.input_tokens}
        took_ms = (self._meter.now_ns() - started_ns) // _NS_PER_MS
        for one in ("lora", "full"):  # of all rows, among which are a rung's, and whatever is behind them
            self._longest_ms.setdefault(f"{one} {_RUNG}", took_ms)
        return self._base | {"evaluate_ms": took_ms}

    def base_scores(self, engine: Engine, method: Method) -> dict[str, Any]:
        """Fields of BaseExamined; the second time from memory. The time is charged to `load`."""
        if self._base_scores is not None:
            return self._base_scores | {"examine_ms": 0}
        started_ns = self._meter.now_ns()
        with self._meter.on("load"):
            found = self._examiner.examine(engine, None)
            self._meter.work("evaluate", method, found.tokens)
            self._base_scores = {"scores": found.scores, "majority": self._examiner.majority()}
        return self._base_scores | {"examine_ms": (self._meter.now_ns() - started_ns) // _NS_PER_MS}


def _kind(trial: LiveTrial) -> str:
    stage = _RUNG if not trial.at.done else "examined" if trial.examine else "final"
    return f"{trial.config.method} {stage}"
