"""What the read verbs show, as plain values: the tables render them and `--json` prints them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, select

from budgets.beancount import journal
from budgets.ledger import Balances, Ledger, trial_account
from budgets.money import MICROS
from budgets.schema import transfer
from budgets.statement import statement as draw_up
from sweep import endgame, finale, records, space, standing, tables, triage
from sweep.endgame import Outcome
from sweep.errors import NotFoundError
from sweep.projection import Projector, projector_of
from sweep.records import Study, TrialRow, WorkerRow
from sweep.rungs import Results

SCHEMA_VERSION = 1


def money(micros: int) -> dict[str, Any]:
    """An amount for machines and for people: whole micro-dollars and a decimal text."""
    return {"micros": micros, "usd": f"{micros / MICROS:.6f}"}


def latest(connection: Connection) -> str:
    """The study that was launched last. Raises NotFoundError."""
    names = records.study_names(connection)
    if not names:
        raise NotFoundError("this database holds no study", "sweep launch SPEC")
    return names[-1]


def trials(connection: Connection, name: str) -> list[dict[str, Any]]:
    """All trials: those with the best results first, then by number; after them those that confirm others."""
    return _ranked(connection, records.study(connection, name), records.trials(connection, name))


def _ranked(connection: Connection, study: Study, rows: Sequence[TrialRow]) -> list[dict[str, Any]]:
    name, metric = study.name, study.spec.objective.metric
    ranked = sorted(records.searched(rows), key=lambda t: _order(t, metric))
    place = {trial.number: n for n, trial in enumerate(ranked)}
    others = [trial for trial in rows if trial.source is not None]
    ranked += sorted(others, key=lambda t: (place.get(t.run[0], len(rows)), t.run))
    balances = Ledger(connection, name).balances()
    curves: dict[int, list[dict[str, Any]]] = {}
    for row in records.evaluations(connection, name):
        curves.setdefault(row.trial, []).append(
            {"rung": row.rung, "tokens": row.tokens, "loss": row.loss, "full_loss": row.full_loss}
        )
    last = len(study.facts["plan"]["rungs"])
    return [_trial(row, curves.get(row.number, []), balances, last) for row in ranked]


def _order(trial: TrialRow, metric: str) -> tuple[int, float, int]:
    """Completed ones by the user's metric over all rows, then by rung and loss there, then those without a loss."""
    if trial.diverged or trial.loss is None:
        return (1_000, 0.0, trial.number)
    found = endgame.value(trial, metric) if trial.state == "completed" else None
    if found is not None:
        return (0, found, trial.number)
    return (100 - trial.rung, trial.loss, trial.number)


def _trial(trial: TrialRow, curve: list[dict[str, Any]], balances: Balances, last: int) -> dict[str, Any]:
    spent = balances.accounts.get(trial_account(trial.number), 0)
    config = {k: v for k, v in dataclasses.asdict(trial.config).items() if k != "number" and v is not None}
    return {
        "number": trial.number,
        "label": trial.label,
        "source": trial.source,
        "finale": trial.finale,
        "state": trial.state,
        "in_words": space.describe(trial.config),
        "config": config,
        "rung": trial.rung,
        "last_rung": last,
        "step": trial.step,
        "tokens": trial.tokens,
        "loss": trial.loss,
        "full_loss": trial.full_loss,
        "train_loss": trial.train_loss,
        "metric": trial.metric,
        "metric_error": trial.metric_error,
        "cost": money(spent),
        "reason": trial.reason,
        "folder": trial.checkpoint,
        "curve": curve,
    }


def best(connection: Connection, name: str) -> dict[str, Any]:
    """The best configuration, beside the untrained model. Raises NotFoundError while no trial was evaluated.

    The winner of the endgame's race, with its means over seeds; where nothing was confirmed the best single run.
    """
    study, rows = records.study(connection, name), records.trials(connection, name)
    ranked = _ranked(connection, study, rows)
    if not ranked or ranked[0]["loss"] is None:
        raise NotFoundError(f"no trial of {name} was evaluated yet", f"watch it with `sweep status {name}`")
    parts = records.searched(rows), records.confirmations(rows)
    won, given = endgame.outcome(study, *parts), finale.deliverable(study, *parts, records.finales(rows))
    best = ranked[0] if won is None else next(t for t in ranked if t["number"] == won.source.number)
    finished = won is not None or best["full_loss"] is not None
    loss, base = (best["full_loss"], study.base_loss) if finished else (best["loss"], study.base_rung_loss)
    judged = "all validation rows" if finished else "the rung's validation rows"
    if won is not None:
        loss, judged = _spread([run.full_loss for run in won.runs])["mean"], f"{judged}, mean of {len(won.runs)} seeds"
    return {
        "study": name,
        "trial": best,
        "loss": loss,
        "base_loss": base,
        "gain": 1 - loss / base if base else None,
        "trained_to_its_end": finished,
        "rows": judged,
        "metric": study.spec.objective.metric,
        "confirmed": won is not None,
        "confirmation": None if won is None else _confirmation(connection, name, won, ranked),
        "deliverable": None if given is None else _deliverable(connection, name, given, ranked),
    }


