"""Who pauses, who is promoted, who stops, who is pruned for money."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest

from budgets.ledger import Balances
from budgets.tariff import Tariff
from sweep import plan, records, rungs, triage
from sweep.errors import SpecError
from sweep.pricing import Quote
from sweep.projection import Plan, Projector
from sweep.records import TrialRow, WorkerRow
from sweep.rungs import Results
from sweep.spec import SearchSpec, Spec
from trainers.messages import TrialConfig

PLAN = Plan(examples=100, run_tokens=10_000, rungs=(1_000, 2_500), rung_rows=16, rung_tokens=300, validation_tokens=900)

RATE = Tariff.flat(3_600_000)  # a millisecond is a micro-dollar


def trial(number: int, **values: object) -> TrialRow:
    """A trial's row."""
    config = TrialConfig(
        number=number, method="lora", learning_rate=1e-3, batch_size=4, examples=100, seed=0, rank=8, alpha=8,
        targets="mlp",
    )  # fmt: skip
    return dataclasses.replace(records.newcomer(config), **values)


def judged(loss: float | None, rung: int, results: Results, **more: object) -> rungs.Judgement:
    """Judges trial 0."""
    row = trial(0, loss=loss, rung=rung, tokens=1_000, full_loss=more.pop("full_loss", None))
    options = {"last": 2, "eta": 2, "base_loss": 4.0, "can_pause": True} | more
    return rungs.judge(row, results, **options)


def test_half_goes_on_from_a_rung() -> None:
    """Proves asynchronous halving: the first to arrive waits, the better of two goes on, ties to the lower number."""
    assert judged(3.0, 0, Results([(0, 0, 3.0)])).verdict == "pause"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 3.5)])).verdict == "promote"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 3.0)])).verdict == "promote"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 2.0)])).verdict == "pause"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 2.0)]), can_pause=False).verdict == "prune"
    assert judged(3.0, 2, Results([(0, 2, 3.0)]), full_loss=3.0).verdict == "complete"


def test_who_cannot_pause_goes_on_while_it_is_the_best() -> None:
    """Proves that trials which have no second chance are stopped by better ones, and the first one by nobody."""
    assert judged(3.0, 0, Results([(0, 0, 3.0)]), can_pause=False).verdict == "promote"
    assert judged(3.0, 1, Results([(0, 1, 3.0)]), can_pause=False).verdict == "promote"
    assert judged(3.0, 1, Results([(0, 1, 3.0), (1, 1, 2.9)]), can_pause=False).verdict == "prune"
    policy = rungs.Hyperband((0.1, 0.3), 2)
    assert judged(3.0, 0, Results([(0, 0, 3.0)], policy), can_pause=False).verdict == "prune", "a policy has its way"


def test_divergence_is_named() -> None:
    """Proves that a loss that is no number, or above the untrained model's, ends a trial at once."""
    for loss in (None, math.inf, 4.5):
        judgement = judged(loss, 0, Results([]))
        assert (judgement.verdict, judgement.diverged) == ("prune", True)
        assert "diverged" in judgement.reason
    at_end = judged(3.0, 2, Results([(0, 2, 3.0)]), full_loss=None)
    assert (at_end.verdict, at_end.diverged) == ("prune", True), "finite on the rung rows, not on all"


def test_a_paused_trial_is_promoted_when_others_turn_out_worse() -> None:
    """Proves true promotion: the highest rung first, and only for those among the best half."""
    rows = [trial(0, state="paused", rung=0, target=0, loss=3.0), trial(1, state="paused", rung=0, target=0, loss=3.5)]
    results = Results([(0, 0, 3.0), (1, 0, 3.5)])
    chosen = rungs.promotable(rows, results, eta=2)
    assert chosen is not None and chosen.number == 0
    assert rungs.promotable(rows[1:], results, eta=2) is None


def money(cap: int, spent: int, held: int = 0) -> triage.Funds:
    """Funds on a machine of one micro-dollar a millisecond."""
    balances = Balances(cap, spent, held, cap - spent - held, 0, 0, False, {})
    return triage.Funds(balances, 3_600_000_000, spent, 0, 0)


