"""Who gets the next dollar: what the model of curves learns, and that its decisions follow from the tables alone."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import surfaces

from benchmarks import replay, synthetic
from sweep import feasibility, space
from sweep.allocation import Allocation, allocation_of
from sweep.curves import Curves, Points, expected_improvement, fitted, rates, standardised
from sweep.loop import Sweep
from sweep.projection import Plan, Projector
from sweep.proposals import anything
from sweep.records import TrialRow, newcomer
from sweep.rungs import Results
from sweep.spec import SearchSpec

SEARCH = SearchSpec(rank=[8], alpha=[16.0], targets=["mlp"], batch_size=[8])
SHARES = (0.05, 0.2)
PLAN = Plan(1000, 100_000, (5_000, 20_000), 100, 1_000, 1_000)


def trial(number: int, rate: float, rung: int, state: str = "paused", search: SearchSpec = SEARCH) -> TrialRow:
    """A LoRA trial of one learning rate that stands at a rung."""
    chosen = {"method": "lora", "lora_rank": 8, "lora_alpha": 16.0, "lora_targets": "mlp"}
    config = space.config(number, chosen | {"lora_learning_rate": rate, "batch_size": 8}, search, 1000, 0)
    return replace(newcomer(config), state=state, rung=rung, target=rung, tokens=[5_000, 20_000, 100_000][rung])


def projector() -> Projector:
    """Forecasts of a machine on which nothing was measured yet."""
    return Projector(PLAN, 10**8, "replay", 4)


def fresh(number: int, search: SearchSpec) -> list[TrialRow]:
    """The cheapest new trial of each method."""
    return [newcomer(space.typical(method, search, 1000, 0, number)) for method in search.method]


def crossing() -> tuple[list[TrialRow], Results]:
    """High rates lead at the first rung and end behind low ones, as six trained to their ends have shown.

    Number 6 has a high rate and the best first loss of all that paused, number 7 a low one and the worst.
    """
    ends = [trial(n, 3e-3 * 1.1**n, 2, "completed") for n in range(3)]
    ends += [trial(n, 2e-4 * 1.1**n, 2, "completed") for n in range(3, 6)]
    paused = [trial(6, 3.5e-3, 0), trial(7, 3.0e-4, 0)]
    losses = [(n, 0, 1.00 + 0.01 * n) for n in range(3)] + [(n, 0, 1.20 + 0.01 * n) for n in range(3, 6)]
    losses += [(n, 1, 0.95) for n in range(3)] + [(n, 1, 0.96) for n in range(3, 6)]
    losses += [(n, 2, 0.90) for n in range(3)] + [(n, 2, 0.80) for n in range(3, 6)]
    return [*ends, *paused], Results([*losses, (6, 0, 0.99), (7, 0, 1.26)])


def test_a_late_bloomer_is_thawed() -> None:
    """Proves that curves may cross: whose neighbours ended best goes on, though its first loss is the worst."""
    trials, results = crossing()
    chosen = Allocation(SEARCH, SHARES, 0).thaw(trials, results, projector(), [])
    assert chosen is not None and chosen.number == 7
    assert results.rank(7, 0) == (8, 8), "halving would have left it where it is"


def test_a_leader_is_thawed_where_curves_do_not_cross() -> None:
    """Proves that an early loss counts where nothing says that it misleads."""
    trials = [trial(n, rate, 0) for n, rate in enumerate(np.geomspace(1e-5, 5e-3, 9))]
    results = Results([(n, 0, 1.5 - 0.05 * n if n != 4 else 0.9) for n in range(9)])
    chosen = Allocation(SEARCH, SHARES, 0).thaw(trials, results, projector(), [])
    assert chosen is not None and chosen.number == 4


@pytest.mark.parametrize(("misled", "early"), [(False, 1.0), (True, 4.0)])
def test_early_losses_that_mislead_are_trusted_less(misled: bool, early: float) -> None:
    """Proves that the model learns by how much the first rung is off: not at all, or more than its losses differ."""
    rng = np.random.default_rng(0)
    features, ends = rng.uniform(0, 1, (12, 1)), rng.normal(0, 0.6, 12)
    first = ends + rng.normal(0, 2.5 if misled else 0.05, 12)
    lengths, rungs = np.log([0.05] * 12 + [1.0] * 12), np.repeat([0, 1], 12)
    seen = Points(np.vstack([features, features]), np.tile(np.arange(12), 2), lengths, rungs)
    assert fitted(seen, np.concatenate([first, ends]), math.log(0.05)).early == early


def test_who_runs_or_diverged_is_not_thawed() -> None:
    """Proves that only a paused trial is chosen, and none before there is something to learn from."""
    trials, results = crossing()
    busy = [replace(t, state="live") if t.state == "paused" else t for t in trials]
    allocation = Allocation(SEARCH, SHARES, 0)
    assert allocation.thaw(busy, results, projector(), []) is None
    lost = [replace(t, state="pruned", diverged=True) if t.number == 7 else t for t in trials]
    assert allocation.thaw(lost, results, projector(), []).number == 6  # type: ignore[union-attr]
    few = Results([(6, 0, 0.99), (7, 0, 1.26)])
    assert allocation.thaw(trials[6:], few, projector(), []) is None


def test_a_trial_that_failed_before_its_first_rung_is_known_at_once() -> None:
    """Proves that what ran out of memory repels from then on, as after a resume, and not from the next loss on."""
    trials, results = crossing()
    newcomers, allocation = fresh(9, SEARCH), Allocation(SEARCH, SHARES, 0)
    before = allocation.propose(trials, results, projector(), newcomers)
    late = trial(8, before["lora_learning_rate"], 0, "failed")
    failed = [*trials, replace(late, rung=-1, target=0, tokens=0)]
    after = allocation.propose(failed, results, projector(), newcomers)
    assert after == Allocation(SEARCH, SHARES, 0).propose(failed, results, projector(), newcomers) != before


def test_a_new_configuration_is_asked_where_the_known_ones_are_poor() -> None:
    """Proves the choice between thawing and asking: one paused trial far behind the best end is not worth its way."""
    ends = [trial(n, 3e-4 * 1.05**n, 2, "completed") for n in range(4)]
    poor = trial(4, 1e-5, 1)
    losses = [(n, rung, 0.8 + 0.1 * (2 - rung) + 0.02 * n) for n in range(4) for rung in range(3)]
    results = Results([*losses, (4, 0, 1.4), (4, 1, 1.39)])
    allocation, fresh = Allocation(SEARCH, SHARES, 0), newcomer(trial(5, 1e-4, 0).config)
    assert allocation.thaw([*ends, poor], results, projector(), [fresh]) is None
    assert allocation.thaw([*ends, poor], results, projector(), []) == poor, "the best there is, if none can be asked"


def test_the_rate_of_a_step_is_what_it_brings_for_a_dollar() -> None:
    """Proves the rates: expected improvement over price for a last step; more with the option to stop than without."""
    one = np.ones(1)
    last = rates(0.0, 0 * one, 0 * one, one, 2 * one, 0 * one)
    assert last == pytest.approx(expected_improvement(0.0, 0 * one, one) / 2, rel=1e-5)
    stopped = rates(0.0, 0 * one, 0.8 * one, 0.2 * one, 0.1 * one, 0.9 * one)
    blind = rates(0.0, 0 * one, 0 * one, one, one, 0 * one)
    assert stopped[0] > 1.3 * blind[0]
    rising = rates(0.0, np.linspace(1, -1, 9), np.full(9, 0.5), np.full(9, 0.5), np.ones(9), np.ones(9))
    assert np.all(np.diff(rising) > 0)
    exact = [0.5 * (1 + math.erf(z / math.sqrt(2))) for z in (-3.0, -0.5, 0.0, 1.7)]
    found = [expected_improvement(z, np.zeros(1), one)[0] for z in (-3.0, -0.5, 0.0, 1.7)]
    bells = [math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (-3.0, -0.5, 0.0, 1.7)]
    assert found == pytest.approx([z * p + b for z, p, b in zip((-3.0, -0.5, 0.0, 1.7), exact, bells)], abs=1e-6)  # noqa: B905


def test_the_model_is_sure_of_what_it_saw_and_of_nothing_far_away() -> None:
    """Proves the outlook: an end that was seen is known, a neighbour's nearly, one at the other end not."""
    lengths = np.log([0.05, 0.05, 0.05, 0.05, 1.0])
    features = np.array([[0.1, 0.5], [0.5, 0.5], [0.6, 0.5], [0.4, 0.5], [0.5, 0.5]])
    seen = Points(features, np.array([0, 1, 2, 3, 1]), lengths, np.array([0, 0, 0, 0, 1]))
    model = Curves(seen, np.array([1.0, -1.0, -0.8, -0.9, -1.2]), float(lengths[0]))
    asked = Points(
        np.array([[0.5, 0.5], [0.52, 0.5], [1.0, 0.5]]), np.array([1, -1, -1]), np.zeros(3), np.ones(3, np.int64)
    )
    found = model.outlook(asked)
    apart = model.apart(asked, found, 0, found, asked.features[0])
    assert apart[1] < 0.5 * apart[2] and found.mean[0] < found.mean[2]
    assert np.all(found.explained <= found.variance) and np.all(found.variance > 0)


