"""Databases of other versions: a newer one is refused, an older one is brought up to date and stays what it was."""

from __future__ import annotations

import gzip
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ledger_faults
import pytest
from ledger_processes import opened
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

import sweep.audit
from budgets.ledger import Ledger
from budgets.schema import hold, transfer
from budgets.statement import statement
from budgets.tariff import Tariff
from sweep import records, tables
from sweep.errors import StoreError
from sweep.store import MIGRATIONS, Store

# A study that the first release finished, as `sqlite3 studies.db .dump` writes it.
DUMP = Path(__file__).with_name("studies-v1.sql.gz")
STUDY = "words"

TABLES = ("sweep_study", "sweep_worker", "sweep_evaluation", "sweep_hold", "sweep_transfer", "sweep_price")
# What versions 2 and 3 added, undone.
BACK_TO_1 = """
DROP TABLE sweep_price;
ALTER TABLE sweep_study DROP COLUMN tariff, DROP COLUMN unit, DROP COLUMN phase;
ALTER TABLE sweep_worker DROP COLUMN tariff, DROP COLUMN occupancy;
ALTER TABLE sweep_evaluation DROP COLUMN ordinal, DROP COLUMN width;
ALTER TABLE sweep_hold DROP COLUMN resolution;
ALTER TABLE sweep_transfer DROP COLUMN request_hash;
DROP TRIGGER sweep_hold_closed ON sweep_hold;
DROP TRIGGER sweep_hold_kept ON sweep_hold;
DROP TRIGGER sweep_transfer_append_only ON sweep_transfer;
DROP FUNCTION sweep_refuse();
DROP INDEX sweep_transfer_seq;
CREATE FUNCTION sweep_transfer_guard() RETURNS trigger LANGUAGE plpgsql AS
'BEGIN RAISE EXCEPTION ''sweep_transfer is append-only''; END';
CREATE TRIGGER sweep_transfer_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON sweep_transfer
EXECUTE FUNCTION sweep_transfer_guard();
DELETE FROM sweep_schema WHERE version > 1;
"""


@pytest.fixture
def first_release(tmp_path: Path) -> Path:
    """A SQLite file as the first release left it."""
    path = tmp_path / "studies.db"
    connection = sqlite3.connect(path)
    connection.executescript(gzip.decompress(DUMP.read_bytes()).decode())
    connection.execute("PRAGMA journal_mode=WAL")
    connection.close()
    return path


def guarded(store: Store) -> None:
    """History cannot be rewritten."""
    for change, refusal in [
        ("UPDATE sweep_transfer SET amount_micros = 1", "append-only"),
        ("DELETE FROM sweep_transfer", "append-only"),
        ("UPDATE sweep_hold SET settled_micros = 1 WHERE state <> 'open'", "closed hold never changes"),
        ("DELETE FROM sweep_hold", "no hold is ever deleted"),
    ]:
        with pytest.raises(DBAPIError, match=refusal), store.write() as connection:
            connection.execute(text(change))


def goes_on(store: Store, study: str) -> None:
    """The migrated books take the new verbs, those with new columns and new accounts too."""
    with store.write() as connection:
        ledger = Ledger(connection, study)
        before = ledger.balances()
        for _ in range(2):
            ledger.hold(f"{study}:new", 100, fence=9, purpose="slice")
            ledger.settle(f"{study}:new", {"trial:1": 60}, fence=9)
            ledger.set_cap(before.cap + 500, "more")
        assert ledger.reconcile(before.spent + 60 + 25, note="invoice") == 25
        after = ledger.balances()
    assert (after.spent, after.cap, after.held) == (before.spent + 85, before.cap + 500, 0)
    assert after.accounts["overhead:bill"] == 25


def assert_nobody_is_connected(store: Store, name: str) -> None:
    """A closed connection leaves the server's list a moment later."""
    query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
    until = time.monotonic() + 3
    while True:
        with store.read() as connection:
            if not connection.execute(query, {"name": name}).scalar_one():
                return
        assert time.monotonic() < until, "a connection was left open"
        time.sleep(0.01)


