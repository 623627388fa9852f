"""Lives of a ledger, each a list of transactions that may be cut off anywhere and repeated from the start.

They stay clear of what a caller cannot repeat blindly either: a request that was refused, or that changed nothing, left
no trace, so it must be the same at the end of its scenario as where it stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from sqlalchemy import Connection, select

from budgets.ledger import RESERVE, Ledger, LedgerError
from budgets.schema import account, hold, transfer
from sweep.store import Store

CAP = 1_000_000

Transaction = Callable[[], AbstractContextManager[Ledger]]


def opened(transaction: Transaction, study: str) -> None:
    """A study's accounts and its cap; every other scenario begins after this."""
    with transaction() as ledger:
        ledger.open(CAP)
    with transaction() as ledger:
        ledger.hold(f"{study}:1", CAP, fence=1, purpose="slice 1")


def renewed(transaction: Transaction, study: str) -> None:
    """A slice is widened, then settled over three centres as the next is opened, which was never used."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 300_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.extend(f"{study}:1", 400_000, fence=1)
    with transaction() as ledger:
        charges = {"trial:0": 100_001, "overhead:load": 50_000, "idle": 7}
        ledger.settle(f"{study}:1", charges, fence=1, usage_ms=5, micros_per_hour=9)
        ledger.hold(f"{study}:2", 200_000, fence=1, purpose="slice 2")
    with transaction() as ledger:
        ledger.void(f"{study}:2", fence=1)


def covered(transaction: Transaction, study: str) -> None:
    """More was used than was held, and than the budget has: the reserve stands in. What is left of it is released."""
    with transaction() as ledger:
        ledger.set_aside(600_000, "launch")
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 300_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 450_000, "trial:1": 50_000}, fence=1)
    with transaction() as ledger:
        ledger.hold(f"{study}:2", 200_000, fence=1, purpose="of the reserve", account_code=RESERVE)
    with transaction() as ledger:
        ledger.release("endgame", note="the search is over")


def overrun(transaction: Transaction, study: str) -> None:
    """More was used than there is: the rest is posted, the study frozen, and a higher cap does not thaw it."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 300_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 700_000, "trial:1": 350_000}, fence=1)
    with transaction() as ledger:
        ledger.set_cap(CAP + 200_000, "more")
    with transaction() as ledger:
        ledger.hold(f"{study}:2", 1, fence=1, purpose="refused")


def expired(transaction: Transaction, study: str) -> None:
    """A worker fell silent; its record was found later and part of the charge returned."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 300_001, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.expire(f"{study}:1", {"trial:0": 1, "trial:1": 1, "idle": 1}, fence=1, note="silent")
    with transaction() as ledger:
        ledger.refund(f"expire:{study}:1:trial:0", 40_000, note="its record")
        ledger.refund(f"expire:{study}:1:trial:1", 100_000, note="its record")


def cap_moved(transaction: Transaction, study: str) -> None:
    """The cap rises, falls to what is held and set aside, and may fall no further."""
    with transaction() as ledger:
        ledger.set_cap(2 * CAP, "up")
    with transaction() as ledger:
        ledger.set_aside(100_000, "launch")
        ledger.hold(f"{study}:1", 300_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.set_cap(400_000, "down")
    with transaction() as ledger:
        ledger.set_cap(399_999, "too low")


def taken_over(transaction: Transaction, study: str) -> None:
    """An orchestrator is replaced; what it still tries is refused."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 300_000, fence=1, purpose="slice 1")
        ledger.hold(f"{study}:2", 200_000, fence=1, purpose="slice 1 of another worker")
    with transaction() as ledger:
        ledger.take_over(2)
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 9}, fence=1)
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 5_000}, fence=2)


