"""The ledger keeps its promises on SQLite and on PostgreSQL: the same suite on both."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from budgets import audit
from budgets.ledger import (
    BudgetExhausted,
    BudgetFrozen,
    CapTooLow,
    HoldClosed,
    IdempotencyConflict,
    Ledger,
)
from budgets.statement import statement
from sweep.store import Store

CAP = 1_000_000


@pytest.fixture
def store(storage: str) -> Iterator[Store]:
    """A database with one funded study."""
    opened = Store(storage, create=True)
    with opened.write() as connection:
        Ledger(connection, "s").open(CAP)
    yield opened
    with opened.read() as connection:
        assert audit.violations(connection, "s") == [], "every test leaves a ledger whose invariants hold"
    opened.dispose()


def test_a_hold_is_settled_by_cost_centre_and_the_rest_returns(store: Store) -> None:
    """Proves the ordinary life of a slice: held, charged to trial and overhead, the rest free again."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("h", 400_000, fence=1, purpose="slice")
        assert (ledger.balances().held, ledger.balances().left) == (400_000, 600_000)
        ledger.settle("h", {"trial:0": 100_001, "overhead:load": 50_000}, fence=1)
        balances = ledger.balances()
    assert (balances.spent, balances.held, balances.left) == (150_001, 0, 849_999)
    drawn = statement(balances)
    assert drawn.trials == {0: 100_001} and drawn.overhead["load"] == 50_000


def test_a_mistyped_bill_is_mended_by_the_right_one(store: Store) -> None:
    """Proves that what was trained costs what it did, whatever was billed by mistake in between."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("h", 400_000, fence=1, purpose="slice")
        ledger.settle("h", {"trial:0": 100_001, "idle": 50_000}, fence=1)
        assert ledger.reconcile(5 * CAP, note="a slip") == 5 * CAP - 150_001 and ledger.balances().frozen
        ledger.reconcile(150_004, note="the invoice")
        after = ledger.balances()
    assert (after.spent, after.overrun, after.frozen) == (150_004, 0, False)
    assert {code: after.accounts[code] for code in ("trial:0", "idle", "overhead:bill")} == {
        "trial:0": 100_001,
        "idle": 50_000,
        "overhead:bill": 3,
    }


def test_the_cap_cannot_be_passed(store: Store) -> None:
    """Proves that a hold beyond what is left is refused without a trace, and that the last cent can be held."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("a", CAP - 1, fence=1, purpose="slice")
        with pytest.raises(BudgetExhausted):
            ledger.hold("b", 2, fence=1, purpose="slice")
        ledger.hold("c", 1, fence=1, purpose="slice")
        assert set(ledger.open_holds()) == {"a", "c"}


def test_every_verb_may_be_repeated(store: Store) -> None:
    """Proves that a replay changes nothing, and that another request under the same id is refused."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        for _ in range(2):
            ledger.open(CAP)
            ledger.hold("h", 300, fence=1, purpose="slice")
        with pytest.raises(IdempotencyConflict):
            ledger.hold("h", 301, fence=1, purpose="slice")
        for _ in range(2):
            ledger.settle("h", {"trial:1": 200}, fence=1)
            ledger.set_cap(2 * CAP, "r1")
        with pytest.raises(HoldClosed):
            ledger.settle("h", {"trial:1": 201}, fence=1)
        with pytest.raises(HoldClosed):
            ledger.void("h", fence=1)
        assert ledger.balances().spent == 200 and ledger.balances().cap == 2 * CAP


def test_a_void_hold_returns_and_an_expired_one_is_charged_in_full(store: Store) -> None:
    """Proves the ends of a hold whose use nobody reported: provably none, unknown, then refunded."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("v", 500, fence=1, purpose="slice")
        ledger.void("v", fence=1)
        ledger.hold("e", 700, fence=1, purpose="slice")
        ledger.expire("e", {"trial:2": 1, "idle": 2}, fence=1)
        assert ledger.balances().spent == 700 and ledger.balances().accounts["idle"] == 467
        ledger.refund("expire:e:idle", 400, note="the provider's log")
        ledger.refund("expire:e:idle", 400, note="the provider's log")
        assert ledger.balances().spent == 300
        with pytest.raises(ValueError, match="cannot be refunded"):
            ledger.refund("expire:e:trial:2", 10_000, note="too much")


