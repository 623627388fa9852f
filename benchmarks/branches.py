"""Records curves under a constant rate: at each rung a copy of the trial decays to zero, is judged, and thrown away.

    python -m benchmarks.branches curves --task TASK --file FILE [--minutes 5]    on the GPU
    python -m benchmarks.branches table --task TASK --file FILE                   here: tables/branched/TASK.parquet
    python -m benchmarks.branches correlations --task TASK
    python -m benchmarks.branches compare --task TASK                             our search under both schedules

The other schedule of DESIGN ("Schedules and rungs"), against warm-up and linear decay over the longest run, under which
benchmarks.record recorded the same configurations: after the same warm-up the rate stays as it is until the last
COOLDOWN of the run, in which it falls to zero (Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
Training Durations", 2024). A trial that comes to one of BRANCHES is copied into a slot of its own, the copy's rate
falls to zero over COOLDOWN of the steps so far, at least LEAST of them, and what it has learned then is the trial's
loss at that rung. Speeds are those of the recording under linear decay. LoRA under the first seed alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from typing import Any

import numpy as np

from benchmarks.record import (
    DRAW,
    SEEDS,
    RecordError,
    Recording,
    _Clock,
    _header,
    add_recording_options,
    stops,
    trials,
)
from benchmarks.tables import COOLDOWN, FOLDER, RUN_SECONDS, SHARES, Run, Table, cooldown_steps, find, write
from benchmarks.tasks import TASKS
from trainers.engine import TrialFailed
from trainers.health import Health
from trainers.lora.bank import Slot
from trainers.lora.engine import LoraEngine
from trainers.lora.packing import Live
from trainers.messages import TrialConfig
from trainers.splits import Split, load_split

BRANCHES = (0.05, 0.1, 0.2, 0.4)
RUNGS = (0.03, 0.1, 0.4)  # the first is within the warm-up, where nothing has to decay
COPY = 1_000_000  # is added to a trial's number


class Branching(LoraEngine):
    """The packed engine under a constant rate, whose trials can be copied."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._left: dict[int, tuple[int, int]] = {}  # of copies: the step at which they left, and all their trial has
        super().__init__(*arguments, **options)

    def branch(self, number: int) -> int:
        """Copies a trial into a free slot, where it decays; returns the copy's number."""
        live, copy = self._of(number), COPY + number
        taken = {other.index for other in self._trials.values()}
        index = next(index for index in range(self.slots) if index not in taken)
        config = dataclasses.replace(live.config, number=copy)
        slot = Slot.empty(config, self._layout, self.base.model.dtype, self.base.device)
        slot.put(live.slot.weights)
        slot.steps = live.slot.steps
        for name, moment in live.slot.moments.items():
            slot.moments[name].copy_(moment)
        plan = live.batches[: live.step + cooldown_steps(live.step)]
        self._left[copy] = live.step, len(live.batches)
        self._trials[copy] = Live(
            config=config, index=index, slot=slot, batches=plan, health=Health(len(plan), resumed=True),
            step=live.step, tokens=live.tokens,
        )  # fmt: skip
        self._runner.seat(index, slot)
        return copy

    def _rate(self, live: Live) -> float:
        start, whole = self._left.get(live.config.number, (None, len(live.batches)))
        warm = math.ceil(live.config.warmup * whole)
        if start is None:
            factor = min(1.0, (whole - live.step) / math.ceil(COOLDOWN * whole))
        else:
            factor = (len(live.batches) - live.step) / (len(live.batches) - start)
        return live.config.learning_rate * factor * min(1.0, ((start or live.step) + 1) / warm)


@dataclasses.dataclass
class _Trial:
    row: int
    config: TrialConfig
    stops: list[int]
    started: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    copied: int | None = None  # which of its losses the copy under way is to replace


def record(engine: Branching, train: Split, wanted: list[tuple[int, TrialConfig]], file: Recording, clock: Any) -> bool:
    """Trains all that is missing; half of the slots are for copies. False where time ran out. Raises RecordError."""
    queue = [(row, config) for row, config in wanted if config.number not in file.done]
    live: dict[int, _Trial] = {}
    while queue or live:
        while queue and len(live) < engine.slots // 2 and clock.fits():
            row, config = queue.pop(0)
            live[config.number] = trial = _Trial(row, config, stops(config, train), time.monotonic())
            engine.admit(config, None, trial.stops[0])
        if clock.over() or not live:
            break
        try:
            for number in engine.advance(clock.over):
                _arrived(engine, live, number, file, clock)
        except TrialFailed as error:
            if error.code != "diverged":
                raise RecordError(f"trial {error.trial}: {error.code}: {error}") from error
            _diverged(engine, live, error, file)
    for number in list(engine._trials):
        engine.drop(number)
    return not (queue or live)


def _arrived(engine: Branching, live: dict[int, _Trial], number: int, file: Recording, clock: Any) -> None:
    trial = live[number % COPY]
    if number < COPY and trial.copied is not None:
        return  # it waits for its copy
    try:
        result = engine.evaluate(number, None)
    except TrialFailed as error:
        _diverged(engine, live, error, file)
        return
    loss = result.nll / result.completion_tokens
    if number >= COPY:
        engine.drop(number)
        trial.losses[trial.copied or 0], trial.copied = loss, None
        return
    at = engine.position(number)
    trial.tokens.append(at.tokens)
    trial.losses.append(loss)
    if SHARES[len(trial.losses) - 1] in BRANCHES:
        trial.copied = len(trial.losses) - 1
        engine.branch(number)
    if not at.done:
        engine.target(number, trial.stops[len(trial.losses)])
        return
    engine.drop(number)
    clock.ended(time.monotonic() - trial.started)
    file.add_trial(trial.row, trial.config, trial.tokens, trial.losses, None)
    del live[number]


