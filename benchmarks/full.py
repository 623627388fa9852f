"""What full-parameter training costs on one GPU and on several: tokens a second, MFU, peak memory, and its losses.

    python -m benchmarks.full --shape SHAPE [--processes 1 2] [--batch-size 8 64] [--checkpointing] [--out FILE]

Run it in the root of a checkout that has `benchmarks/data` (`python -m benchmarks.workload`); try it with
`--shape tiny --device cpu --data short`. Weights are found or made as by benchmarks.packing. Trials are trained by the
engines that studies use, one engine for each number of `--processes`, all over one base model: one trial for each
number and batch size, `--warm-up` steps, then `--steps` measured ones. Result lines are JSON, printed and appended to
`--out`; one says `failed` where a trial was not trained. Figures of memory are of the first GPU.

    tokens_per_s        of the median of five stretches of the measured steps, as ms_per_step and mfu: a compilation in
                        one of them shows in `stretches_ms_per_step` alone
    mfu                 of full_flops at 989 TFLOP/s a GPU, recomputed layers not counted
    peak_memory_gib     most that the allocator had taken from the device; allocated_gib: most that it had handed out
    predicted_gib       what trainers/memory.py says of the latter for streams as long as those that were trained
    planned_gib         the same as `sweep fit` would ask it: every row as long as the longest
    losses              of every step, those of the warm-up too

Where there are several numbers of processes, a line for each batch size says how much faster they are than the first
one, and how far their losses are from its. `--rounding` trains the last batch size on the first number once more, its
batches cut into smaller parts: what the order of sums alone does to losses. `--hand-over 2 1 2` trains that trial in
turns, each going on, in so many processes, from the checkpoint of the one before, and compares it with the first one.

The exit code is 1 if a trial was not trained.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from benchmarks import hf_trials
from benchmarks.memory import shape_by_name
from benchmarks.packing import Report, conditions, parsed
from benchmarks.workload import PEAK_FLOPS, SHAPES, Setup, linear_parameters, make_setup
from trainers import memory
from trainers.engine import TrialFailed
from trainers.full.distributed import Ensemble, GroupError
from trainers.full.engine import FullEngine
from trainers.full.replica import deal
from trainers.messages import TrialConfig, WorkerJob
from trainers.models import Base, load_base
from trainers.named import ModelError
from trainers.splits import Split, batches, cut

STRETCHES = 5  # of the measured steps: a compilation in one of them changes no figure
FAILURES = (TrialFailed, ModelError, GroupError, RuntimeError, ValueError, AssertionError)


def full_flops(config: PretrainedConfig, split: Split) -> NDArray[np.float64]:
    """Floating-point operations that full-parameter training of each example needs, [rows].

    As benchmarks.workload.flops_per_example counts them, but that weights have gradients too: 6 N L for the linears and
    6 V h C for the head instead of 4. Not counted: embeddings, and layers that are run again to save memory.
    """
    tokens = split.lengths.astype(np.float64)
    completion = split.completions
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 6.0 * config.num_hidden_layers * config.num_attention_heads * head_size * tokens**2
    head = 6.0 * config.vocab_size * config.hidden_size * completion
    return np.asarray(6.0 * linear_parameters(config) * tokens + attention + head, dtype=np.float64)


def data_folder(setup: Setup, scratch: Path, kind: str) -> Path:
    """Writes the rows as every process reads them: those of the tiny shape are folded into its vocabulary."""
    folder = scratch / f"full-{setup.shape.name}-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in (("train", setup.train), ("validation", setup.validation)):
        arrays = {"ids": split.ids, "offsets": split.offsets, "mask": split.mask}
        safetensors.numpy.save_file(arrays, folder / f"{name}.safetensors")
    return folder


# --- what memory is predicted to be taken -----------------------------------------------------------------------------


def longest_stream(split: Split, config: TrialConfig, processes: int, micro: int) -> tuple[int, bool]:
    """Tokens of the longest stream of a trial's steps in a process, and whether a batch is more than one stream."""
    most, several = 0, False
    for rows in batches(config, split.rows):
        lengths = split.lengths[rows]
        for hand in deal(lengths, processes):
            parts = cut(hand, lengths, micro)
            most = max([most, *(int(lengths[part].sum()) for part in parts)])
            several |= len(parts) > 1
    return most, several