def test_a_taken_over_hold_obeys_its_new_owner_alone(store: Store) -> None:
    """Proves fencing: an orchestrator that was replaced can no longer settle."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("h", 100, fence=1, purpose="slice")
        ledger.take_over(2)
        with pytest.raises(HoldClosed, match="taken over"):
            ledger.settle("h", {"idle": 5}, fence=1)
        ledger.settle("h", {"idle": 5}, fence=2)


def test_use_above_a_hold_is_taken_from_what_is_left_and_then_shown_as_overrun(store: Store) -> None:
    """Proves that lost money is never hidden: it is posted, and the study takes no new holds."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("h", 100, fence=1, purpose="slice")
        for _ in range(2):
            ledger.settle("h", {"trial:0": CAP + 50}, fence=1)
        balances = ledger.balances()
        assert (balances.spent, balances.overrun, balances.left, balances.frozen) == (CAP, 50, 0, True)
        ledger.set_cap(2 * CAP, "more")
        with pytest.raises(BudgetFrozen):
            ledger.hold("i", 1, fence=1, purpose="slice")


def test_the_cap_may_fall_to_what_is_spent_and_held_but_no_further(store: Store) -> None:
    """Proves that lowering the cap never breaks a promise already made."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("h", 400_000, fence=1, purpose="slice")
        with pytest.raises(CapTooLow):
            ledger.set_cap(399_999, "a")
        ledger.set_cap(400_000, "b")
        assert ledger.balances().left == 0


@pytest.mark.parametrize("statement", ["UPDATE sweep_transfer SET amount_micros = 1", "DELETE FROM sweep_transfer"])
def test_transfers_are_append_only(store: Store, statement: str) -> None:
    """Proves that history cannot be rewritten, even by hand."""
    with pytest.raises(DBAPIError, match="append-only"), store.engine.begin() as connection:
        connection.execute(text(statement))


def test_insert_or_replace_cannot_slip_past_the_guard(tmp_path) -> None:
    """Proves the SQLite trap of the notes closed: REPLACE deletes silently unless recursive_triggers is on."""
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    with store.write() as connection:
        Ledger(connection, "s").open(CAP)
    columns = "id, study, seq, kind, debit, credit, amount_micros, note, recorded_unix_ms"
    replace = f"INSERT OR REPLACE INTO sweep_transfer ({columns}) SELECT id, study, seq, kind, debit, credit, 1, '', 0"
    with pytest.raises(DBAPIError, match="append-only"), store.engine.begin() as connection:
        connection.execute(text(f"{replace} FROM sweep_transfer"))
    store.dispose()


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("UPDATE sweep_account SET held_micros = 7 WHERE code = 'budget'", "held"),
        ("UPDATE sweep_account SET balance_micros = balance_micros - 7 WHERE code = 'budget'", "its transfers"),
        ("UPDATE sweep_account SET seq = 9 WHERE code = 'budget'", "without a gap"),
    ],
)
def test_the_audit_finds_what_was_tampered_with(storage: str, damage: str, found: str) -> None:
    """Proves that the audit can fail: each kind of damage is named."""
    store = Store(storage, create=True)
    with store.write() as connection:
        Ledger(connection, "s").open(CAP)
        assert audit.violations(connection, "s") == []
        connection.execute(text(damage))
        assert any(found in sentence for sentence in audit.violations(connection, "s"))
    store.dispose()


def test_a_database_that_was_overspent_by_hand_is_refused_by_its_own_constraint(store: Store) -> None:
    """Proves the second wall: without the conditional UPDATE the CHECK still holds the cap."""
    with pytest.raises(DBAPIError, match="never_overdrawn"), store.engine.begin() as connection:
        connection.execute(text(f"UPDATE sweep_account SET held_micros = {CAP + 1} WHERE code = 'budget'"))


def _take(url: str, name: str, amount: int, wins: multiprocessing.Queue) -> None:
    store = Store(url)
    won = 0
    for turn in range(4):
        try:
            with store.write() as connection:
                Ledger(connection, "s").hold(f"{name}-{turn}", amount, fence=1, purpose="slice")
            won += 1
        except BudgetExhausted:
            pass
    store.dispose()
    wins.put(won)


def test_many_processes_win_exactly_what_is_affordable(store: Store, storage: str) -> None:
    """Proves admission under contention: 8 processes, 32 tries, money for 9 holds, exactly 9 win."""
    context = multiprocessing.get_context("spawn")
    wins: multiprocessing.Queue = context.Queue()
    jobs = [context.Process(target=_take, args=(storage, f"p{n}", CAP // 9, wins)) for n in range(8)]
    for job in jobs:
        job.start()
    total = sum(wins.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join()
    wins.close()
    wins.join_thread()
    assert total == 9
