"""How many dollars searches need on recorded tables: ours, through its real loop, against others' at equal prices.

    python -m benchmarks.search run [--synthetic] [--table NAME ...] [--search NAME ...] [--prior none good wrong]
                                    [--seeds 30] [--python PEERS_PYTHON] [--out search.jsonl]
    python -m benchmarks.search report search.jsonl [--plot search.html]
    python -m benchmarks.search steps [--trials 10 100 1000]

`run` appends one line a study to `--out` and leaves out what is there already, so it can be killed and run again.
Ours is replayed (benchmarks/replay.py), the others run in simulated time (benchmarks/race.py), from the interpreter
`--python` (benchmarks/requirements-peers.txt). How everyone is treated alike stands in docs/search.md.

Money is counted in whole runs: what training one configuration to its end costs alone, on average over the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import race, replay, synthetic, tables
from benchmarks.replay import Replayed, TableMemory
from benchmarks.simulated import MICROS_PER_HOUR
from benchmarks.tables import Prior, Table
from sweep.errors import Interrupted
from sweep.loop import Sweep

PEERS = {
    "optuna": ("random", "tpe", "tpe+halving", "tpe+hyperband", "gp"),
    "neps": ("priorband", "asha"),
    "syne_tune": ("asha", "bohb"),
    "flaml": ("blendsearch",),
}
ONE_RUNG = "one-rung"
PRIORS = {"none": None, "good": 1.0, "wrong": 30.0}  # by what the guesses' learning rates are divided
WHOLE = 1 - 1e-6  # of a run
RESAMPLES = 2000
SIZE_STEP = 10  # trials between two points of `steps`


# --- ours, and ours without a part ------------------------------------------------------------------------------------


class NoPromotion(Sweep):
    """Whoever pauses has stopped, until the search has no more to ask."""

    def _wake(self, *_: Any, **__: Any) -> bool:
        return False


class NoTriage(Sweep):
    """Nobody is pruned for money; what cannot be paid any more is cut by the last slice."""

    def _project(self) -> None:
        pass


class NoFinish(Sweep):
    """What is left when no new trial can be paid stays in the pocket."""

    def _finish(self, *_: Any) -> bool:
        return False


OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-no-rungs": {"rungs": []},
    "ours-no-promotion": {"sweep": NoPromotion},
    "ours-no-triage": {"sweep": NoTriage},
    "ours-no-finish": {"sweep": NoFinish},
    "ours-random-sampler": {"sampler": "random"},
    "ours-tpe-sampler": {"sampler": "tpe"},
    "ours-halving": {"promote": "halving", "rungs": [0.05, 0.1, 0.2, 0.4]},
    "ours-early-rung": {"rungs": [0.05]},
    "ours-rung-sooner": {"rungs": [0.04, 0.8]},
    "ours-rung-later": {"rungs": [0.075, 0.8]},
    "ours-middle-rungs": {"rungs": [0.025, 0.1, 0.4]},
}
ABLATIONS = tuple(name for name in OURS if name != "ours")
SEARCHES = ("ours", *(f"{library}:{name}" for library, names in PEERS.items() for name in names), ONE_RUNG)


# --- what a study is worth --------------------------------------------------------------------------------------------


def judge(table: Table, done: Replayed) -> dict[str, Any]:
    """Figures of one study; money in whole runs.

    The incumbent is the finished run with the lowest loss that was seen: what a user would be given. `any` judges by
    evaluations of all lengths instead, as if a configuration were an answer before it was trained. What it is worth is
    the seed-mean loss of its configuration at the end.
    """
    lora = table.of("lora")
    finals, best = lora.finals(), lora.best()
    unit = lora.run_seconds() / 3600 * MICROS_PER_HOUR / 1e6
    least = min(finals.values())
    found: dict[str, Any] = {"spent": done.spent / unit, "trials": done.trials}
    for name, lowest_share in (("finished", WHOLE), ("any", 0.0)):
        loss, reached, trace = float("inf"), None, []
        for seen in done.seen:
            if seen.share < lowest_share or seen.loss >= loss:
                continue
            loss = seen.loss
            trace.append([round(seen.dollars / unit, 4), round(finals[seen.row] / least - 1, 6)])
            if reached is None and seen.row in best:
                reached = round(seen.dollars / unit, 4)
        regret = trace[-1][1] if trace else table.base_loss / least - 1
        found[name] = {"reached": reached, "regret": regret, "trace": trace}
    return found


def study(
    table: Table, search: str, prior: Prior | None, seed: int, runs: float, slots: int, peers: dict[str, race.Peer]
) -> Replayed:
    """Runs one study. Raises PeerError."""
    if search in OURS:
        return replay.replay(table, seed, runs, slots, **OURS[search], **_first(prior))
    if search == ONE_RUNG:
        one = race.OneRung(runs, len(table.of("lora").rows))
        return race.race(table, one, search, prior, seed, runs, slots)
    library, _, name = search.partition(":")
    return race.race(table, peers[library], name, prior, seed, runs, slots)


def _first(prior: Prior | None) -> dict[str, Any]:
    """The guesses as our spec takes them: tried first, and nothing else of our own priors."""
    return {"first": prior.guesses} if prior else {}


def run(options: argparse.Namespace) -> int:
    """Runs what is not in the file yet; returns the exit code."""
    known = set()
    if options.out.exists():
        for line in map(json.loads, options.out.read_text().splitlines()):
            known.add((line["table"], line["search"], line["prior"], line["seed"], line["runs"], line["slots"]))
    named = sorted({search.partition(":")[0] for search in options.search} & set(PEERS))
    with race.peers(dict.fromkeys(named, options.python)) as peers, options.out.open("a") as out:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for table in _tables(options):
                space = tables.space_of(table.of("lora"))
                for kind in options.prior:
                    wrong = PRIORS[kind]
                    prior = None if wrong is None else tables.prior_of(space, wrong)
                    for search in options.search:
                        key = (table.name, search, kind, seed, options.runs, options.slots)
                        if key in known:
                            continue
                        started = time.perf_counter()
                        done = study(table, search, prior, seed, options.runs, options.slots, peers)
                        names = ("table", "search", "prior", "seed", "runs", "slots")
                        line = dict(zip(names, key, strict=True)) | {"synthetic": table.synthetic}
                        line |= judge(table, done) | {"seconds": round(time.perf_counter() - started, 2)}
                        out.write(json.dumps(line) + "\n")
                        out.flush()
    return 0


def _tables(options: argparse.Namespace) -> list[Table]:
    made_up = [synthetic.make(name) for name in options.table or synthetic.KINDS] if options.synthetic else None
    # A study has fixed costs (loading, the tail of a slice), which would be most of what runs of a few seconds cost.
    return [table.lasting(options.run_seconds) for table in made_up or tables.find(options.table)]


# --- report -----------------------------------------------------------------------------------------------------------


def interval(values: NDArray[np.float64], of: Callable[[NDArray[np.float64]], Any]) -> tuple[float, float, float]:
    """A figure of a sample with its 95 % bootstrap interval; `of` takes samples along the last axis."""
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(of(values[draws]), [2.5, 97.5])
    return float(of(values)), float(low), float(high)


def ratio(ours: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float, float]:
    """Ratio of means with its 95 % bootstrap interval."""
    source = np.random.default_rng(0)

    def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return values[source.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)

    low, high = np.percentile(means(ours) / means(others), [2.5, 97.5])
    return float(ours.mean() / others.mean()), float(low), float(high)


def _median(values: NDArray[np.float64]) -> Any:
    return np.median(values, axis=-1)


def _needed(lines: list[dict[str, Any]], what: str) -> NDArray[np.float64]:
    """Money until the goal; a study that never got there counts with its cap, which flatters whoever fails."""
    return np.array([line["runs"] if line[what]["reached"] is None else line[what]["reached"] for line in lines])


def _said(figure: tuple[float, float, float], scale: float = 1.0) -> str:
    middle, low, high = (value * scale for value in figure)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _row(search: str, lines: list[dict[str, Any]]) -> str:
    cells = [search, str(len(lines))]
    for what in ("finished", "any"):
        needed = _needed(lines, what)
        reached = sum(line[what]["reached"] is not None for line in lines)
        cells += [f"{reached / len(lines):.0%}", _said(interval(needed, _median)), f"{needed.mean():.2f}"]
    regrets = np.array([line["finished"]["regret"] for line in lines])
    cells += [_said(interval(regrets, _median), 100), f"{np.mean([line['spent'] for line in lines]):.1f}"]
    return "| " + " | ".join([*cells, f"{np.mean([line['trials'] for line in lines]):.0f}"]) + " |"


def _goals(by_search: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Ours against unpruned TPE and against the best of the others."""
    for what in ("finished", "any"):
        means = {search: _needed(lines, what).mean() for search, lines in by_search.items()}
        others = {search: mean for search, mean in means.items() if search not in OURS}
        if "ours" not in means or not others:
            return
        best = min(others, key=lambda search: others[search])
        for other, goal in (("optuna:tpe", 1 / 4), (best, 2 / 3)):
            if other in by_search:
                figure = ratio(_needed(by_search["ours"], what), _needed(by_search[other], what))
                yield f"- {what}: ours / {other} = {_said(figure)}, to reach {goal:.2f}"


