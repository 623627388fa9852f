"""Do trials in a pack end where they end alone? Differences in validation loss, against those between seeds.

    python -m benchmarks.alone [--shape smollm2-135m] [--trials 6] [--seeds 3] [--steps 100] [--out FILE]

Run it as benchmarks.packing, whose data, weights and trials it uses. Every configuration is trained under every seed,
all of them at once in one pack, twice; then each configuration's first seed in a pack of one. The wide pack and that of
one differ in the order of sums alone, which bf16 makes visible, and two runs of the wide pack by what is summed in no
fixed order. Both are to be small against what another seed does. One JSON line:

    diverged        configurations of which a trial did, and which are not in what follows
    alone           |loss in the pack / loss alone - 1|, a configuration each
    again           the same between two runs of the wide pack
    seeds_spread    the standard deviation over seeds, relative to their mean, a configuration each
    fp8             with --fp8: [loss, trained in 8-bit floats; in bf16] of every trial of the wide pack
    losses          validation loss of each configuration: alone, and in the pack by seed
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks import hf_trials
from benchmarks.packing import Report, conditions, load_engine, parsed
from benchmarks.workload import SHAPES, Setup, draw_trials, make_setup
from trainers.engine import Engine, TrialFailed
from trainers.messages import TrialConfig


def losses(engine: Engine, trials: list[TrialConfig]) -> dict[int, float]:
    """Trains all trials at once and returns the validation loss of each by its number; nan where it diverged."""
    found: dict[int, float] = {}
    for trial in trials:
        engine.admit(trial, None, None)
    while len(found) < len(trials):
        try:
            for number in engine.advance(lambda: False):
                seen = engine.evaluate(number, None)
                found[number] = seen.nll / seen.completion_tokens
                engine.drop(number)
        except TrialFailed as error:
            if error.code != "diverged":
                raise
            print(f"trial {error.trial}: {error}", file=sys.stderr)
            found[error.trial] = math.nan
    return found


def measure(setup: Setup, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one shape. Raises TrialFailed where memory runs out."""
    drawn = draw_trials(options.trials, options.seed, setup.shape.batch_size, options.steps)
    wide = [
        dataclasses.replace(trial, number=trial.number * options.seeds + seed, seed=seed)
        for trial in drawn
        for seed in range(options.seeds)
    ]
    start = time.perf_counter()
    engine = load_engine(setup, len(wide), options.tokens)
    packed = losses(engine, wide)
    again = losses(engine, wide)
    del engine
    hf_trials.tidy(setup.device)
    rounded: dict[int, float] = {}
    if options.fp8:
        engine = load_engine(setup, len(wide), options.tokens, "fp8")
        rounded = losses(engine, wide)
        del engine
        hf_trials.tidy(setup.device)
    alone: dict[int, float] = {}
    engine = load_engine(setup, 1, None)
    for trial in wide[:: options.seeds]:
        alone |= losses(engine, [trial])
    by_seed: list[list[float]] = []
    firsts: list[int] = []
    for trial in drawn:
        found = [packed[trial.number * options.seeds + seed] for seed in range(options.seeds)]
        # Learning rates are drawn wide: a configuration that diverged says nothing of rounding.
        if all(map(math.isfinite, [alone[trial.number * options.seeds], *found])):
            by_seed.append(found)
            firsts.append(trial.number * options.seeds)

    def apart(other: dict[int, float]) -> list[float]:
        return [abs(packed[number] / other[number] - 1) for number in firsts]

    return {
        "trials": options.trials,
        "diverged": options.trials - len(firsts),
        "seeds": options.seeds,
        "steps": options.steps,
        "alone": apart(alone),
        "again": apart(again),
        "seeds_spread": [statistics.stdev(found) / statistics.mean(found) for found in by_seed],
        "fp8": [[rounded.get(trial.number, math.nan), packed[trial.number]] for trial in wide] if rounded else None,
        "losses": [[alone[number], *found] for number, found in zip(firsts, by_seed, strict=True)],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments: list[str]) -> int:
    """Prints the line and, with --out, appends it to a file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alone", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--trials", type=int, default=6, help="configurations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, help="of a full stream of the pack")
    parser.add_argument("--fp8", action="store_true", help="train the wide pack in 8-bit floats too")
    options = parsed(parser, arguments)
    device = torch.device(options.device)
    setup = make_setup(SHAPES[options.shape], options.rows, options.model, options.scratch, device)
    common = conditions(options, setup.weights, device)
    Report(options.out).add({**common, **measure(setup, options)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
