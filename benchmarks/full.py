"""What full-parameter training costs on one GPU and on several: tokens a second, MFU, peak memory, and its losses.

    python -m benchmarks.full --shape SHAPE [--processes 1 2] [--checkpointing] [--optimizer adamw-8bit] [--out FILE]

Run it in the root of a checkout that has `benchmarks/data` (`python -m benchmarks.workload`); try it with
`--shape tiny --device cpu --data short`. Weights are found or made as by benchmarks.packing. For each number of
`--processes` one trial is trained by the engine that studies use: `--warm-up` steps, then `--steps` measured ones.
Result lines are JSON, printed and appended to `--out`. `mfu` is of full_flops at 989 TFLOP/s a GPU, recomputed layers
not counted; `peak_memory_gib` is of the first GPU.

With several numbers of processes the last line says how far the losses of their steps are apart: without `--hand-over`
every run begins anew and should have the same ones; with it, every run goes on from the checkpoint of the one before,
so `--processes 2 1 2 --hand-over` pauses on two, resumes on one and goes back. Losses are in every line.

The exit code is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from transformers import PretrainedConfig

from benchmarks import hf_trials
from benchmarks.packing import Report, machine, parsed
from benchmarks.workload import PEAK_FLOPS, SHAPES, Setup, linear_parameters, make_setup
from trainers.engine import TrialFailed
from trainers.full.distributed import Ensemble
from trainers.full.engine import FullEngine
from trainers.messages import TrialConfig, WorkerJob
from trainers.models import ModelError, load_base
from trainers.splits import Split, batches


def full_flops(config: PretrainedConfig, split: Split) -> NDArray[np.float64]:
    """Floating-point operations that full-parameter training of each example needs, [rows].

    As benchmarks.workload.flops_per_example counts them, but that weights have gradients too: 6 N L for the linears and
    6 V h C for the head instead of 4. Not counted: embeddings, and layers that are run again to save memory.
    """
    tokens = split.lengths.astype(np.float64)
    completion = np.add.reduceat(split.mask.astype(np.int64), split.offsets[:-1])
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


def make_engine(setup: Setup, options: argparse.Namespace, processes: int) -> FullEngine:
    """The engine as a worker of a study loads it. Raises ModelError."""
    job = WorkerJob(
        worker="benchmark",
        command=[],
        model=str(setup.folder),
        data=str(data_folder(setup, options.scratch, options.data)),
        rung_rows=64,
        origin_boot_ms=0,
        boot_id="",
        fence=0,
        paid_ms=0,
        work_ms=0,
        checkpoint_ms=0,
        device=options.device,
        methods=["full"],
        optimizer=options.optimizer,
        checkpointing=options.checkpointing,
        processes=processes,
    )
    base = load_base(job.model, job.device)
    return FullEngine(base, setup.train, setup.validation, 64, options.tokens, job, compiled=not options.eager)


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


def measure(setup: Setup, options: argparse.Namespace, processes: int, saved: Path | None, into: Path | None) -> Any:
    """Trains with so many processes; returns the figures. Raises TrialFailed, ModelError, RuntimeError."""
    device = setup.device
    batch = options.batch_size or setup.shape.batch_size
    steps = (options.warm_up + options.steps) * (len(options.processes) if options.hand_over else 1)
    config = TrialConfig(
        number=0,
        method="full",
        learning_rate=options.rate,
        batch_size=batch,
        examples=steps * batch,
        seed=options.seed,
        weight_decay=0.1,
    )
    start = hf_trials.now(device)
    engine = make_engine(setup, options, processes)
    loaded = hf_trials.now(device)
    first = engine.admit(config, saved, None).step
    admitted = hf_trials.now(device)
    losses = train(engine, options.warm_up)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = engine.position(0)
    mark = hf_trials.now(device)
    losses += train(engine, options.steps)
    seconds = hf_trials.now(device) - mark
    at = engine.position(0)
    rows = np.concatenate(batches(config, setup.train.rows)[before.step : at.step])
    flops = float(full_flops(setup.shape.config, setup.train)[rows].sum())
    found: dict[str, Any] = {
        "steps": at.step - before.step,
        "seconds": round(seconds, 3),
        "tokens_per_s": round((at.tokens - before.tokens) / seconds, 1),
        "ms_per_step": round(1000 * seconds / (at.step - before.step), 3),
        "mfu": round(flops / seconds / PEAK_FLOPS / processes, 5) if device.type == "cuda" else None,
        "peak_memory_gib": hf_trials.peak_gib(device),
        "load_seconds": round(loaded - start, 3),
        "admit_seconds": round(admitted - loaded, 3),
        "first_step": first,
        "losses": losses,
    }
    if into is not None:
        mark = time.perf_counter()
        engine.checkpoint(0, into)
        found["checkpoint_seconds"] = round(time.perf_counter() - mark, 3)
    engine.drop(0)
    if isinstance(engine._trained, Ensemble):
        engine._trained.end()
    return found


def summary(lines: list[dict[str, Any]], hand_over: bool) -> dict[str, Any]:
    """How far the runs' losses are apart, and how much faster the largest group is than the smallest."""
    found: dict[str, Any] = {"mode": "summary", "processes": [line["processes"] for line in lines]}
    if hand_over:
        found["losses"] = [loss for line in lines for loss in line["losses"]]
        return found
    runs = np.array([line["losses"] for line in lines])
    found["largest_relative_difference"] = float((np.abs(runs - runs[0]) / np.abs(runs[0])).max())
    found["speed_up"] = [round(line["tokens_per_s"] / lines[0]["tokens_per_s"], 3) for line in lines]
    return found


def run(options: argparse.Namespace) -> int:
    """Measures with every number of processes; returns the exit code."""
    device = torch.device(options.device)
    setup = make_setup(SHAPES[options.shape], options.rows, options.model, options.scratch, device)
    common = {"mode": "full", "shape": options.shape, "data": options.data, "weights": setup.weights, **machine(device)}
    keys = ("batch_size", "optimizer", "checkpointing", "eager", "tokens", "seed")
    common |= {key: getattr(options, key) for key in keys}
    lines: list[dict[str, Any]] = []
    report = Report(options.out)
    saved: Path | None = None
    folder = options.scratch / f"full-checkpoints-{options.shape}"
    shutil.rmtree(folder, ignore_errors=True)

    for place, processes in enumerate(options.processes):
        hf_trials.tidy(device)
        into = folder / f"{place}" if options.hand_over else None
        try:
            found = measure(setup, options, processes, saved, into)
        except (TrialFailed, ModelError, RuntimeError) as error:
            said = str(error).splitlines()[0]
            report.add({**common, "processes": processes, "failed": getattr(error, "code", "error"), "said": said})
            return 1
        saved = into
        lines.append({**common, "processes": processes, **found})
        report.add(lines[-1])
    if len(lines) > 1:
        report.add({**summary(lines, options.hand_over), "shape": options.shape})
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--checkpointing", action="store_true", help="recompute layers to save memory")
    parser.add_argument("--optimizer", choices=("adamw", "adamw-8bit"), default="adamw")
    parser.add_argument("--steps", type=int, default=30, help="that are measured")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before: compilers and allocators settle")
    parser.add_argument("--batch-size", type=int, help="rows a step; the shape's own if not given")
    parser.add_argument("--tokens", type=int, help="that go through the model at once, in each process")
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate")
    parser.add_argument("--eager", action="store_true", help="compile no layers")
    parser.add_argument("--hand-over", action="store_true", help="each run goes on from the one before")
    return run(parsed(parser, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
