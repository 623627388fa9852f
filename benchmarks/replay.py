"""A study on a recorded table in simulated time: the real loop, ledger, store and sampler, and the real worker's code.

The simulated machine is benchmarks/simulated.py; here is what surrounds it: the spec of a table's study, the sampler's
memory that gets a row for whatever it suggests, and what of a study is kept.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from benchmarks.simulated import (
    BOOT,
    LOAD_SECONDS,
    MICROS_PER_HOUR,
    STATE_SECONDS,
    VALIDATION_TOKENS,
    SimulatedLauncher,
)
from benchmarks.tables import Pool, Row, Table
from budgets.ledger import Ledger
from sweep import launch, plan, pricing, priors, records
from sweep.audit import violations
from sweep.errors import InvariantError
from sweep.loop import Stopping, Sweep
from sweep.proposals import guide_of
from sweep.records import Study
from sweep.run import take
from sweep.spec import Spec, validate
from sweep.store import Store
from sweep.study import Memory, _ViewedStudy
from trainers.meter import Timings


class _MovedStudy(_ViewedStudy):
    """A study whose sampler sees each trial with the parameters of the row that it got."""

    moved: dict[int, dict[str, Any]]

    def _get_trials(self, *arguments: Any, **options: Any) -> list[FrozenTrial]:
        return [self._with_row(trial) for trial in super()._get_trials(*arguments, **options)]

    def _with_row(self, trial: FrozenTrial) -> FrozenTrial:
        row = self.moved.get(trial.number)
        if row is None:
            return trial
        shown = copy.copy(trial)  # the storage keeps the original in its cache
        shown.params = {name: row.get(name, value) for name, value in trial.params.items()}
        return shown


class TableMemory(Memory):
    """The sampler's memory, which gets a row of the table for whatever it suggests (benchmarks.tables.Pool)."""

    def __init__(self, store: Store, study: Study, table: Table) -> None:
        """Opens the study over a pool of all rows."""
        spec = study.spec
        super().__init__(store, study.name, spec.seed, spec.search.sampler, guide_of(study))
        self.pool = Pool(table)
        self.rows: dict[int, Row] = {}
        self._study = moved = _MovedStudy(study.name, self._storage)
        moved.moved = {}

    def _ask(self, expected: int, suggest: Any, *seen: Any) -> tuple[int, dict[str, Any]]:
        number, chosen = super()._ask(expected, suggest, *seen)
        wanted = {name.removeprefix("lora_"): value for name, value in chosen.items()}
        row = self.rows[number] = self.pool.take(wanted)
        got = {name: row.config[name.removeprefix("lora_")] for name in chosen}
        assert isinstance(self._study, _MovedStudy)
        self._study.moved[number] = got
        return number, got


@dataclass(frozen=True)
class Seen:
    """One evaluation of a search: what was spent by then, of which row, and the loss that it saw."""

    dollars: float
    row: int
    share: float  # of a whole run
    loss: float


@dataclass(frozen=True)
class Replayed:
    """What a search did: evaluations in their order, and what it had spent at its end."""

    seen: list[Seen]
    spent: float
    trials: int
    steps: list[tuple[int, float]] = field(default_factory=list)  # (trials so far, seconds) of each step of the loop
    dominated: list[int] = field(default_factory=list)  # rows that were stopped because they could not catch up
    looked: Any = None  # what `look` found in the tables at the end


def make_spec(
    table: Table,
    folder: Path,
    seed: int,
    cap_micros: int,
    slots: int,
    endgame: dict[str, Any] | None = None,
    stop: Any = None,
    **search: Any,
) -> Spec:
    """The study of a table: its own space, everything else as a user gets it, but no priors and nothing for an endgame.

    What is compared is the search. Ours is to know as little of the task beforehand as the others do, and a table has
    no other seeds for every row: with an `endgame` a run that confirms another is the same one again.
    """
    (folder / "timings.json").write_text(json.dumps({}))
    space = table.facts["space"]["lora"]
    low, high = space["learning_rate"]
    choices = {name: space[name] for name in ("rank", "alpha", "targets", "batch_size")}
    values = {
        "study": "replay",
        "model": "replay:table",
        "data": {"train": "recorded"},
        "machine": {"price": "$3.60/hour", "slots": slots, "timings": str(folder / "timings.json")},
        "budget": {"cap": f"${cap_micros / 1e6:.6f}"},
        "search": {"learning_rate": {"low": low, "high": high}, "trials": len(table.rows), "priors": "none", **choices}
        | search,
        "endgame": endgame or {"seeds": 0},
        "stop": stop or {},
        "seed": seed,
    }
    return validate(values, "replay")


