"""Where a study stands: who drives it, how it ended, what brings it on. People read it, no decision does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sqlalchemy import Connection

from budgets.ledger import Ledger
from budgets.money import cost_micros, usd
from sweep import feasibility, records, seats, slices, space
from sweep.launchers.base import WATCHDOG_LOCK, locked
from sweep.projection import Projector
from sweep.records import Study, TrialRow, WorkerRow
from sweep.store import ORCHESTRATOR_LOCK

Kind = Literal["running", "unattended", "broken off", "stopped", "out of money", "no winner", "over", "closed"]

REASON_CHARACTERS = 160  # of a trial's reason, which may be a user's own error
SPARE = 1.3  # times what an end is forecast to take: a cap that is just enough is often not


def kind(study: Study, trials: Sequence[TrialRow], worker: WorkerRow | None) -> Kind:
    """Where a study stands, as far as this machine can tell; `worker` is the living one.

    Whether an orchestrator lives is asked of its lock. What runs on another machine is taken to run.
    """
    if study.state == "closed":
        return "closed"
    driven = _held(Path(study.folder) / ORCHESTRATOR_LOCK)
    if driven:
        return "running"
    if worker is not None:
        if driven is None:
            return "running"
        return "unattended" if _held(Path(worker.folder) / WATCHDOG_LOCK) else "broken off"
    states = {trial.state for trial in trials}
    if not states or states & set(records.RUNNING):
        return "stopped"
    if "completed" in states:
        return "over"
    return "no winner" if beyond_money(study, trials) else "out of money"


def words(found: Kind, connection: Connection, study: Study, trials: Sequence[TrialRow], projector: Projector) -> str:
    """What to know of a study of that kind, or to type; nothing while it runs."""
    resume = f"sweep resume {study.name}"
    match found:
        case "unattended":
            return f"nobody drives it; its worker goes on until its paid time; next: {resume}"
        case "broken off":
            return f"nobody drives it, and its worker is gone; next: {resume}"
        case "stopped":
            return f"checkpointed and settled; next: {resume}"
        case "out of money" | "no winner":
            advice = beyond_money(study, trials) or more_money(connection, study, trials, projector)
            return f"no trial came to its end; {advice}"
        case "over":
            return f"next: sweep best {study.name}"
        case _:
            return ""


def _held(path: Path) -> bool | None:
    """Whether a process holds the lock; None where that can't be seen: on another machine, or another user's."""
    try:
        return locked(path) if path.parent.is_dir() else None
    except OSError:
        return None


def beyond_money(study: Study, trials: Sequence[TrialRow]) -> str | None:
    """Why no cap would bring a trial to its end, and which key of the spec to change; None where money would.

    A stored study keeps its spec, so the way on is another study.
    """
    searched = records.searched(trials)
    if not searched or any(trial.state not in records.ENDED for trial in searched):
        return None
    begun = [trial for trial in searched if trial.tokens or feasibility.lost(trial)]
    last = max(begun or searched, key=lambda trial: trial.number)
    why = f"the last one {last.reason.splitlines()[0][:REASON_CHARACTERS]}" if last.reason else "see sweep status"
    if begun and all(map(feasibility.lost, begun)):
        memory = last.reason.startswith(feasibility.REASON)
        key = "search.learning_rate" if last.diverged else "search.batch_size" if memory else "what failed"
        return f"all {len(begun)} that began diverged or failed ({why}): change {key} and launch another study"
    if study.spec.search.trials is not None and len(searched) >= study.spec.search.trials:
        used = f"all {len(searched)} of search.trials ended before that ({why})"
        return f"{used}: raise search.trials and launch another study"
    return None


def more_money(connection: Connection, study: Study, trials: Sequence[TrialRow], projector: Projector) -> str:
    """Which cap would bring a trial to its end, and the command; of the parked ones the soonest, else a new one."""
    projector = projector.among(1.0)
    search, examples = study.spec.search, projector.plan.examples
    parked = [t for t in records.searched(trials) if t.state == "paused"]
    new = [records.newcomer(space.typical(m, search, examples, study.spec.seed, len(trials))) for m in search.method]
    slots = seats.slots(study, records.workers(connection, study.name))
    training = min(projector.to_end(trial).mean for trial in parked or new)
    tail = slices.tail_ms(projector.tail(search.method, slots).high) / 1000
    seconds = projector.load().mean + max(training, slices.MIN_SLICE_MS / 1000) + tail
    balances = Ledger(connection, study.name).balances()
    # No machine can be had for a part of the provider's quantum, nor for less than its least charge.
    billed_ms = study.tariff.billed_ms(round(SPARE * 1000 * seconds))
    needed = balances.spent + round_up(cost_micros(study.micros_per_hour, billed_ms)) + balances.reserve
    cap = round_up(max(needed, balances.cap + 1))
    return f"sweep resume {study.name} --cap '{usd(cap)}' should bring one there"


def roomy(micros: int) -> int:
    """A round amount that pays for what is forecast at `micros`, and for its being late."""
    return round_up(round(SPARE * micros))


def round_up(micros: int) -> int:
    """To whole cents, and under ten of them to hundredths of one."""
    unit = 10_000 if micros > 100_000 else 100
    return -(-micros // unit) * unit