def predictions(setup: Setup, options: argparse.Namespace, config: TrialConfig, engine: FullEngine) -> dict[str, float]:
    """The peaks that are predicted, in GiB."""
    processes = engine._trained.ranks
    tokens, several = longest_stream(setup.train, config, processes, engine.micro_tokens)
    if setup.device.type == "cuda":
        from trainers.lora.gpu import length_of

        tokens = length_of(tokens, engine.micro_tokens, processes == 1 and engine._alone.graphs)
    longest = int(max(setup.train.lengths.max(), setup.validation.lengths.max()))
    streams = {
        "predicted": (tokens, several),
        "planned": memory.full_tokens([config.batch_size], longest, processes, engine.micro_tokens),
    }
    how = {"optimizer": options.optimizer, "checkpointing": options.checkpointing, "processes": processes}
    how |= {"gathered": processes > 1 and not options.reshard}
    shape = shape_by_name(options.shape)
    found = {}
    for name, (tokens, accumulates) in streams.items():
        asked = memory.Setup(method="full", tokens=tokens, accumulates=accumulates, **how)
        found[f"{name}_gib"] = round(memory.peak(shape, asked).total / memory.GIB, 2)
    return found


def measured_gib(device: torch.device) -> dict[str, float | None]:
    """The allocator's high-water marks since the last reset."""
    allocated = torch.cuda.max_memory_allocated() / memory.GIB if device.type == "cuda" else None
    return {"peak_memory_gib": hf_trials.peak_gib(device), "allocated_gib": allocated}


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Engines by number of processes over one base model, made when they are first wanted."""

    setup: Setup
    options: argparse.Namespace
    base: Base
    engines: dict[int, FullEngine] = field(default_factory=dict)

    def engine(self, processes: int) -> FullEngine:
        """The engine as a worker of a study loads it. Raises ModelError, GroupError."""
        if processes not in self.engines:
            options, setup = self.options, self.setup
            times = dict.fromkeys(("origin_boot_ms", "fence", "paid_ms", "work_ms", "checkpoint_ms"), 0)
            job = WorkerJob(
                worker="benchmark",
                command=[],
                model=str(setup.folder),
                data=str(data_folder(setup, options.scratch, options.data)),
                rung_rows=64,
                boot_id="",
                device=options.device,
                methods=["full"],
                optimizer=options.optimizer,
                checkpointing=options.checkpointing,
                full_tokens=options.tokens or (memory.SHARDED_TOKENS if processes > 1 else memory.MICRO_TOKENS),
                full_gathered=processes > 1 and not options.reshard,
                processes=processes,
                **times,
            )
            self.engines[processes] = FullEngine(
                self.base, setup.train, setup.validation, 64, job=job, compiled=not options.eager
            )
        for other, engine in self.engines.items():
            if other != processes:
                engine.rest()  # its graphs read where the base's weights were before they left for the others
        return self.engines[processes]

    def trial(self, batch: int) -> TrialConfig:
        """The trial of a batch size."""
        options = self.options
        return TrialConfig(
            number=0,
            method="full",
            learning_rate=options.rate,
            batch_size=batch,
            examples=(options.warm_up + options.steps + 2 * options.profile) * batch,
            seed=options.seed,
            weight_decay=0.1,
        )

    def give_up(self, processes: int) -> None:
        """Lets an engine go in which something failed."""
        engine = self.engines.pop(processes, None)
        if engine is not None:
            if self.base.busy:
                engine._release()
            end(engine)


def end(engine: FullEngine) -> None:
    """Ends an engine's other processes."""
    if isinstance(engine._trained, Ensemble):
        engine._trained.end()


def train(engine: FullEngine, steps: int) -> list[float]:
    """The loss of each of the next steps; nothing waits for the device before the last."""
    seen: list[int] = []

    def pause() -> bool:
        seen.append(1)
        return len(seen) == steps

    engine.advance(pause)
    run = engine._of(0)
    losses = list(run.losses)
    engine.train_loss(0)
    return losses