def charged(transaction: Transaction, study: str) -> None:
    """Time that no hold covered is charged: first in full, then what is left of budget and reserve and an overrun."""
    with transaction() as ledger:
        ledger.set_aside(100_000, "launch")
    with transaction() as ledger:
        ledger.charge(f"{study}:gap:1", "idle", 250_000, note="between two runs")
    with transaction() as ledger:
        ledger.charge(f"{study}:gap:2", "idle", 800_000, note="between two runs")


def billed_less(transaction: Transaction, study: str) -> None:
    """The bill is lower than the books: off the overrun first, then off every centre in proportion."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 900_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 700_000, "idle": 400_000}, fence=1)
    with transaction() as ledger:
        ledger.reconcile(777_777, note="invoice")


def billed_by_mistake(transaction: Transaction, study: str) -> None:
    """A bill that was mistyped, far beyond the cap, and then the right one."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 900_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 600_000, "idle": 100_000}, fence=1)
    for bill in (70_000_000, 700_003):
        with transaction() as ledger:
            ledger.reconcile(bill, note="invoice")


def billed_more(transaction: Transaction, study: str) -> None:
    """The bill is higher than the books, and than the cap."""
    with transaction() as ledger:
        ledger.hold(f"{study}:1", 900_000, fence=1, purpose="slice 1")
    with transaction() as ledger:
        ledger.settle(f"{study}:1", {"trial:0": 600_000}, fence=1)
    with transaction() as ledger:
        ledger.reconcile(1_100_000, note="invoice")


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        opened,
        renewed,
        covered,
        overrun,
        expired,
        cap_moved,
        taken_over,
        charged,
        billed_less,
        billed_by_mistake,
        billed_more,
    )
}

# Where each one must end: cap, spent, held, reserve, overrun.
ENDS = {
    "opened": (CAP, 0, CAP, 0, 0),
    "renewed": (CAP, 150_008, 0, 0, 0),
    "covered": (CAP, 500_000, 200_000, 0, 0),
    "overrun": (CAP + 200_000, CAP, 0, 0, 50_000),
    "expired": (CAP, 160_001, 0, 0, 0),
    "cap_moved": (400_000, 0, 300_000, 100_000, 0),
    "taken_over": (CAP, 5_000, 200_000, 0, 0),
    "charged": (CAP, CAP, 0, 0, 50_000),
    "billed_less": (CAP, 777_777, 0, 0, 0),
    "billed_by_mistake": (CAP, 700_003, 0, 0, 0),
    "billed_more": (CAP, CAP, 0, 0, 100_000),
}


def prepare(store: Store, name: str, *studies: str) -> None:
    """Opens the studies, unless that is what the scenario does."""
    if name != "opened":
        with store.write() as connection:
            for study in studies:
                Ledger(connection, study).open(CAP)


def run(store: Store, name: str, study: str) -> None:
    """Carries out a scenario from its first intent on; what the ledger refuses is passed over."""

    @contextlib.contextmanager
    def transaction() -> Iterator[Ledger]:
        with contextlib.suppress(LedgerError), store.write() as connection:
            yield Ledger(connection, study)

    SCENARIOS[name](transaction, study)


def state(connection: Connection, study: str) -> str:
    """All rows of a study but the wall clock's, without its name, so that two runs of a scenario can be compared."""
    # A hold's request hash covers the study's name, so it differs from study to study.
    tables = ((account, "code", set()), (hold, "id", {"request_hash"}), (transfer, "seq", {"recorded_unix_ms"}))
    lines = []
    for table, order, left_out in tables:
        columns = [column for column in table.columns if column.name not in left_out]
        rows = connection.execute(select(*columns).where(table.c.study == study).order_by(table.c[order]))
        lines += [f"{table.name} {dict(row)}" for row in rows.mappings()]
    return "\n".join(lines).replace(study, "STUDY")


def end(connection: Connection, study: str) -> tuple[int, int, int, int, int]:
    """What `ENDS` states."""
    balances = Ledger(connection, study).balances()
    return balances.cap, balances.spent, balances.held, balances.reserve, balances.overrun
