"""What trials will still take: the forecasts (budgets/forecast.py) put together with rungs and states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from budgets.forecast import NOTHING, Forecast, Seconds, Work, flops_per_token
from sweep import records
from sweep.pricing import SECONDS_A_TOKEN
from sweep.records import Study, TrialRow
from trainers.messages import TrialConfig

# Effective FLOP/s before anything was measured. Small models reach far less of a GPU than large ones; the first
# evaluations correct this by whatever factor it is wrong.
PRIOR_FLOPS = {"H200": 1.5e14, "H100": 1.5e14, "B200": 2.5e14, "A100": 8e13, "L40S": 8e13, "MI300X": 1.5e14}
OTHER_GPU_FLOPS = 3e13
CORE_FLOPS = 5e10
DISK_BYTES_PER_SECOND = 4e8
START_SECONDS = {False: 10.0, True: 2.0}  # interpreter, imports, the check of the loss; a replay has none of them
FREE = 1e-6  # seconds of what costs nothing where tokens are paid for


@dataclass(frozen=True)
class Plan:
    """The lengths that a study compares trials at, all derived before the first hold."""

    examples: int  # of the longest run
    run_tokens: int  # of the longest run, on average over the data
    rungs: tuple[int, ...]  # tokens of the rungs before the end
    rung_rows: int  # validation rows that a rung is judged on
    rung_tokens: int  # their input tokens, on average
    validation_tokens: int  # of all validation rows

    @property
    def last(self) -> int:
        """Index of the final rung, the end of the run."""
        return len(self.rungs)

    def until(self, target: int) -> int | None:
        """Tokens at which a trial with this target stands still; None is the end."""
        return None if target >= self.last else self.rungs[target]


def plan(facts: dict[str, Any]) -> Plan:
    """Reads the plan that the launch stored with the study."""
    values = facts["plan"]
    return Plan(**{**values, "rungs": tuple(values["rungs"])})


class Projector:
    """Forecasts for one study on one machine; learns from every measurement that it is shown."""

    def __init__(self, plan: Plan, parameters: int, device: str, cores: int, unit: str = "hour") -> None:
        """`unit` Mtok: the meter runs on tokens (sweep/pricing.py), so what a token takes is known."""
        self.plan = plan
        self.parameters = parameters
        self.forecast = Forecast()
        known = (speed for name, speed in PRIOR_FLOPS.items() if name in device.upper())
        self._metered_by_token = unit == "Mtok"
        self._replayed = device == "replay"
        self._flops = CORE_FLOPS * cores if device in {"cpu", "replay"} else next(known, OTHER_GPU_FLOPS)

    def observe_evaluation(self, config: TrialConfig, row: Any) -> None:
        """Learns from a stretch of training that ended in an evaluation (an Evaluated event, or its row)."""
        self.forecast.observe(self._train(config), row.train_tokens, row.train_ms / 1000)
        self.forecast.observe(self._evaluate(), row.evaluate_tokens, row.evaluate_ms / 1000)
        self.forecast.observe(self._piece("checkpoint", config.method), 1, row.checkpoint_ms / 1000)

    def observe_load(self, ms: int) -> None:
        """Learns how long a worker took to get ready."""
        self.forecast.observe(self._piece("load", "lora"), 1, ms / 1000)

    def load(self) -> Seconds:
        """From the launch of a worker until it is ready."""
        return self.forecast.seconds(self._piece("load", "lora"))

    def tail(self, methods: tuple[str, ...], slots: int) -> Seconds:
        """A last evaluation and the checkpoints of all slots."""
        saved = max((self.forecast.seconds(self._piece("checkpoint", m)) for m in methods), key=lambda s: s.high)
        pieces = Seconds(saved.mean * slots, saved.low * slots, saved.high * slots)
        return pieces + self.forecast.seconds(self._evaluate(), self.plan.validation_tokens)

    def evaluation(self, tokens: int) -> Seconds:
        """An evaluation of so many tokens."""
        return self.forecast.seconds(self._evaluate(), tokens)

    def checkpoint(self, method: str) -> Seconds:
        """One trial's checkpoint."""
        return self.forecast.seconds(self._piece("checkpoint", method))

    def train(self, config: TrialConfig, tokens: int) -> Seconds:
        """A stretch of training."""
        return self.forecast.seconds(self._train(config), tokens)

    def to_target(self, trial: TrialRow, target: int | None = None) -> Seconds:
        """From where the trial stands to its next decision: training, evaluation, checkpoint, its slot."""
        goal = trial.target if target is None else target
        tokens = (self.plan.until(goal) or self.plan.run_tokens) - trial.tokens
        rows = self.plan.validation_tokens if goal >= self.plan.last else self.plan.rung_tokens
        seconds = self.train(trial.config, tokens) + self.forecast.seconds(self._evaluate(), rows)
        seconds += self.forecast.seconds(self._piece("checkpoint", trial.config.method))
        return seconds + (self._restore(trial) if trial.slot is None and trial.checkpoint else NOTHING)

    def to_end(self, trial: TrialRow) -> Seconds:
        """From where the trial stands through all rungs to its end."""
        first = max(trial.target, trial.rung + 1)
        seconds = self.to_target(trial, self.plan.last)
        for _ in range(first, self.plan.last):
            seconds += self.forecast.seconds(self._evaluate(), self.plan.rung_tokens)
            seconds += self.forecast.seconds(self._piece("checkpoint", trial.config.method))
        return seconds

    def parking_pays(self, trial: TrialRow) -> bool:
        """Whether writing and reading the trial's state is cheaper than training it again up to here."""
        parked = self.forecast.seconds(self._piece("checkpoint", trial.config.method)).mean + self._restore(trial).mean
        return parked < self.train(trial.config, trial.tokens).mean

    def _restore(self, trial: TrialRow) -> Seconds:
        return self.forecast.seconds(self._piece("restore", trial.config.method))

    def _train(self, config: TrialConfig) -> Work:
        features = {
            "full": float(config.method == "full"),
            "log_batch": math.log(config.batch_size / 8),
            "attention": float(config.targets == "attention"),
            "mlp": float(config.targets == "mlp"),
            "rank": (config.rank or 0) / 64,
        }
        prior = flops_per_token(self.parameters, config.method) / self._flops
        prior = SECONDS_A_TOKEN if self._metered_by_token else prior
        return Work("train", prior, features, owner=str(config.number))

    def _evaluate(self) -> Work:
        prior = SECONDS_A_TOKEN if self._metered_by_token else 2.0 * self.parameters / self._flops
        return Work("evaluate", prior)

    def _piece(self, kind: str, method: str) -> Work:
        full = method == "full"
        state = 14.0 * self.parameters / DISK_BYTES_PER_SECOND if full else 0.1
        start = START_SECONDS[self._replayed] + 4.0 * self.parameters / DISK_BYTES_PER_SECOND
        prior = start if kind == "load" else 0.1 + state
        prior = FREE if self._metered_by_token else prior
        return Work(kind, prior, {"full": float(full)})


def projector_of(study: Study, connection: Connection) -> Projector:
    """Builds the forecasts of a study from everything that was measured."""
    facts = study.facts
    projector = Projector(plan(facts), facts["parameters"], facts["device"], facts["cores"], study.unit)
    configs = {t.number: t.config for t in records.trials(connection, study.name)}
    for row in records.evaluations(connection, study.name):
        projector.observe_evaluation(configs[row.trial], row)
    for worker in records.workers(connection, study.name):
        if worker.load_ms is not None:
            projector.observe_load(worker.load_ms)
    return projector