def test_triage_prunes_the_least_promising_until_it_fits() -> None:
    """Proves triage: what cannot reach its end goes first, then the worst, each with its figures as the reason."""
    projector = Projector(PLAN, 10_000_000, "cpu", 2)
    losses = {0: 2.0, 1: 3.0, 2: 2.5}
    results = Results((number, 1, loss) for number, loss in losses.items())
    rows = [trial(n, state="waiting", rung=1, target=2, tokens=2_500, loss=loss) for n, loss in losses.items()]
    funds = money(10**9, 0)
    assert triage.triage(funds, rows, results, projector) == []
    need = triage.projected_spend(funds, rows, projector)
    tight = money(need - 1, 0)
    end = tight.cost(projector.to_end(rows[0]).mean)
    assert end < need, "all three can still be brought to their end one at a time"
    stopped = triage.triage(tight, rows, results, projector)
    assert [row.number for row, _ in stopped] == [1]
    assert "ranked last of 3 at 2,500 tokens" in stopped[0][1] and " of $" in stopped[0][1]
    poor = money(end - 1, 0)
    assert len(triage.triage(poor, rows, results, projector)) == 3
    assert "its end is forecast at" in triage.triage(poor, rows, results, projector)[0][1]


def test_nothing_is_kept_back_for_a_leader_that_cannot_be_paid() -> None:
    """Proves that the money goes to the best that it brings to an end, and who shares a machine is not cheap alone.

    A new leader at 5 % of its run, whose end nobody could pay any more, had all others pruned for the sake of it.
    """
    projector = Projector(PLAN, 10_000_000, "cpu", 2)
    early = trial(0, state="live", rung=0, target=1, tokens=250, loss=2.0)
    late = trial(1, state="live", rung=1, target=2, tokens=4_000, loss=1.9)
    results = Results([(0, 0, 2.0), (1, 0, 2.1), (1, 1, 1.9)])
    need = {t.number: money(10**12, 0).cost(projector.seconds_to_end(t)) for t in (early, late)}
    rich = triage.with_finish(money(10**12, 0), [early, late], results, projector)
    assert rich.leader == 1, "the first of the later rung goes before the first of the earlier one"
    poor = triage.with_finish(money(need[0] - 1, 0), [early], results, projector)
    assert (poor.leader, poor.finish_seconds) == (None, 0.0)
    left = triage.with_finish(money(need[1] + 1, 0), [early, late], results, projector)
    assert [t.number for t, _ in triage.triage(left, [early, late], results, projector)] == [0]
    alone = Projector(PLAN, 10_000_000, "NVIDIA H100", 16, layers=30)
    shared, end = alone.among(16.0), money(10**12, 0).cost(alone.seconds_to_end(early))
    assert 2 * shared.seconds_to_target(early) < alone.seconds_to_target(early)
    hopeless = triage.triage(money(end - 1, 0), [early], Results([(0, 0, 2.0)]), shared)
    assert "its end is forecast at" in hopeless[0][1], "nobody is at its end sooner because others share its machine"


def loading(paid_ms: int, state: str = "intended") -> WorkerRow:
    """A worker of which nothing was heard yet, paid up to here."""
    tariff = Tariff.flat(3_600_000)
    return WorkerRow(
        id="s:w001", ordinal=1, state=state, folder="", hold="", slice=1, final=False, micros_per_hour=tariff.now,
        tariff=tariff, origin_boot_ms=0, boot_id="", paid_ms=paid_ms, work_ms=paid_ms, settled_ms=0, settled_usage={},
        at_ms=0, usage={}, offset=0, slots={}, device=None, load_ms=None, exit_code=None, why="", occupancy=None,
    )  # fmt: skip


def test_a_load_that_is_held_is_not_counted_twice() -> None:
    """Proves that a worker's first hold pays for its load: with the cap all held, nobody is pruned while it loads.

    On a GPU the first hold is generous, and the load was counted beside it: every trial was pruned at the worker's
    first word.
    """
    balances = Balances(600_000, 0, 600_000, 0, 0, 0, False, {})
    rows, projector = [trial(0, state="waiting")], Projector(PLAN, 10_000_000, "cpu", 2)
    needed = round(1000 * projector.to_target(rows[0]).mean)
    funds = triage.funds(balances, 3_600_000, loading(600_000), now_ms=40_000, load_seconds=100.0)
    assert (funds.prepaid_ms, funds.overhead) == (600_000 - 100_000, 0)
    assert needed < funds.prepaid_ms
    assert triage.projected_spend(funds, rows, projector) == 600_000
    assert triage.triage(funds, rows, Results([]), projector) == []
    short = triage.funds(balances, 3_600_000, loading(60_000), now_ms=40_000, load_seconds=100.0)
    assert (short.prepaid_ms, short.overhead) == (0, 40_000), "what the hold does not cover is still to be paid"
    ready = triage.funds(balances, 3_600_000, loading(600_000, "ready"), now_ms=40_000, load_seconds=100.0)
    assert (ready.prepaid_ms, ready.overhead) == (560_000, 0)