def _confirmation(connection: Connection, name: str, won: Outcome, ranked: list[dict[str, Any]]) -> dict[str, Any]:
    """What the winner's runs under new seeds came to, on the validation rows that chose and on the test rows."""
    scores = _test_scores(connection, name)
    described = {trial["number"]: trial for trial in ranked}
    runs = [described[run.number] | {"test": scores.get(run.number)} for run in won.runs]
    test: dict[str, dict[str, Any]] = {}
    for what in ("loss", "metric"):
        found = [scores.get(run.number, {}).get(what) for run in won.runs]
        if None not in found:
            untrained = scores.get(tables.UNTRAINED, {})
            test[what] = _spread(found) | {"untrained": untrained.get(what), "majority": untrained.get("majority")}
    return {
        "seeds": len(runs),
        "runs": runs,
        "validation": {
            what: _spread([run[key] for run in runs])
            for what, key in (("loss", "full_loss"), ("metric", "metric"))
            if all(run[key] is not None for run in runs)
        },
        "test": test or None,
        "cost": money(sum(run["cost"]["micros"] for run in runs)),
        "export": described[won.export.number],
    }


def _deliverable(
    connection: Connection, name: str, given: finale.Deliverable, ranked: list[dict[str, Any]]
) -> dict[str, Any]:
    """The run whose weights are handed over, why that one, and its own scores on the test rows."""
    trial = next(trial for trial in ranked if trial["number"] == given.trial.number)
    return {"trial": trial, "words": given.words, "test": _test_scores(connection, name).get(trial["number"])}


def _spread(values: Sequence[Any]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}


def _test_scores(connection: Connection, name: str) -> dict[int, dict[str, Any]]:
    """By trial its loss on the test rows, nats a completion token, and its metric there."""
    query = select(tables.scores).where(tables.scores.c.study == name, tables.scores.c.split == "test")
    found = {}
    for row in connection.execute(query):
        metric = None if row.metric is None else statistics.fmean(json.loads(row.metric))
        loss = sum(json.loads(row.nll)) / sum(json.loads(row.tokens))
        found[row.trial] = {"loss": loss, "metric": metric, "majority": row.majority}
    return found


def statement(connection: Connection, name: str) -> dict[str, Any]:
    """Where the money went. Raises NotFoundError."""
    study = records.study(connection, name)
    drawn = draw_up(Ledger(connection, name).balances())
    rows, workers = records.trials(connection, name), records.workers(connection, name)
    described = {t.number: (space.describe(t.config), t.state) for t in rows}
    return {
        "study": name,
        "unit": study.unit,
        "machine": _machine(workers),
        "occupancy": _occupancy(connection, name, rows, workers),
        "trials": [
            {"number": n, "label": records.label(n), "in_words": described[n][0], "state": described[n][1], **money(m)}
            for n, m in drawn.trials.items()
        ],
        "confirmation": money(sum(drawn.trials.get(t.number, 0) for t in records.confirmations(rows))),
        "finale": money(sum(drawn.trials.get(t.number, 0) for t in records.finales(rows))),
        "overhead": {centre: money(m) for centre, m in drawn.overhead.items()},
        "idle": money(drawn.idle),
        "spent": money(drawn.spent),
        "held": money(drawn.held),
        "left": money(drawn.left),
        "reserve": money(drawn.reserve),
        "cap": money(drawn.cap),
        "overrun": money(drawn.overrun),
    }


def _machine(workers: Sequence[WorkerRow]) -> dict[str, Any]:
    """The same total from the other side: time by price, and what it cost as the workers were charged."""
    spans: dict[int, int] = {}
    for worker in workers:
        for price, ms in worker.tariff.pieces(worker.settled_ms):
            spans[price] = spans.get(price, 0) + ms
    cost = sum(worker.tariff.cost(worker.settled_ms) for worker in workers)
    return {"spans": [{"micros_per_hour": p, "ms": ms} for p, ms in sorted(spans.items())], "cost": money(cost)}


def _occupancy(
    connection: Connection, name: str, trials: Sequence[TrialRow], workers: Sequence[WorkerRow]
) -> float | None:
    """Real tokens of live trials over tokens computed, in training, over all workers; None before any was reported.

    Only packed LoRA trials share what is computed: of a full-parameter trial every token is real.
    """
    packed = {trial.number for trial in trials if trial.config.method == "lora"}
    shares = {worker.id: worker.occupancy for worker in workers if worker.occupancy}
    real = computed = 0.0
    for row in connection.execute(select(tables.attempt).where(tables.attempt.c.study == name)):
        share = shares.get(row.worker) if row.trial in packed else 1.0
        if share is not None:
            real += row.tokens - row.from_tokens
            computed += (row.tokens - row.from_tokens) / share
    return real / computed if computed else None


