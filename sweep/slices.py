"""Machine time paid ahead: how long a slice is, what its hold must cover, and how it is settled.

    meter  0 ─────── settled_ms ─── at_ms ─── now ─────── work_ms ───── paid_ms
           charged already │ used, to be charged │ may train │ tail: last evaluation, checkpoint, teardown

The open hold covers settled_ms to paid_ms, so spent + held is what the machine costs if it runs to paid_ms, where the
watchdog ends it. Renewing charges up to at_ms, the worker's last report, and holds from there to the new paid_ms. Where
the provider bills whole minutes or hours, paid_ms is the end of one; a worker that ends before is charged up to there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select

from budgets.ledger import IDLE, BudgetExhausted, BudgetFrozen, Ledger
from budgets.meter import account_of, charges
from budgets.money import affordable_ms, split_micros, usd
from budgets.schema import transfer
from budgets.tariff import Tariff
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


def open_slice(
    connection: Connection, study: Study, worker: str, tariff: Tariff, lengths: Lengths
) -> tuple[int, int, bool]:
    """Holds a new worker's first slice; returns its work_ms, its paid_ms and whether it is the last that fits.

    It covers start-up, a slice and the tail; what is left of the cap bounds it. Raises BudgetError if less than the
    start-up, a moment of training and the tail can be paid.
    """
    ledger = Ledger(connection, study.name)
    balances = ledger.balances()
    if balances.frozen:
        raise InvariantError(f"study {study.name} is frozen after an overrun of {usd(balances.overrun)}")
    left = balances.left - balances.reserve
    wanted = tariff.billed_ms(lengths.load + lengths.slice + lengths.tail)
    paid = min(wanted, tariff.affordable_ms(0, left))
    least = lengths.expected_load + MIN_SLICE_MS + lengths.tail
    amount = max(tariff.hold(0, paid), 1)  # time that is all billed already needs a hold too, and one is never empty
    if paid < least or amount > left:
        needed = max(tariff.hold(0, least), 1)
        raise BudgetError(
            f"a worker's start, {MIN_SLICE_MS // 1000} s of training and its end cost {usd(needed)}; {usd(left)} left",
            f"raise the cap: sweep resume {study.name} --cap ...",
        )
    ledger.hold(hold_id(worker, 1), amount, fence=study.fence, purpose=f"{worker} slice 1")
    return paid - lengths.tail, paid, paid < wanted


def settle(connection: Connection, study: Study, worker: WorkerRow, to_ms: int, rest: str, note: str = "") -> None:
    """Charges the open slice up to `to_ms` by cost centre; unexplained time goes to the centre `rest`."""
    split = charges(worker.tariff, worker.settled_ms, to_ms, worker.settled_usage, worker.usage, rest)
    Ledger(connection, study.name).settle(
        worker.hold,
        split,
        fence=study.fence,
        usage_ms=to_ms - worker.settled_ms,
        micros_per_hour=worker.tariff.now,
        note=note,
    )
    records.set_worker(connection, worker.id, settled_ms=to_ms, settled_usage=worker.usage)


def _explained(worker: WorkerRow, usage: Mapping[str, int], until_ms: int, rest: Sequence[str]) -> dict[str, int]:
    """A worker's usage, with the time up to `until_ms` that no report explains given to `rest`, in equal parts."""
    explained = dict(usage)
    missing = until_ms - worker.settled_ms - (sum(explained.values()) - sum(worker.settled_usage.values()))
    for place, centre in enumerate(rest):
        explained[centre] = explained.get(centre, 0) + (max(missing, 0) + place) // len(rest)
    return explained


def settle_end(
    connection: Connection, study: Study, worker: WorkerRow, ended_ms: int, rest: Sequence[str], note: str
) -> int:
    """Charges a worker that ended, to the end of the provider's quantum; returns that moment.

    What lies between the worker's last report and its end goes to the centres `rest`, the rounding is idle time.
    """
    billed_ms = worker.tariff.billed_ms(ended_ms)
    explained = _explained(worker, worker.usage, ended_ms, rest)
    explained = _explained(worker, explained, billed_ms, [IDLE])
    split = charges(worker.tariff, worker.settled_ms, billed_ms, worker.settled_usage, explained, IDLE)
    used = {"usage_ms": billed_ms - worker.settled_ms, "micros_per_hour": worker.tariff.now}
    Ledger(connection, study.name).settle(worker.hold, split, fence=study.fence, note=note, **used)
    records.set_worker(connection, worker.id, settled_ms=billed_ms, settled_usage=worker.usage)
    return billed_ms