def make_facts(table: Table, spec: Spec) -> dict[str, Any]:
    examples, tokens = int(table.facts["examples"]), float(table.facts["tokens_per_example"])
    splits = {
        "train": {"rows": examples, "tokens": round(examples * tokens)},
        "validation": {"rows": 100, "tokens": VALIDATION_TOKENS},
    }
    facts = {"parameters": table.facts["parameters"], "device": "replay", "cores": 8, "seconds": 0.0}
    lengths = vars(plan.lengths(spec.search, splits))
    chosen = priors.select(spec.search, facts, examples)
    known = chosen.model_dump(mode="json") if chosen else None
    return facts | {"data": {"splits": splits}, "plan": lengths, "priors": known}


def _timings(table: Table) -> Timings:
    each = float(np.mean([row.seconds_per_token for row in table.rows]))
    evaluate = float(np.mean([row.evaluate_seconds for row in table.rows])) / VALIDATION_TOKENS
    return Timings(LOAD_SECONDS, evaluate, STATE_SECONDS, STATE_SECONDS, {"lora": each, "full": each})


def replay(
    table: Table,
    seed: int,
    runs: float,
    slots: int = 4,
    sweep: type[Sweep] = Sweep,
    memory: type[TableMemory] = TableMemory,
    scratch: str | None = "/dev/shm",
    watch: Callable[[Sweep, Callable[[], bool]], bool] | None = None,
    stop: Any = None,
    endgame: dict[str, Any] | None = None,
    look: Callable[[Connection, str], Any] = lambda *_: None,
    **search: Any,
) -> Replayed:
    """Runs a whole study on a table's LoRA rows, under a cap that pays for `runs` whole runs alone, and audits it.

    Raises what Sweep.run raises, and InvariantError for books that do not agree.

    `sweep` and `memory` may be variants of the real ones; `search` replaces keys of the spec's section, `stop` and
    `endgame` are their own. `watch` is called in the place of each step of the loop, with the loop and that step,
    `look` at the end with the tables.
    """
    table = table.of("lora")
    cap = round(runs * table.run_seconds() * MICROS_PER_HOUR / 3600)
    place = scratch if scratch and Path(scratch).is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as temporary:
        folder = Path(temporary)
        spec = make_spec(table, folder, seed, cap, slots, endgame, stop, **search)
        store = Store(f"sqlite:///{folder}/studies.db", create=True)
        spec, facts = plan.settle(spec, make_facts(table, spec), pricing.quote(spec))
        facts["plan"] |= {"rung_rows": 100, "rung_tokens": VALIDATION_TOKENS}  # as they were recorded
        study = launch.create(store, spec, facts, pricing.quote(spec), folder, BOOT)
        take(store, spec.study)
        launcher = SimulatedLauncher(table, seed, slots, _timings(table))
        mind = memory(store, study, table)
        driven = sweep(store, spec.study, launcher, mind, Stopping())
        if watch is not None:
            step = driven.step
            driven.step = lambda: watch(driven, step)  # type: ignore[method-assign]
        driven.run()
        with store.read() as connection:
            trials = records.trials(connection, spec.study)
            spent = Ledger(connection, spec.study).balances().spent
            wrong = violations(connection, spec.study)
            looked = look(connection, spec.study)
        if wrong:
            raise InvariantError(wrong[0])
        mind.close()
        store.dispose()
    hopeless = [mind.rows[t.number].number for t in trials if t.reason.startswith("dominated")]
    taken = len(records.searched(trials))
    return Replayed(_seen(table, launcher, mind), spent / 1e6, taken, dominated=hopeless, looked=looked)


def _seen(table: Table, launcher: SimulatedLauncher, mind: TableMemory) -> list[Seen]:
    found, before_ms = [], 0
    for worker in launcher.workers:
        for event in worker.said:
            loss = getattr(event, "loss", None)
            trial = getattr(event, "trial", None)
            if loss is not None and trial in mind.rows:  # one that confirms another took no row
                dollars = (before_ms + event.at_ms) / 3.6e6 * MICROS_PER_HOUR / 1e6
                found.append(Seen(dollars, mind.rows[trial].number, min(event.tokens / table.run_tokens, 1.0), loss))  # type: ignore[attr-defined]
        before_ms += worker.said[-1].at_ms
    return found
