"""The plan: a pure function of spec, facts and forecasts, and the rehearsal of a search that it rests on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import synthetic
from benchmarks.plan import of_table
from sweep import pricing
from sweep.outline import Outline, Probed, drawn_configs, prospective
from sweep.plan import drawn, lengths
from sweep.projection import untaught
from sweep.rehearsal import MOST, Costs, Rules, rehearse
from sweep.spec import Spec, validate

STRETCHES = (1.0, 1.0, 2.0, 6.0)
COSTS = Costs(packed=STRETCHES, alone=STRETCHES, kept=(0.1,) * 4, park=0.0, restore=0.1, parks=True)
SPLITS = {"train": {"rows": 2_000, "tokens": 400_000}, "validation": {"rows": 64, "tokens": 12_800}}
SPLITS["test"] = {"rows": 64, "tokens": 12_800}


def a_spec(cap: str = "$20", **changes: Any) -> Spec:
    """A study of a small model."""
    values: dict[str, Any] = {
        "study": "words",
        "model": "m",
        "data": {"train": "t"},
        "machine": {"price": "$3.60/hour"},
    }
    values |= {"budget": {"cap": cap}, "search": {"method": ["lora", "full"]}} | changes
    return validate(values, "here")


def facts_of(spec: Spec, device: str = "NVIDIA H100") -> dict[str, Any]:
    """What a launch would have seen."""
    found = {"parameters": 135_000_000, "device": device, "cores": 16, "seconds": 0.0, "data": {"splits": SPLITS}}
    return found | {"plan": lengths(spec.search, SPLITS).__dict__, "notes": []}


def planned(spec: Spec, probed: Probed | None = None) -> Outline:
    """The plan of a spec."""
    return drawn(spec, facts_of(spec), pricing.quote(spec), probed)


# --- the rehearsal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 5.0, 12.0, 40.0, 400.0])
@pytest.mark.parametrize("slots", [1, 8])
def test_a_rehearsed_search_spends_what_it_has(seconds: float, slots: int) -> None:
    """Proves that every second is a stretch's, a checkpoint's or left, and that a trial begins only if one can end."""
    found = rehearse([COSTS], seconds, Rules(live=4, slots=slots, eta=2))
    assert sum(found.spent) + found.beside + found.left == pytest.approx(seconds)
    assert min(found.left, found.beside, *found.spent) >= 0
    assert list(found.arrived) == sorted(found.arrived, reverse=True) and found.started == found.arrived[0]
    if seconds < 10.4:
        assert found.started == 0 and found.left == seconds
    else:
        assert found.arrived[-1] >= 1, "what was begun is brought to an end"
    if seconds == 400:
        assert found.left < 0.05 * seconds
        assert 1.5 < found.arrived[0] / found.arrived[1] < 2.5, "about a half goes on"


def test_a_long_search_goes_on_as_it_began() -> None:
    """Proves the short cut: of a search of thousands of trials a part is rehearsed, and trials rise with the money."""
    rules = Rules(live=4, slots=1, eta=2)
    once, twice = (rehearse([COSTS], seconds, rules) for seconds in (4_000.0, 8_000.0))
    assert once.started > MOST
    assert twice.started / once.started == pytest.approx(2, rel=0.05)
    assert sum(twice.spent) + twice.beside == pytest.approx(8_000.0)


def test_trials_end_where_the_spec_says() -> None:
    """Proves that a stated number of trials is not exceeded, and that what is left then finishes paused ones alone."""
    found = rehearse([COSTS], 400.0, Rules(live=4, slots=1, eta=2, trials=6))
    assert found.started == 6 and found.left > 200


class _Nobody:
    """A policy of the user's by which nobody goes on."""

    shares = (0.1, 0.2, 0.4)

    def goes_on(self, trial: int, rung: int, losses: Mapping[int, Mapping[int, float]]) -> bool:
        """See rungs.Policy."""
        assert trial in losses[rung]
        return False


