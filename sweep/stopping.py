"""When a search has found enough: by patience, or because nothing more is worth its price (`stop`, off by default).

A search that has enough asks for nobody new and wakes nobody; who trains comes to a decision. Then the endgame has
its reserve and no more: the rest of the cap is not spent. Everything here follows from the tables, so a killed study
decides the same again, and one that improves after all goes on.

How utility estimates (log losses on the rungs' rows, so differences are relative):

    where a trial would end     its last loss, moved by the mean log ratio (end / that rung) of those that came to
                                their ends; normal, with the spread of those ratios
    what promoting one brings   the expected improvement over the best end (Jones, Schonlau and Welch, "Efficient Global
                                Optimization of Expensive Black-Box Functions", 1998), for the forecast price of its end
    what a new trial brings     what the last WINDOW trials improved, and one more gap between the best few, over
                                WINDOW + 1; for what a trial has cost on average so far, promotions included
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

from budgets.money import cost_micros, usd
from sweep import endgame, records
from sweep.current import Current
from sweep.projection import Projector
from sweep.records import Study, TrialRow
from sweep.spec import PatienceSpec, UtilitySpec

WINDOW = 10  # trials whose improvements tell what the next one brings
GAPS = 3  # between the best ones, whose mean stands for one more improvement
LEAST_ENDS, LEAST_TRIALS = 3, 10  # before which nothing is estimated
RATIO_SD = 0.05  # of a log ratio, counted as one measurement
STANDARD = NormalDist()


def enough(study: Study, now: Current, projector: Projector) -> str | None:
    """Why the search stops although there is money left; None while it goes on."""
    if study.phase != "search":
        stopped: str | None = study.facts.get("stopped")
        return stopped
    wanted, rate = study.spec.stop, study.micros_per_hour
    found = None
    if wanted.patience is not None:
        since = int(study.facts.get("patience_from", 0))
        found = patience(wanted.patience, now.trials, now.evaluations, study.spec.objective.metric, rate, since)
    if found is None and wanted.utility is not None:

        def price(trial: TrialRow) -> int:
            return cost_micros(rate, round(1000 * projector.seconds_to_end(trial)))

        spent = cost_micros(rate, sum(_work_ms(row) for row in now.evaluations))
        found = utility(wanted.utility, now.trials, now.results.losses, projector.plan.last, spent, price)
    return found


# Patience


def patience(
    wanted: PatienceSpec,
    trials: Sequence[TrialRow],
    evaluations: Sequence[Any],
    metric: str,
    micros_per_hour: int,
    since: int = 0,
) -> str | None:
    """Whether the best trained trial was not improved on, by more than the tolerance, for long enough.

    Counted are trials that trained after it and do not train any more, and the price of the training and evaluation
    after it. `evaluations` are in their order; those before the ordinal `since` are another search's.
    """
    known = {trial.number: trial for trial in trials}
    best: float | None = None
    champion, at = -1, 0
    for row in evaluations:
        trial = known.get(row.trial)
        found = endgame.value(trial, metric) if trial is not None and row.full_loss is not None else None
        if found is not None and (best is None or found < best - wanted.tolerance * abs(best)):
            best, champion, at = found, row.trial, row.ordinal
    if best is None:
        return None
    at = max(at, since)
    later = [row for row in evaluations if row.ordinal > at and row.trial in known]
    tried = {row.trial for row in later} - {champion}
    done = sum(known[number].state not in records.RUNNING for number in tried)
    cost = cost_micros(micros_per_hour, sum(_work_ms(row) for row in later))
    words = f"trial {champion} was not improved on by more than {100 * wanted.tolerance:g} %"
    if wanted.trials is not None and done >= wanted.trials:
        return f"{words} over {done} trials"
    if wanted.dollars is not None and cost >= wanted.dollars:
        return f"{words} over {usd(cost)} of training"
    return None


def _work_ms(row: Any) -> int:
    return int(row.train_ms + row.evaluate_ms + row.checkpoint_ms)


# Utility


def utility(
    wanted: UtilitySpec,
    trials: Sequence[TrialRow],
    losses: Mapping[int, Mapping[int, float]],
    last: int,
    spent: int,
    price: Callable[[TrialRow], int],
) -> str | None:
    """Whether nothing is expected to improve the best end by more than its price; `losses[rung][trial]`.

    `spent` is what the training of all trials cost, in micro-dollars; `price` that of bringing one to its end.
    """
    ends = {number: math.log(loss) for number, loss in losses.get(last, {}).items() if loss > 0}
    expected = _expected_ends(trials, losses, last, ends)
    if len(ends) < LEAST_ENDS or len(expected) < LEAST_TRIALS:
        return None
    best = min(ends.values())
    gain, cost = _improvement([mean for mean, _ in expected.values()]), spent // len(expected)
    if gain > 0 and _worth(wanted, gain) > cost:
        return None
    for trial in trials:
        if trial.state == "paused" and trial.number in expected and trial.number not in ends:
            mean, sd = expected[trial.number]
            if _worth(wanted, expected_improvement(best, mean, sd)) > price(trial):
                return None
    words = f"the next trial is expected to improve the loss by {100 * gain:.2g} %, worth {usd(_worth(wanted, gain))}"
    return f"{words}, and to cost {usd(cost)}; no paused one is worth its end either"


def _expected_ends(
    trials: Sequence[TrialRow], losses: Mapping[int, Mapping[int, float]], last: int, ends: Mapping[int, float]
) -> dict[int, tuple[float, float]]:
    """By trial, in their order, the log loss that it ended with or would end with, and its standard deviation."""
    found = {}
    for trial in sorted(trials, key=lambda t: t.number):
        loss = losses.get(trial.rung, {}).get(trial.number)
        if trial.diverged or loss is None or loss <= 0:
            continue
        if trial.rung >= last:
            found[trial.number] = math.log(loss), 0.0
            continue
        there = losses[trial.rung]
        ratios = [end - math.log(there[number]) for number, end in ends.items() if there.get(number, 0.0) > 0]
        if ratios:
            mean = statistics.fmean(ratios)
            spread = sum((ratio - mean) ** 2 for ratio in ratios) + RATIO_SD**2
            found[trial.number] = math.log(loss) + mean, math.sqrt(spread / len(ratios))
    return found


def expected_improvement(best: float, mean: float, sd: float) -> float:
    """The expectation of max(best - x, 0) for a normal x, lower is better."""
    if sd <= 0:
        return max(best - mean, 0.0)
    z = (best - mean) / sd
    return sd * (z * STANDARD.cdf(z) + STANDARD.pdf(z))


def _improvement(ends: Sequence[float]) -> float:
    """What the next trial is expected to take off the best log loss; `ends` are in the order of the questions."""
    window = min(WINDOW, len(ends) // 2)
    realised = max(min(ends[:-window]) - min(ends), 0.0)
    few = sorted(ends)[: GAPS + 1]
    gap = (few[-1] - few[0]) / (len(few) - 1)
    return (realised + gap) / (window + 1)


def _worth(wanted: UtilitySpec, gain: float) -> int:
    """Micro-dollars that a fall of the log loss is worth."""
    return round(wanted.dollars_per_percent * 100 * (1 - math.exp(-gain)))
