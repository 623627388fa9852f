"""Who pauses, who is promoted, who stops, who is pruned for money."""

from __future__ import annotations

import dataclasses
import math

from budgets.ledger import Balances
from sweep import records, rungs, triage
from sweep.projection import Plan, Projector
from sweep.records import TrialRow
from sweep.rungs import Results
from trainers.messages import TrialConfig

PLAN = Plan(examples=100, run_tokens=10_000, rungs=(1_000, 2_500), rung_rows=16, rung_tokens=300, validation_tokens=900)


def trial(number: int, **values: object) -> TrialRow:
    """A trial's row."""
    config = TrialConfig(
        number=number, method="lora", learning_rate=1e-3, batch_size=4, examples=100, seed=0, rank=8, alpha=8,
        targets="mlp",
    )  # fmt: skip
    return dataclasses.replace(records.newcomer(config), **values)


def judged(loss: float | None, rung: int, results: Results, **more: object) -> rungs.Judgement:
    """Judges trial 0."""
    row = trial(0, loss=loss, rung=rung, tokens=1_000)
    options = {"last": 2, "eta": 2, "base_loss": 4.0, "can_pause": True} | more
    return rungs.judge(row, results, **options)


def test_half_goes_on_from_a_rung() -> None:
    """Proves asynchronous halving: the first to arrive waits, the better of two goes on, ties to the lower number."""
    assert judged(3.0, 0, Results([(0, 0, 3.0)])).verdict == "pause"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 3.5)])).verdict == "promote"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 3.0)])).verdict == "promote"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 2.0)])).verdict == "pause"
    assert judged(3.0, 0, Results([(0, 0, 3.0), (1, 0, 2.0)]), can_pause=False).verdict == "prune"
    assert judged(3.0, 2, Results([(0, 2, 3.0)])).verdict == "complete"


def test_divergence_is_named() -> None:
    """Proves that a loss that is no number, or above the untrained model's, ends a trial at once."""
    for loss in (None, math.inf, 4.5):
        judgement = judged(loss, 0, Results([]))
        assert (judgement.verdict, judgement.diverged) == ("prune", True)
        assert "diverged" in judgement.reason


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
    assert triage.triage(funds, rows, results, projector, 2) == []
    need = triage.projected_spend(funds, rows, projector)
    tight = money(need - 1, 0)
    end = tight.cost(projector.to_end(rows[0]).mean)
    assert end < need, "all three can still be brought to their end one at a time"
    stopped = triage.triage(tight, rows, results, projector, 2)
    assert [row.number for row, _ in stopped] == [1]
    assert "ranked last of 3 at 2,500 tokens" in stopped[0][1] and " of $" in stopped[0][1]
    poor = money(end - 1, 0)
    assert len(triage.triage(poor, rows, results, projector, 2)) == 3
    assert "its end is forecast at" in triage.triage(poor, rows, results, projector, 2)[0][1]


def test_promise_orders_across_rungs() -> None:
    """Proves the estimate behind triage: one that survived a cut beats a newcomer, a newcomer beats a rung's last."""
    results = Results([(0, 0, 2.0), (1, 0, 3.0), (0, 1, 2.0)])
    veteran, loser = trial(0, rung=1, loss=2.0), trial(1, rung=0, loss=3.0)
    values = [rungs.promise(t, results, 2) for t in (veteran, trial(5), loser)]
    assert values == sorted(values) and len(set(values)) == 3
