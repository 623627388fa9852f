"""Checks that take the class of the ledger: the real one must pass them, and every mutant must fail one."""

from __future__ import annotations

import threading
import time

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from ledger_model import Books
from sqlalchemy import text

from budgets import audit
from budgets.ledger import BudgetExhausted, Ledger
from sweep.store import Store


def follows_the_model(store: Store, ledger_class: type[Ledger], examples: int, *, explain: bool = True) -> None:
    """Runs sequences of calls, the same ones every time; `explain` looks for the shortest one that fails."""
    machine = type("Books", (Books,), {"store": store, "ledger_class": ledger_class})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=30,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=list(Phase) if explain else [Phase.generate],
        report_multiple_bugs=explain,
    )
    run_state_machine_as_test(machine, settings=chosen)


def waits_its_turn(store: Store, ledger_class: type[Ledger]) -> None:
    """A hold that waited behind another's is judged by what that one left: 60 and 60 of 100 cannot both be held."""
    with store.write() as connection:
        Ledger(connection, "turn").open(100)
    errors: list[Exception] = []

    def second() -> None:
        try:
            with store.write() as connection:
                ledger_class(connection, "turn").hold("second", 60, fence=1, purpose="slice")
        except Exception as error:
            errors.append(error)

    late = threading.Thread(target=second)
    with store.write() as connection:
        ledger_class(connection, "turn").hold("first", 60, fence=1, purpose="slice")
        late.start()
        _wait_until_blocked(store)
    late.join()
    with store.read() as connection:
        violations = audit.violations(connection, "turn")
    assert not violations, f"the audit found {violations}"
    assert [type(error) for error in errors] == [BudgetExhausted], f"the second hold came to {errors}"


def _wait_until_blocked(store: Store) -> None:
    if store.is_sqlite:
        time.sleep(0.2)  # it tells nobody who waits; a late start would prove the same, only less
        return
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with store.read() as connection:
            if connection.execute(waiting).scalar_one():
                return
        time.sleep(0.01)
    raise AssertionError("the second hold never came to wait")
