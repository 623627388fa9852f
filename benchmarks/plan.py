"""The plan against what really happened: dollars and trials, by phase and by rung.

    python -m benchmarks.plan --table synthetic-forgiving --table synthetic-spread [--runs 12] [--slots 4] [--seed 0]
    python -m benchmarks.plan --spec examples/quickstart.yaml [--no-probe]

A table's study is replayed in simulated time by the real loop (benchmarks/replay.py), with an endgame of its default
seeds, unless `--seeds 0`; its plan is drawn from priors, and once more by a forecast that was taught the table's mean
speeds, as a probe would. A spec's study is planned from priors, probed, and then launched as it is, for its real price,
in a new database, whose path is printed; that no trial came to its end (exit 3) is an outcome too. One JSON line each:
`planned`, `probed` and `actual` hold dollars by phase, trials by rung, and how many runs were confirmed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from sqlalchemy import Connection

from benchmarks import synthetic
from benchmarks.replay import make_facts, make_spec, replay
from benchmarks.simulated import LOAD_SECONDS, MICROS_PER_HOUR, STATE_SECONDS, VALIDATION_TOKENS
from benchmarks.tables import RUN_SECONDS, Table, find
from budgets.ledger import IDLE, Ledger, trial_account
from sweep import launch, pricing, records
from sweep.errors import BudgetError
from sweep.outline import Outline, Probed, drawn_configs, prospective
from sweep.plan import drawn
from sweep.projection import untaught
from sweep.spec import Spec, load
from sweep.store import Store

PHASES = ("search", "confirmation", "overhead", "left")


def happened(connection: Connection, name: str) -> dict[str, Any]:
    """What became of a study: micro-dollars by phase, as the statement has them, and searched trials by rung."""
    study, trials = records.study(connection, name), records.trials(connection, name)
    balances = Ledger(connection, name).balances()
    accounts = balances.accounts

    def charged(some: list[records.TrialRow]) -> int:
        return sum(accounts.get(trial_account(trial.number), 0) for trial in some)

    searched, others = records.searched(trials), records.confirmations(trials)
    numbers = {trial.number for trial in searched}
    arrived = [0] * (len(study.facts["plan"]["rungs"]) + 1)
    for row in records.evaluations(connection, name):
        arrived[row.rung] += row.trial in numbers
    overhead = sum(micros for code, micros in accounts.items() if code == IDLE or code.startswith("overhead:"))
    dollars = (charged(searched), charged(others), overhead, balances.left + balances.held)
    assert sum(dollars) == balances.cap, "the phases are the cap"
    trained = sum(trial.tokens > 0 for trial in searched)
    return {
        "dollars": {name: micros / 1e6 for name, micros in zip(PHASES, dollars, strict=True)},
        "trials": trained,
        "rungs": arrived,
        "confirmations": len([trial for trial in others if trial.state == "completed"]),
    }


def planned(one: Outline) -> dict[str, Any]:
    """The same figures of a plan."""
    confirmed = one.phase("confirmation").runs or 0
    return {
        "dollars": {name: one.phase(name).cost / 1e6 for name in PHASES},
        "trials": round(one.trials, 1),
        "rungs": [round(rung.trials, 1) for rung in one.rungs],
        "confirmations": confirmed,
    }


def _taught(table: Table, spec: Spec, facts: dict[str, Any], slots: int) -> Probed:
    """What a probe would have measured: the table's mean speeds."""
    projector = untaught(prospective(spec, facts, pricing.quote(spec)))
    per_token = float(np.mean([row.seconds_per_token for row in table.rows]))
    evaluate = float(np.mean([row.evaluate_seconds for row in table.rows]))
    stretch = round(0.05 * table.run_tokens)
    row = {
        "width": slots,
        "shared_batch": None,
        "train_tokens": stretch,
        "train_ms": round(1000 * per_token * stretch),
        "evaluate_tokens": VALIDATION_TOKENS,
        "evaluate_ms": round(1000 * evaluate),
        "checkpoint_ms": round(1000 * STATE_SECONDS),
        "warm_ms": 0,
        "warm_tokens": 0,
        "write_ms": round(1000 * STATE_SECONDS),
        "examine_ms": 0,
        "full_loss": None,
        "tokens": stretch,
    }
    for config in drawn_configs(spec, "lora", projector.plan.examples)[:slots]:
        projector.observe_evaluation(config, SimpleNamespace(**row))
    projector.observe_load(round(1000 * LOAD_SECONDS))
    return Probed(projector, slots)