def test_the_bad_ones_are_all_alike() -> None:
    """Proves the scale: the better half spans it, and what diverged is no worse than what is just bad."""
    found = standardised(np.array([0.8, 1.0, 5.0, math.inf]), np.array([0.8, 1.0, 5.0]))
    assert found[1] == 0 and found[0] < 0 < found[2] == found[3] < 2


@pytest.mark.parametrize("method", [["lora"], ["lora", "full"]])
def test_the_same_question_has_the_same_answer(method: list[str]) -> None:
    """Proves that proposals follow from seed, number and losses, and lie in the space, for both methods."""
    search = SearchSpec(method=method)
    draw, trials = random.Random(1), []
    for number in range(20):
        config = space.config(number, anything(search, draw), search, 1000, 0)
        trials.append(replace(newcomer(config), state="paused", rung=0, tokens=5_000))
    results = Results([(t.number, 0, 1 + abs(math.log10(t.config.learning_rate) + 3)) for t in trials])
    answers = []
    for _ in range(2):
        allocation = Allocation(search, SHARES, 7)
        allocation.propose(trials[:10], results, projector(), fresh(3, search))  # what was asked before does not matter
        answers.append([allocation.propose(trials, results, projector(), fresh(n, search)) for n in (20, 21)])
    assert answers[0] == answers[1] and answers[0][0] != answers[0][1]
    for chosen in answers[0]:
        assert space.chosen(space.config(20, chosen, search, 1000, 0)) == chosen
        assert space.encoded(chosen, search) == chosen


