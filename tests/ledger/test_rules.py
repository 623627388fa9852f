"""What the ledger refuses, what it does not look at, and what cannot be rewritten even by hand."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import ledger_scenarios
import pytest
from ledger_processes import opened
from ledger_scenarios import SCENARIOS
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from budgets import audit
from budgets.ledger import IDLE, RESERVE, CapTooLow, HoldClosed, IdempotencyConflict, Ledger
from sweep.store import Store

CAP = 1_000_000
DAY_NS = 86_400 * 10**9


@pytest.fixture
def store(storage: str) -> Iterator[Store]:
    """A database with one funded study, whole at the end of every test."""
    made = opened(storage, "s", CAP)
    yield made
    with made.read() as connection:
        assert audit.violations(connection, "s") == []
    made.dispose()


# Clocks


def states(store: Store, suffix: str) -> dict[str, str]:
    """Where every scenario ends, in studies of their own."""
    found = {}
    for name in SCENARIOS:
        study = f"{name}-{suffix}"
        ledger_scenarios.prepare(store, name, study)
        ledger_scenarios.run(store, name, study)
        with store.read() as connection:
            found[name] = ledger_scenarios.state(connection, study)
    return found


def test_the_wall_clock_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a clock that is days off, stands in 1970 or leaps back in mid-study changes only its own column."""
    store = Store(f"sqlite:///{tmp_path}/studies.db", create=True)
    expected = states(store, "now")
    now = time.time_ns()
    leaps = itertools.cycle([now, now - DAY_NS, 0, now + DAY_NS])
    clocks = {
        "tomorrow": lambda: now + DAY_NS,
        "yesterday": lambda: now - DAY_NS,
        "1970": lambda: 0,
        "leaping": lambda: next(leaps),
    }
    for name, clock in clocks.items():
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", clock)
            assert states(store, name) == expected, name
    with store.read() as connection:
        seen = connection.execute(
            text("SELECT DISTINCT recorded_unix_ms FROM sweep_transfer WHERE study LIKE '%-1970'")
        )
        assert seen.scalars().all() == [0], "the clock was looked at"
    store.dispose()


def test_the_time_zone_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a ledger is the same wherever it is kept, also where the clocks change in summer."""
    store = Store(f"sqlite:///{tmp_path}/studies.db", create=True)
    expected = states(store, "here")
    for zone in ("UTC", "Pacific/Kiritimati", "Australia/Lord_Howe", "America/St_Johns"):
        with monkeypatch.context() as patch:
            patch.setenv("TZ", zone)
            time.tzset()
            assert states(store, zone.replace("/", "-")) == expected, zone
    time.tzset()
    store.dispose()


# Requests that contradict what was done

ENDS = {
    "settle": ({"trial:0": 40},),
    "settle otherwise": ({"trial:0": 41},),
    "settle elsewhere": ({"trial:1": 40},),
    "settle nothing": ({},),
    "void": (),
    "expire": ({"trial:0": 1},),
    "expire otherwise": ({"trial:1": 1},),
}


@pytest.mark.parametrize("first", ENDS)
def test_a_hold_ends_once(store: Store, first: str) -> None:
    """Proves that the request that closed a hold may be repeated, and that no other one has any effect on it."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("h", 100, fence=1, purpose="slice")
        getattr(ledger, first.split()[0])("h", *ENDS[first], fence=1)
        after = ledger.balances()
        for other, arguments in ENDS.items():
            verb = getattr(ledger, other.split()[0])
            if other == first:
                verb("h", *arguments, fence=1)
            else:
                with pytest.raises(HoldClosed):
                    verb("h", *arguments, fence=1)
        with pytest.raises(HoldClosed):
            ledger.extend("h", 200, fence=1)
        ledger.hold("h", 100, fence=1, purpose="slice")
        assert ledger.balances() == after


@pytest.mark.parametrize(
    "other", [{"amount": 101}, {"amount": 99}, {"purpose": "another"}, {"account_code": RESERVE}], ids=str
)
def test_a_hold_with_a_known_id_and_another_request(store: Store, other: dict[str, object]) -> None:
    """Proves that an id stands for one request: another amount, purpose or account under it is refused."""
    request = {"amount": 100, "purpose": "slice", "account_code": "budget"}
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.set_aside(500, "launch")
        ledger.hold("h", fence=1, **request)
        with pytest.raises(IdempotencyConflict):
            ledger.hold("h", fence=1, **(request | other))
        assert ledger.open_holds() == {"h": 100}
    other_study = opened(str(store.url.render_as_string(hide_password=False)), "t", CAP)
    with pytest.raises(IdempotencyConflict), other_study.write() as connection:
        Ledger(connection, "t").hold("h", fence=1, **request)
    other_study.dispose()