def _diverged(engine: Branching, live: dict[int, _Trial], error: TrialFailed, file: Recording) -> None:
    """A trial, or its copy, which says as much, is over."""
    number = error.trial % COPY
    for other in (number, COPY + number):
        if other in engine._trials:
            engine.drop(other)
    trial = live.pop(number)
    losses = trial.losses if trial.copied is None else trial.losses[: trial.copied]
    file.add_trial(trial.row, trial.config, trial.stops[: len(losses) + 1], losses, str(error))


def curves(options: argparse.Namespace) -> int:
    """Records until all is there or time is over; returns the exit code: 0, or 3 where some is left."""
    from trainers.models import load_base

    train, validation = (load_split(options.data / options.task, name) for name in ("train", "validation"))
    clock = _Clock(options.minutes)
    base = load_base(str(options.model), options.device)
    engine = Branching(base, train, validation, validation.rows, None, slots=options.slots)
    if base.device.type == "cuda":
        from trainers.lora import probe

        probe.warm_up(engine, max(DRAW["lora"]["rank"]))
    file = Recording(options.file, _header(options, train, validation, engine))
    drawn = trials(file.header["drawn"], options.examples)
    wanted = [pair for pair in drawn if pair[1].method == "lora" and pair[1].seed == 0]
    complete = record(engine, train, wanted, file, clock)
    diverged = sum(line["diverged"] is not None for line in file.done.values())
    print(f"{file.path}: {len(file.done)} of {len(wanted)} trials, {diverged} of them diverged")
    return 0 if complete else 3


# --- on recorded tables -----------------------------------------------------------------------------------------------


def pair(task: str, file: Recording) -> list[Table]:
    """The same configurations under linear decay and in branches, under the first seed, with the same speeds."""
    linear = find([task])[0].of("lora")
    kept = [row for row in linear.rows if row.number * SEEDS in file.done]
    rows, branched = [], []
    for row in kept:
        line = file.done[row.number * SEEDS]
        run = Run(np.asarray(line["tokens"], np.int64), np.asarray(line["losses"]), line["diverged"] is not None)
        rows.append(dataclasses.replace(row, runs={0: row.runs[0]}))
        branched.append(dataclasses.replace(row, runs={0: run}))
    made = {**linear.facts, "branches": list(BRANCHES), "base_loss": file.header["base_loss"]}
    return [
        dataclasses.replace(linear, rows=rows),
        Table(f"{task}-branched", made, branched),
    ]


def table(options: argparse.Namespace) -> int:
    """Writes the Parquet file; returns the exit code."""
    path = FOLDER / "branched" / f"{options.task}.parquet"
    path.parent.mkdir(exist_ok=True)
    write(path, pair(options.task, Recording(options.file))[1])
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


def correlations(options: argparse.Namespace) -> int:
    """Prints how losses at the rungs are ranked like those at the end, of all and of the best 30."""
    from scipy.stats import spearmanr

    for one in pairs_of(options.task):
        lasting = [row.runs[0] for row in one.rows if not row.runs[0].diverged]
        ends = np.array([run.losses[-1] for run in lasting])
        best = np.argsort(ends)[:30]
        print(f"{one.name}: base {one.base_loss:.4f}, best {np.sort(ends)[:5].round(4).tolist()}")
        for share in (0.03, *BRANCHES):
            seen = np.array([run.losses[SHARES.index(share)] for run in lasting])
            of_all, of_best = spearmanr(seen, ends)[0], spearmanr(seen[best], ends[best])[0]
            ranks = np.argsort(np.argsort(seen))[best[:4]].tolist()
            print(f"  {share:4.0%}: all {of_all:5.2f}, best 30 {of_best:5.2f}, ranks of the best four {ranks}")
    return 0


def pairs_of(task: str) -> list[Table]:
    """As `pair`, from the tables."""
    branched = find([task], FOLDER / "branched")[0]
    known = {row.number for row in branched.rows}
    linear = find([task])[0].of("lora")
    rows = [dataclasses.replace(row, runs={0: row.runs[0]}) for row in linear.rows if row.number in known]
    return [dataclasses.replace(linear, rows=rows), branched]


def compare(options: argparse.Namespace) -> int:
    """Replays our search under both schedules, at equal dollars and the same rungs; a copy's steps are charged."""
    from benchmarks import replay
    from benchmarks.search import judge

    for one in pairs_of(options.task):
        lasting = one.lasting(RUN_SECONDS)
        for seed in range(options.seeds):
            done = replay.replay(lasting, seed, options.runs, 4, rungs=list(RUNGS))
            found = judge(lasting, done)
            print(
                json.dumps({"table": one.name, "seed": seed, "trials": found["trials"], **found["finished"]}),
                flush=True,
            )
    return 0


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.branches", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    for verb in (curves, table, correlations, compare):
        command = commands.add_parser(verb.__name__)
        command.set_defaults(verb=verb)
        command.add_argument("--task", choices=TASKS, required=True)
        add_recording_options(command, slots=64)  # half of them for copies
        command.add_argument("--seeds", type=int, default=30, help="studies to compare")
        command.add_argument("--runs", type=float, default=20.0, help="whole runs that the cap pays for")
    options = parser.parse_args(arguments)
    try:
        return int(options.verb(options))
    except RecordError as error:
        print(f"branches: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
