"""Records learning curves of many configurations on one task, with the packed engine and the full one.

    python -m benchmarks.record prepare [--task define sums speech]     here, once: rows become token files
    python -m benchmarks.record plan [--task ...]                       GPU minutes, before one is spent
    python -m benchmarks.record curves --task TASK [--minutes 9]        on the GPU; again until all is there
    python -m benchmarks.record speed --task TASK [--minutes 9]         on the GPU: each configuration alone
    python -m benchmarks.record table --task TASK                       here: benchmarks/tables/TASK.parquet

A recording is a file of JSON lines, `--file` (benchmarks/data/record/TASK.jsonl): what was drawn first of all, then a
line for every trial that came to its end or diverged, and for every speed that was measured. A run that is killed goes
on where it was when it is started again; a trial that had not ended is trained anew. Without a GPU try it with
`--device cpu --lora 3 --full 1 --examples 1600` and a tiny `--model`. `curves` and `speed` need torch, transformers and
peft; the other parts also `datasets`.

The tasks are those of benchmarks/tasks.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import FOLDER, SHARES, SPACE, Row, Run, Table, write
from benchmarks.tasks import TASKS, rows_of
from trainers import peak
from trainers.engine import Engine, TrialFailed
from trainers.messages import TrialConfig
from trainers.splits import Split, batches, load_split

ROOT = Path(__file__).absolute().parents[1]
DATA = ROOT / "benchmarks" / "data" / "record"
VALIDATION_ROWS = 128
MAX_TOKENS = 256
SEEDS = 3  # of a fifth of the configurations
DRAW: dict[str, dict[str, Any]] = {  # the learning rates are wider than anybody would search: some must diverge
    "lora": {
        "rank": [2, 4, 8, 16, 32, 64],
        "alpha": [8.0, 16.0, 32.0, 64.0, 128.0],
        "targets": ["attention", "mlp", "all-linear"],
        "learning_rate": [1e-5, 1e-2],
        "batch_size": [4, 8, 16],
    },
    "full": {"learning_rate": [1e-6, 1e-3], "batch_size": [4, 8, 16]},
}
# For `plan`: docs/log.md has 365,000 tokens a second in full streams of 65,536; a stream of short rows is limited by
# launches instead. The other figures are guesses until the first recording.
TOKENS_PER_SECOND, STREAM_SECONDS, FULL_STEP_SECONDS = 365_000, 0.04, 0.016
EVALUATION_SECONDS, START_SECONDS = 0.014, 45
SOLO_STEPS = 3  # before a speed counts


class RecordError(Exception):
    """What stops a recording. One line."""


# --- what is recorded -------------------------------------------------------------------------------------------------


def draw(lora: int, full: int, seed: int) -> list[dict[str, Any]]:
    """Draws the configurations; the first ones of each method do not depend on how many there are."""
    drawn = []
    for method, count in (("lora", lora), ("full", full)):
        source = np.random.default_rng((seed, len(method)))
        space = DRAW[method]
        low, high = np.log(space["learning_rate"])
        for _ in range(count):
            config = {"method": method, "learning_rate": float(np.exp(source.uniform(low, high)))}
            for name in ("rank", "alpha", "targets", "batch_size"):
                choices = space.get(name)
                config[name] = None if choices is None else choices[int(source.integers(len(choices)))]
            drawn.append(config)
    return drawn


def trials(drawn: list[dict[str, Any]], examples: int) -> list[tuple[int, TrialConfig]]:
    """Every (row, trial) to be trained: all rows under seed 0, every fifth under SEEDS seeds."""
    found = []
    for row, config in enumerate(drawn):
        for seed in range(SEEDS if row % 5 == 0 else 1):
            found.append((row, TrialConfig(number=row * SEEDS + seed, seed=seed, examples=examples, **config)))
    return found


def stops(config: TrialConfig, train: Split) -> list[int]:
    """Tokens at which a trial is evaluated: at the first step that is not before each of SHARES, [evaluations]."""
    tokens = np.cumsum([int(train.lengths[rows].sum()) for rows in batches(config, train.rows)])
    return [int(tokens[math.ceil(round(share * len(tokens), 6)) - 1]) for share in SHARES]


class Recording:
    """The file of a recording."""

    def __init__(self, path: Path, header: dict[str, Any] | None = None) -> None:
        """Opens it, or begins it with `header`. Raises RecordError where it is of something else."""
        self.path = path
        self.done: dict[int, dict[str, Any]] = {}
        self.speeds: dict[str, dict[str, Any]] = {}
        lines = self._lines()
        if not lines:
            if header is None:
                raise RecordError(f"{path}: there is no recording; make one with `curves`")
            self.header = header
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"recording": header})
            return
        self.header = lines[0]["recording"]
        same = ("task", "seed", "examples", "drawn", "model", "train_rows", "device")
        other = [key for key in same if header is not None and self.header[key] != header[key]]
        if other:
            raise RecordError(f"{path}: was begun with another {other[0]}; name another --file")
        for line in lines[1:]:
            if "trial" in line:
                self.done[line["trial"]] = line
            else:
                self.speeds[line["speed"]] = line

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        *whole, cut = self.path.read_text().split("\n")
        if cut:  # by a kill
            self.path.write_text("".join(line + "\n" for line in whole))
        return [json.loads(line) for line in whole]

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def add_trial(self, row: int, config: TrialConfig, tokens: list[int], losses: list[float], why: str | None) -> None:
        """Takes a trial that came to its end, or diverged."""
        line = {"trial": config.number, "row": row, "seed": config.seed, "tokens": tokens, "losses": losses}
        self.done[config.number] = line | {"diverged": why}
        self._append(self.done[config.number])

    def add_speed(self, key: str, **measured: Any) -> None:
        """Takes a speed."""
        self.speeds[key] = {"speed": key, **measured}
        self._append(self.speeds[key])


# --- curves -----------------------------------------------------------------------------------------------------------


class _Clock:
    """The time that a call may take."""

    def __init__(self, minutes: float) -> None:
        self.started = time.monotonic()
        self.end = self.started + 60 * minutes
        self._taken: list[float] = []

    def over(self) -> bool:
        return time.monotonic() >= self.end

    def ended(self, seconds: float) -> None:
        self._taken.append(seconds)

    def fits(self) -> bool:
        """Whether another trial would come to its end, as far as those that ended tell."""
        return time.monotonic() + (1.2 * max(self._taken) if self._taken else 0.0) < self.end


@dataclasses.dataclass
class _Live:
    row: int
    config: TrialConfig
    stops: list[int]
    started: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)


def record(engine: Engine, train: Split, wanted: list[tuple[int, TrialConfig]], file: Recording, clock: _Clock) -> bool:
    """Trains trials in the engine's slots, evaluating each as often; False where time ran out. Raises RecordError."""
    queue = [(row, config) for row, config in wanted if config.number not in file.done]
    live: dict[int, _Live] = {}
    while queue or live:
        while queue and len(live) < engine.slots and clock.fits():
            row, config = queue.pop(0)
            live[config.number] = trial = _Live(row, config, stops(config, train), time.monotonic())
            engine.admit(config, None, trial.stops[0])
        if clock.over() or not live:
            break
        try:
            for number in engine.advance(clock.over):
                _evaluate(engine, live, number, file, clock)
        except TrialFailed as error:
            if error.code != "diverged":
                raise RecordError(f"trial {error.trial}: {error.code}: {error}") from error
            trial = live.pop(error.trial)
            tokens = trial.stops[: len(trial.losses) + 1]  # it is charged up to where it would have been evaluated next
            file.add_trial(trial.row, trial.config, tokens, trial.losses, str(error))
    for number in live:
        engine.drop(number)
    return not (queue or live)


