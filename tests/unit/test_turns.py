"""Whose turn it is between LoRA and full training: the same money each, in long turns, from the tables alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from budgets.ledger import Balances
from sweep import space, turns
from sweep.projection import Plan, Projector
from sweep.records import TrialRow, newcomer
from sweep.rungs import Results
from sweep.spec import SearchSpec
from sweep.triage import Funds

BOTH = SearchSpec(method=["lora", "full"])
PLAN = Plan(1000, 100_000, (5_000, 20_000), 100, 1_000, 1_000)
BALANCES = Balances(1_000_000, spent=0, held=0, left=1_000_000, overrun=0, reserve=200_000, frozen=False, accounts={})
MONEY = Funds(BALANCES, 3_600_000, 0, 0, 0)  # 800 seconds


def trial(number: int, method: Any, **values: Any) -> TrialRow:
    """A paused trial of a method."""
    config = space.typical(method, BOTH, 1000, 0, number)
    return replace(newcomer(config), **({"state": "paused", "turn": number, "rung": 0} | values))


def spent(number: int, seconds: float) -> Any:
    """An evaluation after so many seconds of training."""
    return SimpleNamespace(trial=number, train_ms=round(1000 * seconds), evaluate_ms=0, examine_ms=0, tokens=5_000)


def order(trials: list[TrialRow], evaluations: list[Any], start: float = 0) -> list[str]:
    """The methods, the one whose turn it is first; a way to the first rung is forecast at 150 s.

    `start` seconds were no trial's. A second costs a thousand micro-dollars.
    """
    money = replace(MONEY, spent_now=round(1000 * start) + sum(row.train_ms for row in evaluations))
    return list(turns.order(BOTH, trials, evaluations, Projector(PLAN, 10**9, "replay", 4), money))


def test_a_turn_lasts_until_a_method_is_an_eighth_ahead() -> None:
    """Proves the rule: turns of an eighth of the search's money, 100 s here, and nobody is more than one ahead."""
    assert order([], []) == ["lora", "full"]
    lora, full = trial(0, "lora"), trial(1, "full")
    assert order([lora], [spent(0, 99)]) == ["lora", "full"]
    assert order([lora], [spent(0, 101)]) == ["full", "lora"]
    assert order([lora, full], [spent(0, 101), spent(1, 10)]) == ["full", "lora"]
    assert order([lora, full], [spent(0, 101), spent(1, 200)]) == ["full", "lora"]
    assert order([lora, full], [spent(0, 101), spent(1, 202)]) == ["lora", "full"]
    woken = replace(lora, turn=2)
    assert order([woken, full], [spent(0, 150), spent(1, 140)]) == ["lora", "full"]


def test_a_dear_start_leaves_shorter_turns() -> None:
    """Proves that turns share what trials can spend: where a start takes half of the search, both still get theirs."""
    lora = trial(0, "lora")
    assert order([lora], [spent(0, 49)], start=400) == ["lora", "full"]
    assert order([lora], [spent(0, 51)], start=400) == ["full", "lora"]


def test_what_is_under_way_counts() -> None:
    """Proves that trials which have not reached their rungs yet do not let a method ask for ever."""
    running = [trial(n, "full", state="waiting", rung=-1, turn=n + 9) for n in range(1, 4)]
    assert order([trial(0, "lora"), *running], [spent(0, 5)]) == ["lora", "full"]


def test_who_never_comes_to_a_rung_does_not_keep_the_turn() -> None:
    """Proves that a method whose trials all diverge at their first steps, for nothing, is not asked for ever."""
    lost = [trial(n, "full", state="pruned", diverged=True, rung=-1) for n in range(1, 4)]
    assert order([trial(0, "lora"), *lost], [spent(0, 20)]) == ["lora", "full"]
    late = [trial(n, "full", state="pruned", rung=0, tokens=10_000) for n in range(1, 4)]
    rows = [spent(0, 20), *(spent(n, 1) for n in range(1, 4))]
    assert order([trial(0, "lora"), *late], rows) == ["lora", "full"], "what was trained since the last rung counts"


def test_full_training_has_one_slot() -> None:
    """Proves that no more full-parameter trials wait than take turns, and that a pack is not limited by that."""
    waiting = [trial(n, "full", state="waiting") for n in range(BOTH.live)]
    assert turns.crowded(BOTH, waiting, "full") and not turns.crowded(BOTH, waiting[1:], "full")
    assert not turns.crowded(BOTH, waiting, "lora")


def test_methods_are_compared_apart() -> None:
    """Proves that places at a rung are among a method's own trials."""
    trials = [trial(0, "lora"), trial(1, "full"), trial(2, "full")]
    mine, results = turns.among(trials, Results([(0, 0, 1.0), (1, 0, 2.0), (2, 0, 1.5)]), "full")
    assert [t.number for t in mine] == [1, 2] and results.rank(2, 0) == (1, 2)
    assert turns.balanced(BOTH) and not turns.balanced(SearchSpec())
    assert not turns.balanced(BOTH.model_copy(update={"balance": "promise"}))