@pytest.mark.parametrize("rungs", [(0.05, 0.8), (0.025, 0.1, 0.4)])
def test_a_rehearsal_of_a_wide_pack_ends_whatever_it_has(rungs: tuple[float, ...]) -> None:
    """Proves that nobody is promoted for whom triage has no time, where a pack is far cheaper a trial than one alone.

    Such a trial was promoted and parked in turn for ever, and a launch never came to its question.
    """
    stretches = tuple(100 * (end - start) for start, end in zip((0.0, *rungs), (*rungs, 1.0), strict=True))
    packed = tuple(seconds / 12 for seconds in stretches)
    costs = Costs(packed=packed, alone=stretches, kept=(0.02,) * len(stretches), park=0.0, restore=0.1, parks=True)
    for seconds in range(20, 900, 40):
        found = rehearse([costs], float(seconds), Rules(live=40, slots=32, eta=6))
        spent = sum(found.spent) + found.beside + found.left
        assert spent == pytest.approx(seconds, rel=0.01)
        assert found.arrived[-1] >= 1 or seconds < 200


def test_a_policy_decides_in_the_rehearsal_too() -> None:
    """Proves that who goes on is asked of the study's policy: without promotions most of the money goes to rung 1."""
    free = dataclasses.replace(COSTS, restore=0.0)
    halving, nobody = (rehearse([free], 100.0, Rules(4, 1, 2, policy)) for policy in (None, _Nobody()))
    assert nobody.arrived[0] > 1.5 * halving.arrived[0]
    assert nobody.arrived[1] < 0.2 * nobody.arrived[0], "the best that are left go on, with the last of the money"


def test_what_cannot_be_parked_is_pruned() -> None:
    """Proves that trials which can't be parked do not come back, so that nothing is read; the best so far go on."""
    dear = dataclasses.replace(COSTS, restore=3.0)
    rules = Rules(4, 8, 2)
    parked, pruned = (rehearse([dataclasses.replace(dear, parks=parks)], 200.0, rules) for parks in (True, False))
    assert parked.beside > 2 * pruned.beside
    assert pruned.beside == pytest.approx(0.1 * sum(pruned.arrived)) and pruned.arrived[-1] >= 1


def test_the_money_of_methods_is_kept_even() -> None:
    """Proves that a method which costs ten times as much is tried a tenth as often, and that all money is used."""
    dear = dataclasses.replace(COSTS, packed=tuple(10 * s for s in STRETCHES), alone=tuple(10 * s for s in STRETCHES))
    even, equal = (rehearse([COSTS, dear], 2_000.0, Rules(4, 1, 2, even=even)) for even in (True, False))
    assert even.started > 2.5 * equal.started
    for found in (even, equal):
        assert sum(found.spent) + found.beside + found.left == pytest.approx(2_000.0)


def test_what_is_put_aside_is_written_then() -> None:
    """Proves that writing a state is paid by those who are put aside alone, and that every second is accounted for."""
    free, dear = (dataclasses.replace(COSTS, kept=(0.0, 0.0, 0.0, 0.1), park=park) for park in (0.0, 3.0))
    for slots in (1, 8):
        cheap, costly = (rehearse([costs], 200.0, Rules(4, slots, 2)) for costs in (free, dear))
        assert costly.beside > cheap.beside and costly.started < cheap.started
        assert sum(costly.spent) + costly.beside + costly.left == pytest.approx(200.0)
        pruned = rehearse([dataclasses.replace(dear, parks=False, restore=0.0)], 200.0, Rules(4, slots, 2))
        assert pruned.beside == pytest.approx(0.1 * pruned.arrived[-1])


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", ["$0.01", "$0.30", "$3", "$500"])
@pytest.mark.parametrize("seeds", [0, 3])
def test_the_phases_are_the_cap(cap: str, seeds: int) -> None:
    """Proves that a plan accounts for every micro-dollar, and that the search keeps away from the reserve."""
    spec = a_spec(cap, endgame={"seeds": seeds})
    plan = planned(spec)
    assert sum(phase.cost for phase in plan.phases) == plan.cap == spec.budget.cap
    assert min(phase.cost for phase in plan.phases) >= 0
    assert plan.phase("search").cost <= plan.cap - plan.reserve
    assert plan.trials_low <= plan.trials <= plan.trials_high
    assert [other.cap for other in plan.others] == [plan.cap / 2, plan.cap * 2]
    assert (plan.confirmation is None) == (seeds == 0)
    assert planned(spec) == plan, "the same arguments give the same plan"