def _evaluate(engine: Engine, live: dict[int, _Live], number: int, file: Recording, clock: _Clock) -> None:
    """Evaluates a trial where it stands and sends it on; at its end it goes into the file."""
    trial = live[number]
    result = engine.evaluate(number, None)
    at = engine.position(number)
    trial.tokens.append(at.tokens)
    trial.losses.append(result.nll / result.completion_tokens)
    if not at.done:
        engine.target(number, trial.stops[len(trial.losses)])
        return
    engine.drop(number)
    clock.ended(time.monotonic() - trial.started)
    file.add_trial(trial.row, trial.config, trial.tokens, trial.losses, None)
    del live[number]


def engines(options: argparse.Namespace, train: Split, validation: Split, slots: int) -> Iterator[tuple[str, Engine]]:
    """Yields the engine of each method over one base model, as a worker would load them. Raises ModelError."""
    from trainers.full.engine import FullEngine
    from trainers.lora.engine import LoraEngine
    from trainers.models import load_base

    base = load_base(str(options.model), options.device)
    lora = LoraEngine(base, train, validation, validation.rows, None, slots=slots)
    if base.device.type == "cuda":
        from trainers.lora import probe

        probe.warm_up(lora, max(DRAW["lora"]["rank"]))
    yield "lora", lora
    yield "full", FullEngine(base, train, validation, validation.rows)