def test_the_last_one_keeps_what_nobody_else_can_use() -> None:
    """Proves that the leader that alone is left goes on while the money may bring it to its end, and is woken for it.

    With one slow evaluation measured, a leader was parked with three quarters of the cap left, and nobody won.
    """
    projector = Projector(PLAN, 10_000_000, "cpu", 2)
    best = trial(0, state="live", rung=0, target=1, tokens=1_000, loss=2.0)
    results = Results([(0, 0, 2.0), (1, 0, 2.5)])
    worse = trial(1, state="paused", rung=0, target=0, tokens=1_000, loss=2.5)
    end = projector.among(1.0).to_end(best)

    def funds(seconds: float, **changes: object) -> triage.Funds:
        left = dataclasses.replace(money(10**12, 0), ready=True, **changes)
        return dataclasses.replace(left, spent_now=10**12 - left.cost(seconds))

    def stopped(trials: list[TrialRow], left: triage.Funds, begun: Results = results) -> list[int]:
        return [one.number for one, _ in triage.triage(left, trials, begun, projector)]

    lucky = funds((end.low + end.mean) / 2)
    assert stopped([best, worse], lucky) == [] and stopped([best], funds(end.low / 2)) == [0]
    assert stopped([best], dataclasses.replace(lucky, ready=False)) == [0], "for another load it is not risked"
    other = trial(2, state="waiting", target=0)
    assert sorted(stopped([best, other], lucky)) == [2], "who was never evaluated leaves it to the leader"
    leader = dataclasses.replace(best, state="paused")
    running = dataclasses.replace(worse, state="live", target=1)
    assert stopped([leader, running], lucky) == [1], "the leader is woken instead"
    done = trial(3, state="completed", rung=2, target=2, loss=1.0, full_loss=1.0)
    assert stopped([best, done], lucky) == [0], "there is a winner, to whom the rest of the money is worth more"

    def woken(left: triage.Funds, *others: TrialRow) -> bool:
        waiting = dataclasses.replace(best, state="waiting")
        return triage.last_chance(waiting, [waiting, *others], results, left, projector, begun=False)

    assert woken(funds(end.mean + 0.01), worse) and not woken(lucky, worse), "not by luck alone: it was parked for that"
    assert not woken(funds(end.mean + 0.01), running)


def test_what_buys_no_whole_quantum_is_not_counted_on() -> None:
    """Proves that money is counted as the provider sells time: of 115 s worth of it a machine runs for 60.

    The rest was promised to trials, none of which came to its end. A second quantum is counted when it can be had.
    """
    minutes = dataclasses.replace(Tariff.flat(3_600_000), quantum_ms=60_000, minimum_ms=60_000)

    def left(cap: int, worker: WorkerRow | None, spent: int = 0, held: int = 0, reserve: int = 0) -> int:
        balances = Balances(cap, spent, held, cap - spent - held, 0, reserve, False, {})
        following = minutes.following(1_500) if spent else minutes
        return triage.funds(balances, 3_600_000, worker, 10_000, 2.0, following).left_now

    assert left(115_000, None) == 60_000 and left(120_000, None) == 120_000 and left(59_999, None) == 0
    assert left(175_000, None, reserve=60_000) == 60_000, "what is set apart is not the search's"
    assert left(178_499, None, spent=60_000) == 60_000, "after a worker it is quanta again"
    running = dataclasses.replace(loading(60_000, "ready"), tariff=minutes)
    assert left(115_000, running, held=60_000) == 60_000 - 10_000
    assert left(120_000, running, held=60_000) == 120_000 - 10_000
    by_the_ms = triage.funds(Balances(115_000, 0, 0, 115_000, 0, 0, False, {}), 3_600_000, None, 0, 2.0, RATE)
    assert by_the_ms.left_now == 115_000


