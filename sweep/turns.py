"""Whose turn it is where LoRA and full-parameter training are both searched: each gets the same money, in long turns.

Tried equally often, full training would take nearly all of the money; left to what promises most, the method that
learns faster would get nearly all of it, and who loses the comparison would have lost it for want of tries. So the
methods are searched apart, each among its own trials, and the money between them is kept even. Turns are long because a
worker trains one method at a time: each change lets a pack run empty. All of this follows from the tables and from the
money that is left now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from budgets.money import affordable_ms
from sweep import rungs
from sweep.projection import Projector
from sweep.records import ENDED, RUNNING, TrialRow
from sweep.rungs import Results
from sweep.spec import Method, SearchSpec
from sweep.triage import Funds

TURNS = 8  # in a search, of both methods together


def balanced(search: SearchSpec) -> bool:
    """Whether the methods of a search get the same money each."""
    return search.balance == "dollars" and len(search.method) > 1


def order(
    search: SearchSpec, trials: Sequence[TrialRow], evaluations: Iterable[Any], projector: Projector, money: Funds
) -> list[Method]:
    """The methods, first the one that the next step of the search belongs to; the other where that can do nothing.

    `evaluations` are those of the search as they are stored.
    """
    methods = {trial.number: trial.config.method for trial in trials}
    spent = dict.fromkeys(search.method, 0.0)
    seen: dict[int, int] = {}  # tokens at the last evaluation
    for row in evaluations:
        spent[methods[row.trial]] += (row.train_ms + row.evaluate_ms + row.examine_ms) / 1000
        seen[row.trial] = row.tokens
    # What trials took and what they may still take: a start that costs half of the search leaves half as long turns.
    seconds = sum(spent.values()) + affordable_ms(money.micros_per_hour, max(money.left_now, 0)) / 1000
    for trial in trials:
        if trial.state in RUNNING or trial.rung < 0:  # who never came to a rung counts as if it had: tries cost turns
            spent[trial.config.method] += projector.seconds_to_target(trial)
        elif trial.state in ENDED:
            lost = max(trial.tokens - seen.get(trial.number, trial.tokens), 0)
            spent[trial.config.method] += projector.train(trial.config, lost).mean
    first = turn(search.method, spent, seconds / TURNS)
    return [first, *(method for method in search.method if method != first)]


def turn(methods: Sequence[Method], spent: Mapping[Method, float], length: float) -> Method:
    """Whose turn it is: by what all have spent together, turns of one length; but whoever is a turn ahead waits."""
    now = methods[int(sum(spent.values()) / max(length, 1e-9)) % len(methods)]
    least = min(methods, key=lambda method: (spent[method], methods.index(method)))
    return now if spent[now] < spent[least] + length else least


def crowded(search: SearchSpec, trials: Sequence[TrialRow], method: Method | None) -> bool:
    """Whether enough trials of a method wait or train: of full training, which has one slot, as many as take turns."""
    running = sum(t.state in RUNNING and t.config.method == "full" for t in trials)
    return method == "full" and running >= search.live


def last_chances(search: SearchSpec, trials: Sequence[TrialRow], results: Results) -> list[TrialRow]:
    """The paused trials that may still be the best of those that they are compared with, the most promising first."""
    methods: Sequence[Method | None] = search.method if balanced(search) else [None]
    groups = [among(trials, results, method) for method in methods]
    return [one for mine, theirs in groups for one in rungs.last_chances(mine, theirs)]


def among(trials: Sequence[TrialRow], results: Results, method: Method | None) -> tuple[list[TrialRow], Results]:
    """The trials of one method, and their results; of all where `method` is None."""
    if method is None:
        return list(trials), results
    mine = [trial for trial in trials if trial.config.method == method]
    return mine, results.of({trial.number for trial in mine})
