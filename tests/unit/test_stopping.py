"""When a search has enough, and who can't catch up: pure functions of losses and prices."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import stopping as measured
from sweep import dominance, records, stopping
from sweep.errors import SpecError
from sweep.records import TrialRow
from sweep.rungs import Judgement
from sweep.spec import PatienceSpec, StopSpec, UtilitySpec, validate
from trainers.messages import TrialConfig

LAST = 2  # the rung at the end
VALUES = {"study": "w", "model": "m", "data": {"train": "t"}, "machine": {"price": "$1/hour"}, "budget": {"cap": "$9"}}


def a_trial(number: int, state: str, losses: Sequence[float]) -> TrialRow:
    """A trial that was evaluated at the rungs from 0 on."""
    config = TrialConfig(number=number, method="lora", learning_rate=1e-3, batch_size=4, examples=100, seed=0)
    more: dict[str, Any] = {"rung": len(losses) - 1, "loss": losses[-1] if losses else None, "tokens": 100}
    more["full_loss"] = losses[-1] if len(losses) == LAST + 1 else None
    return dataclasses.replace(records.newcomer(config), state=state, **more)


def losses_of(curves: Mapping[int, Sequence[float]]) -> dict[int, dict[int, float]]:
    """By rung and trial."""
    return {
        rung: {number: curve[rung] for number, curve in curves.items() if len(curve) > rung} for rung in range(LAST + 1)
    }


def arrived(curves: Sequence[tuple[int, Sequence[float]]], ms: int = 1000) -> list[Any]:
    """Evaluations as they are stored, one trial after the other; each took so long."""
    found = []
    for number, curve in curves:
        for rung, _ in enumerate(curve):
            full = curve[-1] if rung == LAST else None
            row = {"trial": number, "rung": rung, "full_loss": full, "ordinal": len(found) + 1}
            found.append(SimpleNamespace(**row, train_ms=ms, evaluate_ms=0, checkpoint_ms=0))
    return found


def patient(wanted: PatienceSpec, curves: Sequence[tuple[int, Sequence[float]]], since: int = 0) -> str | None:
    """Patience after these trials, at $3.60 an hour: a second is a thousand micro-dollars."""
    trials = [a_trial(n, "completed" if len(curve) > LAST else "paused", curve) for n, curve in curves]
    return stopping.patience(wanted, trials, arrived(curves), "validation_loss", 3_600_000, since)


def test_patience_counts_from_the_last_real_improvement() -> None:
    """Proves the count: trials that trained after the best one, whatever became of them; less than the tolerance is no
    improvement, unless small steps add up; and what came before a raised cap does not count."""
    wanted = PatienceSpec(trials=3, tolerance=0.01)
    curves = [(0, [3.0, 2.5, 2.0]), (1, [3.1]), (2, [3.2]), (3, [2.9, 2.4])]
    assert patient(wanted, curves[:3]) is None
    found = patient(wanted, curves)
    assert found is not None and "trial 0 was not improved on by more than 1 % over 3 trials" in found
    assert patient(wanted, [*curves[:3], (3, [2.9, 2.4, 1.995])]) is not None, "a quarter of a percent is none"
    small = [*curves[:3], (3, [2.9, 2.4, 1.99]), (4, [2.8, 2.3, 1.97])]
    assert patient(wanted, small[:4]) is not None and patient(wanted, small) is None, "together it is one"
    assert patient(wanted, curves, since=4) is None
    assert patient(wanted, [(n, [3.0]) for n in range(30)]) is None, "nothing was trained to its end yet"


def test_patience_in_dollars() -> None:
    """Proves that the training after the best one is priced, and that whichever limit comes first counts."""
    curves = [(0, [3.0, 2.5, 2.0]), (1, [3.1, 3.0])]
    assert patient(PatienceSpec(dollars="$0.003"), curves) is None
    found = patient(PatienceSpec(dollars="$0.002", trials=50), curves)
    assert found is not None and found.endswith("over $0.002000 of training")


def useful(dollars: str, curves: Mapping[int, Sequence[float]], end: int = 5_000, spent: int = 100_000) -> str | None:
    """Utility after these trials; `end` is what bringing one to its end costs."""
    trials = [a_trial(n, "completed" if len(curve) > LAST else "paused", curve) for n, curve in curves.items()]
    wanted = UtilitySpec(dollars_per_percent=dollars)
    return stopping.utility(wanted, trials, losses_of(curves), LAST, spent, lambda _: end)


FLAT: dict[int, list[float]] = {n: [3.0 + 0.01 * n, 2.5, 2.0 + 0.001 * (n + 1)] for n in range(4)}
FLAT |= {n: [3.6] for n in range(4, 24)}


def test_utility_weighs_an_improvement_against_its_price() -> None:
    """Proves that the same study goes on where a percent is worth much, and stops where it is worth little."""
    assert useful("$10", FLAT) is None
    found = useful("$0.001", FLAT)
    assert found is not None and "no paused one is worth its end either" in found
    assert useful("$0.001", {n: FLAT[n] for n in (0, 1, 4, 5)}) is None, "nothing is known of what comes yet"


def test_utility_finishes_a_paused_one_that_is_ahead() -> None:
    """Proves that one that stands as well as the best did is worth its end, unless that costs too much."""
    ahead = FLAT | {24: [2.98]}
    assert useful("$0.02", FLAT) is not None
    assert useful("$0.02", ahead, end=1_000) is None
    assert useful("$0.02", ahead, end=1_000_000) is not None


def test_the_expected_improvement_is_that_of_a_normal() -> None:
    """Proves the formula against a simulation, and that without a spread it is the difference."""
    rng = random.Random(3)
    simulated = statistics.fmean(max(1.0 - rng.gauss(1.05, 0.2), 0.0) for _ in range(200_000))
    assert stopping.expected_improvement(1.0, 1.05, 0.2) == pytest.approx(simulated, rel=0.02)
    assert stopping.expected_improvement(1.0, 0.9, 0.0) == pytest.approx(0.1)
    assert stopping.expected_improvement(1.0, 1.1, 0.0) == 0.0


def test_how_it_is_written() -> None:
    """Proves the forms that a spec may have, and that what an improvement is worth must be said."""

    def stop(value: object) -> StopSpec:
        return validate(VALUES | {"stop": value}, "here").stop

    assert stop(False) == stop("off") == stop(None) == validate(VALUES, "here").stop == StopSpec()
    assert stop("patience") == stop({"patience": {}}) == StopSpec(patience=PatienceSpec(trials=20))
    both = stop({"patience": {"dollars": "$5"}, "utility": {"dollars_per_percent": 1.0}})
    assert both.patience is not None and both.patience.trials is None and both.patience.dollars == 5_000_000
    assert both.utility is not None and both.utility.dollars_per_percent == 1_000_000
    assert validate(validate(VALUES | {"stop": both.model_dump()}, "here").resolved(), "here").stop == both
    with pytest.raises(SpecError, match=r"stop\.utility\.dollars_per_percent is missing"):
        stop("utility")
    with pytest.raises(SpecError, match=r"stop: is `off`, `patience`, or a section"):
        stop("patient")


# Dominance


def rivals(*ends: Sequence[float]) -> dict[int, Sequence[float]]:
    """Trials that came to their ends, by number."""
    return dict(enumerate(ends))


SEEN = rivals([3.0, 2.5, 2.0], [3.1, 2.6, 2.1], [3.2, 2.6, 2.1], [3.0, 2.6, 2.06])


def judged(loss: float, curves: Mapping[int, Sequence[float]], verdict: Any = "promote") -> Judgement:
    """What becomes of one more trial with this loss at the first rung."""
    newest = a_trial(99, "judging", [loss])
    trials = [*(a_trial(n, "completed" if len(c) > LAST else "paused", c) for n, c in curves.items()), newest]
    return dominance.overrule(Judgement(verdict, "first"), newest, trials, losses_of({**curves, 99: [loss]}))


def test_who_is_behind_by_more_than_anybody_made_good_is_stopped() -> None:
    """Proves the rule and its words: the gap at the rung against three times the largest recovery from there on."""
    found = judged(4.0, SEEN)
    assert found.verdict == "prune" and not found.diverged
    assert found.reason.startswith("dominated: loss 33.3 % above trial 0's at 100 tokens")
    assert judged(3.2, SEEN).verdict == "promote" and judged(3.2, SEEN, "pause").verdict == "pause"
    assert judged(4.0, SEEN, "complete").verdict == "complete"


def test_one_late_bloomer_is_enough_to_spare_others() -> None:
    """Proves that a study in which one trial came from far behind stops nobody for being so far behind."""
    late = {**SEEN, 4: [3.6, 2.6, 1.99]}
    assert judged(4.0, late).verdict == "promote"


def test_before_some_came_to_their_ends_nobody_is_stopped() -> None:
    """Proves that three whole curves are no evidence, and that paused ones count for none."""
    few = {n: SEEN[n] for n in range(3)} | {n: [3.0] for n in range(3, 30)}
    assert judged(9.0, few).verdict == "promote"


def test_late_bloomers_of_made_up_tables_are_spared(capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that over ten tables of each kind some are stopped and none of the best tenth, and that a rule that allows
    for no more than was seen would stop some."""

    def stopped(safety: str) -> tuple[int, int]:
        assert measured.main(["dominance", "--seeds", "10", "--safety", safety]) == 0
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        return sum(int(row[2]) for row in rows), sum(int(row[5]) for row in rows)

    usual = dominance.SAFETY
    try:
        every, late = stopped(str(usual))
        assert every > 0 and late == 0
        assert stopped("0.5")[1] > 0
    finally:
        dominance.SAFETY = usual
