"""A stretch of training: one call of the engine, whose time the trials that trained share by their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.engine import Engine
from trainers.live import LiveTrial
from trainers.meter import Meter


class Stretch:
    """Who trains from now until `close`, and how far each came. `moved` holds tokens by cost centre, for the meter."""

    def __init__(self, meter: Meter, engine: Engine, trials: Sequence[LiveTrial]) -> None:
        """`trials` are those that train in the engine; the meter's time from here on is theirs."""
        self._meter = meter
        self._engine, self._warm = engine, engine.warm
        self._trials = trials
        self._spent_ns = {trial.number: meter.spent_ns(trial.centre) for trial in trials}
        self.moved = {trial.centre: 0 for trial in trials}
        self.started_ns = meter.now_ns()

    def account(self, gone: int | None = None) -> None:
        """Books the tokens trained since the last call, and moves a meter that runs on a file by them.

        `gone` is a trial that failed: it is out of the engine, which can't say any more how far it came.
        """
        for trial in self._trials:
            if trial.number == gone:
                continue
            at = self._engine.position(trial.number)
            moved = at.tokens - trial.at.tokens
            trial.at = at
            if moved:
                trial.train_tokens += moved
                self.moved[trial.centre] += moved
                with self._meter.on(trial.centre):
                    self._meter.work("train", trial.config.method, moved)
        centre = f"trial:{gone}"
        if centre in self.moved and not self.moved[centre]:
            # It failed before its first step was booked: the others' mean is what it can have taken, and a fair bill.
            others = [tokens for other, tokens in self.moved.items() if other != centre]
            self.moved[centre] = max(1, sum(others) // max(1, len(others)))

    def close(self) -> int:
        """Adds what each trial was charged to its figures; returns the nanoseconds since the start."""
        passed_ns = self._meter.now_ns() - self.started_ns
        warm, moved = self._engine.warm.since(self._warm), sum(self.moved.values())
        of_time, of_tokens = min(warm.ns / max(passed_ns, 1), 1.0), min(warm.tokens / max(moved, 1), 1.0)
        batches = sum(trial.config.batch_size for trial in self._trials)
        for trial in self._trials:
            charged_ns = self._meter.spent_ns(trial.centre) - self._spent_ns[trial.number]
            trial.train_ns += charged_ns
            trial.warm_ns += round(of_time * charged_ns)
            trial.warm_tokens += round(of_tokens * self.moved[trial.centre])
            trial.passed_ns += passed_ns
            trial.shared_ns += passed_ns * len(self._trials)
            trial.batches_ns += passed_ns * batches
        return passed_ns
