"""Machine time paid ahead: how long a slice is, what its hold must cover, and how it is settled.

    meter  0 ─────── settled_ms ─── at_ms ─── now ─────── work_ms ───── paid_ms
           charged already │ used, to be charged │ may train │ tail: last evaluation, checkpoint, teardown

The open hold covers settled_ms to paid_ms, so spent + held is what the machine costs if it runs to paid_ms, where the
watchdog ends it. Renewing charges up to at_ms, the worker's last report, and holds from there to the new paid_ms.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from budgets.ledger import BudgetExhausted, BudgetFrozen, Ledger
from budgets.meter import charges
from budgets.money import affordable_ms, cost_micros, usd
from sweep import records
from sweep.errors import BudgetError, InvariantError
from sweep.records import Study, WorkerRow

MIN_SLICE_MS = 10_000
MAX_SLICE_MS = 600_000
GRACE_MS = 2_000  # between SIGTERM and SIGKILL
EXIT_MS = 1_500  # interpreter teardown
WASTE_SHARE = 100  # a crash wastes at most about one slice: a hundredth of the cap


@dataclass(frozen=True)
class Lengths:
    """The three lengths of paid time, in ms."""

    load: int  # start-up, generously
    expected_load: int  # start-up, as forecast
    slice: int
    tail: int


def slice_ms(cap_micros: int, micros_per_hour: int, checkpoint_seconds: float, step_seconds: float) -> int:
    """A slice's length: a hundredth of the cap.

    But long enough for ten checkpoints and eight steps (or evaluations), so that a slow one does not outlast it.
    """
    affordable = affordable_ms(micros_per_hour, cap_micros // WASTE_SHARE)
    least = max(MIN_SLICE_MS, round(10_000 * checkpoint_seconds), round(8_000 * step_seconds))
    return min(max(affordable, least), MAX_SLICE_MS)


def tail_ms(seconds: float) -> int:
    """The tail's length, given what the last evaluation and the checkpoints take."""
    return round(1000 * seconds) + GRACE_MS + EXIT_MS


def hold_id(worker: str, number: int) -> str:
    """The id of a slice's hold."""
    return f"{worker}:s{number:05d}"


def open_slice(connection: Connection, study: Study, worker: str, lengths: Lengths) -> tuple[int, int, bool]:
    """Holds a new worker's first slice; returns its work_ms, its paid_ms and whether it is the last that fits.

    It covers start-up, a slice and the tail; what is left of the cap bounds it. Raises BudgetError if less than the
    start-up, a moment of training and the tail can be paid.
    """
    ledger = Ledger(connection, study.name)
    balances = ledger.balances()
    if balances.frozen:
        raise InvariantError(f"study {study.name} is frozen after an overrun of {usd(balances.overrun)}")
    left = balances.left - balances.reserve
    wanted = lengths.load + lengths.slice + lengths.tail
    paid = min(wanted, affordable_ms(study.micros_per_hour, left))
    least = lengths.expected_load + MIN_SLICE_MS + lengths.tail
    if paid < least:
        needed = cost_micros(study.micros_per_hour, least)
        raise BudgetError(
            f"a worker's start, {MIN_SLICE_MS // 1000} s of training and its end cost {usd(needed)}; {usd(left)} left",
            f"raise the cap: sweep resume {study.name} --cap ...",
        )
    ledger.hold(
        hold_id(worker, 1), cost_micros(study.micros_per_hour, paid), fence=study.fence, purpose=f"{worker} slice 1"
    )
    return paid - lengths.tail, paid, paid < wanted


def settle(connection: Connection, study: Study, worker: WorkerRow, to_ms: int, rest: str, note: str = "") -> None:
    """Charges the open slice up to `to_ms` by cost centre; unexplained time goes to the centre `rest`."""
    split = charges(worker.micros_per_hour, worker.settled_ms, to_ms, worker.settled_usage, worker.usage, rest)
    Ledger(connection, study.name).settle(
        worker.hold,
        split,
        fence=study.fence,
        usage_ms=to_ms - worker.settled_ms,
        micros_per_hour=worker.micros_per_hour,
        note=note,
    )
    records.set_worker(connection, worker.id, settled_ms=to_ms, settled_usage=worker.usage)


def renew(connection: Connection, study: Study, worker: WorkerRow, now_ms: int, lengths: Lengths) -> None:
    """Settles the open slice and opens the next, which takes over the tail. A refused one makes the last one final.

    What the cap still allows is held to the last micro-dollar, so the final slice may be a short one; paid_ms never
    moves back.
    """
    settle(connection, study, worker, worker.at_ms, rest="idle")
    ledger = Ledger(connection, study.name)
    balances = ledger.balances()
    base = cost_micros(worker.micros_per_hour, worker.at_ms)
    wanted = now_ms + lengths.slice + lengths.tail
    affordable = affordable_ms(worker.micros_per_hour, base + balances.left - balances.reserve)
    paid = max(min(wanted, affordable), worker.paid_ms)
    amount = cost_micros(worker.micros_per_hour, paid) - base
    name = hold_id(worker.id, worker.slice + 1)
    try:
        ledger.hold(name, amount, fence=study.fence, purpose=f"{worker.id} slice {worker.slice + 1}")
    except BudgetFrozen as error:
        raise InvariantError(f"study {study.name} is frozen after an overrun") from error
    except BudgetExhausted as error:  # the settlement gave back at least this much, in the same transaction
        raise InvariantError(f"the slice that {worker.hold} paid for can no longer be held") from error
    records.set_worker(
        connection,
        worker.id,
        hold=name,
        slice=worker.slice + 1,
        paid_ms=paid,
        work_ms=max(paid - lengths.tail, worker.work_ms),
        final=int(paid < wanted),
    )