def beancount(connection: Connection, name: str) -> str:
    """The study's books as a beancount file. Raises NotFoundError."""
    records.study(connection, name)
    rows = connection.execute(select(transfer).where(transfer.c.study == name).order_by(transfer.c.seq)).all()
    return journal(name, Ledger(connection, name).balances().accounts, rows)


def status(connection: Connection, name: str, now_ms: dict[str, int] | None = None) -> dict[str, Any]:
    """Budget, projection, what runs, the best so far, the last events. `now_ms`: worker id to its meter now."""
    study = records.study(connection, name)
    rows = records.trials(connection, name)
    balances = Ledger(connection, name).balances()
    worker = next(iter(records.workers(connection, name, living=True)), None)
    projector = projector_of(study, connection)
    projected, low, high = _projected(connection, study, rows, balances, worker, now_ms or {}, projector)
    held = projector.forecast.calibration("train")
    ranked = _ranked(connection, study, rows)
    counts: dict[str, int] = {}
    searched, repeated = records.searched(rows), records.confirmations(rows)
    for row in searched:
        counts[row.state] = counts.get(row.state, 0) + 1
    kind = standing.kind(study, rows, worker)
    evaluated = bool(ranked) and ranked[0]["loss"] is not None
    return {
        "study": name,
        "state": study.state,
        "standing": {"kind": kind, "words": standing.words(kind, connection, study, rows, projector)},
        "worker": None if worker is None else {"state": worker.state, "device": worker.device, "slice": worker.slice},
        "cap": money(balances.cap),
        "spent": money(balances.spent),
        "held": money(balances.held),
        "left": money(balances.left),
        "projected": money(projected),
        "projected_low": money(low),
        "projected_high": money(high),
        "forecasts": None if held is None else dataclasses.asdict(held),
        "frozen": balances.frozen,
        "overrun": money(balances.overrun),
        "micros_per_hour": study.micros_per_hour,
        "unit": study.unit,
        "phase": study.phase,
        "stopped": study.facts.get("stopped"),
        "reserve": money(balances.reserve),
        "base_loss": study.base_loss,
        "trials": len(searched),
        "counts": counts,
        "confirmations": {"done": sum(t.state in records.ENDED for t in repeated), "all": len(repeated)},
        "running": [t for t in ranked if t["state"] in records.RUNNING],
        "best": ranked[0] if evaluated else None,
        "events": [
            {"unix_ms": e.unix_ms, "kind": e.kind, "text": e.text} for e in records.log_after(connection, name, 0)[-8:]
        ],
    }


def _projected(
    connection: Connection,
    study: Study,
    rows: list[TrialRow],
    balances: Balances,
    worker: WorkerRow | None,
    now_ms: dict[str, int],
    projector: Projector,
) -> tuple[int, int, int]:
    """Projected spend and its 80 % interval, in micro-dollars."""
    running = [t for t in rows if t.state in {"live", "waiting"}]
    if worker is None and not running:
        return balances.spent, balances.spent, balances.spent
    now = now_ms.get(worker.id, worker.at_ms) if worker else 0
    funds = triage.funds(balances, study.micros_per_hour, worker, now, projector.load().mean)
    results = Results.of_search(records.evaluations(connection, study.name))
    rows = records.searched(rows)
    # With one at its end, nobody else of the search is brought there from the endgame's money.
    over = study.phase == "endgame" and study.spec.endgame.trains and any(t.state == "completed" for t in rows)
    funds = funds if over else triage.with_finish(funds, rows, results, projector)
    leader = next((t for t in rows if t.number == funds.leader), None)
    ahead = projector.ahead(running, leader, launch=worker is None or worker.state != "ready")

    def spend(more: float) -> int:
        later = dataclasses.replace(funds, finish_seconds=funds.finish_seconds + more)
        return triage.projected_spend(later, running, projector)

    # Less may be needed than holds already pay for: what is left of them is given back, but nothing that was spent.
    low = max(spend(0.0) - funds.cost(ahead.mean - ahead.low), balances.spent)
    return spend(0.0), low, spend(ahead.high - ahead.mean)


def listing(connection: Connection) -> list[dict[str, Any]]:
    """All studies of this database, oldest first."""
    found = []
    for name in records.study_names(connection):
        study, rows = records.study(connection, name), records.trials(connection, name)
        balances = Ledger(connection, name).balances()
        ranked = _ranked(connection, study, rows)
        worker = next(iter(records.workers(connection, name, living=True)), None)
        top = ranked[0] if ranked and ranked[0]["loss"] is not None else None
        found.append(
            {
                "study": name,
                "state": study.state,
                "standing": standing.kind(study, rows, worker),
                "model": study.spec.model,
                "trials": sum(trial["source"] is None for trial in ranked),
                "best": None if top is None else top["full_loss"] or top["loss"],
                "spent": money(balances.spent),
                "cap": money(balances.cap),
            }
        )
    return found
