"""What the methods of a study cost, how many configurations of each were tried, and what equal effort brings."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from budgets.ledger import Ledger, trial_account
from budgets.money import cost_micros
from sweep import endgame, fit, records, space, verdict
from sweep.projection import Projector, projector_of
from sweep.records import Study, TrialRow

METHODS = ("lora", "full")
RATIOS = ("alone", "charged", "elapsed", "peak", "peak_predicted")  # what is said of LoRA's over full training's


def read(
    connection: Connection, study: Study, trials: Sequence[TrialRow], chosen: Mapping[str, TrialRow]
) -> dict[str, Any]:
    """Returns `costs`, `tried` and `exchange` as plain values; `chosen`: each method's best confirmed trial."""
    accounts = Ledger(connection, study.name).balances().accounts
    evaluations: dict[int, list[Any]] = {}
    for row in records.evaluations(connection, study.name):
        evaluations.setdefault(row.trial, []).append(row)
    projector = projector_of(study, connection)
    projector.width = 1.0  # what a run costs that has the machine to itself
    costs: dict[str, Any] = {
        method: _cost(study, method, trials, chosen.get(method), accounts, evaluations, projector) for method in METHODS
    }
    searched = {
        m: [t for t in trials if t.config.method == m and t.source is None and (t.rung >= 0 or t.diverged)]
        for m in METHODS
    }
    tried = {method: _tried(study, method, trials, searched[method], accounts) for method in METHODS}
    costs["ratio"] = {name: _ratio(costs, name) for name in RATIOS}
    return {
        "costs": costs,
        "tried": {**tried, "equal": _equal(study, searched)},
        "exchange": _exchange(costs, tried),
    }


def _cost(
    study: Study,
    method: str,
    trials: Sequence[TrialRow],
    chosen: TrialRow | None,
    accounts: Mapping[str, int],
    evaluations: Mapping[int, Sequence[Any]],
    projector: Projector,
) -> dict[str, Any] | None:
    """One whole run of a method's best configuration; None of a method of which nothing was measured."""
    of_method = [t for t in trials if t.config.method == method]
    measured = [t for t in of_method if t.number in evaluations]
    if not measured:
        return None
    one = chosen or min(measured, key=lambda t: (-t.rung, t.loss if t.loss is not None else float("inf"), t.number))
    runs = [t for t in of_method if chosen is not None and t.source == chosen.number and t.state == "completed"]
    # As the confirmations that it is priced beside, where there are any.
    config = endgame.whole(one.config) if runs else one.config
    fresh = dataclasses.replace(records.newcomer(config), target=projector.plan.last)
    alone = projector.to_end(fresh)
    charged = [accounts.get(trial_account(t.number), 0) for t in runs]
    stretches = [row for t in runs for row in evaluations.get(t.number, [])]
    trained = sum(row.train_ms for row in stretches)
    peaks = [(row.peak_bytes, row.width) for row in stretches or evaluations[one.number] if row.peak_bytes]
    peak, peak_width = max(peaks, default=(None, None))

    def price(seconds: float) -> int:
        return cost_micros(study.micros_per_hour, round(1000 * seconds))

    return {
        "trial": one.number,
        "in_words": space.describe(one.config),
        "alone": {
            "micros": price(alone.mean),
            "low": price(alone.low),
            "high": price(alone.high),
            "seconds": alone.mean,
        },
        "charged": {"micros": round(statistics.fmean(charged)), "runs": len(runs)} if charged else None,
        # Of a pack each trial is charged its share of the time, but lives through all of it.
        "elapsed": sum(_elapsed(row) for row in stretches) / len(runs) if runs else None,
        "width": sum(row.width * row.train_ms for row in stretches) / trained if trained else None,
        "peak": peak,
        "peak_width": peak_width,
        "peak_predicted": None if peak_width is None else fit.predicted(study, one.config, peak_width),
    }


def _elapsed(row: Any) -> float:
    """Seconds from the first step of a stretch to the end of its evaluation."""
    return float(row.train_ms * row.width + row.evaluate_ms + row.checkpoint_ms + row.examine_ms) / 1000


def _ratio(costs: Mapping[str, Any], name: str) -> float | None:
    """LoRA's over full training's."""
    one, other = (_figure(costs[method], name) for method in METHODS)
    return None if one is None or not other else one / other


