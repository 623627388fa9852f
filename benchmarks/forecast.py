"""How well forecasts hold: what was forecast at 10, 30 and 50 % of a trial's run, against what it then took.

    python -m benchmarks.forecast [--trials 12] [--set KEY=VALUE ...] [--folder DIR] [--json]
    python -m benchmarks.forecast --study-db studies.db [--study NAME] [--json]

Run it in the root of a checkout. Without a database it records one first: the quickstart's spec with the real model
(`make model`), rungs at 10, 30 and 50 % of the run, and every trial promoted to its end whatever its loss, so that what
a trial took after each rung is known. `--folder` keeps that recording; it may be judged again, on any machine, as any
other recorded study may.

The measurements are replayed in the order in which they arrived. At each rung of a trial that came to its end, the
forecast of the rest of it (training, evaluations and checkpoints) is compared with what the rest took. With how many
others it shared the machine on its way is taken as known, since that is the search's doing. So is how large their
batches were, which makes a GPU's steps longer or shorter: `with batches` takes that as known too. Besides, each
measurement is forecast just before it is learned, from the second of its kind on. `covered` is the share inside the
80 % interval, `error` the median of |forecast / taken - 1|.

The exit code is 1 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from budgets.forecast import Seconds
from sweep import cli, records, rungs, summary
from sweep.errors import SweepError
from sweep.projection import Projector, untaught
from sweep.records import TrialRow
from sweep.store import Store

ROOT = Path(__file__).absolute().parents[1]
STUDY = "forecast"
CAP = "$0.50"  # fifty minutes at the quickstart's price: never the reason why a trial ends
WHOLE = 0.02  # a stretch whose measured tokens miss more than this share was interrupted: its seconds are not all known


@dataclasses.dataclass(frozen=True)
class Pair:
    """A forecast, and the seconds that were taken."""

    group: str
    forecast: Seconds
    taken: float

    @property
    def inside(self) -> bool:
        """Whether the interval held."""
        return self.forecast.low <= self.taken <= self.forecast.high

    @property
    def error(self) -> float:
        """The mean's absolute error as a share of what was taken."""
        return abs(self.forecast.mean / self.taken - 1)


# --- recording ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def everyone_promoted() -> Iterator[None]:
    """While the context lasts, no loss stops a trial before its end."""
    judge: Callable[..., rungs.Judgement] = rungs.judge

    def promote(trial: TrialRow, results: rungs.Results, **options: Any) -> rungs.Judgement:
        verdict = judge(trial, results, **options)
        if trial.loss is None or trial.rung >= options["last"]:
            return verdict
        return rungs.Judgement("promote", "every trial is trained to its end")

    rungs.judge = promote
    try:
        yield
    finally:
        rungs.judge = judge


