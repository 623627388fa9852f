"""What the racing processes do; a pool's process imports this and nothing of pytest."""

from __future__ import annotations

from functools import partial

from ledger_processes import Work, opened, race
from sqlalchemy import select

from budgets import audit
from budgets.ledger import IDLE, Ledger
from budgets.schema import hold
from sweep.store import Store

CAP = 1_000_000


def _hold(store: Store, *, study: str, name: str, amount: int) -> str:
    with store.write() as connection:
        Ledger(connection, study).hold(name, amount, fence=1, purpose="slice")
    return "held"


def _settle(store: Store, *, study: str, amount: int) -> str:
    with store.write() as connection:
        Ledger(connection, study).settle(f"{study}:h", {IDLE: amount}, fence=1)
    return f"settled {amount}"


def _void(store: Store, *, study: str) -> str:
    with store.write() as connection:
        Ledger(connection, study).void(f"{study}:h", fence=1)
    return "voided"


def _extend(store: Store, *, study: str) -> str:
    with store.write() as connection:
        Ledger(connection, study).extend(f"{study}:h", 900_000, fence=1)
    return "widened"


def _lower_cap(store: Store, *, study: str) -> str:
    with store.write() as connection:
        Ledger(connection, study).set_cap(500_000, "lower")
    return "lowered"


def _take_over(store: Store, *, study: str) -> str:
    with store.write() as connection:
        Ledger(connection, study).take_over(2)
    return "taken over"


def _rivals(kind: str, study: str) -> tuple[Work, Work]:
    settle, void = partial(_settle, study=study, amount=100), partial(_void, study=study)
    take_over, new_hold = partial(_take_over, study=study), partial(_hold, study=study, name=f"{study}:h")
    return {
        "settle_twice": (settle, partial(_settle, study=study, amount=200)),
        "settle_alike": (settle, settle),
        "settle_and_void": (settle, void),
        "settle_and_take_over": (settle, take_over),
        "extend_alike": (partial(_extend, study=study), partial(_extend, study=study)),
        "hold_and_lower_cap": (partial(new_hold, amount=600_000), partial(_lower_cap, study=study)),
        "hold_and_take_over": (partial(new_hold, amount=600_000), take_over),
    }[kind]


def rounds(url: str, kind: str, count: int) -> list[tuple[list[str], int, dict[str, int]]]:
    """Races two processes again and again, each time over a new study; returns outcomes, what was spent and the rest.

    The one that is named first starts second every other time.
    """
    store = Store(url, create=True)
    found = []
    for number in range(count):
        study = f"{kind}-{number}"
        with store.write() as connection:
            Ledger(connection, study).open(CAP)
        if not kind.startswith("hold"):
            _hold(store, study=study, name=f"{study}:h", amount=600_000)
        turn = 1 if number % 2 else -1
        outcomes = race(store, _rivals(kind, study)[::turn])[::turn]
        with store.read() as connection:
            assert audit.violations(connection, study) == [], f"{kind}: {outcomes}"
            balances = Ledger(connection, study).balances()
            fence = connection.execute(select(hold.c.fence).where(hold.c.study == study)).scalar_one_or_none()
        found.append((outcomes, balances.spent, {"held": balances.held, "cap": balances.cap, "fence": fence or 0}))
    store.dispose()
    return found


def last_dollar(url: str, study: str, processes: int, price: int) -> tuple[list[str], int]:
    """Lets many processes hold `price` of one dollar that is left of five; returns outcomes and what is left then."""
    store = opened(url, study, 5 * CAP)
    with store.write() as connection:
        ledger = Ledger(connection, study)
        ledger.hold(f"{study}:spent", 3 * CAP, fence=1, purpose="slice")
        ledger.settle(f"{study}:spent", {"trial:0": 3 * CAP}, fence=1)
        ledger.hold(f"{study}:held", CAP, fence=1, purpose="slice")
    works = [partial(_hold, study=study, name=f"{study}:{number}", amount=price) for number in range(processes)]
    outcomes = race(store, works)
    with store.read() as connection:
        assert audit.violations(connection, study) == []
        left = Ledger(connection, study).balances().left
    store.dispose()
    return outcomes, left
