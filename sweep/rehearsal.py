"""A search rehearsed on paper: how far its money brings how many trials, by the rules of halving, with losses made up.

Who pauses, who is promoted, who is asked for and who is pruned for want of money is decided as in `rungs` and `triage`,
on what stretches are forecast to take; only who is better than whom is drawn by chance. Nothing is read or written, and
the same arguments give the same answer. Apart from the loop for its speed: a whole search takes milliseconds.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sweep.rungs import Policy, asked

MOST = 256  # trials that are rehearsed; of a longer search the rest is taken to go on in the same way
DRAWS = 4  # searches that are averaged
# By how much, of that spread, a configuration is better than the first when e times as many were tried: who searches
# learns, so that more than one in eta goes on. Found on replays (benchmarks/plan.py).
LEARNS = 0.2
NOISE = 0.35  # sd of a loss at a rung, of what configurations differ by: early ranks agree to 0.9 or so with final ones


@dataclass(frozen=True)
class Costs:
    """What a method's trials take, in seconds of the machine. Of a tuple the entry k is the way to rung k, the last one
    that to the end."""

    packed: tuple[float, ...]  # training and evaluation, beside as many others as share the machine
    alone: tuple[float, ...]  # the same with the machine to itself: what is kept back for the way to an end
    kept: tuple[float, ...]  # what is written there, of whoever arrives
    park: float  # what putting a trial aside writes beyond that
    restore: float
    parks: bool  # a trial that does not go on is parked, and not pruned


@dataclass(frozen=True)
class Rules:
    """What of a study decides about its trials."""

    live: int  # trials that take turns
    slots: int  # of them train at once
    eta: int
    policy: Policy | None = None  # who goes on from a rung; None: halving
    trials: int | None = None  # at most
    even: bool = False  # the methods are searched apart, for the same money each (sweep/turns.py)


@dataclass(frozen=True)
class Rehearsed:
    """Means over the searches that were rehearsed; seconds of the machine."""

    started: float  # trials
    arrived: tuple[float, ...]  # trials that were evaluated at each rung, the last one is the end
    spent: tuple[float, ...]  # seconds of the stretches that ended there
    beside: float  # seconds of checkpoints
    left: float  # seconds that nothing could be done with


def rehearse(costs: Sequence[Costs], seconds: float, rules: Rules) -> Rehearsed:
    """Returns how a search of so many seconds is to be expected to go. `costs`: of each method.

    Methods are tried equally often unless the rules keep their money even.
    """
    found = [_Search(costs, seconds, rules, seed).run() for seed in range(DRAWS)]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    return Rehearsed(
        started=mean([one.started for one in found]),
        arrived=tuple(map(mean, zip(*(one.arrived for one in found), strict=True))),
        spent=tuple(map(mean, zip(*(one.spent for one in found), strict=True))),
        beside=mean([one.beside for one in found]),
        left=mean([one.left for one in found]),
    )


@dataclass
class _Trial:
    number: int
    method: int  # its place among the costs
    costs: Costs
    quality: float
    state: str = "running"  # paused, ended
    rung: int = -1  # the last one that it was evaluated at
    target: int = 0
    parked: bool = False  # its state must be read before it goes on
    losses: list[float] = field(default_factory=list)  # by rung


class _Search:
    """One search. What is named as in rungs and triage does the same."""

    def __init__(self, costs: Sequence[Costs], seconds: float, rules: Rules, seed: int) -> None:
        self._costs, self._rules = costs, rules
        self._draw = random.Random(seed)
        self._seconds = self._left = seconds
        self._last = len(costs[0].packed) - 1
        self._trials: list[_Trial] = []
        self._running: list[_Trial] = []
        groups = len(costs) if rules.even else 1
        # (loss, number) by who is compared with whom, and by rung
        self._ranked: list[list[list[tuple[float, int]]]] = [[[] for _ in costs[0].packed] for _ in range(groups)]
        self._of_method = [0.0] * len(costs)  # seconds that each method has had
        self._losses: dict[int, dict[int, float]] = {}  # as a policy is shown them
        self._spent = [0.0] * (self._last + 1)
        self._beside = 0.0
        self._cut = False  # MOST trials are reached, and there is money for more

    def run(self) -> Rehearsed:
        """Goes on until nothing runs and nothing more is affordable."""
        while not self._cut:
            self._fill()
            if not self._running:
                break
            self._triage()
            if self._running:
                self._train(self._running.pop(0))
        # Of a search that was cut short all goes on as it did, down to its last second.
        factor = self._seconds / (self._seconds - self._left) if self._cut else 1.0
        return Rehearsed(
            started=factor * sum(t.rung >= 0 for t in self._trials),
            arrived=tuple(factor * sum(map(len, ranked)) for ranked in zip(*self._ranked, strict=True)),
            spent=tuple(factor * seconds for seconds in self._spent),
            beside=factor * self._beside,
            left=0.0 if self._cut else self._left,
        )

    # What it takes

    def _next(self, trial: _Trial) -> float:
        costs = trial.costs
        return costs.packed[trial.target] + costs.kept[trial.target] + (costs.restore if trial.parked else 0.0)

    def _to_end(self, trial: _Trial) -> float:
        beyond = slice(trial.target + 1, None)
        return self._next(trial) + sum(trial.costs.alone[beyond]) + sum(trial.costs.kept[beyond])

    def _alone_to_end(self, trial: _Trial) -> float:
        left = slice(trial.target, None)
        return sum(trial.costs.alone[left]) + sum(trial.costs.kept[left])

    def _finisher(self) -> _Trial | None:
        return self._leader(lambda trial: self._alone_to_end(trial) <= self._left)

    def _finish_seconds(self, joined: Sequence[_Trial], leader: _Trial | None) -> float:
        if leader is None or not self._worth_finishing(leader):
            return 0.0
        return self._to_end(leader) - (self._next(leader) if leader in joined else 0.0)

    def _ahead(self, joined: Sequence[_Trial]) -> float:
        return sum(map(self._next, joined)) + self._finish_seconds(joined, self._finisher())

    def _affordable(self, trial: _Trial) -> bool:
        others = [t for t in self._running if t is not trial]
        leader = self._finisher()
        ahead = sum(map(self._next, others))
        if leader is not trial:
            ahead += self._finish_seconds(others, leader)
        room = self._next(trial) if trial.rung < 0 else 0.0
        in_time = self._alone_to_end(trial) <= self._left and ahead + self._to_end(trial) <= self._left
        return in_time and self._ahead([*others, trial]) + room <= self._left

    # Who is better

    def _peers(self, trial: _Trial) -> list[list[tuple[float, int]]]:
        return self._ranked[trial.method if self._rules.even else 0]

    def _place(self, trial: _Trial) -> tuple[int, int]:
        ranked = self._peers(trial)[trial.rung]
        return bisect.bisect_left(ranked, (trial.losses[trial.rung], trial.number)) + 1, len(ranked)

    def _among_best(self, trial: _Trial) -> bool:
        if self._rules.policy is not None:
            return asked(self._rules.policy, trial.number, trial.rung, self._losses)
        place, count = self._place(trial)
        return place <= count // self._rules.eta or (place == 1 and not trial.costs.parks)

    def _hopeful(self, trial: _Trial) -> tuple[float, int, int]:
        if trial.rung < 0:
            return 0.5, 1, trial.number
        compared = max(map(len, self._peers(trial)))
        return (self._place(trial)[0] - 0.5) / compared, -trial.rung, trial.number

    def _leader(self, payable: Callable[[_Trial], bool] = lambda _: True) -> _Trial | None:
        best = []
        for group in self._ranked:
            for rung, ranked in enumerate(group):
                here = (self._trials[number] for _, number in ranked)
                best.append(next((t for t in here if t.rung == rung and t.state != "ended" and payable(t)), None))
        found = [trial for trial in best if trial is not None]
        return min(found, key=self._hopeful, default=None)

    def _worth_finishing(self, trial: _Trial) -> bool:
        done = self._peers(trial)[self._last]
        return not done or trial.losses[trial.rung] < self._trials[done[0][1]].losses[trial.rung]

    # The loop

    def _fill(self) -> None:
        while len(self._running) < self._rules.live and not self._cut:
            if not (self._wake() or self._ask() or self._finish()):
                return

    def _wake(self) -> bool:
        for rung in reversed(range(self._last)):
            for group in self._ranked:
                ranked = group[rung]
                count = len(ranked) if self._rules.policy is not None else len(ranked) // self._rules.eta
                waiting = (self._trials[number] for _, number in ranked[:count])
                paused = (t for t in waiting if t.state == "paused" and t.rung == rung)
                earned = next((t for t in paused if self._among_best(t)), None)
                if earned is not None:
                    return self._promote(earned)
        return False

    def _promote(self, trial: _Trial) -> bool:
        trial.target, trial.parked = trial.rung + 1, True
        if not self._affordable(trial):
            return False
        trial.state = "running"
        self._running.append(trial)
        return True

    def _ask(self) -> bool:
        number = len(self._trials)
        if self._rules.trials is not None and number >= self._rules.trials:
            return False
        quality = self._draw.gauss(0, 1) - LEARNS * math.log1p(number)
        trials = [_Trial(number, method, self._costs[method], quality) for method in self._order(number)]
        trial = next((one for one in trials if self._affordable(one)), None)
        if trial is None:
            return False
        if number >= MOST:
            self._cut = True
            return False
        self._trials.append(trial)
        self._running.append(trial)
        return True

    def _order(self, number: int) -> list[int]:
        """The methods that the next trial may be of, the one whose turn it is first."""
        if not self._rules.even:
            return [number % len(self._costs)]
        ahead = [sum(self._next(t) for t in self._running if t.method == method) for method in range(len(self._costs))]
        spent = [had + more for had, more in zip(self._of_method, ahead, strict=True)]
        share = math.inf if self._rules.trials is None else math.ceil(self._rules.trials / len(spent))
        open_ones = [m for m in range(len(spent)) if sum(t.method == m for t in self._trials) < share]
        return sorted(open_ones, key=lambda method: spent[method])

    def _finish(self) -> bool:
        """The rest of the money finishes the paused ones that may still win."""
        if self._running:
            return False
        paused = [t for t in self._trials if t.state == "paused" and self._worth_finishing(t)]
        joined = 0
        for trial in sorted(paused, key=self._hopeful):
            joined += self._promote(trial)
            if joined == self._rules.slots:
                break
        return joined > 0

    def _triage(self) -> None:
        running = self._running
        for trial in [t for t in running if self._alone_to_end(t) > self._left]:
            self._drop(trial)
        while running and self._ahead(running) > self._left:
            self._drop(max(running, key=self._hopeful))

    def _drop(self, trial: _Trial) -> None:
        leader = self._leader()
        trial.state = "paused" if trial is leader and self._worth_finishing(trial) else "ended"
        self._running.remove(trial)

    def _train(self, trial: _Trial) -> None:
        rung = trial.target
        self._left -= self._next(trial)
        self._of_method[trial.method] += trial.costs.packed[rung]
        self._spent[rung] += trial.costs.packed[rung]
        self._beside += self._next(trial) - trial.costs.packed[rung]
        trial.rung, trial.parked = rung, False
        trial.losses.append(trial.quality + (self._draw.gauss(0, NOISE) if rung < self._last else 0.0))
        bisect.insort(self._peers(trial)[rung], (trial.losses[rung], trial.number))
        self._losses.setdefault(rung, {})[trial.number] = trial.losses[rung]
        if rung == self._last:
            trial.state = "ended"
        elif self._among_best(trial):
            trial.target += 1
            # Another one's turn: what takes turns in one slot is put aside, and read again, where its state is small.
            trial.parked = self._rules.slots == 1 and bool(self._running) and not trial.costs.park
            self._running.append(trial)
        else:
            trial.state = "paused" if trial.costs.parks else "ended"
        if trial.parked or trial.state == "paused":
            self._left -= trial.costs.park
            self._beside += trial.costs.park
