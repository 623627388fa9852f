"""What stopping early saves and loses, on tables: `stop: patience`, `stop: utility`, and dominance.

    python -m benchmarks.stopping run [--seeds 5] [--first 0] [--runs 20] [--variant NAME ...] [--out stopping.jsonl]
    python -m benchmarks.stopping report stopping.jsonl
    python -m benchmarks.stopping dominance [--seeds 40] [--safety 3]

Each variant is a whole study by the real loop (benchmarks/replay.py) on synthetic tables, a new draw of the table for
every seed. `run` appends a line a study and leaves out what is there already. Money is in whole runs; what an answer
is worth is the seed-mean final loss of its configuration, over the table's best. `late` counts configurations of the
table's best tenth that were stopped as dominated. `dominance` asks the rule alone, on many tables in a minute: rows in
a random order go through halving one after the other, without any machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import replay, synthetic
from benchmarks.search import judge
from benchmarks.simulated import MICROS_PER_HOUR
from benchmarks.tables import SPACE, Row, Table
from sweep import dominance, records
from sweep.loop import Sweep
from sweep.records import TrialRow
from sweep.rungs import Judgement, Results
from trainers.messages import TrialConfig

RUN_SECONDS = 600.0
LATE_SHARE = 0.1
ASKED, RUNGS = 60, (0.05, 0.1, 0.2, 0.4, 1.0)  # trials of a study, and the default rungs with the end
# Worth of a percent, in whole runs.
UTILITY = {"utility 0.02": 0.02, "utility 0.1": 0.1, "utility 0.5": 0.5}
STOPS: dict[str, Any] = {
    "patience 10": {"patience": {"trials": 10}},
    "patience 20": {"patience": {"trials": 20}},
    "patience 40": {"patience": {"trials": 40}},
}


class Undominated(Sweep):
    """Whoever stays behind is paused, however far."""

    def _overruled(self, judgement: Judgement, *_: Any) -> Judgement:
        return judgement


SEARCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no dominance": {"sweep": Undominated},
    "hyperband": {"rungs": "hyperband"},
    "hyperband, no dominance": {"rungs": "hyperband", "sweep": Undominated},
}
VARIANTS = (*SEARCHES, *STOPS, *UTILITY)


def study(name: str, seed: int, variant: str, runs: float) -> dict[str, Any]:
    """One study; figures in whole runs."""
    table = synthetic.make(name, seed).lasting(RUN_SECONDS)
    lora = table.of("lora")
    unit = lora.run_seconds() * MICROS_PER_HOUR / 3600 / 1e6
    stop = STOPS.get(variant)
    if variant in UTILITY:
        stop = {"utility": {"dollars_per_percent": f"${UTILITY[variant] * unit:.6f}"}}
    done = replay.replay(table, seed, runs, stop=stop, priors="default", **SEARCHES.get(variant, {}))
    best = lora.best(LATE_SHARE)
    found = judge(table, done)
    trace = found["finished"]["trace"]
    return {
        "table": name,
        "seed": seed,
        "variant": variant,
        "spent": found["spent"],
        "trials": done.trials,
        "excess": trace[-1][1] if trace else None,
        "dominated": len(done.dominated),
        "late": sum(row in best for row in done.dominated),
    }


def run(options: argparse.Namespace) -> int:
    """Appends the studies that are missing."""
    known = set()
    if options.out.exists():
        lines = [json.loads(line) for line in options.out.read_text().splitlines()]
        known = {(line["table"], line["seed"], line["variant"]) for line in lines}
    for seed in range(options.first, options.first + options.seeds):
        for name in synthetic.KINDS:
            for variant in options.variant or VARIANTS:
                if (name, seed, variant) not in known:
                    with options.out.open("a") as out:
                        out.write(json.dumps(study(name, seed, variant, options.runs)) + "\n")
    return 0


def report(options: argparse.Namespace) -> int:
    """Prints a line a table and variant: means over the seeds that `as it is` has too."""
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    print("| table | variant | seeds | spent | left by it | answer worse by | dominated | of the best tenth |")
    print("|---|---|---|---|---|---|---|---|")
    for name in synthetic.KINDS:
        base = {line["seed"]: line for line in lines if (line["table"], line["variant"]) == (name, "as it is")}
        for variant in VARIANTS:
            mine = [one for one in lines if (one["table"], one["variant"]) == (name, variant) and one["seed"] in base]
            if mine:
                print(_row(name, variant, mine, base))
    return 0


def _row(name: str, variant: str, mine: Sequence[dict[str, Any]], base: dict[int, dict[str, Any]]) -> str:
    spent = statistics.fmean(line["spent"] for line in mine)
    left = statistics.fmean(1 - line["spent"] / base[line["seed"]]["spent"] for line in mine)
    known = [line for line in mine if None not in (line["excess"], base[line["seed"]]["excess"])]
    worse = [(1 + line["excess"]) / (1 + base[line["seed"]]["excess"]) - 1 for line in known]
    lost = f"{100 * statistics.fmean(worse):.2f} % (worst {100 * max(worse):.2f} %)" if worse else "no answer"
    counts = [sum(line[key] for line in mine) for key in ("dominated", "late")]
    return (
        f"| {name} | {variant} | {len(mine)} | {spent:.1f} | {100 * left:.0f} % | {lost} | {counts[0]} | {counts[1]} |"
    )


def dominance_alone(options: argparse.Namespace) -> int:
    """Prints how many rows the rule stops, how many of them halving would have promoted, and how many are late ones."""
    dominance.SAFETY = options.safety
    print("| table | rows | stopped | of them halving promotes | of the best tenth | stopped of these |")
    print("|---|---|---|---|---|---|")
    for name in synthetic.KINDS:
        counts = [_halved(synthetic.make(name, seed).of("lora"), seed) for seed in range(options.seeds)]
        print(f"| {name} | {' | '.join(str(sum(column)) for column in zip(*counts, strict=True))} |")
    return 0


def _halved(table: Table, seed: int) -> tuple[int, int, int, int, int]:
    """Rows, stopped ones, stopped ones that halving promotes, rows of the best tenth, stopped ones of these."""
    rows = [table.rows[place] for place in np.random.default_rng(seed).permutation(len(table.rows))[:ASKED]]
    best, losses = table.best(LATE_SHARE), {rung: dict[int, float]() for rung in range(len(RUNGS))}
    trials: list[TrialRow] = []
    stopped, promoted = [], 0
    for row in rows:
        trial = _newcomer(row)
        for rung, share in enumerate(RUNGS):
            run = row.runs[0]
            if table.death(run) <= share:
                break
            loss = losses[rung][row.number] = table.loss(run, share)
            last = rung == len(RUNGS) - 1
            trial = replace(trial, rung=rung, loss=loss, state="completed" if last else "judging")
            goes_on = Results((number, 0, one) for number, one in losses[rung].items()).among_best(row.number, 0, 2)
            if not last and dominance.dominated(trial, trials, losses) is not None:
                stopped.append(row.number)
                promoted += goes_on
                break
            if not goes_on and not last:
                break
        trials.append(trial)
    return len(rows), len(stopped), promoted, sum(r.number in best for r in rows), sum(n in best for n in stopped)


def _newcomer(row: Row) -> TrialRow:
    config = {name: row.config[name] for name in ("method", *SPACE)}
    return records.newcomer(TrialConfig(number=row.number, examples=1, seed=0, **config))


def main(arguments: list[str]) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.stopping")
    verbs = parser.add_subparsers(required=True)
    runner = verbs.add_parser("run")
    runner.add_argument("--seeds", type=int, default=5)
    runner.add_argument("--first", type=int, default=0)
    runner.add_argument("--runs", type=float, default=20.0)
    runner.add_argument("--variant", action="append", choices=VARIANTS)
    runner.add_argument("--out", type=Path, default=Path("stopping.jsonl"))
    runner.set_defaults(call=run)
    ruler = verbs.add_parser("dominance")
    ruler.add_argument("--seeds", type=int, default=40)
    ruler.add_argument("--safety", type=float, default=dominance.SAFETY)
    ruler.set_defaults(call=dominance_alone)
    reporter = verbs.add_parser("report")
    reporter.add_argument("out", type=Path)
    reporter.set_defaults(call=report)
    options = parser.parse_args(arguments)
    return int(options.call(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