def stretches(bench: Bench, engine: FullEngine, config: TrialConfig) -> tuple[dict[str, Any], list[float]]:
    """Trains the measured steps; returns speeds, which are the median stretch's, and losses. Raises FAILURES."""
    setup, options = bench.setup, bench.options
    flops, plan = full_flops(setup.shape.config, setup.train), batches(config, setup.train.rows)
    found: list[tuple[float, float, float]] = []
    losses: list[float] = []
    seconds = 0.0
    for part in np.array_split(np.arange(options.steps), min(STRETCHES, options.steps)):
        before, mark = engine.position(0), hf_trials.now(setup.device)
        losses += train(engine, len(part))
        passed, at = hf_trials.now(setup.device) - mark, engine.position(0)
        done = float(flops[np.concatenate(plan[before.step : at.step])].sum())
        found.append(((at.tokens - before.tokens) / passed, 1000 * passed / len(part), done / passed))
        seconds += passed
    tokens, ms, rate = np.median(found, axis=0).tolist()
    gpus = engine._trained.ranks if setup.device.type == "cuda" else 0
    speeds = {
        "steps": options.steps,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens, 1),
        "ms_per_step": round(ms, 3),
        "mfu": round(rate / PEAK_FLOPS / gpus, 5) if gpus else None,
        "stretches_ms_per_step": [round(ms, 1) for _, ms, _ in found],
    }
    return speeds, losses


def profiled(engine: FullEngine, steps: int = 2) -> dict[str, Any]:
    """What the first GPU's time goes to, in ms a step: the kernels that take most, all of them, and the whole step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        train(engine, steps)
        torch.cuda.synchronize()
    passed = time.perf_counter() - started
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    taken: dict[str, float] = {}
    for event in kernels:
        taken[event.name[:60]] = taken.get(event.name[:60], 0.0) + event.device_time_total / 1000 / steps
    most = sorted(taken.items(), key=lambda item: -item[1])[:14]
    busy, end = 0.0, 0.0
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        start, stop = event.time_range.start, event.time_range.end
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {
        "profile_ms": {name: round(ms, 2) for name, ms in most},
        "profile_busy_ms": round(busy / 1000 / steps, 1),
        "profile_step_ms": round(1000 * passed / steps, 1),
    }


def measure(bench: Bench, processes: int, config: TrialConfig) -> dict[str, Any]:
    """Trains a trial in so many processes; returns the figures. Raises FAILURES."""
    setup, options, device = bench.setup, bench.options, bench.setup.device
    hf_trials.tidy(device)
    start = hf_trials.now(device)
    engine = bench.engine(processes)
    loaded = hf_trials.now(device)
    engine.admit(config, None, None)
    admitted = hf_trials.now(device)
    losses = train(engine, options.warm_up)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    warm = hf_trials.now(device)
    speeds, later = stretches(bench, engine, config)
    peaks = measured_gib(device)
    seen = profiled(engine) if options.profile else {}
    engine.drop(0)
    return {
        **speeds,
        **seen,
        **peaks,
        **predictions(setup, options, config, engine),
        "load_seconds": round(loaded - start, 3),
        "admit_seconds": round(admitted - loaded, 3),
        "warm_up_seconds": round(warm - admitted, 3),
        "losses": losses + later,
    }


def distance(losses: list[float], others: list[float]) -> float:
    """The largest relative difference between the losses of the same steps."""
    ours, theirs = np.array(losses), np.array(others)
    return float((np.abs(ours - theirs) / np.abs(theirs)).max())


def rounding(bench: Bench, processes: int, config: TrialConfig, whole: list[float]) -> dict[str, Any]:
    """A trial once more, its batches cut into at least two parts, against its losses. Raises FAILURES."""
    engine = bench.engine(processes)
    usual, (stream, _) = engine.micro_tokens, longest_stream(bench.setup.train, config, processes, engine.micro_tokens)
    engine.micro_tokens = stream // 2
    engine.admit(config, None, None)
    losses = train(engine, len(whole))
    engine.drop(0)
    engine.micro_tokens = usual
    return {"micro_tokens": stream // 2, "losses": losses, "largest_relative_difference": distance(losses, whole)}


def hand_over(bench: Bench, turns: list[int], config: TrialConfig, whole: list[float]) -> dict[str, Any]:
    """A trial that goes from engine to engine by its checkpoints, against the losses of one that stayed.

    Raises FAILURES and OSError.
    """
    folder = bench.options.scratch / f"full-checkpoints-{bench.options.shape}"
    shutil.rmtree(folder, ignore_errors=True)
    ends = [len(whole) * turn // len(turns) for turn in range(len(turns) + 1)]
    losses: list[float] = []
    found: dict[str, list[float]] = {"admit_seconds": [], "checkpoint_seconds": []}
    saved: Path | None = None
    for turn, processes in enumerate(turns):
        engine = bench.engine(processes)
        mark = hf_trials.now(bench.setup.device)
        at = engine.admit(config, saved, None).step
        found["admit_seconds"].append(round(hf_trials.now(bench.setup.device) - mark, 3))
        if at != ends[turn]:
            raise RuntimeError(f"turn {turn} goes on at step {at} instead of {ends[turn]}")
        losses += train(engine, ends[turn + 1] - at)
        if turn + 1 < len(turns):
            mark, before, saved = time.perf_counter(), saved, folder / f"{turn}"
            engine.checkpoint(0, saved)
            found["checkpoint_seconds"].append(round(time.perf_counter() - mark, 3))
            if before is not None:
                shutil.rmtree(before)
        engine.drop(0)
    shutil.rmtree(folder, ignore_errors=True)
    return {**found, "ends": ends[1:], "losses": losses, "largest_relative_difference": distance(losses, whole)}


def compared(batch: int, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How much faster than the first the trials of one batch size are, and how far from its losses."""
    first = lines[0]
    return {
        "mode": "summary",
        "batch_size": batch,
        "processes": [line["processes"] for line in lines],
        "speed_up": [round(line["tokens_per_s"] / first["tokens_per_s"], 3) for line in lines],
        "largest_relative_difference": [distance(line["losses"], first["losses"]) for line in lines],
    }