def record(folder: Path, trials: int, settings: list[str]) -> str:
    """Runs the quickstart's study in `folder` with every trial trained to its end; returns the database's URL.

    `settings` are more `--set` texts for `sweep launch`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{folder.absolute() / 'studies.db'}"
    own = {
        "model": ROOT / "models" / "smollm2-135m",
        "data.train": ROOT / "examples" / "data" / "define.jsonl",
        "search.rungs": "[0.1,0.3,0.5]",
        "search.trials": trials,
    }
    texts = [*(f"{key}={value}" for key, value in own.items()), *settings]
    overrides = [part for text in texts for part in ("--set", text)]
    arguments = ["launch", str(ROOT / "examples" / "quickstart.yaml"), "--study", STUDY, "--cap", CAP, *overrides]
    with contextlib.chdir(folder), everyone_promoted():
        cli.main([*arguments, "--storage", storage, "--yes"], standalone_mode=False)
    return storage


# --- judging --------------------------------------------------------------------------------------------------------


def pairs(connection: Connection, name: str) -> list[Pair]:
    """Replays a study; returns every forecast that can be compared, in the order of the measurements."""
    study = records.study(connection, name)
    configs = {t.number: t.config for t in records.trials(connection, name)}
    rows = records.evaluations(connection, name)
    projector = untaught(study)
    found: list[Pair] = []
    for worker in records.workers(connection, name):
        if worker.load_ms is not None:
            projector.observe_load(worker.load_ms)
    for row in rows:
        config = configs[row.trial]
        found += _next_ones(projector, config, row)
        projector.observe_evaluation(config, row)
        if row.shared_batch is not None:  # of those that it shared the machine with until now
            projector.batch = row.shared_batch / row.width
        rest = [r for r in rows if r.trial == row.trial and r.rung > row.rung]
        if _whole(row, rest, projector.plan.last):
            taken = sum(r.train_ms + r.evaluate_ms + r.checkpoint_ms for r in rest) / 1000
            share = projector.plan.rungs[row.rung] / projector.plan.run_tokens
            found.append(Pair(f"rest at {share:.0%}", projector.known_widths(config, rest), taken))
            known = projector.known_widths(config, rest, batches=True)
            found.append(Pair(f"rest at {share:.0%} with batches", known, taken))
    return found


def _whole(row: Any, rest: list[Any], last: int) -> bool:
    """Whether all that a trial took from this evaluation to its end was measured."""
    trained = sum(r.train_tokens for r in rest)
    left = max((r.tokens for r in rest), default=0) - row.tokens
    return any(r.rung == last for r in rest) and abs(trained - left) <= WHOLE * left


def _next_ones(projector: Projector, config: Any, row: Any) -> list[Pair]:
    """The forecasts of one row's measurements from what was learned before them."""
    candidates = [
        ("train", projector.train(config, row.train_tokens, row.width, row.shared_batch), row.train_ms),
        ("evaluate", projector.evaluation(config.method, row.evaluate_tokens), row.evaluate_ms),
        ("checkpoint", projector.checkpoint(config.method), row.checkpoint_ms),
    ]
    known = projector.forecast.measured
    return [Pair(f"next {kind}", forecast, ms / 1000) for kind, forecast, ms in candidates if ms and known(kind)]


def judged(database: str, name: str | None) -> list[dict[str, Any]]:
    """The figures of a study in a database (a file or a URL), the latest without a name. Raises SweepError."""
    store = Store(database if "://" in database else f"sqlite:///{Path(database).absolute()}")
    try:
        with store.read() as connection:
            return figures(pairs(connection, name or summary.latest(connection)))
    finally:
        store.dispose()


def figures(found: list[Pair]) -> list[dict[str, Any]]:
    """One row of figures for each group of pairs."""
    table = []
    for group in sorted({pair.group for pair in found}, reverse=True):
        mine = [pair for pair in found if pair.group == group]
        table.append(
            {
                "forecast": group,
                "count": len(mine),
                "median_error": statistics.median(pair.error for pair in mine),
                "covered": sum(pair.inside for pair in mine) / len(mine),
                "median_seconds": statistics.median(pair.taken for pair in mine),
                "median_width": statistics.median(p.forecast.high / p.forecast.low for p in mine),
            }
        )
    return table


def print_table(table: list[dict[str, Any]]) -> None:
    """Prints one line a group."""
    print(f"{'forecast of':<24} {'n':>4} {'median s':>9} {'error':>7} {'covered':>8}  high/low")
    for row in table:
        shares = f"{row['median_error']:>7.1%} {row['covered']:>8.0%}  {row['median_width']:.2f}"
        print(f"{row['forecast']:<24} {row['count']:>4} {row['median_seconds']:>9.2f} {shares}")


def main(arguments: list[str]) -> int:
    """Records if need be, judges, prints; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forecast", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=12, metavar="N", help="to record; 12 take about 7 minutes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to sweep launch")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the recording here")
    parser.add_argument("--study-db", metavar="DB", help="judge this database (a file or a URL) instead of recording")
    parser.add_argument("--study", metavar="NAME", help="a study of that database; the latest, unless one is named")
    parser.add_argument("--json", action="store_true", help="one line of JSON a forecast")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.folder or Path(temporary)
            table = judged(options.study_db or record(folder, options.trials, options.set), options.study)
    except SweepError as error:
        print(error, file=sys.stderr)
        return 1
    if not table:
        print("this study holds no two measurements of a kind: nothing to compare", file=sys.stderr)
        return 1
    if options.json:
        for row in table:
            print(json.dumps(row))
    else:
        print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