def _header(options: argparse.Namespace, train: Split, validation: Split, engine: Engine) -> dict[str, Any]:
    base = engine.evaluate(None, None)
    model: Any = getattr(engine, "base", None)
    return {
        "task": options.task,
        "model": Path(options.model).name,
        "parameters": model.model.num_parameters(),
        "device": _device(options.device),
        "seed": options.seed,
        "space": DRAW,
        "drawn": draw(options.lora, options.full, options.seed),
        "examples": options.examples,
        "shares": list(SHARES),
        "train_rows": train.rows,
        "validation_rows": validation.rows,
        "tokens_per_example": float(train.lengths.mean()),
        "base_loss": base.nll / base.completion_tokens,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def _device(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"


def curves(options: argparse.Namespace) -> int:
    """Records until all is there or time is over; returns the exit code: 0, or 3 where some is left."""
    steps = options.examples / max(DRAW["lora"]["batch_size"])
    if len({math.ceil(round(share * steps, 6)) for share in SHARES}) < len(SHARES):
        raise RecordError(f"--examples {options.examples}: the largest batch needs a step for each evaluation")
    train, validation = (load_split(options.data / options.task, name) for name in ("train", "validation"))
    clock = _Clock(options.minutes)
    file: Recording | None = None
    complete = True
    for method, engine in engines(options, train, validation, options.slots):
        if file is None:
            file = Recording(_path(options), _header(options, train, validation, engine))
        wanted = [pair for pair in trials(file.header["drawn"], options.examples) if pair[1].method == method]
        complete = record(engine, train, wanted, file, clock) and complete
    assert file is not None
    total = len(trials(file.header["drawn"], options.examples))
    diverged = sum(line["diverged"] is not None for line in file.done.values())
    print(f"{file.path}: {len(file.done)} of {total} trials, {diverged} of them diverged")
    return 0 if complete else 3


# --- speed ------------------------------------------------------------------------------------------------------------


def speed_key(config: dict[str, Any]) -> str:
    """What a configuration's speed depends on."""
    return " ".join(str(config[name]) for name in ("method", "rank", "targets", "batch_size"))


def measure(engine: Engine, config: TrialConfig, seconds: float, device: str) -> dict[str, Any]:
    """Seconds a token and an evaluation of a trial that has the machine to itself, and its peak memory."""
    import torch

    cuda = device.startswith("cuda")
    engine.admit(config, None, None)
    end = [math.inf]

    def over() -> bool:
        return (
            engine.position(config.number).step >= SOLO_STEPS if end[0] == math.inf else time.perf_counter() >= end[0]
        )

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    engine.advance(over)
    engine.evaluate(config.number, None)
    peak.take_bytes({config.method: engine}, config.method)
    started, before = now(), engine.position(config.number).tokens
    end[0] = started + seconds
    engine.advance(over)
    middle, after = now(), engine.position(config.number).tokens
    engine.evaluate(config.number, None)
    evaluated = now()
    engine.drop(config.number)
    return {
        "seconds_per_token": (middle - started) / max(after - before, 1),
        "evaluate_seconds": evaluated - middle,
        "peak_bytes": peak.take_bytes({config.method: engine}, config.method) if cuda else None,
    }


def speed(options: argparse.Namespace) -> int:
    """Measures what is missing; returns the exit code: 0, or 3 where time ran out."""
    train, validation = (load_split(options.data / options.task, name) for name in ("train", "validation"))
    file = Recording(_path(options))
    clock = _Clock(options.minutes)
    keys = {speed_key(config): config for config in file.header["drawn"]}
    for method, engine in engines(options, train, validation, 1):
        for key, config in keys.items():
            if config["method"] != method or key in file.speeds:
                continue
            if clock.over():
                print(f"{file.path}: {len(file.speeds)} of {len(keys)} speeds")
                return 3
            # A low rate, so that it does not diverge, and more examples than there is time for.
            slow = {**config, "learning_rate": 1e-6}
            trial = TrialConfig(number=0, seed=0, examples=1_000_000, **slow)
            file.add_speed(key, **measure(engine, trial, options.seconds, options.device))
    print(f"{file.path}: {len(file.speeds)} of {len(keys)} speeds")
    return 0


# --- prepare, plan, table ---------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> int:
    """Writes the token files of the tasks; returns the exit code."""
    from trainers import data
    from trainers.models import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    for task in options.task:
        rows = rows_of(task)
        with tempfile.TemporaryDirectory() as temporary:
            source = Path(temporary) / f"{task}.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
            data.prepare(
                tokenizer,
                train=str(source),
                validation=VALIDATION_ROWS / len(rows),
                test=None,
                max_tokens=MAX_TOKENS,
                seed=0,
                folder=options.data / task,
                model=options.model.name,
            )
        split = load_split(options.data / task, "train")
        print(f"{task}: {split.rows} rows of {split.lengths.mean():.1f} tokens, {split.mask.mean():.0%} completion")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Prints the GPU minutes of each task; returns the exit code."""
    total = 0.0
    for task in options.task:
        train = load_split(options.data / task, "train")
        drawn = draw(options.lora, options.full, options.seed)
        wanted = trials(drawn, options.examples)
        lora = [config for _, config in wanted if config.method == "lora"]
        steps = [math.ceil(options.examples / config.batch_size) for config in lora]
        tokens = len(lora) * options.examples * float(train.lengths.mean())
        packed = max(tokens / TOKENS_PER_SECOND, sum(steps) / options.slots * STREAM_SECONDS)
        full = [config for _, config in wanted if config.method == "full"]
        alone = sum(math.ceil(options.examples / config.batch_size) for config in full) * FULL_STEP_SECONDS
        evaluated = len(wanted) * len(SHARES) * EVALUATION_SECONDS
        speeds = len({speed_key(config) for config in drawn})
        measured = speeds * (options.seconds + 1.0)
        minutes = (2 * START_SECONDS + packed + alone + evaluated + measured) / 60
        total += minutes
        print(
            f"{task}: {minutes:.1f} minutes: start twice {2 * START_SECONDS} s, {len(lora)} LoRA trials in packs of"
            f" {options.slots} {packed:.0f} s, {len(full)} full ones {alone:.0f} s, {len(wanted) * len(SHARES)}"
            f" evaluations {evaluated:.0f} s, {speeds} speeds {measured:.0f} s"
        )
    print(f"all: {total:.0f} minutes, if the guesses at the top of this file are right")
    return 0


def to_table(file: Recording) -> Table:
    """Puts a recording together. Raises RecordError where something of it is missing."""
    header = dict(file.header)
    drawn = header.pop("drawn")
    wanted = trials(drawn, header["examples"])
    missing = sum(config.number not in file.done for _, config in wanted)
    slow = {speed_key(config) for config in drawn} - set(file.speeds)
    if missing or slow:
        raise RecordError(f"{file.path}: {missing} trials and {len(slow)} speeds are missing: go on")
    runs: dict[int, dict[int, Run]] = {}
    for row, config in wanted:
        line = file.done[config.number]
        run = Run(np.asarray(line["tokens"], np.int64), np.asarray(line["losses"]), line["diverged"] is not None)
        runs.setdefault(row, {})[config.seed] = run
    rows = []
    for number, config in enumerate(drawn):
        measured = {key: value for key, value in file.speeds[speed_key(config)].items() if key != "speed"}
        known = {name: config[name] for name in ("method", *SPACE)}
        rows.append(Row(number, known, runs[number], **measured))
    return Table(header["task"], {"synthetic": False, **header}, rows)


def table(options: argparse.Namespace) -> int:
    """Writes the Parquet file of a recording; returns the exit code."""
    path = options.folder / f"{options.task}.parquet"
    write(path, to_table(Recording(_path(options))))
    print(f"{path}: {path.stat().st_size} bytes")
    return 0


def _path(options: argparse.Namespace) -> Path:
    return Path(options.file or options.data / f"{options.task}.jsonl")


def add_recording_options(command: argparse.ArgumentParser, slots: int) -> None:
    """What every recorder of learning curves is told; `slots` is how many by default."""
    command.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m", metavar="DIR")
    command.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="prepared rows, and recordings")
    command.add_argument("--file", type=Path, metavar="JSONL", help="the recording")
    command.add_argument("--device", default="cuda")
    command.add_argument("--lora", type=int, default=100, help="configurations")
    command.add_argument("--full", type=int, default=16, help="configurations")
    command.add_argument("--examples", type=int, default=1920, help="of a run")
    command.add_argument("--slots", type=int, default=slots)
    command.add_argument("--seed", type=int, default=0, help="of the draw")
    command.add_argument("--minutes", type=float, default=1e6, help="after which it stops by itself")


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {
        "prepare": prepare,
        "plan": plan,
        "curves": curves,
        "speed": speed,
        "table": table,
    }
    for name, verb in verbs.items():
        command = commands.add_parser(name)
        command.set_defaults(verb=verb)
        if name in ("prepare", "plan"):
            command.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
        else:
            command.add_argument("--task", choices=TASKS, required=True)
        add_recording_options(command, slots=32)
        command.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="of tables")
        command.add_argument("--seconds", type=float, default=2.0, help="of measuring a speed")
    options = parser.parse_args(arguments)
    try:
        return int(options.verb(options))
    except RecordError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
