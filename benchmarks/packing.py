"""What a dollar buys on one GPU: trials with today's tools, one and many at once, against packed trials.

    python -m benchmarks.packing --shape SHAPE [--mode MODE ...] [--data long|short] [--seconds 30] [--out FILE]

Run it in the root of a checkout that has `benchmarks/data` (`python -m benchmarks.workload`). It needs torch,
transformers, peft and accelerate, and on the CPU nothing else: try it with `--shape tiny --device cpu --data short`.
SmolLM2's weights are read from `--model`; without them, and for every other shape, random ones are made once and kept
under `--scratch`. Modes, run in the order in which they are named:

    cold       (a) a loop of transformers' Trainer and PEFT; every trial loads its base model
    warm       (b) the same over a base model that stays in memory
    solo       (c) our engine with one slot
    pack       (d) our engine with each number of `--slots`
    processes  (e) each number of `--processes` such Trainers at once, each with a base model of its own, measured while
               all of them train

Every mode trains the same trials on the same rows: `cold` exactly `--trials` whole ones, `warm` at least as many, the
others for `--seconds`. Result lines are JSON, printed and appended to `--out` as they come. In each, `tokens` are real
ones, prompt and completion; `occupancy` is their share of all that were computed; `mfu` is that of
benchmarks.workload.flops_per_example at 989 TFLOP/s; `ms_per_trial_step` is the time of the whole machine over the
steps of all trials. The last line compares modes by what 1,000 trial-steps cost, with the latest lines of `--out` for
the same shape, rows and device; a ratio of 5 means that packing is five times as cheap.

The exit code is 1 if a mode failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from benchmarks import hf_trials
from benchmarks.workload import DATA, KINDS, PEAK_FLOPS, ROOT, SHAPES, Measured, Setup, Work, draw_trials, make_setup
from trainers.engine import Engine, TrialFailed
from trainers.messages import Precision, TrialConfig
from trainers.splits import batches

MODES = ("cold", "warm", "solo", "pack", "processes")
PRICE = 3.99  # dollars an hour: runpod, 1x H100 SXM, on demand, as of 2026-11-09 (budgets/prices.csv)
DRAWN = 512  # trials; an engine that finishes them all begins again
_WARM_UP_STEPS = 3  # of every trial in a slot
_READY_S = 300.0  # for processes to start, load and train their first steps
_RAMP_S = 1.0  # between the end of the wait and the window
_LOOK_S = 0.1


class BenchmarkError(Exception):
    """A mode that could not be measured; `code` says why in a word."""

    def __init__(self, code: str, said: str, **more: Any) -> None:
        super().__init__(said)
        self.line = {"failed": code, "said": said, **more}


# --- our engine -----------------------------------------------------------------------------------------------------


class _Occupied:
    """An engine whose slots are always full: trials that come to their end make room for the next ones."""

    def __init__(self, engine: Engine, setup: Setup, trials: list[TrialConfig]) -> None:
        self.engine = engine
        self.setup = setup
        self.live: dict[int, TrialConfig] = {}
        self.finished = 0
        self.diverged = 0
        self._trials = trials
        self._next = 0
        self._flops: dict[int, list[float]] = {}  # of a live trial, up to each of its steps
        self._past = Work()  # of trials that are no longer live

    def fill(self) -> None:
        """Admits trials until no slot is free."""
        while len(self.live) < self.engine.slots:
            trial = dataclasses.replace(self._trials[self._next % len(self._trials)], number=self._next)
            self._next += 1
            steps = batches(trial, self.setup.train.rows)
            self._flops[trial.number] = list(accumulate((self.setup.flops[rows].sum() for rows in steps), initial=0.0))
            self.engine.admit(trial, None, None)
            self.live[trial.number] = trial

    def _of(self, number: int) -> Work:
        position = self.engine.position(number)
        return Work(position.step, position.tokens, float(self._flops[number][position.step]), 0)

    def work(self) -> Work:
        """All that was trained since the start, but for trials that failed."""
        return sum((self._of(number) for number in self.live), self._past)

    def advance(self, pause: Callable[[], bool]) -> None:
        """Trains until `pause()` says so or trials end. Raises TrialFailed for a lack of memory."""
        try:
            for number in self.engine.advance(pause):
                self._past += self._of(number)
                self.engine.drop(number)
                self.finished += 1
                del self.live[number]
        except TrialFailed as error:
            if error.code != "diverged":
                raise
            self.diverged += 1
            del self.live[error.trial]
        self.fill()

    def warm_up(self, seconds: float) -> None:
        """Trains for this long, and until every trial made some steps: compilers and allocators settle."""
        end = time.perf_counter() + seconds
        wanted = _WARM_UP_STEPS
        while time.perf_counter() < end or any(self.engine.position(n).step < wanted for n in self.live):
            self.advance(lambda: True)
            if self.finished >= self.engine.slots:
                wanted = 0  # the trials are so short that the newcomers' first steps are no sign of a cold start


def load_engine(setup: Setup, slots: int, tokens: int | None, precision: Precision = "bf16") -> Engine:
    """Puts our LoRA engine over the base model as trainers.models.load_engines does."""
    from trainers.lora.engine import LoraEngine
    from trainers.models import load_base

    base = load_base(str(setup.folder), str(setup.device))
    return LoraEngine(base, setup.train, setup.validation, 64, tokens, slots=slots, precision=precision)


def run_engine(
    setup: Setup,
    trials: list[TrialConfig],
    slots: int,
    seconds: float,
    warm_up: float,
    tokens: int | None,
    precision: Precision,
) -> Measured:
    """Keeps `slots` trials training for this long after a warm-up. Raises TrialFailed, BenchmarkError."""
    start = hf_trials.now(setup.device)
    engine = load_engine(setup, slots, tokens, precision)
    occupied = _Occupied(engine, setup, trials)
    occupied.fill()
    occupied.warm_up(warm_up)
    start_up = hf_trials.now(setup.device) - start
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, finished = occupied.work(), occupied.finished
    start = hf_trials.now(setup.device)
    while time.perf_counter() < start + seconds:
        occupied.advance(lambda: time.perf_counter() >= start + seconds)
    taken = hf_trials.now(setup.device) - start
    work = occupied.work() - before
    occupancy = getattr(engine, "occupancy", lambda: None)()
    extra = {
        "precision": precision,
        "start_up_seconds": round(start_up, 3),
        "trials_finished": occupied.finished - finished,
        "trials_diverged": occupied.diverged,
    }
    memory = hf_trials.peak_gib(setup.device)
    for number in list(occupied.live):
        engine.drop(number)
    return Measured("solo" if slots == 1 else "pack", slots, taken, work, occupancy, memory, extra)


# --- processes ------------------------------------------------------------------------------------------------------


def _used_gib(device: torch.device) -> float | None:
    """GPU memory in use by all processes, this one's context included."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(said[0]) / 1024 if said and said[0].isdigit() else None


