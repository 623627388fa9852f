"""Projected spend, and who is pruned when it passes the cap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from budgets.ledger import Balances
from budgets.money import cost_micros, usd
from budgets.tariff import Tariff
from sweep import records
from sweep.projection import Projector
from sweep.records import TrialRow, WorkerRow
from sweep.rungs import Results, hopeful, leader, worth_finishing

NOT_STARTED = "not started"
SPARE = 1.1  # times what a leader's end is forecast at: of one whose end takes all there is, nobody may come to it


@dataclass(frozen=True)
class Funds:
    """The study's money at one moment of its machine's clock, in micro-dollars."""

    balances: Balances
    micros_per_hour: int
    spent_now: int  # what the machine has cost up to now, settled or not
    prepaid_ms: int  # training time that open holds already pay for
    overhead: int  # what is forecast beyond trials and not held: a load, if a worker has yet to start
    leader: int | None = None  # the trial that is to come to its end whatever else is done
    finish_seconds: float = 0.0  # from its next decision to its end
    ready: bool = False  # a worker is loaded
    odd: int = 0  # what is left over after the provider's last whole quantum: no machine can be had for it

    @property
    def limit(self) -> int:
        """What all may come to: the cap, or as much of it as buys whole quanta."""
        return self.balances.cap - self.odd

    @property
    def left_now(self) -> int:
        """What may still be used for search: the cap less what the machine has cost and less the reserve."""
        return self.limit - self.balances.reserve - self.spent_now

    def cost(self, seconds: float) -> int:
        """The price of machine time."""
        return cost_micros(self.micros_per_hour, round(seconds * 1000))


def funds(
    balances: Balances,
    micros_per_hour: int,
    worker: WorkerRow | None,
    now_ms: int,
    load_seconds: float,
    following: Tariff | None = None,
) -> Funds:
    """Reads the money as of `now_ms` on the worker's meter; without a worker a load is still to be paid.

    `following` is the tariff of the worker that would be launched without one.
    """
    if worker is None:
        overhead = cost_micros(micros_per_hour, round(load_seconds * 1000))
        odd = _odd(following, 0, balances.left - balances.reserve) if following is not None else 0
        return Funds(balances, micros_per_hour, balances.spent, 0, overhead, odd=odd)
    used = worker.tariff.cost(max(now_ms, 0)) - worker.tariff.cost(worker.settled_ms)
    # A worker that is loading does so in the time that its first hold pays for; what is left of that is for trials.
    loading_ms = 0 if worker.state == "ready" else max(round(load_seconds * 1000) - now_ms, 0)
    prepaid_ms = max(worker.work_ms - now_ms, 0)
    overhead = cost_micros(micros_per_hour, max(loading_ms - prepaid_ms, 0))
    spent, prepaid_ms = balances.spent + max(used, 0), max(prepaid_ms - loading_ms, 0)
    odd = _odd(worker.tariff, worker.settled_ms, balances.held + balances.left - balances.reserve)
    ready = worker.state == "ready"
    return Funds(balances, micros_per_hour, spent, prepaid_ms, overhead, ready=ready, odd=odd)


def _odd(tariff: Tariff, from_ms: int, available: int) -> int:
    """What of the money that can be held from a moment of a worker's meter on buys no quantum, in micro-dollars."""
    if tariff.quantum_ms == 1 and not tariff.minimum_ms:
        return 0
    # At the price that is charged: what a spot machine's holds take beyond it comes back.
    tariff = replace(tariff, ceiling=tariff.now) if tariff.now else tariff
    last_ms = tariff.affordable_ms(from_ms, available)
    return max(available - (tariff.hold(from_ms, last_ms) if last_ms else 0), 0)


def with_finish(money: Funds, trials: Sequence[TrialRow], results: Results, projector: Projector) -> Funds:
    """Keeps back what bringing the leader to its end takes beyond its next decision, as long as it may still win.

    The leader of those that the money left brings to their end with something to spare: for another, nothing is kept
    back from the others.
    """
    best = leader(trials, results, lambda trial: _end_alone(trial, money, projector, SPARE) <= money.left_now)
    if best is None or not worth_finishing(best, trials, results):
        return money
    end = projector.seconds_to_end(best)
    beyond = end - projector.seconds_to_target(best) if best.state in {"live", "waiting"} else end
    return replace(money, leader=best.number, finish_seconds=beyond)


def projected_spend(money: Funds, trials: Sequence[TrialRow], projector: Projector) -> int:
    """Spent + held + what it takes, beyond what holds already pay for, to bring every live and waiting trial to its
    next decision + the leading trial's way from there to its end + overhead + the unspent reserve.

    Paused trials cost nothing until promoted. The leader's way is counted so that a study ends with a trained winner
    and not with many beginnings.
    """
    seconds = sum(projector.seconds_to_target(t) for t in trials if t.state in {"live", "waiting"})
    beyond = max(seconds + money.finish_seconds - money.prepaid_ms / 1000, 0.0)
    balances = money.balances
    return balances.spent + balances.held + money.cost(beyond) + money.overhead + balances.reserve