def expire(connection: Connection, study: Study, worker: WorkerRow, rest: Sequence[str], note: str) -> None:
    """Charges the whole slice of a worker of which nothing is known, at the highest price it can have had."""
    tariff = worker.tariff
    if tariff.ceiling > tariff.now:
        tariff = tariff.changed(worker.settled_ms, tariff.ceiling, tariff.ceiling)
    explained = _explained(worker, worker.usage, worker.paid_ms, rest)
    weights = charges(tariff, worker.settled_ms, worker.paid_ms, worker.settled_usage, explained, IDLE)
    ledger = Ledger(connection, study.name)
    if sum(weights.values()) == ledger.open_holds()[worker.hold]:
        ledger.expire(worker.hold, weights or {account_of(rest[0]): 1}, fence=study.fence, note=note)
    else:  # a price that changed left the hold larger or smaller than what the time costs
        ledger.settle(worker.hold, weights, fence=study.fence, note=note)
    records.set_worker(connection, worker.id, settled_ms=worker.paid_ms, tariff=tariff)


def refund_expired(connection: Connection, study: Study, worker: WorkerRow, ended_ms: int) -> int:
    """Returns the charge for what an expired slice did not use, now that a record says when it ended; micro-dollars."""
    used_ms = max(worker.tariff.billed_ms(ended_ms), worker.at_ms)
    excess: int = worker.tariff.cost(worker.settled_ms) - worker.tariff.cost(min(used_ms, worker.settled_ms))
    mine = (transfer.c.hold_id == worker.hold) & (transfer.c.kind == "expire")
    paid: dict[str, int] = {row.id: row.amount_micros for row in connection.execute(select(transfer).where(mine))}
    excess = min(excess, sum(paid.values()))
    ledger = Ledger(connection, study.name)
    for identifier, part in sorted(split_micros(excess, paid).items()):
        ledger.refund(identifier, part, note=f"the worker's record says that it ended after {ended_ms / 1000:.1f} s")
    records.set_worker(connection, worker.id, settled_ms=min(used_ms, worker.settled_ms))
    return excess


def renew(connection: Connection, study: Study, worker: WorkerRow, now_ms: int, lengths: Lengths) -> None:
    """Settles the open slice and opens the next, which takes over the tail. A refused one makes the last one final.

    What the cap still allows is held to the last micro-dollar, so the final slice may be a short one; paid_ms never
    moves back.
    """
    settle(connection, study, worker, worker.at_ms, rest=IDLE)
    ledger, tariff = Ledger(connection, study.name), worker.tariff
    balances = ledger.balances()
    wanted = tariff.billed_ms(now_ms + lengths.slice + lengths.tail)
    affordable = tariff.affordable_ms(worker.at_ms, balances.left - balances.reserve)
    paid = max(min(wanted, affordable), worker.paid_ms)
    name = hold_id(worker.id, worker.slice + 1)
    try:
        amount = max(tariff.hold(worker.at_ms, paid), 1)
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


def change_price(
    connection: Connection, study: Study, worker: WorkerRow, tariff: Tariff, now_ms: int, lengths: Lengths
) -> None:
    """Puts a living worker under a tariff whose price changed: the open hold is widened, or else the slice shortened.

    What can be held of the rest of the slice at the new price is held; the watchdog ends the worker where it stops.
    """
    ledger = Ledger(connection, study.name)
    balances = ledger.balances()
    held = ledger.open_holds()[worker.hold]
    needed = tariff.hold(worker.settled_ms, worker.paid_ms)
    values: dict[str, object] = {"tariff": tariff, "micros_per_hour": tariff.now}
    if needed > held:
        available = held if balances.frozen else held + max(balances.left - balances.reserve, 0)
        if needed > available:
            paid = max(tariff.affordable_ms(worker.settled_ms, available), min(now_ms, worker.paid_ms))
            work = min(max(paid - lengths.tail, now_ms), worker.work_ms)
            values |= {"paid_ms": paid, "work_ms": work, "final": 1}
        ledger.extend(worker.hold, min(needed, available), fence=study.fence)
    records.set_worker(connection, worker.id, **values)