def test_a_refund_happens_once(store: Store) -> None:
    """Proves that the same refund twice is one, that another one of the same charge is refused, as is too much."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.charge("gap", IDLE, 100, note="between two runs")
        for _ in range(2):
            ledger.refund("charge:gap", 30, note="evidence")
            assert ledger.balances().spent == 70
        for amount in (29, 31):
            with pytest.raises(IdempotencyConflict):
                ledger.refund("charge:gap", amount, note="other evidence")
        for amount in (0, -1, 101):
            with pytest.raises(ValueError, match="cannot be refunded"):
                ledger.refund("charge:gap", amount, note="too much")
        with pytest.raises(ValueError, match="cannot be refunded"):
            ledger.refund("refund:charge:gap", 30, note="a refund of a refund")
        assert ledger.balances().spent == 70


def test_the_cap_may_not_fall_into_the_reserve(store: Store) -> None:
    """Proves that money that was set aside is a promise too: the cap stays over spent, held and reserve together."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.set_aside(100_000, "launch")
        ledger.hold("h", 400_000, fence=1, purpose="slice")
        ledger.charge("gap", IDLE, 50_000, note="")
        with pytest.raises(CapTooLow, match="550000"):
            ledger.set_cap(549_999, "a")
        ledger.set_cap(550_000, "b")
        assert (ledger.balances().left, ledger.balances().reserve) == (100_000, 100_000)


# Guards


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        ("UPDATE sweep_hold SET settled_micros = 1 WHERE id = 'closed'", "a closed hold never changes"),
        (
            "UPDATE sweep_hold SET state = 'open', settled_micros = NULL WHERE id = 'closed'",
            "a closed hold never changes",
        ),
        ("DELETE FROM sweep_hold WHERE id = 'closed'", "no hold is ever deleted"),
        ("DELETE FROM sweep_hold WHERE id = 'open'", "no hold is ever deleted"),
        ("UPDATE sweep_transfer SET note = 'other' WHERE seq = 1", "append-only"),
        ("DELETE FROM sweep_transfer WHERE seq = 2", "append-only"),
    ],
)
def test_history_is_guarded(store: Store, statement: str, refusal: str) -> None:
    """Proves that closed holds and transfers stay as they are whatever program writes to the database."""
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("closed", 100, fence=1, purpose="slice")
        ledger.settle("closed", {IDLE: 5}, fence=1)
        ledger.hold("open", 100, fence=1, purpose="slice")
    with pytest.raises(DBAPIError, match=refusal), store.write() as connection:
        connection.execute(text(statement))


@pytest.mark.parametrize("table", ["sweep_hold", "sweep_transfer"])
@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_history_cannot_be_emptied(store: Store, table: str) -> None:
    """Proves that TRUNCATE, which fires no row trigger, is refused too."""
    with pytest.raises(DBAPIError, match=r"append-only|ever deleted"), store.write() as connection:
        connection.execute(text(f"TRUNCATE {table} CASCADE"))


NEW_TRANSFER = "(id, study, seq, kind, debit, credit, amount_micros, note, recorded_unix_ms)"


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT OR REPLACE INTO sweep_hold SELECT * FROM sweep_hold WHERE id = 'closed'",
        "INSERT OR REPLACE INTO sweep_hold SELECT * FROM sweep_hold WHERE id = 'open'",
        "REPLACE INTO sweep_transfer SELECT * FROM sweep_transfer WHERE seq = 1",
        f"INSERT OR REPLACE INTO sweep_transfer {NEW_TRANSFER}"
        " VALUES ('new', 's', 1, 'fund', 'world', 'budget', 9, '', 0)",
        "INSERT INTO sweep_transfer SELECT * FROM sweep_transfer WHERE seq = 1"
        " ON CONFLICT (id) DO UPDATE SET amount_micros = 9",
        "UPDATE OR REPLACE sweep_transfer SET seq = 1 WHERE seq = 2",
        "UPDATE OR REPLACE sweep_hold SET id = 'open' WHERE id = 'closed'",
        "UPDATE OR REPLACE sweep_hold SET id = 'closed' WHERE id = 'open'",
    ],
)
def test_no_replace_slips_past_a_bare_connection(tmp_path: Path, statement: str) -> None:
    """Proves that another program's connection, without recursive_triggers or foreign keys, cannot replace a row."""
    store = opened(f"sqlite:///{tmp_path}/studies.db", "s", CAP)
    with store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.hold("closed", 100, fence=1, purpose="slice")
        ledger.settle("closed", {IDLE: 5}, fence=1)
        ledger.hold("open", 100, fence=1, purpose="slice")
    bare = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    assert bare.execute("PRAGMA recursive_triggers").fetchone() == (0,)
    before = [bare.execute(f"SELECT * FROM {table}").fetchall() for table in ("sweep_hold", "sweep_transfer")]
    with pytest.raises(sqlite3.IntegrityError, match=r"append-only|replaced|never changes"):
        bare.execute(statement)
    assert before == [bare.execute(f"SELECT * FROM {table}").fetchall() for table in ("sweep_hold", "sweep_transfer")]
    bare.close()
    store.dispose()