def report(options: argparse.Namespace) -> int:
    """Prints Markdown tables; returns the exit code."""
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in map(json.loads, options.file.read_text().splitlines()):
        name = f"{line['table']} (made up: no result about a task)" if line["synthetic"] else line["table"]
        groups[name, line["prior"]][line["search"]].append(line)
    for (name, prior), by_search in sorted(groups.items()):
        print(f"\n## {name}, prior: {prior}\n")
        print("Money in whole runs: median (95 % interval) and mean until the incumbent is among the best 2 %.\n")
        print(
            "| search | n | finished: reached | median | mean | any: reached | median | mean | regret at the cap, % |"
            " spent | trials |\n|---|---|---|---|---|---|---|---|---|---|---|"
        )
        for search in sorted(by_search, key=lambda s: _needed(by_search[s], "finished").mean()):
            print(_row(search, by_search[search]))
        print("\n" + "\n".join(_goals(by_search)))
    if options.plot is not None:
        return plot(groups, options.plot)
    return 0


def plot(groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]], path: Path) -> int:
    """Draws the median regret of the finished incumbent over the money spent; returns the exit code."""
    try:
        from plotly import graph_objects, subplots
    except ImportError:
        print("no plot: plotly is not installed here (pip install plotly)", file=sys.stderr)
        return 1
    titles = [f"{name}, prior: {prior}" for name, prior in sorted(groups)]
    figure = subplots.make_subplots(rows=len(titles), cols=1, subplot_titles=titles)
    for place, key in enumerate(sorted(groups), 1):
        for search, lines in sorted(groups[key].items()):
            grid = np.linspace(0.5, lines[0]["runs"], 200)
            curves = [_over(line["finished"]["trace"], grid) for line in lines]
            curve = graph_objects.Scatter(
                x=grid, y=100 * np.median(curves, axis=0), name=search, legendgroup=search, showlegend=place == 1
            )
            curve.line.width = 4 if search == "ours" else 1.5
            figure.add_trace(curve, row=place, col=1)
    figure.update_xaxes(title="money spent, in whole runs")
    figure.update_yaxes(title="median regret of the best finished run, %", type="log")
    figure.update_layout(height=500 * len(titles))
    figure.write_html(path, include_plotlyjs=True)
    return 0