@contextlib.contextmanager
def _started(jobs: list[dict[str, Any]], folder: Path, cpus: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One process a job while the context lasts."""
    children: list[subprocess.Popen[bytes]] = []
    # Every process would start a thread a CPU otherwise, and they would fight.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cpus // len(jobs))), "TOKENIZERS_PARALLELISM": "false"}
    try:
        for number, job in enumerate(jobs):
            path = folder / f"job-{number}.json"
            path.write_text(json.dumps(job))
            with (folder / f"log-{number}").open("wb") as log:
                command = [sys.executable, "-m", "benchmarks.hf_trials", str(path)]
                child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
            children.append(child)
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def _check(children: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Raises BenchmarkError if a process failed."""
    for number, child in enumerate(children):
        if child.poll() in (None, 0):
            continue
        result = folder / f"job-{number}.result"
        if result.exists():
            failure = json.loads(result.read_text())
            raise BenchmarkError(failure["failed"], failure["said"])
        lines = (folder / f"log-{number}").read_text(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"exit code {child.returncode}"
        # cuBLAS and the driver have words of their own for it.
        text = said.lower()
        raise BenchmarkError("out_of_memory" if "out of memory" in text or "alloc_failed" in text else "error", said)


def _wait(ready: Callable[[], bool], seconds: float, children: list[subprocess.Popen[bytes]], folder: Path) -> None:
    end = time.monotonic() + seconds
    while not ready():
        _check(children, folder)
        if time.monotonic() > end:
            raise BenchmarkError("timeout", f"the processes took more than {seconds:.0f} s")
        time.sleep(_LOOK_S)


def run_processes(setup: Setup, options: argparse.Namespace, trials: list[TrialConfig], count: int) -> Measured:
    """Trains in `count` processes at once; counts the steps that ended in one window of all. Raises BenchmarkError."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common = {
            "shape": setup.shape.name,
            "device": str(setup.device),
            "data": str(options.rows),
            "model": str(options.model.absolute()),
            "scratch": str(options.scratch.absolute()),
            "folder": temporary,
        }
        jobs = [
            {**common, "trial": dataclasses.asdict(dataclasses.replace(trials[number % len(trials)], number=number))}
            for number in range(count)
        ]
        with _started(jobs, folder, _cpus()) as children:
            started = time.monotonic()
            _wait(lambda: len(list(folder.glob("ready-*"))) == count, _READY_S, children, folder)
            start_up = time.monotonic() - started
            start = time.monotonic_ns() + int(_RAMP_S * 1e9)
            (folder / "go.tmp").write_text(json.dumps([start, start + int(options.seconds * 1e9)]))
            (folder / "go.tmp").rename(folder / "go")
            time.sleep(_RAMP_S + options.seconds / 2)
            memory = _used_gib(setup.device)
            done = options.seconds + _READY_S
            _wait(lambda: all(child.poll() is not None for child in children), done, children, folder)
            _check(children, folder)
            results = [Work(**json.loads((folder / f"job-{number}.result").read_text())) for number in range(count)]
    work = sum(results, Work())
    extra = {"start_up_seconds": round(start_up, 3), "steps_of_each": [result.steps for result in results]}
    occupancy = work.tokens / work.computed if work.computed else None
    return Measured("processes", count, options.seconds, work, occupancy, memory, extra)


# --- results --------------------------------------------------------------------------------------------------------


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def machine(device: torch.device) -> dict[str, Any]:
    """What a result was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    found |= {"cpu": names[0] if names else "unknown"}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {**found, "cpus": _cpus(), **versions}


def conditions(options: argparse.Namespace, weights: str, device: torch.device) -> dict[str, Any]:
    """What every line says of how it was measured."""
    return {"shape": options.shape, "data": options.data, "weights": weights, **machine(device)}


def result_line(measured: Measured, common: dict[str, Any], price: float) -> dict[str, Any]:
    """The figures of one measurement."""
    work, seconds = measured.work, measured.seconds
    steps, tokens = work.steps / seconds, work.tokens / seconds
    return {
        "mode": measured.mode,
        "trials_at_once": measured.at_once,
        **common,
        "seconds": round(seconds, 3),
        "steps": work.steps,
        "tokens_per_s": round(tokens, 1),
        "trial_steps_per_s": round(steps, 3),
        "ms_per_trial_step": round(1000 / steps, 3) if steps else None,
        "occupancy": None if measured.occupancy is None else round(measured.occupancy, 4),
        "mfu": round(work.flops / seconds / PEAK_FLOPS, 5) if common["device"] != "cpu" else None,
        "usd_per_1000_trial_steps": price / 3600 * 1000 / steps if steps else None,
        "usd_per_million_tokens": price / 3600 * 1e6 / tokens if tokens else None,
        "usd_per_hour": price,
        "peak_memory_gib": None if measured.memory_gib is None else round(measured.memory_gib, 2),
        **measured.extra,
    }


def summary(lines: list[dict[str, Any]], common: dict[str, Any]) -> dict[str, Any]:
    """Compares the modes; of a mode with several counts the cheapest stands for it."""
    same = ("shape", "data", "device")
    latest: dict[tuple[str, int], dict[str, Any]] = {}
    for line in lines:
        if line.get("usd_per_1000_trial_steps") and all(line[key] == common[key] for key in same):
            latest[line["mode"], line["trials_at_once"]] = line
    best: dict[str, dict[str, Any]] = {}
    for line in latest.values():
        mode = line["mode"]
        if mode not in best or line["usd_per_1000_trial_steps"] < best[mode]["usd_per_1000_trial_steps"]:
            best[mode] = line
    found: dict[str, Any] = {"mode": "summary", **{key: common[key] for key in same}}
    found["trials_at_once"] = {mode: line["trials_at_once"] for mode, line in best.items()}
    if "pack" not in best:
        return found
    for name, modes in {
        "cold": ("cold",),
        "warm": ("warm",),
        "best_of_solo_and_processes": ("solo", "processes"),
    }.items():
        for key, unit in (("usd_per_1000_trial_steps", ""), ("usd_per_million_tokens", "_by_tokens")):
            costs = [best[mode][key] for mode in modes if mode in best]
            if costs:
                found[f"{name}/pack{unit}"] = round(min(costs) / best["pack"][key], 3)
    return found


class Report:
    """Prints lines and appends them to a file, one by one."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.failed = False
        self.lines: list[dict[str, Any]] = []
        if out is not None and out.exists():
            *whole, cut = out.read_text().split("\n")
            self.lines = [json.loads(line) for line in whole]
            if cut:
                out.write_text("".join(line + "\n" for line in whole))

    def add(self, line: dict[str, Any]) -> None:
        """Takes one line."""
        self.lines.append(line)
        self.failed |= "failed" in line
        text = json.dumps(line)
        print(text, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text + "\n")


def _counts(mode: str, options: argparse.Namespace) -> list[int]:
    counts: dict[str, list[int]] = {"pack": options.slots, "processes": options.processes}
    return counts.get(mode, [1])


def run_mode(mode: str, count: int, setup: Setup, options: argparse.Namespace) -> Measured:
    """Measures one mode with so many trials at once. Raises BenchmarkError."""
    trials = draw_trials(DRAWN, options.seed, setup.shape.batch_size, options.steps)
    try:
        if mode == "cold":
            return hf_trials.run_cold(setup, trials, options.trials)
        if mode == "warm":
            return hf_trials.run_warm(setup, trials, options.trials, options.seconds)
        if mode == "processes":
            return run_processes(setup, options, trials, count)
        return run_engine(setup, trials, count, options.seconds, options.warm_up, options.tokens, options.precision)
    except torch.OutOfMemoryError as error:
        raise BenchmarkError("out_of_memory", str(error).splitlines()[0]) from error
    except TrialFailed as error:
        raise BenchmarkError(error.code, str(error)) from error


def run(options: argparse.Namespace) -> int:
    """Runs all modes; returns the exit code."""
    device = torch.device(options.device)
    setup = make_setup(SHAPES[options.shape], options.rows, options.model, options.scratch, device)
    common = conditions(options, setup.weights, device)
    report = Report(options.out)
    for mode in options.mode:
        for count in _counts(mode, options):
            # What a failed mode left is free only now that its error is gone, and other processes need it.
            hf_trials.tidy(device)
            try:
                report.add(result_line(run_mode(mode, count, setup, options), common, options.price))
            except BenchmarkError as error:
                report.add({"mode": mode, "trials_at_once": count, **common, **error.line})
                if error.line["failed"] == "out_of_memory":
                    break  # more of them have no more room
    report.add(summary(report.lines, common))
    return int(report.failed)


def parsed(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Reads a command line with the options of all that train on the workload; `rows` is where its texts are."""
    parser.add_argument("--data", choices=KINDS, default="long")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m", metavar="DIR")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"), metavar="DIR", help="or /dev/shm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines here")
    options = parser.parse_args(arguments)
    options.rows = DATA / options.data
    hf_trials.quiet()
    return options


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES))
    parser.add_argument("--seconds", type=float, default=30.0, help="of measuring, a mode and count")
    parser.add_argument("--trials", type=int, default=1, help="cold and warm: whole trials")
    parser.add_argument("--steps", type=int, default=200, help="of a trial")
    parser.add_argument("--slots", type=int, nargs="+", default=[32])
    parser.add_argument("--tokens", type=int, help="of a full stream of our engine")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="of our engine's base")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds an engine trains before it is measured")
    parser.add_argument("--price", type=float, default=PRICE, help="dollars an hour")
    return run(parsed(parser, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
