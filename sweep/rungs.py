"""Who pauses, who is promoted, who stops: asynchronous successive halving with true promotion.

So it is with `promote: halving`; by default `sweep/allocation.py` has the last word where a trial can pause. At a rung
the best one in `eta` of all that ever reached it goes on; the others pause with their checkpoint and may be promoted
later, when more have come and they stand among the best (Li et al., "A System for Massively Parallel Hyperparameter
Tuning", 2020; Optuna's pruners can only stop). Shares and eta were chosen on 352 recorded curves: halving at 5, 10, 20
and 40 % with half kept found the very best run of both tasks for 16.3 % of the cost.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sweep import plugins
from sweep.errors import SpecError
from sweep.records import TrialRow
from sweep.spec import SearchSpec
from sweep.tables import CONFIRMATIONS

DIVERGED = 1.1  # a loss at a rung this many times the untrained model's means that training hurts

Verdict = Literal["complete", "promote", "pause", "prune"]


@dataclass(frozen=True)
class Judgement:
    """What becomes of a trial at a rung, and the reason in words."""

    verdict: Verdict
    reason: str
    diverged: bool = False


class Policy(Protocol):
    """Who goes on from a rung; `search.rungs: module:Class` names one. Its constructor may take `eta`.

    It is asked when a trial is evaluated at a rung, and again about every paused trial as more results arrive; so it
    must follow from its arguments alone, or a resumed study decides otherwise.
    """

    shares: Sequence[float]  # of the longest run, rising: where trials are compared

    def goes_on(self, trial: int, rung: int, losses: Mapping[int, Mapping[int, float]]) -> bool:
        """Whether the trial trains on from `rung`, counted from 0; `losses[rung][trial]` are in nats a token."""


class Results:
    """Losses of all trials at all rungs: `losses[rung][trial]`."""

    def __init__(self, evaluations: Iterable[tuple[int, int, float]], policy: Policy | None = None) -> None:
        """Takes (trial, rung, loss) triples, and who decides about them; None: halving."""
        self._policy = policy
        self.losses: dict[int, dict[int, float]] = {}
        for trial, rung, loss in evaluations:
            self.losses.setdefault(rung, {})[trial] = loss
        self._orders: dict[int, list[tuple[float, int]]] = {}  # of each rung, the best first

    @classmethod
    def of_search(cls, rows: Iterable[Any], policy: Policy | None = None) -> Results:
        """From evaluations as they are stored, without those of confirmations."""
        return cls(((row.trial, row.rung, row.loss) for row in rows if row.trial < CONFIRMATIONS), policy)

    def of(self, numbers: Container[int]) -> Results:
        """Those of some trials alone."""
        each = ((trial, rung, loss) for rung, there in self.losses.items() for trial, loss in there.items())
        return Results((one for one in each if one[0] in numbers), self._policy)

    def best_so_far(self, trial: int, rung: int) -> bool:
        """Whether nobody was better at a rung yet; never where a policy decides."""
        return self._policy is None and self.rank(trial, rung)[0] == 1

    def rank(self, trial: int, rung: int) -> tuple[int, int]:
        """The trial's place at a rung, from 1, and how many reached it. Ties go to the lower number."""
        there = self.losses[rung]
        if len(self._orders.get(rung, ())) != len(there):
            self._orders[rung] = sorted((loss, number) for number, loss in there.items())
        return bisect.bisect_left(self._orders[rung], (there[trial], trial)) + 1, len(there)

    def among_best(self, trial: int, rung: int, eta: int) -> bool:
        """Whether the trial goes on: it is among the best one in `eta` of those that reached the rung, or the policy
        says so."""
        if self._policy is not None:
            return asked(self._policy, trial, rung, self.losses)
        place, count = self.rank(trial, rung)
        return place <= count // eta


LOWEST, GENTLEST = 0.025, 0.1  # shares of the run within which the first rung lies
LONGEST = 0.45  # beyond this share a rung saves little
RUNG_STEPS = 8  # a first rung of fewer optimizer steps says nothing
WIDE = 32  # configurations that a search should see, if its money allows
BRACKETS = 3
DERIVED = ("auto", "halving")  # shares that follow from money and speed
# Where a model of the curves decides: early, when warm-up is over, and late. In mid-decay a high rate looks worse than
# it ends: on two recorded tasks of three, rungs there lost the best configurations (docs/log.md).
EARLY, LATE = 0.05, 0.8
FIRST_STEPS = 3  # of a first rung, where that is no later than GENTLEST
EXPECTED, EXPECTED_BETWEEN = 6, 3  # one in so many goes on: of those rungs, and of a ladder in between (docs/log.md)