def of_table(table: Table, runs: float, slots: int, seed: int, seeds: int) -> dict[str, Any]:
    """Plans and replays a study of a table whose cap pays for so many whole runs alone."""
    lora, endgame = table.of("lora"), {"seeds": seeds}
    cap = round(runs * lora.run_seconds() * MICROS_PER_HOUR / 3600)
    with tempfile.TemporaryDirectory() as folder:
        spec = make_spec(lora, Path(folder), seed, cap, slots, endgame)
        facts, price = make_facts(lora, spec), pricing.quote(spec)
        drawings = drawn(spec, facts, price), drawn(spec, facts, price, _taught(lora, spec, facts, slots))
    done = replay(table, seed, runs, slots, endgame=endgame, look=happened)
    values = {"study": f"{table.name}, {runs:g} runs, {slots} slots, seed {seed}, {seeds} seeds", "cap": cap / 1e6}
    return values | {"planned": planned(drawings[0]), "probed": planned(drawings[1]), "actual": done.looked}


def of_spec(path: Path, *, probe: bool) -> dict[str, Any]:
    """Plans, probes and launches a spec from where its relative paths lead; returns plans and outcome."""
    spec = load(path)
    folder = Path(tempfile.mkdtemp(prefix="sweep-planned-"))
    sys.stderr.write(f"the study is in {folder}\n")
    storage = f"sqlite:///{folder}/studies.db"
    values: dict[str, Any] = {"study": spec.study, "cap": spec.budget.cap / 1e6}
    sweep = [sys.executable, "-m", "sweep"]
    ways = {"planned": []} | ({"probed": ["--probe"]} if probe else {})
    for name, flags in ways.items():
        command = [*sweep, "plan", str(path), "--json", "--storage", storage, *flags]
        found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
        cost = {phase["name"]: phase["cost"] / 1e6 for phase in found["phases"]}
        values[name] = {
            "dollars": {phase: cost[phase] for phase in PHASES},
            "trials": round(found["trials"], 1),
            "rungs": [round(rung["trials"], 1) for rung in found["rungs"]],
            "confirmations": next(p["runs"] for p in found["phases"] if p["name"] == "confirmation"),
        } | ({"probe_seconds": round(found["probe_seconds"], 1)} if flags else {})
    study = f"planned-{os.getpid()}"
    command = [*sweep, "launch", str(path), "--yes", "--storage", storage, "--study", study]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode not in (0, BudgetError.exit_code):
        sys.exit(f"{shlex.join(command)} failed")
    store = Store(storage)
    with store.read() as connection:
        values["actual"] = happened(connection, study)
    store.dispose()
    sys.stderr.write(f"its weights are in {launch.study_folder(study)}\n")
    return values


def main(arguments: list[str]) -> int:
    """Compares what was asked for; prints a JSON line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--table", action="append", default=[], help="a synthetic table's name, or a recorded one's")
    parser.add_argument("--spec", type=Path, action="append", default=[])
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--runs", type=float, default=12.0, help="whole runs alone that the cap pays for")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3, help="of the endgame")
    options = parser.parse_args(arguments)
    for name in options.table:
        table = synthetic.make(name, lora=150) if name in synthetic.KINDS else find([name])[0].lasting(RUN_SECONDS)
        found = of_table(table, options.runs, options.slots, options.seed, options.seeds)
        print(json.dumps(found), flush=True)
    for path in options.spec:
        print(json.dumps(of_spec(path, probe=not options.no_probe)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