def _end_alone(trial: TrialRow, money: Funds, projector: Projector, spare: float = 1.0) -> int:
    """What must be left for a trial to come to its end: it is there soonest alone, however many share its steps."""
    return money.cost(spare * projector.among(1.0).seconds_to_end(trial))


def affordable(trial: TrialRow, trials: Sequence[TrialRow], money: Funds, projector: Projector) -> bool:
    """Whether a trial that joins can reach its end although all others reach their next decision before it.

    `money` is what there is when it has joined.
    """
    if _end_alone(trial, money, projector) > money.left_now:
        return False
    others = [t for t in trials if t.number != trial.number]
    ahead = sum(projector.seconds_to_target(t) for t in others if t.state in {"live", "waiting"})
    if trial.number != money.leader:
        ahead += money.finish_seconds
    if money.cost(ahead + projector.seconds_to_end(trial)) + money.overhead > money.left_now:
        return False
    # A newcomer for whom there is just so much room would be pruned before it began: reports lag behind what is used.
    room = projector.seconds_to_target(trial) if trial.rung < 0 else 0.0
    roomy = replace(money, finish_seconds=money.finish_seconds + room)
    return projected_spend(roomy, [*others, trial], projector) <= money.limit


def last_chance(
    trial: TrialRow, trials: Sequence[TrialRow], results: Results, money: Funds, projector: Projector, *, begun: bool
) -> bool:
    """Whether a trial may use up what is left, since nobody else can: otherwise a study ends without a winner.

    It is the leader, it would be the only one that runs and the first at its end, and no load is to be paid for it.
    What is held for a slice's end counts here: the last evaluation is made in that. One that has `begun` stays as long
    as it may come to its end by luck, so that it is not parked and woken again whenever a report is late.
    """
    rivals = (t for t in trials if t.number != trial.number)
    if not money.ready or trial.rung < 0 or any(t.state in {*records.RUNNING, "completed"} for t in rivals):
        return False
    best = leader(trials, results)
    if best is None or best.number != trial.number:
        return False
    end = projector.among(1.0).to_end(trial)
    return money.cost(end.low if begun else end.mean) <= money.left_now


def refused(trials: Sequence[TrialRow], newcomer: TrialRow) -> TrialRow:
    """What a new trial must at least be able to pay: the last of its method that was asked, if that could not be."""
    mine = (trial for trial in trials if trial.config.method == newcomer.config.method)
    last = max(mine, key=lambda trial: trial.number, default=None)
    if last is None or not last.reason.startswith(NOT_STARTED):
        return newcomer
    return records.newcomer(replace(last.config, number=newcomer.number))


def not_started(money: Funds, trial: TrialRow, projector: Projector) -> str:
    """Says why a trial that was asked is not begun."""
    end, left = usd(money.cost(projector.seconds_to_end(trial))), usd(max(money.left_now, 0))
    return f"{NOT_STARTED}: its end is forecast at {end}, with {left} left for it and those under way"


def triage(
    money: Funds, trials: Sequence[TrialRow], results: Results, projector: Projector
) -> list[tuple[TrialRow, str]]:
    """Returns whom to stop and why: first who cannot be brought to an end, then the least promising until it fits.

    A pack shares what a step costs whatever it trains, so who is stopped saves less than was charged to it, and leaves
    more to those that stay: what they need is forecast at the width that is left.
    """
    running = [t for t in trials if t.state in {"live", "waiting"}]
    stopped: list[tuple[TrialRow, str]] = []
    for trial in running:
        if (needed := _end_alone(trial, money, projector)) > money.left_now:
            stopped.append((trial, f"its end is forecast at {usd(needed)}, {usd(max(money.left_now, 0))} are left"))
    gone = {trial.number for trial, _ in stopped}
    running = [t for t in running if t.number not in gone]
    limit = money.limit
    while running:
        sharing = sum(t.config.method == "lora" for t in running)
        projected = projected_spend(money, running, projector.among(max(min(projector.width, sharing), 1.0)))
        if projected <= limit:
            break
        worst = max(running, key=lambda t: hopeful(t, results))
        place = f"ranked last of {len(running)} at {worst.tokens:,} tokens"
        stopped.append((worst, f"projected {usd(projected)} of {usd(limit)}; {place}"))
        running.remove(worst)
    if stopped and not running:
        for trial, _ in stopped:
            gone = {other.number for other, _ in stopped} - {trial.number}
            staying = [t for t in trials if t.number not in gone]
            if last_chance(trial, staying, results, money, projector, begun=True):
                return [(other, reason) for other, reason in stopped if other.number != trial.number]
    return stopped