def _over(trace: list[list[float]], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The regret at each amount of money; before anything was finished it is that of ten times the best loss."""
    regrets = np.full(len(grid), 9.0)
    for dollars, regret in trace:
        regrets[grid >= dollars] = max(regret, 1e-4)
    return regrets


# --- what a step costs ------------------------------------------------------------------------------------------------


def steps(options: argparse.Namespace) -> int:
    """Measures the loop's step and the sampler's question as the number of trials grows; returns the exit code.

    In CPU time: all of it is this process's own work, and a busy machine must not change the figures.
    """
    most = max(options.trials)
    table = synthetic.make("synthetic-forgiving", lora=most + 50, full=0)
    taken: dict[int, list[float]] = defaultdict(list)
    asked: dict[int, list[float]] = defaultdict(list)

    class Timed(TableMemory):
        def ask(self, expected: int, *rest: Any) -> tuple[int, dict[str, Any]]:
            started = time.process_time()
            found = super().ask(expected, *rest)
            asked[expected].append(time.process_time() - started)
            return found

    def watch(driven: Sweep, step: Callable[[], bool]) -> bool:
        before = len(driven._current.trials) if driven._current else 0
        questions = len(asked)
        started = time.process_time()
        changed = step()
        seconds = time.process_time() - started
        if len(asked) == questions:  # a step without a question; questions are measured by themselves
            taken[before].append(seconds)
        if before >= most:
            driven.asked_to.asked = True
        return changed

    with contextlib.suppress(Interrupted):
        replay.replay(table, 0, 0.6 * most, 4, memory=Timed, watch=watch, trials=most + 50, rungs=[0.05], eta=50)
    for count in options.trials:
        near = range(max(count - SIZE_STEP, 1), count + 1)
        loop, sampler = ([ms for n in near for ms in values.get(n, [])] for values in (taken, asked))
        line = {"trials": count, "loop_cpu_ms": round(1000 * float(np.median(loop)), 2) if loop else None}
        print(json.dumps(line | {"ask_cpu_ms": round(1000 * float(np.median(sampler)), 2) if sampler else None}))
    return 0


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--synthetic", action="store_true", help="on made-up tables, which prove nothing about tasks")
    runs.add_argument("--table", nargs="+", default=[], metavar="NAME")
    runs.add_argument("--search", nargs="+", default=list(SEARCHES), choices=[*SEARCHES, *ABLATIONS], metavar="NAME")
    runs.add_argument("--prior", nargs="+", default=list(PRIORS), choices=list(PRIORS))
    runs.add_argument("--seeds", type=int, default=30)
    runs.add_argument("--first-seed", type=int, default=0)
    runs.add_argument("--runs", type=float, default=20.0, help="whole runs that the cap pays for")
    runs.add_argument(
        "--run-seconds", type=float, default=tables.RUN_SECONDS, help="that a whole run takes alone, on average"
    )
    runs.add_argument("--slots", type=int, default=4)
    runs.add_argument("--python", default=sys.executable, help="of the peers' environment")
    runs.add_argument("--out", type=Path, default=Path("search.jsonl"), metavar="FILE")
    runs.set_defaults(verb=run)
    reports = commands.add_parser("report")
    reports.add_argument("file", type=Path)
    reports.add_argument("--plot", type=Path, metavar="HTML")
    reports.set_defaults(verb=report)
    costs = commands.add_parser("steps")
    costs.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    costs.set_defaults(verb=steps)
    options = parser.parse_args(arguments)
    try:
        return int(options.verb(options))
    except (tables.TableError, race.PeerError) as error:
        print(f"search: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