def test_promise_orders_across_rungs() -> None:
    """Proves the estimate behind triage: who came farther goes before an equal, a newcomer before a rung's last.

    One of two that went on is the best of them all, not the best of one: alone at 80 %, with a fifth left to pay, it
    was pruned for the second of fifty at 5 %.
    """
    early = [(number, 0, 2.0 + number) for number in range(6)]
    results = Results([*early, (0, 1, 1.5), (4, 1, 1.8)])
    rows = [trial(n, rung=0, loss=2.0 + n) for n in (1, 2, 3, 5)] + [trial(6)]
    rows += [trial(0, rung=1, loss=1.5), trial(4, rung=1, loss=1.8)]
    assert [t.number for t in sorted(rows, key=lambda t: rungs.hopeful(t, results))] == [0, 4, 1, 2, 6, 3, 5]
    best = rungs.leader(rows, results)
    assert best is not None and best.number == 0


def test_a_ladder_follows_from_the_money() -> None:
    """Proves `halving`: much money cuts late and gently, little cuts early and hard, and a short run is not cut."""
    rich, usual, poor = (rungs.ladder(runs, 1000) for runs in (100, 6, 2))
    assert rich.shares == (0.1, 0.2, 0.4) and rich.eta == 2
    assert usual.shares == (0.05, 0.1, 0.2, 0.4) and usual.eta == 2, "what the recorded curves chose"
    assert usual.trials == int(6 / 0.1625)
    assert (poor.shares[0], poor.eta) == (0.025, 3) and 2 / 0.1625 < poor.trials < 32
    for runs in (1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 1000.0):
        found = rungs.ladder(runs, 1000)
        first, last = found.trials * found.shares[0], 1 - found.shares[-1]
        assert found.shares[0] <= 0.1 and first + last <= runs, "one comes to its end"
    assert rungs.ladder(6, 79).shares == () and rungs.ladder(2, 160).shares[0] >= 8 / 160
    assert rungs.ladder(6, 1000, eta=4).eta == 4


def spec(cap: str, **search: object) -> Spec:
    """A spec of one machine."""
    return Spec.model_validate(
        {"study": "s", "model": "m", "data": {"train": "t"}, "machine": {"price": "$1/hour"}, "budget": {"cap": cap},
         "search": search}
    )  # fmt: skip


def settled(given: Spec) -> tuple[Spec, dict]:
    """The spec and facts that would be stored."""
    splits = {"train": {"rows": 8_000, "tokens": 800_000}, "validation": {"rows": 200, "tokens": 20_000}}
    facts = {"parameters": 10**8, "device": "cpu", "cores": 2, "data": {"splits": splits}}
    facts["plan"] = dataclasses.asdict(plan.lengths(given.search, splits))
    return plan.settle(given, facts, Quote(Tariff.flat(1_000_000), "hour", ""))


def test_the_cap_settles_the_rungs_of_a_spec() -> None:
    """Proves that halving is stored as the shares that the cap buys, and that a list and `none` stay."""
    dear, facts = settled(spec("$50", rungs="halving"))
    cheap, few = settled(spec("$3", rungs="halving"))
    assert dear.search.rungs == (0.1, 0.2, 0.4) and cheap.search.rungs[0] < 0.1
    assert facts["plan"]["rungs"] == (80_000, 160_000, 320_000) and "about" in facts["notes"][0]
    assert len(few["plan"]["rungs"]) == len(cheap.search.rungs)
    assert Spec.model_validate(dear.resolved()) == dear
    assert settled(spec("$50", rungs="halving", eta=3))[0].search.eta == 3
    for rungs_, stored in ([0.1, 0.5], (0.1, 0.5)), ("none", ()):
        same, facts = settled(spec("$50", rungs=rungs_))
        assert same.search.rungs == stored and len(facts["plan"]["rungs"]) == len(stored)
    banded, facts = settled(spec("$50", rungs="hyperband"))
    assert banded.search.rungs == "hyperband" and len(facts["plan"]["rungs"]) == 3