def test_the_same_money_in_full_runs_is_said_where_full_training_is_not_searched() -> None:
    """Proves that the exchange into full-parameter runs does not depend on the search."""
    plan = planned(a_spec(search={"method": ["lora"]}))
    lora, full = plan.runs
    assert lora.searched and not full.searched
    assert lora.affordable / full.affordable == pytest.approx(full.cost / lora.cost)


def test_a_reserve_that_confirms_nothing_is_named_with_what_would_fit() -> None:
    """Proves that the remedy is one: with the reserve that it names nothing falls short any more."""
    short = planned(a_spec("$2", budget={"cap": "$2", "reserve": "$0.01"}))
    assert short.confirmation is not None
    (shortfall,) = short.shortfalls
    assert "over 3 seeds takes" in shortfall.what and "budget.reserve: $" in shortfall.remedy
    reserve = shortfall.remedy.split("budget.reserve: ")[1].split(",")[0]
    enough = planned(a_spec("$2", budget={"cap": "$2", "reserve": reserve}))
    assert enough.shortfalls == [] and enough.confirmation is not None
    assert enough.confirmation.configurations >= 2 and enough.confirmation.seeds == 3


def test_what_was_probed_replaces_the_priors() -> None:
    """Proves that a machine that is ten times slower than it was taken for buys a tenth, with narrow intervals."""
    spec = a_spec(search={"method": ["lora"]}, endgame={"seeds": 0})
    guessed = planned(spec)
    study = prospective(spec, facts_of(spec), pricing.quote(spec))
    projector = untaught(study)
    row = {"width": 1.0, "shared_batch": None, "train_tokens": 20_000, "evaluate_tokens": 12_800, "checkpoint_ms": 100}
    row |= {"write_ms": 100, "examine_ms": 0, "warm_ms": 0, "warm_tokens": 0, "full_loss": None, "tokens": 20_000}
    prior = untaught(study)
    for config in drawn_configs(spec, "lora", projector.plan.examples):
        slow = {"train_ms": round(1e4 * prior.train(config, 20_000).mean)}
        slow |= {"evaluate_ms": round(1e4 * prior.evaluation("lora", 12_800).mean)}
        projector.observe_evaluation(config, SimpleNamespace(**row, **slow))
    known = planned(spec, Probed(projector, 1, 12.0))
    assert guessed.probe_seconds is None and known.probe_seconds == 12.0
    assert known.runs[0].cost / guessed.runs[0].cost == pytest.approx(10, rel=0.2)
    assert known.runs[0].high / known.runs[0].low < 1.5 < guessed.runs[0].high / guessed.runs[0].low


# --- what really happens ---------------------------------------------------------------------------------------------


def test_a_plan_that_knows_the_speeds_is_what_a_replay_does() -> None:
    """Proves plan and loop against each other, in simulated time: dollars of the search to a tenth of the cap, trials
    to a factor of two (whom chance promotes decides), those that end to two, confirmations to one."""
    found = of_table(synthetic.make("synthetic-forgiving", lora=60), 8, 4, 0, 2)
    known, actual = found["probed"], found["actual"]
    for phase in ("search", "overhead"):
        assert abs(known["dollars"][phase] - actual["dollars"][phase]) < 0.1 * found["cap"], phase
    assert abs(known["confirmations"] - actual["confirmations"]) <= 1
    assert 0.5 < known["trials"] / actual["trials"] < 2
    assert abs(known["rungs"][-1] - actual["rungs"][-1]) <= 2


def test_nothing_of_a_plan_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that planning is pure: no file appears where it runs."""
    monkeypatch.chdir(tmp_path)
    planned(a_spec())
    assert list(tmp_path.iterdir()) == []
