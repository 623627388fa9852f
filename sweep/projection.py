"""What trials will still take: the forecasts (budgets/forecast.py) put together with rungs and states."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any

from sqlalchemy import Connection

from budgets.forecast import Forecast, Piece, Seconds, Work, floor_seconds, flops_per_token, rounded_share
from sweep import records, seats
from sweep.pricing import SECONDS_A_TOKEN
from sweep.records import Study, TrialRow
from sweep.tables import CONFIRMATIONS
from trainers.messages import WRITERS, Checkpointed, Evaluated, Method, Paused, TrialConfig

# Effective FLOP/s before anything was measured. Small models reach far less of a GPU than large ones; the first
# evaluations correct this by whatever factor it is wrong.
PRIOR_FLOPS = {"H200": 1.5e14, "H100": 1.5e14, "B200": 2.5e14, "A100": 8e13, "L40S": 8e13, "MI300X": 1.5e14}
OTHER_GPU_FLOPS = 3e13
CORE_FLOPS = 5e10
DISK_BYTES_PER_SECOND = 4e8
COMPILE_SECONDS = 60.0
PROBE_SECONDS = 25.0  # of a GPU's first worker: how wide a pack should be (trainers/lora/probe.py keeps the answer)
USUAL_BATCH, USUAL_ROW = 8, 512  # examples a step and tokens an example; only what differs from them has a factor
START_SECONDS = {False: 10.0, True: 2.0}  # interpreter, imports, the check of the loss; a replay has none of them
# What a GPU's worker compiles and captures besides: with its probe it was ready after 39 to 41 s, and after 56 s where
# nothing was kept from before (135M on an H100, 2026-11-26).
WARM_SECONDS = 10.0
GENERATED = 10.0  # what a generated token takes beside an evaluated one, before anything was measured: one at a time
CHOICES = 4  # of a label, where the spec names none
SNAPSHOT_SECONDS = 0.02  # what an adapter's checkpoint keeps a GPU from training: it is written beside others' training
# Of a full-parameter trial's state, what is written at its end: bf16 weights without masters and moments.
MODEL_SHARE = 2 / 14
# An evaluation's forward pass over training's floor: 12 ms where a step is 14 (30 layers, captured, an H100, 2026).
EVALUATION_FLOOR = 0.8
# Of the logarithm of a pack's mean batch size, by the sd of those that the space has: how far it wanders while a trial
# is on its way. Measured on a simulation of packs of 32 whose searches change their mind about batches (docs/log.md).
WANDERS = 0.27
LEAST_MS = 0.5  # of what was measured as less than one
LEAST_SHARE = 0.1  # of a stretch that must have been training: else it was compiling, and says nothing
WORKS = 4096  # that are kept at most
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

    @property
    def shares(self) -> tuple[float, ...]:
        """The rungs before the end as shares of the longest run."""
        return tuple(tokens / self.run_tokens for tokens in self.rungs)

    def until(self, target: int) -> int | None:
        """Tokens at which a trial with this target stands still; None is the end."""
        return None if target >= self.last else self.rungs[target]


@dataclass(frozen=True)
class Examination:
    """What is measured at a trial's end beyond its loss, in tokens that an evaluation would read in that time."""

    metric: float = 0.0  # the user's metric over all validation rows: of every trial
    scores: float = 0.0  # every row of the test and retention rows, the metric of the test rows too: of a confirmation


def examination(study: Study) -> Examination:
    """What the spec's metric and the prepared rows make of it."""
    objective, splits = study.spec.objective, study.facts["data"]["splits"]

    def metric(split: str) -> float:
        rows, tokens = (float(splits.get(split, {}).get(name, 0)) for name in ("rows", "tokens"))
        if objective.metric == "validation_loss":
            return 0.0
        if objective.metric == "accuracy":
            return tokens * (len(objective.choices) if objective.choices else CHOICES)
        return tokens + GENERATED * rows * objective.max_new_tokens

    read = sum(splits[split]["tokens"] for split in ("test", "retention") if split in splits)
    return Examination(metric("validation"), read + metric("test"))