# --- all of them ------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Trains with every batch size and number of processes; returns the exit code."""
    device = torch.device(options.device)
    setup = make_setup(SHAPES[options.shape], options.rows, options.model, options.scratch, device)
    common = conditions(options, setup.weights, device)
    common |= {key: getattr(options, key) for key in ("optimizer", "checkpointing", "eager", "tokens", "seed")}
    report = Report(options.out)
    bench = Bench(setup, options, load_base(str(setup.folder), options.device))

    def add(mode: str, processes: list[int], batch: int, call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        line = {"mode": mode, **common, "batch_size": batch}
        line |= {"processes": processes[0] if mode == "full" else processes}
        try:
            report.add(line | call())
        except (*FAILURES, OSError) as error:
            traceback.print_exc()
            said = (str(error).splitlines() or [type(error).__name__])[0]
            report.add(line | {"failed": getattr(error, "code", "error"), "said": said})
            for number in processes:
                bench.give_up(number)
            return None
        return report.lines[-1]

    ways = options.processes
    for batch in options.batch_size or [setup.shape.batch_size]:
        config = bench.trial(batch)
        tried = [add("full", [n], batch, lambda n=n, c=config: measure(bench, n, c)) for n in ways]  # type: ignore[misc]
        lines = [line for line in tried if line is not None]
        if len(lines) > 1:
            report.add({**compared(batch, lines), "shape": options.shape})
    if lines and options.rounding:
        add("rounding", ways[:1], batch, lambda: rounding(bench, ways[0], config, lines[0]["losses"]))
    if lines and options.hand_over:
        turns = options.hand_over
        add("hand-over", turns, batch, lambda: hand_over(bench, turns, config, lines[0]["losses"]))
    for engine in bench.engines.values():
        end(engine)
    return int(report.failed)


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--batch-size", type=int, nargs="+", help="rows a step; the shape's own if not given")
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers to save memory")
    parser.add_argument("--optimizer", choices=("adamw", "adamw-8bit"), default="adamw")
    parser.add_argument("--steps", type=int, default=30, help="that are measured")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before: compilers and allocators settle")
    parser.add_argument("--tokens", type=int, help="at once in each process, if not what a study would take")
    parser.add_argument("--reshard", action="store_true", help="weights are gathered again for backward")
    parser.add_argument("--profile", action="store_true", help="what the GPU's time goes to in two more steps")
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate")
    parser.add_argument("--eager", action="store_true", help="compile no layers")
    parser.add_argument("--rounding", action="store_true", help="what another order of sums does to losses")
    parser.add_argument("--hand-over", type=int, nargs="+", metavar="N", help="one trial, in so many processes in turn")
    return run(parsed(parser, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