@dataclass(frozen=True)
class Ladder:
    """Rungs as shares of the longest run, and about how many configurations the money brings to the first of them."""

    shares: tuple[float, ...]
    eta: int
    trials: int


def ladder(runs: float, steps: int, eta: int | None = None) -> Ladder:
    """Derives rungs from what the money buys: the gentlest that still let the search see WIDE configurations.

    `runs`: whole runs that the search's money pays for (cap and forecast speed). `steps`: optimizer steps of a run, of
    the largest batch. A later first rung and a smaller eta lose fewer late bloomers; half kept from a twentieth on
    found the best of both recorded tasks, a third kept lost 3 % on one of them. `eta` fixes it.
    """
    lowest = max(LOWEST, RUNG_STEPS / steps)
    if lowest > GENTLEST:
        return Ladder((), eta or 2, max(int(runs), 1))  # so short a run has no early part to judge by
    firsts = [first for first in (GENTLEST, GENTLEST / 2, LOWEST) if first >= lowest] or [lowest]
    options = [_laddered(first, kept, runs) for kept in ((eta,) if eta else (2, 3)) for first in firsts]
    return next((option for option in options if option.trials >= WIDE), max(options, key=lambda option: option.trials))


def climb(steps: int, warmup: float = 0.0) -> tuple[float, ...]:
    """Rungs for a model of the curves, which chooses between trials how many of them go on. `steps` as in `ladder`.

    `warmup` is the share of the run in which the rate rises: nobody is compared before.
    """
    first = max(min(max(EARLY, FIRST_STEPS / steps), GENTLEST), warmup)
    return (first, LATE) if first <= LONGEST else (LATE,)


def expected(shares: Sequence[float]) -> int:
    """One in how many is expected to go on from a rung where a model of the curves decides: as on recorded tables."""
    late = any(math.isclose(share, LATE, abs_tol=0.01) for share in shares)  # they are of whole tokens
    return EXPECTED if late else EXPECTED_BETWEEN


def _laddered(first: float, eta: int, runs: float) -> Ladder:
    shares = [first]
    while shares[-1] * eta <= LONGEST:
        shares.append(round(shares[-1] * eta, 6))
    *climb, last = [(end - start) * float(eta) ** -rung for rung, (start, end) in enumerate(_stretches(shares))]
    trials = runs / (sum(climb) + last)
    if trials < eta ** len(shares):  # one of them comes to its end all the same
        trials = (runs - (1 - shares[-1])) / sum(climb)
    return Ladder(tuple(shares), eta, max(int(trials), 1))


def _stretches(shares: Sequence[float]) -> list[tuple[float, float]]:
    return list(zip([0.0, *shares], [*shares, 1.0], strict=True))


class Hyperband:
    """Halving in brackets, in turn by trial number: those of bracket b are not cut before rung b.

    Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 2018; asynchronous as in
    Li et al., 2020. Trials are compared within their bracket.
    """

    def __init__(self, shares: Sequence[float], eta: int) -> None:
        """`shares` of the longest run at which trials are compared; one in `eta` goes on."""
        self.shares = shares
        self._eta = eta
        self._brackets = max(min(len(shares), BRACKETS), 1)

    def goes_on(self, trial: int, rung: int, losses: Mapping[int, Mapping[int, float]]) -> bool:
        """See Policy."""
        mine = trial % self._brackets
        if rung < mine:
            return True
        there = {number: loss for number, loss in losses[rung].items() if number % self._brackets == mine}
        better = sum((loss, number) < (there[trial], trial) for number, loss in there.items())
        return better + 1 <= len(there) // self._eta


def policy(search: SearchSpec, shares: Sequence[float]) -> Policy | None:
    """Who decides at the rungs of a study; None is halving. Raises SpecError for a class that is none."""
    if not isinstance(search.rungs, str) or search.rungs in DERIVED:
        return None
    if search.rungs == "hyperband":
        return Hyperband(shares, search.eta)
    made: Policy = plugins.make(search.rungs, "search.rungs", eta=search.eta)
    own = list(getattr(made, "shares", ()))
    if not callable(getattr(made, "goes_on", None)) or own != sorted(set(own)) or not all(0 < s < 1 for s in own):
        wanted = "it needs `shares`, rising and between 0 and 1, and goes_on(trial, rung, losses)"
        raise SpecError(f"search.rungs: {search.rungs} is no policy: {wanted}", "see sweep/rungs.py, Policy")
    return made