def test_a_rung_that_is_an_end_is_left_out() -> None:
    """Proves that derived rungs lie before the last step of the largest batch; those that the spec names stay."""
    splits = {"train": {"rows": 64, "tokens": 6_400}, "validation": {"rows": 200, "tokens": 20_000}}
    for batch, expected in ((16, (0.1,)), (4, (0.1, 0.8)), (64, ())):
        given = spec("$50", batch_size=[4, batch])
        facts = {"parameters": 10**8, "device": "cpu", "cores": 2, "data": {"splits": splits}}
        facts["plan"] = dataclasses.asdict(plan.lengths(given.search, splits))
        stored, found = plan.settle(given, facts, Quote(Tariff.flat(1_000_000), "hour", ""))
        assert len(stored.search.rungs) == len(found["plan"]["rungs"]) == len(expected)
        assert stored.search.rungs == pytest.approx(expected, abs=0.1)
        assert ("the end alone" in found["notes"][0]) == (not expected)
    listed = spec("$50", batch_size=16, rungs=[0.1, 0.8])
    assert plan.settle(listed, facts, Quote(Tariff.flat(1_000_000), "hour", ""))[0].search.rungs == (0.1, 0.8)


def test_hyperband_cycles_through_brackets() -> None:
    """Proves brackets: trial 0 is cut at the first rung, 1 only from the second on, each among its own."""
    found = rungs.policy(SearchSpec(rungs="hyperband"), (0.1, 0.2, 0.4))
    first = Results([(n, 0, 1.0 + n) for n in range(12)] + [(n, 1, 1.0 + n) for n in (1, 4)], found)
    assert [first.among_best(n, 0, 2) for n in (0, 3, 6, 9)] == [True, True, False, False]
    assert all(first.among_best(n, 0, 2) for n in (1, 2, 4, 5, 10, 11))
    assert [first.among_best(n, 1, 2) for n in (1, 4)] == [True, False]


class Half:
    """A user's policy."""

    shares = (0.5,)

    def goes_on(self, trial: int, rung: int, losses: dict) -> bool:
        """All under one nat."""
        return losses[rung][trial] < 1


class Rising:
    """A user's policy that is none."""

    shares = (0.5, 0.1)
    goes_on = Half.goes_on


def test_a_policy_of_ones_own_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves module:Class: its rungs, its decisions in judge and promotable, and one-line errors."""
    own, facts = settled(spec("$50", rungs=f"{__name__}:Half"))
    assert own.search.rungs == f"{__name__}:Half" and facts["plan"]["rungs"] == (400_000,)
    found = rungs.policy(own.search, (0.5,))
    losses = [(0, 0, 0.5), (1, 0, 0.2), (2, 0, 1.5)]
    assert judged(0.5, 0, Results(losses, found)).verdict == "promote", "two of three would not be by halving"
    row = trial(2, state="paused", rung=0, target=0, loss=1.5)
    assert rungs.promotable([row], Results(losses, found), 2) is None
    with pytest.raises(SpecError, match=r"search.rungs: .*:Rising is no policy: it needs `shares`"):
        rungs.policy(SearchSpec(rungs=f"{__name__}:Rising"), ())
    with pytest.raises(SpecError, match=r"search.rungs: Half.goes_on failed at trial 9, rung 0: KeyError: 9"):
        Results(losses, found).among_best(9, 0, 2)
    (tmp_path / "mine_18.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SpecError, match=r"search\.rungs: mine_18:Mine cannot be used: ZeroDivisionError"):
        rungs.policy(SearchSpec(rungs="mine_18:Mine"), ())


@pytest.mark.parametrize("value", ["halvng", "mine-y:Class", "a:b:c", [0.1, 2]])
def test_rungs_that_are_none_are_refused(value: object) -> None:
    """Proves that anything but shares, a known policy or module:Class is refused."""
    with pytest.raises(ValueError, match="rungs"):
        SearchSpec(rungs=value)


def test_a_model_of_the_curves_looks_early_and_late() -> None:
    """At 5 and 80 %; after three steps where a run is short; never within the warm-up, and not in mid-decay for it."""
    assert rungs.climb(1000) == rungs.climb(60) == (0.05, 0.8)
    assert rungs.climb(40) == (0.075, 0.8) and rungs.climb(10) == (0.1, 0.8)
    assert rungs.climb(1000, 0.2) == (0.2, 0.8) and rungs.climb(1000, 0.5) == (0.8,)
    assert rungs.expected((617 / 12_347, 9_878 / 12_347)) > rungs.expected((0.025, 0.1, 0.4))
