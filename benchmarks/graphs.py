"""What CUDA graphs save where launching takes longer than computing, and whether they compute the same.

    python -m benchmarks.graphs [--shape smollm2-135m] [--data short] [--out FILE]

Run it in the root of a checkout that has `benchmarks/data` (`python -m benchmarks.workload`), on a GPU. Weights are
found or made as by benchmarks.packing. Two things, with compiled layers, launched kernel by kernel and replayed:

    evaluation   the loss of a LoRA trial in a pack on the first validation rows, between others that train
    full step    an optimizer step of a full-parameter trial

One JSON line each: milliseconds with and without, their ratio, and the largest relative difference between the losses.
The last line says what coming back to a pack costs after a full-parameter trial: milliseconds of its first evaluation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import hf_trials
from benchmarks.packing import Report, conditions, load_engine, parsed
from benchmarks.workload import SHAPES, Setup, draw_trials, make_setup
from trainers.full.engine import FullEngine
from trainers.lora import probe
from trainers.messages import TrialConfig
from trainers.models import Base


def milliseconds(call: Callable[[], float], times: int) -> tuple[float, list[float]]:
    """The median time of a call that ends with a figure on the host, and what the calls returned."""
    found, seconds = [], []
    for _ in range(times):
        started = time.perf_counter()
        found.append(call())
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 3), found


def compared(what: str, eager: tuple[float, list[float]], replayed: tuple[float, list[float]]) -> dict[str, Any]:
    """The line of one thing."""
    pairs = zip(eager[1], replayed[1], strict=True)
    return {
        "what": what,
        "eager_ms": eager[0],
        "graphs_ms": replayed[0],
        "ratio": round(eager[0] / replayed[0], 2),
        "largest_relative_difference": max(abs(one / other - 1) for one, other in pairs),
    }


def evaluations(setup: Setup, options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Evaluates a trial of a pack both ways; returns the line and the engine."""
    engine: Any = load_engine(setup, options.slots, options.tokens)
    probe.warm_up(engine, 64)
    for trial in draw_trials(options.slots, options.seed, setup.shape.batch_size, 50):
        engine.admit(trial, None, None)
    seen: list[int] = []

    def pause() -> bool:
        seen.append(1)
        return len(seen) % 4 == 0

    def look() -> float:
        found = engine.evaluate(0, options.judged)
        return float(found.nll / found.completion_tokens)

    engine.advance(pause)
    engine._runner.graphs = False
    milliseconds(look, 3)
    eager = milliseconds(look, options.times)
    engine._runner.graphs = True
    milliseconds(look, 3)
    replayed = milliseconds(look, options.times)
    for number in list(engine._trials):
        engine.drop(number)
    return compared("evaluation", eager, replayed), engine


def full_steps(base: Base, setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """Trains the same steps both ways."""
    batch = setup.shape.batch_size
    config = TrialConfig(
        number=0, method="full", learning_rate=2e-5, batch_size=batch, examples=batch * (options.times + 6), seed=0
    )
    runs = []
    for graphs in (False, True):
        engine: Any = FullEngine(base, setup.train, setup.validation, 64)
        if not graphs:
            engine._without_graphs()
        engine.warm_up()
        engine.admit(config, None, None)

        def step(engine: Any = engine) -> float:
            engine.advance(lambda: True)
            return float(engine._of(0).take_loss())

        milliseconds(step, 5)
        runs.append(milliseconds(step, options.times))
        engine.drop(0)
    return {**compared("full step", *runs), "captured": engine._alone.graphs}


def coming_back(engine: Any, setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """A trial comes back to a pack whose graphs were kept; its loss is compared with that of launched kernels."""
    engine.admit(draw_trials(1, options.seed, setup.shape.batch_size, 50)[0], None, None)
    kept = vars(engine.kept())
    replayed = milliseconds(lambda: float(engine.evaluate(0, options.judged).nll), 1)
    engine._runner.graphs = False
    engine.rest()
    eager = milliseconds(lambda: float(engine.evaluate(0, options.judged).nll), 1)
    return {**compared("coming back", eager, replayed), "kept": kept}


def run(options: argparse.Namespace) -> int:
    """Measures everything; returns the exit code."""
    device = torch.device(options.device)
    setup = make_setup(SHAPES[options.shape], options.rows, options.model, options.scratch, device)
    common = conditions(options, setup.weights, device)
    report = Report(options.out)
    line, engine = evaluations(setup, options)
    report.add({**common, **line})
    report.add({**common, **full_steps(engine.base, setup, options)})
    report.add({**common, **coming_back(engine, setup, options)})
    hf_trials.tidy(device)
    return 0


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384, help="of a full stream of the pack")
    parser.add_argument("--judged", type=int, default=200, help="validation rows of an evaluation")
    parser.add_argument("--times", type=int, default=20, help="each is measured")
    return run(parsed(parser, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