def _figure(cost: Mapping[str, Any] | None, name: str) -> float | None:
    found = None if cost is None else cost[name]
    return found["micros"] if isinstance(found, dict) else found


def _tried(
    study: Study, method: str, trials: Sequence[TrialRow], tried: Sequence[TrialRow], accounts: Mapping[str, int]
) -> dict[str, Any]:
    """The search's configurations of a method, their results at the end, and what search and confirmations cost."""
    mine = [t for t in trials if t.config.method == method]
    results = _results(study, tried)
    best = min(results, key=lambda result: result[0]) if results else None
    spent = {
        name: sum(accounts.get(trial_account(t.number), 0) for t in mine if (t.source is None) == (name == "search"))
        for name in ("search", "confirmations")
    }
    sign = -1 if study.spec.objective.metric != "validation_loss" else 1
    return {
        "configurations": len(tried),
        "completed": len(results),
        "diverged": sum(t.diverged for t in tried),
        "best": None if best is None else {"trial": best[1].number, "value": sign * best[0]},
        "best_in_words": None if best is None else space.describe(best[1].config),
        "search_micros": spent["search"],
        "confirmations_micros": spent["confirmations"],
    }


def _results(study: Study, tried: Sequence[TrialRow]) -> list[tuple[float, TrialRow]]:
    """What completed trials came to, lower is better."""
    if study.spec.objective.metric == "validation_loss":
        return [(t.full_loss, t) for t in tried if t.state == "completed" and t.full_loss is not None]
    return [(-t.metric, t) for t in tried if t.state == "completed" and t.metric is not None]


def _filled(study: Study, tried: Sequence[TrialRow]) -> list[float]:
    """A result for every configuration that was tried, lower is better; [] where none was completed.

    One that was stopped early counts as the worst completed one: it was behind when it was stopped. One that diverged
    leaves its user with the untrained model, if that is worse still.
    """
    results = [value for value, _ in _results(study, tried)]
    if not results:
        return []
    worst = max(results)
    loss = study.spec.objective.metric == "validation_loss"
    nothing = max(worst, study.base_loss) if loss and study.base_loss is not None else worst
    diverged = sum(t.diverged for t in tried)
    return [*results, *[nothing] * diverged, *[worst] * (len(tried) - len(results) - diverged)]


def _equal(study: Study, searched: Mapping[str, Sequence[TrialRow]]) -> list[dict[str, Any]]:
    """The expected best of 1, 2, 4, ... configurations of each method, up to as many as both have."""
    values = [_filled(study, searched[method]) for method in METHODS]
    most = min(map(len, values))
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most} - {0})
    sign = -1 if study.spec.objective.metric != "validation_loss" else 1
    rows = []
    for count in counts:
        lora, full = (verdict.best_of(found, count) for found in values)
        base = study.base_loss if sign > 0 else None
        share = None if base is None or base <= full else (base - lora) / (base - full)
        rows.append({"configurations": count, "lora": sign * lora, "full": sign * full, "share": share})
    return rows


def _exchange(costs: Mapping[str, Any], tried: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the dollars of one method would have bought of the other: whole runs."""
    lora, full = costs["lora"], costs["full"]
    spent = {m: tried[m]["search_micros"] + tried[m]["confirmations_micros"] for m in METHODS}
    found: dict[str, Any] = {"lora_micros": spent["lora"], "full_micros": spent["full"]}
    prices = {
        "full_alone": _figure(full, "alone"),
        "lora_alone": _figure(lora, "alone"),
        "lora_charged": _figure(lora, "charged"),
    }
    found["lora_buys_full"] = _runs(spent["lora"], prices["full_alone"])
    found["full_buys_lora"] = _runs(spent["full"], prices["lora_charged"] or prices["lora_alone"])
    found["full_buys_lora_alone"] = _runs(spent["full"], prices["lora_alone"])
    found["a_full_run_buys_lora"] = _runs(prices["full_alone"], prices["lora_charged"])
    found["a_full_run_buys_lora_alone"] = _runs(prices["full_alone"], prices["lora_alone"])
    return found


def _runs(micros: float | None, price: float | None) -> float | None:
    return micros / price if micros and price else None
