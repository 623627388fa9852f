"""Who pauses, who is promoted, who stops: asynchronous successive halving with true promotion.

At a rung the best one in `eta` of all that ever reached it goes on; the others pause with their checkpoint and may be
promoted later, when more have come and they stand among the best (Li et al., "A System for Massively Parallel
Hyperparameter Tuning", 2020; Optuna's pruners can only stop). Shares and eta were chosen on 352 recorded curves:
halving at 5, 10, 20 and 40 % with half kept found the very best run of both tasks for 16.3 % of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sweep.records import TrialRow
from sweep.tables import CONFIRMATIONS

DIVERGED = 1.1  # a loss at a rung this many times the untrained model's means that training hurts

Verdict = Literal["complete", "promote", "pause", "prune"]


@dataclass(frozen=True)
class Judgement:
    """What becomes of a trial at a rung, and the reason in words."""

    verdict: Verdict
    reason: str
    diverged: bool = False


class Results:
    """Losses of all trials at all rungs: `losses[rung][trial]`."""

    def __init__(self, evaluations: Iterable[tuple[int, int, float]]) -> None:
        """Takes (trial, rung, loss) triples."""
        self.losses: dict[int, dict[int, float]] = {}
        for trial, rung, loss in evaluations:
            self.losses.setdefault(rung, {})[trial] = loss

    @classmethod
    def of_search(cls, rows: Iterable[Any]) -> Results:
        """From evaluations as they are stored, without those of confirmations."""
        return cls((row.trial, row.rung, row.loss) for row in rows if row.trial < CONFIRMATIONS)

    def rank(self, trial: int, rung: int) -> tuple[int, int]:
        """The trial's place at a rung, from 1, and how many reached it. Ties go to the lower number."""
        there = self.losses[rung]
        better = sum((loss, number) < (there[trial], trial) for number, loss in there.items())
        return better + 1, len(there)

    def among_best(self, trial: int, rung: int, eta: int) -> bool:
        """Whether the trial is among the best one in `eta` of those that reached the rung."""
        place, count = self.rank(trial, rung)
        return place <= count // eta


def judge(
    trial: TrialRow, results: Results, *, last: int, eta: int, base_loss: float | None, can_pause: bool
) -> Judgement:
    """Decides about a trial that was just evaluated at its rung; rung `last` is its end."""
    loss = trial.loss
    if loss is None or not math.isfinite(loss) or (base_loss is not None and loss > DIVERGED * base_loss):
        shown = "nan" if loss is None else f"{loss:.4g}"
        above = f" above the untrained model's {base_loss:.4g}" if base_loss is not None else ""
        return Judgement("prune", f"diverged: loss {shown}{above} at {trial.tokens:,} tokens", diverged=True)
    if trial.rung >= last:
        return Judgement("complete", "trained to its end")
    place, count = results.rank(trial.number, trial.rung)
    where = f"ranked {place} of {count} at {trial.tokens:,} tokens"
    if results.among_best(trial.number, trial.rung, eta):
        return Judgement("promote", where)
    if can_pause:
        return Judgement("pause", where)
    return Judgement("prune", f"{where}; parking its full state costs more than repeating its work")


def promotable(trials: Iterable[TrialRow], results: Results, eta: int) -> TrialRow | None:
    """The paused trial that has earned its next rung: the highest rung first, then the best loss."""
    earned = [
        trial
        for trial in trials
        if trial.state == "paused"
        and (trial.promoted or (trial.rung >= 0 and results.among_best(trial.number, trial.rung, eta)))
    ]
    return min(earned, key=lambda t: (-t.rung, t.loss if t.loss is not None else math.inf, t.number), default=None)


def promise(trial: TrialRow, results: Results, eta: int) -> float:
    """An estimate of the share of all configurations that are better; lower is more promising.

    A trial that was promoted r times stands in the best eta**-r; within its rung its place says the rest. One that was
    never evaluated is taken for an average one.
    """
    if trial.rung < 0 or trial.number not in results.losses.get(trial.rung, {}):
        return 0.5
    place, count = results.rank(trial.number, trial.rung)
    return (place - 0.5) / count * float(eta) ** -trial.rung


def leader(trials: Iterable[TrialRow], results: Results, eta: int) -> TrialRow | None:
    """The most promising unfinished trial that was evaluated at least once."""
    still_open = {"waiting", "live", "judging", "paused"}
    # One whose last evaluation gave no finite loss reached its rung but has no result there; it is about to be pruned.
    open_ones = [t for t in trials if t.state in still_open and t.number in results.losses.get(t.rung, {})]
    return min(open_ones, key=lambda t: (promise(t, results, eta), t.number), default=None)


def worth_finishing(trial: TrialRow, trials: Iterable[TrialRow], results: Results) -> bool:
    """Whether the trial may still beat the best completed one: it did at the last rung that both reached."""
    done = [t for t in trials if t.state == "completed" and t.full_loss is not None]
    best = min(done, key=lambda t: (t.full_loss or 0.0, t.number), default=None)
    if best is None or trial.rung < 0:
        return best is None
    there = results.losses[trial.rung]
    return best.number not in there or there[trial.number] < there[best.number]


def last_chances(trials: Sequence[TrialRow], results: Results, eta: int) -> list[TrialRow]:
    """The paused trials that may still beat the best completed one, the most promising first."""
    paused = [t for t in trials if t.state == "paused" and worth_finishing(t, trials, results)]
    return sorted(paused, key=lambda t: (promise(t, results, eta), t.number))
