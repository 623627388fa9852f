"""A machine on which recorded curves are trained in simulated time, for the real loop and by the real worker's code.

Of a real study three things are slow: processes (a second to start), waiting for them (20 ms a look), and fsync. Here
the worker lives in the orchestrator's own process. Whenever the loop looks for events, the worker takes turns until it
has something to say or has nothing to do, on a meter that moves by recorded seconds; so nobody ever waits, and the same
seed gives the same study on every machine. The database belongs on a disk in memory (/dev/shm). What is left is the
loop's own work, some 10 ms a step.

Slots work as everywhere, but what a pack saves is not counted: a dollar buys the same solo seconds however many share
the machine, as it does for the searches that this is compared with.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tables import SPACE, Row, Run, Table, choose_seed, cooldown_steps
from trainers.engine import Engine, Evaluation, Kept, Position, TrialFailed, Warm
from trainers.judging import Examination, Judge, Judgement, Measured
from trainers.live import LiveTrial
from trainers.messages import Command, Event, Progress, Ready, TrialConfig, UsageRecord, WorkerJob
from trainers.meter import Kind, Meter, Timings
from trainers.replay import ReplayEngines, remove_older
from trainers.splits import Split
from trainers.worker import Worker

MICROS_PER_HOUR = 3_600_000  # $3.60/hour: a thousand micro-dollars a second
LOAD_SECONDS = 10.0
STATE_SECONDS = 0.5  # of a checkpoint, and of reading one
BOOT = ("simulated", 0)
VALIDATION_TOKENS = 10_000


@dataclass
class _Slot:
    config: TrialConfig
    row: Row
    run: Run
    tokens_per_example: float
    steps: int
    step: int
    until_tokens: int | None
    losses: list[float] = field(default_factory=list)

    def tokens_at(self, step: int) -> int:
        return round(min(step * self.config.batch_size, self.config.examples) * self.tokens_per_example)

    @property
    def share(self) -> float:
        return min(self.step * self.config.batch_size / self.config.examples, 1.0)

    @property
    def position(self) -> Position:
        return Position(step=self.step, tokens=self.tokens_at(self.step), done=self.step >= self.steps)

    @property
    def arrived(self) -> bool:
        at = self.position
        return at.done or (self.until_tokens is not None and at.tokens >= self.until_tokens)


class TableEngine:
    """The engine protocol over a table: a trial's configuration must be one of its rows."""

    warm = Warm()

    def __init__(self, table: Table, seed: int, slots: int) -> None:
        """`seed` says which recorded seed of each row is replayed."""
        self.slots = slots
        self._table = table
        self._seed = seed
        self._rows = {_key(row.config): row for row in table.rows}
        self._trials: dict[int, _Slot] = {}
        self.copied_tokens = 0.0  # that the copy was trained on which was evaluated last (benchmarks/branches.py)

    def row(self, config: TrialConfig) -> Row:
        """The configuration's row. Raises TrialFailed."""
        row = self._rows.get(_key(vars(config)))
        if row is None:
            raise TrialFailed(config.number, "error", "the table has no such configuration")
        return row

    def admit(self, config: TrialConfig, checkpoint: Path | None, until_tokens: int | None) -> Position:
        """See Engine."""
        row = self.row(config)
        step = 0 if checkpoint is None else int(json.loads((checkpoint / "state.json").read_text())["step"])
        steps = math.ceil(config.examples / config.batch_size)
        known = row.runs[choose_seed(row, self._seed)]
        each = float(self._table.facts["tokens_per_example"])
        self._trials[config.number] = _Slot(config, row, known, each, steps, step, until_tokens)
        return self.position(config.number)

    def target(self, trial: int, until_tokens: int | None) -> None:
        """See Engine."""
        self._trials[trial].until_tokens = until_tokens

    def advance(self, pause: Callable[[], bool]) -> list[int]:
        """See Engine. Steps all trials in turn, one optimizer step each."""
        while short := [slot for slot in self._trials.values() if not slot.arrived]:
            for slot in short:
                self._step(slot)
            if pause() or any(slot.arrived for slot in short):
                break
        return [number for number, slot in self._trials.items() if slot.arrived]

    def _step(self, slot: _Slot) -> None:
        slot.step += 1
        if slot.share >= self._table.death(slot.run):
            del self._trials[slot.config.number]
            raise TrialFailed(slot.config.number, "diverged", f"step {slot.step}: loss nan")
        slot.losses.append(self._table.loss(slot.run, slot.share))

    def finish(self) -> None:
        """See Engine."""

    def position(self, trial: int) -> Position:
        """See Engine."""
        return self._trials[trial].position

    def train_loss(self, trial: int) -> float:
        """See Engine. Training loss was not recorded; the validation loss stands for it."""
        losses, self._trials[trial].losses = self._trials[trial].losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def occupancy(self) -> float:
        """See Engine."""
        return 1.0

    def evaluate(self, trial: int | None, rows: int | None) -> Evaluation:
        """See Engine. Rungs and ends are judged on the same rows, as they were recorded."""
        loss, self.copied_tokens = self._table.base_loss, 0.0
        if trial is not None:
            slot = self._trials[trial]
            loss = self._table.loss(slot.run, slot.share)
            before = slot.share - 1 / slot.steps
            if any(before < share <= slot.share for share in self._table.facts.get("branches", ())):
                self.copied_tokens = slot.tokens_at(cooldown_steps(slot.step))
        count = VALIDATION_TOKENS
        return Evaluation(
            rung_nll=loss * count, rung_tokens=count, nll=loss * count, completion_tokens=count, input_tokens=count
        )

    def score(self, trial: int | None, split: Split, rows: Sequence[int]) -> NDArray[np.float64]:
        """See Engine. Raises RuntimeError: examples were not recorded."""
        raise RuntimeError("a table holds no losses by example")

    def generate(
        self, trial: int | None, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """See Engine. Raises RuntimeError: text was not recorded."""
        raise RuntimeError("a table holds no text")

    def checkpoint(self, trial: int, folder: Path) -> None:
        """See Engine."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"step": self._trials[trial].step}))

    def drop(self, trial: int) -> None:
        """See Engine."""
        del self._trials[trial]

    def kept(self) -> Kept:
        """See Engine."""
        return Kept()

    def rest(self) -> None:
        """See Engine."""


def _key(config: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(config[name] for name in ("method", *SPACE))


class _TableMeter(Meter):
    """A meter on recorded seconds, which differ by configuration: the cost centre says whose work it is."""

    def __init__(self, timings: Timings, engine: TableEngine) -> None:
        super().__init__(None, timings)
        self._engine = engine
        self.rows: dict[str, Row] = {}  # by cost centre

    def wait_until(self, ms: int) -> None:
        """Lets time pass."""
        self._worked_ns = max(self._worked_ns, ms * 1_000_000)

    def work(self, kind: Kind, method: Any, tokens: int) -> None:
        """Moves the meter by what the table says of the trial at work."""
        row = self.rows.get(self._centre)
        if row is not None and kind == "evaluate" and not tokens:
            return  # a metric of no tokens, after the evaluation
        if row is None or kind not in ("train", "evaluate"):
            super().work(kind, method, tokens)
        else:
            copied = self._engine.copied_tokens if kind == "evaluate" else tokens
            seconds = row.seconds_per_token * copied + (row.evaluate_seconds if kind == "evaluate" else 0.0)
            self._worked_ns += round(seconds * 1e9)


class _Queue:
    """The worker's inbox, in memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def waiting(self, timeout_s: float = 0.0) -> bool:
        """Says whether anything is there; nothing comes while the worker has its turn."""
        return bool(self.lines)

    def take(self) -> list[str]:
        """Returns what is there."""
        lines, self.lines = self.lines, []
        return lines


class _Losses:
    """Implements `trainers.judging.Examiner` on a table, which holds validation losses and nothing by example."""

    def evaluate(self, engine: Engine, trial: int | None, rows: int | None) -> Judgement:
        """See Examiner."""
        found = engine.evaluate(trial, rows)
        return Judgement(found.rung_nll / found.rung_tokens, found.nll / found.completion_tokens, found.input_tokens)

    def measure(self, engine: Engine, trial: int, judgement: Judgement) -> Measured:
        """See Examiner."""
        return Measured()

    def examine(self, engine: Engine, trial: int | None) -> Examination:
        """See Examiner."""
        return Examination()

    def majority(self) -> dict[str, float]:
        """See Examiner."""
        return {}


class _Worker(Worker):
    """The real worker, which takes turns in its orchestrator's process."""

    def __init__(self, job: WorkerJob, engine: TableEngine, meter: _TableMeter) -> None:
        super().__init__(job, meter, -1, -1)
        self._inbox: Any = _Queue()
        self.said: list[Event] = []
        self.exit_code: int | None = None
        self._table_engine, self._table_meter = engine, meter
        self._waits_for_ms = self._looks = -1  # the work time that is used up, and how often we were asked since

    def load(self) -> None:
        """Gets ready."""
        self._loaded, self._remove_older = ReplayEngines({"lora": self._table_engine}, "simulated", 1, []), remove_older
        self._judge = Judge(_Losses(), self._meter, self._job.rung_rows)
        self._meter.work("load", "lora", 0)
        self._emit(Ready, device="simulated", slots={"lora": self._table_engine.slots}, parameters=1)
        self._meter.ready()

    def send(self, command: Command) -> None:
        """Takes a command."""
        if hasattr(command, "config"):
            config = command.config
            with contextlib.suppress(TrialFailed):
                self._table_meter.rows[f"trial:{config.number}"] = self._table_engine.row(config)
        self._inbox.lines.append(command.line())

    def go_on(self) -> None:
        """Takes turns until something was said, the worker has ended, or it has nothing to do."""
        said = len(self.said)
        while self.exit_code is None and len(self.said) == said:
            before_ns, had = self._meter.now_ns(), self._inbox.waiting()
            if reason := self.turn():
                self.exit_code = self._end(reason)
            elif not had and self._meter.now_ns() == before_ns and not self._report_wait():
                break

    def _report_wait(self) -> bool:
        """Says that the paid time is used up; False while the answer is awaited.

        Where none comes, because this slice is the last, time passes up to its end, and that is said.
        """
        begun = [t for t in self._trials.values() if not (t.standing or t.arrived())]
        if self._waits_for_ms != self._work_ms:
            self._waits_for_ms, self._looks = self._work_ms, 0
        self._looks += 1
        if not begun or self._looks not in (1, 3):
            return False
        if self._looks == 3:
            self._table_meter.wait_until(self._work_ms)
        # One of them speaks for all: each report is a step of the loop, and a slice is a twentieth of a run of each.
        one = begun[0]
        self._emit(Progress, **one.place(), train_loss=one.take_loss(self._engine()))
        return True

    def _report_progress(self) -> None:
        # A sign of life a second is a transaction each; here nothing is silent, so one at the end of a slice is enough.
        pass

    def _out_of_time(self, evaluating: bool = False, trial: LiveTrial | None = None) -> bool:
        # As on the clock: no step may begin that would end after the work time.
        return not evaluating and self._meter.now_ns() + self._step_ns >= self._work_ms * 1_000_000

    def _emit(self, kind: Callable[..., Event], **fields: Any) -> None:
        at_ms, usage = self._meter.usage()
        self.said.append(kind(at_ms=at_ms, usage=usage, **fields))


class SimulatedLauncher:
    """The launcher protocol over workers in this process; everything that was said is kept in `events`."""

    def __init__(self, table: Table, seed: int, slots: int, timings: Timings) -> None:
        """See TableEngine."""
        self._table, self._seed, self._slots, self._timings = table, seed, slots, timings
        self._workers: dict[Path, _Worker] = {}

    @property
    def workers(self) -> list[_Worker]:
        """All that were started, in order."""
        return list(self._workers.values())

    def boot(self) -> tuple[str, int]:
        """See Launcher. Simulated time is the workers' meters alone."""
        return BOOT

    def worker_command(self, folder: Path) -> list[str]:
        """See Launcher."""
        return ["simulated"]

    def start(self, job: WorkerJob, folder: Path) -> None:
        """See Launcher."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "watchdog.json").touch()
        engine = TableEngine(self._table, self._seed, self._slots)
        worker = _Worker(job, engine, _TableMeter(self._timings, engine))
        self._workers[folder] = worker
        worker.load()

    def send(self, folder: Path, command: Command) -> bool:
        """See Launcher."""
        worker = self._workers.get(folder)
        if worker is None or worker.exit_code is not None:
            return False
        worker.send(command)
        return True

    def read_events(self, folder: Path, offset: int) -> list[tuple[int, Event]]:
        """See Launcher. The offset counts events; the worker works until there is one."""
        worker = self._workers[folder]
        if offset >= len(worker.said):
            worker.go_on()
        return list(enumerate(worker.said[offset : offset + 1], offset + 1))

    def read_usage(self, folder: Path) -> UsageRecord | None:
        """See Launcher."""
        worker = self._workers[folder]
        ended = worker.exit_code is not None
        return UsageRecord(
            ms=worker.said[-1].at_ms, ended=ended, exit_code=worker.exit_code, why="exit" if ended else ""
        )

    def alive(self, folder: Path) -> bool:
        """See Launcher."""
        worker = self._workers.get(folder)
        return worker is not None and worker.exit_code is None

    worker_alive = alive

    def fence_off(self, folder: Path) -> bool:
        """See Launcher."""
        return not self.alive(folder)

    def stop(self, folder: Path) -> None:
        """See Launcher."""

    def wait_dead(self, folder: Path, timeout_s: float) -> bool:
        """See Launcher."""
        return not self.alive(folder)