def plan(facts: dict[str, Any]) -> Plan:
    """Reads the plan that the launch stored with the study."""
    values = facts["plan"]
    return Plan(**{**values, "rungs": tuple(values["rungs"])})


class Projector:
    """Forecasts for one study on one machine; learns from every measurement that it is shown."""

    def __init__(
        self,
        plan: Plan,
        parameters: int,
        device: str,
        cores: int,
        unit: str = "hour",
        per_rank: Mapping[str, int] | None = None,
        probes: bool = False,
        examination: Examination = Examination(),
        flops: float | None = None,
        layers: int = 0,
        batches: Sequence[int] = (),
        writers: int = 1,
    ) -> None:
        """`unit` Mtok: the meter runs on tokens (sweep/pricing.py), so what a token takes is known.

        `per_rank`: by targets, how many parameters an adapter has for each unit of rank, where the launch saw them.
        `probes`: a worker may have to find its slots before it is ready. `examination`: what comes after a last
        evaluation. `flops`: a second, as an earlier study measured them on such a machine. `layers`: of the model, each
        of which a GPU needs a while for, however little it does. `batches`: the sizes that the space has. `writers`: as
        many adapters are written at once at a worker's end.
        """
        self.plan = plan
        self.parameters = parameters
        self.forecast = Forecast()
        self.width = 1.0  # how many LoRA trials share the machine as things stand
        self.batch: float | None = None  # their mean batch size; None: whoever is asked about has such as itself
        self._wanders = WANDERS * pstdev(map(math.log, batches)) if batches else 0.0
        self._per_rank = per_rank or {}
        self._writers = writers
        self._examination = examination
        self._probe_seconds = PROBE_SECONDS if probes else 0.0
        self._run_tokens = plan.run_tokens
        self._works: dict[tuple[Any, ...], Work] = {}  # they are asked for at every step, and follow from few things
        known = (speed for name, speed in PRIOR_FLOPS.items() if name in device.upper())
        self._metered_by_token = unit == "Mtok"
        self._replayed = device == "replay"
        self._on_gpu = device not in {"cpu", "replay"}
        self._model_share = 1.0 if self._replayed else MODEL_SHARE
        guess = next(known, OTHER_GPU_FLOPS) if self._on_gpu else CORE_FLOPS * cores
        self.flops = flops or guess
        # A machine that was found to be slower than the guess is slower in all that it does.
        self._layers = layers * guess / self.flops if self._on_gpu else 0.0

    def observe(self, config: TrialConfig, event: Evaluated | Paused | Checkpointed) -> None:
        """Learns from what a worker says of a trial."""
        if isinstance(event, Evaluated):
            self.observe_evaluation(config, event)
        elif config.method == "full" and event.checkpoint_ms:
            self.observe_state(event.checkpoint_ms)

    def observe_evaluation(self, config: TrialConfig, row: Any) -> None:
        """Learns from a stretch of training that ended in an evaluation (an Evaluated event, or its row)."""
        width = row.width if config.method == "lora" else 1.0
        tokens, trained_ms = row.train_tokens - row.warm_tokens, row.train_ms - row.warm_ms
        if tokens >= LEAST_SHARE * row.train_tokens and trained_ms >= LEAST_SHARE * row.train_ms:
            self._learn(self._train(config, width, row.shared_batch), tokens, trained_ms, width)
        self._learn(self._evaluate(config.method, row.evaluate_tokens), row.evaluate_tokens, row.evaluate_ms)
        written = self._kept(config.method, row.full_loss is not None)
        # A full-parameter trial that was written just before it was judged says 0, and nothing of what that took. An
        # adapter may say so too, before the first judgement of its kind, but where writing is free 0 is all there is.
        if written and (row.checkpoint_ms or config.method == "lora"):
            self._learn(self._piece("checkpoint", config.method), written, row.checkpoint_ms)
            # What keeps one of several waiting that are written at once keeps all: that the disk hung is seen once.
            at_once = min(self._writers, width)
            self._learn(self._piece("write", config.method), written, row.write_ms or row.checkpoint_ms, at_once)
        if row.examine_ms:
            self._learn(self._reading(config.method), self._examined(_confirms(config)), row.examine_ms)
        if row.full_loss is not None:  # at its end; all trials of a study train on the same examples, but for a finale
            self._run_tokens = round(row.tokens * self.plan.examples / config.examples)

    def of(self, plan: Plan) -> Projector:
        """The same forecasts with other lengths; what either learns from here on, both know."""
        other = copy.copy(self)
        other.plan, other._run_tokens, other._works = plan, plan.run_tokens, {}
        return other

    def among(self, width: float) -> Projector:
        """The same forecasts where so many LoRA trials share the machine; what either learns, both know."""
        other = copy.copy(self)
        other.width = width
        return other

    def _learn(self, work: Work, units: float, ms: int, width: float = 1.0) -> None:
        # What takes less than a millisecond, such as a checkpoint that is written beside training, reads 0. Left out it
        # would be taken for as dear as its first guess for ever. On a meter of tokens 0 is exact.
        if ms or not self._metered_by_token:
            self.forecast.observe(work, units, max(ms, LEAST_MS) / 1000, width)

    def observe_state(self, ms: int) -> None:
        """Learns how long a full-parameter trial's whole state took to write."""
        for kind in ("checkpoint", "write"):
            self._learn(self._piece(kind, "full"), 1, ms)

    def observe_load(self, ms: int) -> None:
        """Learns how long a worker took to get ready."""
        self._learn(self._piece("load", "lora"), 1, ms)

    def observe_compile(self, ms: int) -> None:
        """Learns how long a worker compiled in its whole life; one that compiled nothing says nothing."""
        self.forecast.observe(self._piece("compile", "lora"), 1, ms / 1000)

    def load(self) -> Seconds:
        """From the launch of a worker until it is ready, and what it then compiles, where workers do."""
        return self.forecast.total(self._start())

    def tail(self, methods: tuple[Method, ...], slots: int, *, confirms: bool = False) -> Seconds:
        """A last evaluation and the checkpoints of all slots on the disk, of which a full-parameter trial has one.

        `confirms`: that evaluation may be a confirmation's.
        """
        each = [self._pack_written(slots) if method == "lora" else self._written(method, 1) for method in methods]
        each = [one + self._last(m, confirms=confirms) for one, m in zip(each, methods, strict=True)]
        return max(each, key=lambda seconds: seconds.high)

    def ending(self, methods: tuple[Method, ...]) -> Seconds:
        """What comes after the training of one confirmation: evaluation, examination, checkpoint."""
        each = [self._written(m, self._kept(m, True)) + self._last(m, confirms=True) for m in methods]
        return max(each, key=lambda seconds: seconds.high)

    def examined(self, method: Method, *, confirms: bool) -> Seconds:
        """What is measured at a trial's end beyond its loss."""
        return self.forecast.total(self._examine(method, confirms))

    def _examine(self, method: Method, confirms: bool) -> list[Piece]:
        tokens = self._examined(confirms)
        # Until one was measured it is read as fast as an evaluation is, as far as that was measured.
        known = self.forecast.measured("examine")
        return [(self._reading(method) if known else self._evaluate(method, tokens), tokens)] if tokens else []

    def _examined(self, confirms: bool) -> float:
        return self._examination.metric + (self._examination.scores if confirms else 0.0)

    def _reading(self, method: Method) -> Work:
        work = self._evaluate(method, self._examined(confirms=True))
        return Work("examine", work.prior_seconds, work.features)

    def _last(self, method: Method, *, confirms: bool) -> Seconds:
        return self.evaluation(method, self.plan.validation_tokens) + self.examined(method, confirms=confirms)

    def _pack_written(self, slots: int) -> Seconds:
        """The adapters of all slots, several at once: after those under way, each round may be late, and a disk may
        take one at a time."""
        under_way = min(slots, self._writers) > 1
        rounds, alone = (self._written("lora", count) for count in (-(-slots // self._writers) + under_way, slots))
        return Seconds(alone.mean, rounds.low, max(rounds.high, alone.mean))

    def _written(self, method: str, count: float) -> Seconds:
        one = self.forecast.seconds(self._piece("write", method))
        return Seconds(one.mean * count, one.low * count, one.high * count)

    def evaluation(self, method: Method, tokens: int) -> Seconds:
        """An evaluation of so many tokens, by a method's engine; the base model is evaluated as an adapter is."""
        return self.forecast.seconds(self._evaluate(method, tokens), tokens)

    def checkpoint(self, method: str) -> Seconds:
        """What one trial's checkpoint keeps the machine from training."""
        return self.forecast.seconds(self._piece("checkpoint", method))

    def kept(self, method: str, final: bool) -> Seconds:
        """What is written when a trial arrives at a rung, or at its `final` one, keeps the machine from training."""
        return self.forecast.seconds(self._piece("checkpoint", method), self._kept(method, final))

    def _kept(self, method: str, final: bool) -> float:
        """How much of a checkpoint that is: a full-parameter trial's state is written when it is put aside alone."""
        if method == "lora":
            return 1.0
        return self._model_share if final else 0.0

    def train(self, config: TrialConfig, tokens: int, width: float = 1.0, shared_batch: float | None = None) -> Seconds:
        """A stretch of training, as it is charged in a pack of `width` trials, with so many examples a step in all."""
        return self.forecast.seconds(self._train(config, width, shared_batch), tokens)

    def to_target(self, trial: TrialRow) -> Seconds:
        """From where the trial stands to its next decision: training at the present width, evaluation, checkpoint."""
        return self.forecast.total(self._next(trial))

    def to_end(self, trial: TrialRow) -> Seconds:
        """From where the trial stands through all rungs to its end, from its next decision on alone.

        What a pack saves is not counted on for the end: the last one to train has nobody to share the machine with.
        """
        return self.forecast.total(self._whole(trial))

    def seconds_to_target(self, trial: TrialRow) -> float:
        """The mean of `to_target` alone."""
        return self.forecast.mean(self._next(trial))

    def seconds_to_end(self, trial: TrialRow) -> float:
        """The mean of `to_end` alone."""
        return self.forecast.mean(self._whole(trial))

    def known_widths(self, config: TrialConfig, rows: Sequence[Any], *, batches: bool = False) -> Seconds:
        """What stretches take that were measured, as if their widths alone were known: what forecasts are judged by.

        With `batches` as if it were also known how large those were that they shared the machine with.
        """
        pieces: list[Piece] = []
        for row in rows:
            kept = self._kept(config.method, row.full_loss is not None)
            train = self._train(config, row.width, row.shared_batch if batches else None)
            pieces += [(train, row.train_tokens)]
            pieces += [(self._evaluate(config.method, row.evaluate_tokens), row.evaluate_tokens)]
            pieces += [(self._piece("checkpoint", config.method), kept)]
        return self.forecast.total(pieces)

    def confirmation(self, trial: TrialRow, width: float) -> Seconds:
        """A confirmation's way to its end among `width` such that train at once, its examination included."""
        last, batches = self.plan.last, width * trial.config.batch_size
        way = self._way(trial.config, trial.tokens, last, last, width, batches)
        return self.forecast.total(self._seat(trial) + way)

    def ahead(self, running: Sequence[TrialRow], leader: TrialRow | None, launch: bool) -> Seconds:
        """All that is still to come: the next decision of those who run, the leader's way to its end, a worker's start.

        The sum of what `to_target`, `to_end` and `load` say, with the interval of the sum.
        """
        pieces = self._start() if launch else []
        for trial in running:
            pieces += self._next(trial)
        if leader is not None and any(trial.number == leader.number for trial in running):
            pieces += self._beyond(leader.config, leader.target)
        elif leader is not None:
            pieces += self._whole(leader)
        return self.forecast.total(pieces)

    def parking_pays(self, trial: TrialRow) -> bool:
        """Whether writing and reading the trial's state is cheaper than training it again up to here."""
        method = trial.config.method
        parked = self.checkpoint(method).mean + self.restore(method).mean
        return parked < self.train(trial.config, trial.tokens).mean

    def restore(self, method: str) -> Seconds:
        """Reading one trial's checkpoint."""
        return self.forecast.seconds(self._piece("restore", method))

    def _until(self, target: int, config: TrialConfig) -> int:
        # A finale may be longer than the longest run of the search.
        return self.plan.until(target) or round(self._run_tokens * config.examples / self.plan.examples)

    def _next(self, trial: TrialRow) -> list[Piece]:
        return self._seat(trial) + self._to_rung(trial, trial.target)

    def _whole(self, trial: TrialRow) -> list[Piece]:
        first = max(trial.target, trial.rung + 1)
        return self._seat(trial) + self._to_rung(trial, first) + self._beyond(trial.config, first)

    def _to_rung(self, trial: TrialRow, target: int) -> list[Piece]:
        return self._way(trial.config, trial.tokens, target, target, self.width)

    def _beyond(self, config: TrialConfig, rung: int) -> list[Piece]:
        return self._way(config, self._until(rung, config), rung + 1, self.plan.last, 1.0)

    def _way(
        self, config: TrialConfig, tokens: int, first: int, last: int, width: float, shared_batch: float | None = None
    ) -> list[Piece]:
        """Training from `tokens` on through the rungs from `first` to `last`, and what is done at each of them."""
        if first > last:
            return []
        pieces: list[Piece] = [(self._train(config, width, shared_batch), self._until(last, config) - tokens)]
        for target in range(first, last + 1):
            final = target >= self.plan.last
            seen = self.plan.validation_tokens if final else self.plan.rung_tokens
            kept = self._kept(config.method, final)
            pieces += [(self._evaluate(config.method, seen), seen), (self._piece("checkpoint", config.method), kept)]
        return pieces + (self._examine(config.method, _confirms(config)) if last >= self.plan.last else [])

    def _seat(self, trial: TrialRow) -> list[Piece]:
        parked = trial.slot is None and trial.checkpoint
        return [(self._piece("restore", trial.config.method), 1)] if parked else []

    def _start(self) -> list[Piece]:
        kinds = ["load", "compile"] if self.forecast.measured("compile") else ["load"]
        return [(self._piece(kind, "lora"), 1) for kind in kinds]

    def _once(self, make: Callable[..., Work], *arguments: Any) -> Work:
        key = make.__name__, *arguments
        if key not in self._works:
            if len(self._works) >= WORKS:  # a pack has another mean batch whenever somebody comes or goes
                self._works.clear()
            self._works[key] = make(*arguments)
        return self._works[key]

    def _train(self, config: TrialConfig, width: float, shared_batch: float | None = None) -> Work:
        """`shared_batch`: examples of one step of all that train, where that was measured. Else it is as things stand,
        which they will not do to the trial's end."""
        if config.method != "lora":
            width = 1.0
        loose = 0.0
        if not self._layers:
            shared_batch = config.batch_size  # nothing depends on the others'
        elif shared_batch is None:
            shared_batch = config.batch_size + (width - 1) * (self.batch or config.batch_size)
            loose = (1 - 1 / width) * self._wanders
        return self._once(self._training, config, width, shared_batch, loose)

    def _training(self, config: TrialConfig, width: float, shared_batch: float, loose: float) -> Work:
        row, rounded = self.plan.run_tokens / self.plan.examples, float(config.precision == "fp8")
        features = {
            "full": float(config.method == "full"),
            "log_batch": 0.0 if self._layers else math.log(config.batch_size / USUAL_BATCH),
            "log_row": math.log(row / USUAL_ROW),
            "attention": float(config.targets == "attention"),
            "mlp": float(config.targets == "mlp"),
            "rank": (config.rank or 0) / 64,
            "rounded": rounded,
        }
        if not self._layers:  # what of a step is fixed is learned from the widths that were measured
            features |= {"beside": 1 - 1 / width, "log_width": math.log(width)}
        adapter = (config.rank or 0) * self._per_rank.get(config.targets or "", 0)
        floor = floor_seconds(self._layers, shared_batch * row)
        share = rounded_share(self.parameters) ** rounded
        prior = share * flops_per_token(self.parameters, config.method, adapter) / self.flops + floor
        loose *= floor / prior
        prior = SECONDS_A_TOKEN if self._metered_by_token else prior
        return Work("train", prior, features, owner=str(config.number), loose=loose)

    def _evaluate(self, method: Method, tokens: float) -> Work:
        return self._once(self._evaluating, method, tokens)

    def _evaluating(self, method: Method, tokens: float) -> Work:
        prior = 2.0 * self.parameters / self.flops + EVALUATION_FLOOR * floor_seconds(self._layers, tokens)
        prior = SECONDS_A_TOKEN if self._metered_by_token else prior
        return Work("evaluate", prior, {"full": float(method == "full")})

    def _piece(self, kind: str, method: str) -> Work:
        return self._once(self._whole_piece, kind, method)

    def _whole_piece(self, kind: str, method: str) -> Work:
        full = method == "full"
        state = 14.0 * self.parameters / DISK_BYTES_PER_SECOND if full else 0.1
        start = (
            START_SECONDS[self._replayed]
            + WARM_SECONDS * self._on_gpu
            + 4.0 * self.parameters / DISK_BYTES_PER_SECOND
            + self._probe_seconds
        )
        prior = {"load": start, "compile": COMPILE_SECONDS}.get(kind, 0.1 + state)
        if kind == "checkpoint" and self._on_gpu and not full:
            prior = SNAPSHOT_SECONDS
        prior = FREE if self._metered_by_token else prior
        # An adapter's checkpoint says nothing about 14 bytes a parameter.
        return Work(f"{kind} of a full state" if full else kind, prior)


def untaught(study: Study) -> Projector:
    """The forecasts of a study before anything was measured."""
    facts = study.facts
    return Projector(
        plan(facts),
        facts["parameters"],
        facts["device"],
        facts["cores"],
        study.unit,
        facts.get("trained_parameters_per_rank"),
        seats.probes(study),
        examination(study),
        facts.get("flops"),
        facts.get("layers", 0),
        study.spec.search.batch_size,
        1 if study.timings is not None else WRITERS,
    )


def _confirms(config: TrialConfig) -> bool:
    return config.number >= CONFIRMATIONS


def projector_of(study: Study, connection: Connection) -> Projector:
    """Builds the forecasts of a study from everything that was measured."""
    projector = untaught(study)
    trials, workers = records.trials(connection, study.name), records.workers(connection, study.name)
    projector.width, projector.batch = seats.width(seats.slots(study, workers), trials), seats.batch(trials)
    configs = {trial.number: trial.config for trial in trials}
    # Studies of before they were kept in their order have the milliseconds alone.
    states = deque(one if isinstance(one, list) else [math.inf, one] for one in study.facts.get("state_ms", []))
    for row in records.evaluations(connection, study.name):
        while states and states[0][0] <= row.ordinal:
            projector.observe_state(states.popleft()[1])
        projector.observe_evaluation(configs[row.trial], row)
    for _, ms in states:
        projector.observe_state(ms)
    for worker in workers:
        if worker.load_ms is not None:
            projector.observe_load(worker.load_ms)
        if worker.state == "ended":  # one that lives may compile more
            projector.observe_compile(worker.usage.get("compile", 0))
    return projector