def asked(policy: Policy, trial: int, rung: int, losses: Mapping[int, Mapping[int, float]]) -> bool:
    """The policy's answer. Raises SpecError for whatever a user's class raises."""
    try:
        return bool(policy.goes_on(trial, rung, losses))
    except Exception as error:
        name = type(policy).__name__
        message = f"search.rungs: {name}.goes_on failed at trial {trial}, rung {rung}: {type(error).__name__}: {error}"
        raise SpecError(message, "mend the class, then: sweep resume") from error


def judge(
    trial: TrialRow, results: Results, *, last: int, eta: int, base_loss: float | None, can_pause: bool
) -> Judgement:
    """Decides about a trial that was just evaluated at its rung; rung `last` is its end.

    One that cannot pause has no second chance: the first ones of a rung go on as long as they are the best there, as in
    Optuna's pruner of the same kind.
    """
    loss = trial.loss
    if loss is None or not math.isfinite(loss) or (base_loss is not None and loss > DIVERGED * base_loss):
        shown = "nan" if loss is None else f"{loss:.4g}"
        above = f" above the untrained model's {base_loss:.4g}" if base_loss is not None else ""
        return Judgement("prune", f"diverged: loss {shown}{above} at {trial.tokens:,} tokens", diverged=True)
    if trial.rung >= last and trial.full_loss is None:
        return Judgement("prune", "diverged: its loss on all validation rows is not finite at its end", diverged=True)
    if trial.rung >= last:
        return Judgement("complete", "trained to its end")
    place, count = results.rank(trial.number, trial.rung)
    where = f"ranked {place} of {count} at {trial.tokens:,} tokens"
    place_is_enough = results.among_best(trial.number, trial.rung, eta)
    if place_is_enough or (not can_pause and results.best_so_far(trial.number, trial.rung)):
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


def promise(trial: TrialRow, results: Results) -> float:
    """An estimate of the share of all configurations that are better; lower is more promising.

    Whoever went on from a rung is taken for the best of it, so the k-th at any rung is the k-th of all that were ever
    compared. One that was never evaluated is taken for an average one.
    """
    if trial.rung < 0 or trial.number not in results.losses.get(trial.rung, {}):
        return 0.5
    compared = max(len(there) for there in results.losses.values())
    return (results.rank(trial.number, trial.rung)[0] - 0.5) / compared


def hopeful(trial: TrialRow, results: Results) -> tuple[float, int, int]:
    """The order in which trials get what money there is: by promise, then by how far they came."""
    return promise(trial, results), -trial.rung, trial.number


def leader(
    trials: Iterable[TrialRow], results: Results, payable: Callable[[TrialRow], bool] = lambda _: True
) -> TrialRow | None:
    """The most promising unfinished trial that was evaluated at least once, of those that are `payable`."""
    still_open = {"waiting", "live", "judging", "paused"}
    # One whose last evaluation gave no finite loss reached its rung but has no result there; it is about to be pruned.
    open_ones = [t for t in trials if t.state in still_open and t.number in results.losses.get(t.rung, {})]
    return next(filter(payable, sorted(open_ones, key=lambda t: hopeful(t, results))), None)


def worth_finishing(trial: TrialRow, trials: Iterable[TrialRow], results: Results) -> bool:
    """Whether the trial may still beat the best completed one: it did at the last rung that both reached."""
    done = [t for t in trials if t.state == "completed" and t.full_loss is not None]
    best = min(done, key=lambda t: (t.full_loss or 0.0, t.number), default=None)
    if best is None or trial.rung < 0:
        return best is None
    there = results.losses[trial.rung]
    return best.number not in there or there[trial.number] < there[best.number]


def last_chances(trials: Sequence[TrialRow], results: Results) -> list[TrialRow]:
    """The paused trials that may still beat the best completed one, the most promising first."""
    paused = [t for t in trials if t.state == "paused" and worth_finishing(t, trials, results)]
    return sorted(paused, key=lambda t: hopeful(t, results))