def test_a_newer_database_is_refused(storage: str) -> None:
    """Proves that a program that does not know the tables leaves them alone: exit code 6, and nothing stays open."""
    store = opened(storage, "s", 1_000_000)
    with store.write() as connection:
        connection.execute(tables.schema.insert().values(version=len(MIGRATIONS) + 1))
    url = storage if store.is_sqlite else ledger_faults.named(storage, "refused")
    for create in (False, True):
        with pytest.raises(StoreError, match=f"schema version {len(MIGRATIONS) + 1}") as refused:
            Store(url, create=create)
        assert refused.value.exit_code == 6 and "newer" in refused.value.hint
        if not store.is_sqlite:
            assert_nobody_is_connected(store, "refused")
    store.dispose()


def test_the_first_release_on_sqlite(first_release: Path) -> None:
    """Proves on a real study of the first release that it reads, adds up, is guarded and goes on after the migration.

    Its trials, workers and every cent are what they were.
    """
    raw = sqlite3.connect(first_release)
    balances = dict(raw.execute("SELECT code, balance_micros FROM sweep_account"))
    rows = [raw.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("sweep_transfer", "sweep_trial")]
    raw.close()
    store = Store(f"sqlite:///{first_release}")
    with store.read() as connection:
        assert list(connection.execute(text("SELECT version FROM sweep_schema ORDER BY version")).scalars()) == list(
            range(1, len(MIGRATIONS) + 1)
        )
        assert sweep.audit.violations(connection, STUDY) == []
        after = Ledger(connection, STUDY).balances()
        assert after.accounts == balances and statement(after).spent == after.spent > 0
        study, workers = records.study(connection, STUDY), records.workers(connection, STUDY)
        assert (study.tariff, study.unit, study.phase) == (Tariff.flat(study.micros_per_hour), "hour", "search")
        assert (
            [worker.tariff for worker in workers] == [Tariff.flat(worker.micros_per_hour) for worker in workers] != []
        )
        assert len(connection.execute(transfer.select()).all()) == rows[0]
        assert len(records.trials(connection, STUDY)) == rows[1] > 10
        assert {worker.occupancy for worker in workers} == {None}
        assert {row.width for row in records.evaluations(connection, STUDY)} == {1.0}
        ordinals = [row.ordinal for row in records.evaluations(connection, STUDY)]
        assert ordinals == list(range(1, len(ordinals) + 1)) != []
        closed = connection.execute(hold.select()).mappings().all()
        assert [row["state"] for row in closed] == ["settled"] and closed[0]["resolution"] is None
    guarded(store)
    goes_on(store, STUDY)
    store.dispose()
    again = Store(f"sqlite:///{first_release}")
    with again.read() as connection:
        assert [row.version for row in connection.execute(tables.schema.select())] == list(
            range(1, len(MIGRATIONS) + 1)
        )
    again.dispose()


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_the_first_release_on_postgresql(storage: str) -> None:
    """Proves that PostgreSQL is brought up to date as SQLite is; what version 2 added is taken away before."""
    store = opened(storage, STUDY, 1_000_000)
    with store.write() as connection:
        ledger = Ledger(connection, STUDY)
        ledger.hold("old", 1_000, fence=1, purpose="slice")
        ledger.settle("old", {"trial:1": 700, "idle": 2}, fence=1)
        columns = {table: sorted(c["name"] for c in inspect(connection).get_columns(table)) for table in TABLES}
        connection.exec_driver_sql(BACK_TO_1)
    with store.read() as connection:
        assert {c["name"] for c in inspect(connection).get_columns("sweep_hold")}.isdisjoint({"resolution"})
    store.dispose()
    migrated = Store(storage)
    with migrated.read() as connection:
        assert {t: sorted(c["name"] for c in inspect(connection).get_columns(t)) for t in TABLES} == columns
        assert {index["name"] for index in inspect(connection).get_indexes("sweep_transfer")} == {"sweep_transfer_seq"}
        balances = Ledger(connection, STUDY).balances()
        assert (balances.spent, balances.accounts["trial:1"], balances.cap) == (702, 700, 1_000_000)
    guarded(migrated)
    goes_on(migrated, STUDY)
    migrated.dispose()


def test_a_kill_in_mid_migration(first_release: Path, pool: ProcessPoolExecutor) -> None:
    """Proves that a migration happens whole or not at all: killed at any seventh step, the next open does it."""
    kills, ends = pool.submit(ledger_faults.migrate_and_die, str(first_release), STUDY, 7).result()
    assert kills > 5 and len(ends) == 1