def test_who_was_pruned_is_not_thawed() -> None:
    """Proves that an answer from before somebody else pruned the trial is not remembered against that."""
    trials, results = crossing()
    allocation = Allocation(SEARCH, SHARES, 0)
    chosen = allocation.thaw(trials, results, projector(), [])
    assert chosen is not None and chosen.number == 7
    pruned = [replace(t, state="pruned") if t.number == 7 else t for t in trials]
    other = allocation.thaw(pruned, results, projector(), [])
    assert other is not None and other.number == 6


def test_a_method_is_asked_for_at_its_own_price() -> None:
    """Proves that where money is not kept even, a method that costs a hundred times as much is hardly proposed."""
    search = SearchSpec(method=["lora", "full"], balance="promise")
    draw, trials, asked = random.Random(1), [], []
    known = projector()
    for number in range(24):
        trials.append(replace(newcomer(space.config(number, anything(search, draw), search, 1000, 0)), state="paused"))
    trials = [replace(t, rung=0, tokens=5_000) for t in trials]
    for trial in trials:
        dear = 100 if trial.config.method == "full" else 1
        row = {"train_tokens": 5_000, "train_ms": 1_000 * dear, "evaluate_tokens": 1_000, "evaluate_ms": 1}
        row |= {"tokens": 5_000, "checkpoint_ms": 1, "write_ms": 1, "examine_ms": 0, "full_loss": None, "width": 1.0}
        row |= {"shared_batch": None, "warm_ms": 0, "warm_tokens": 0}
        known.observe_evaluation(trial.config, SimpleNamespace(**row))
    results = Results([(t.number, 0, 1 + 0.1 * draw.random()) for t in trials])
    allocation = Allocation(search, SHARES, 7)
    asked = [allocation.propose(trials, results, known, fresh(n, search))["method"] for n in range(24, 44)]
    assert asked.count("full") <= 2


def test_decisions_after_a_kill_are_those_before_it() -> None:
    """Proves on a whole study that at every step an allocation that knows the tables alone decides as the one that ran.

    That is what a resumed study has: our tables, and nothing of the process that was killed.
    """
    table = synthetic.make("synthetic-forgiving", seed=4, lora=20, full=0).lasting(600.0)
    compared: list[bool] = []

    def watch(driven: Sweep, step: Any) -> bool:
        changed = bool(step())
        trials, results = driven._trials()
        fresh = allocation_of(driven.study, driven.projector.plan.shares)
        ask = feasibility.newcomers(driven.study, trials)
        answers = [a.thaw(trials, results, driven.projector, ask) for a in (driven.allocation, fresh)]
        proposals = [a.propose(trials, results, driven.projector, ask) for a in (driven.allocation, fresh) if ask]
        assert answers[0] == answers[1] and proposals[:1] == proposals[1:]
        compared.append(answers[0] is not None)
        return changed

    done = replay.replay(table, 0, 6.0, watch=watch)
    assert done.trials > 8 and any(compared) and not all(compared)


def _until_good(seed: int, first: list[float], *, modelled: bool) -> int:
    """Trials until one is truly within 15 % of the best, on the surface where few are; at most 60."""
    search, surface = SearchSpec(), surfaces.labels
    allocation, draw = Allocation(search, (), seed), random.Random(seed)
    trials: list[TrialRow] = []
    losses: list[tuple[int, int, float]] = []
    for number in range(60):
        chosen = anything(search, draw)
        if modelled:
            chosen = allocation.propose(trials, Results(losses), projector(), fresh(number, search))
        if number < len(first):
            chosen = chosen | {"lora_learning_rate": first[number]}
        if surface(chosen) < surfaces.BEST["labels"] * 1.15:
            return number + 1
        losses.append((number, 0, surfaces.noisy(surface, chosen, seed)))
        done = newcomer(space.config(number, chosen, search, 1000, 0))
        trials.append(replace(done, state="completed", rung=0))
    return 60


def test_a_wrong_guess_by_thirty_is_no_worse_than_chance() -> None:
    """Proves that first guesses with rates thirty times too low cost less than the model saves."""
    wrong = [5e-4 / 30, 1e-3 / 30, 2e-4 / 30]
    model = statistics.mean(_until_good(seed, wrong, modelled=True) for seed in range(10))
    chance = statistics.mean(_until_good(seed, [], modelled=False) for seed in range(10))
    assert model < chance, json.dumps({"model": model, "chance": chance})
