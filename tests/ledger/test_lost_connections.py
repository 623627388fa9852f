"""PostgreSQL goes away: between statements, before COMMIT, during it, and after it had its effect."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

import pytest
from ledger_faults import lose_everywhere, named, terminate
from ledger_processes import opened
from ledger_scenarios import SCENARIOS
from sqlalchemy import Connection, create_engine, make_url, text

import sweep.store
from budgets import audit
from budgets.ledger import IDLE, Ledger
from sweep.errors import OutcomeUnknownError, StoreUnavailableError
from sweep.store import Store

CAP = 1_000_000
VICTIM = "victim"
# COMMIT runs it, and takes its time.
SLOW_COMMIT = """
CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(60); RETURN NULL; END';
CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON sweep_transfer DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION slowly()
"""

ON_POSTGRES = pytest.mark.parametrize("storage", ["postgresql"], indirect=True)


@pytest.fixture
def server(storage: str) -> Iterator[Connection]:
    """An administrator's connection to the same database, whose own commits wait for no standby."""
    engine = create_engine(storage, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("SET synchronous_commit = local"))
        yield connection
    engine.dispose()


def wait_in(server: Connection, event: str) -> None:
    """Returns once the victim waits for `event` in its COMMIT."""
    query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name AND wait_event = :event")
    until = time.monotonic() + 20
    while not server.execute(query, {"name": VICTIM, "event": event}).scalar_one():
        assert time.monotonic() < until, f"the victim never waited in {event}"
        time.sleep(0.01)


def lose_in_commit(store: Store, then: Callable[[], object]) -> Exception | None:
    """Charges 100 in a thread, does `then` meanwhile; returns what the charge raised."""
    raised: list[Exception] = []

    def charge() -> None:
        try:
            with store.write() as connection:
                Ledger(connection, "s").charge("gap", IDLE, 100, note="between two runs")
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=charge)
    thread.start()
    try:
        then()
    finally:
        thread.join()
    return raised[0] if raised else None


def spent(store: Store) -> int:
    """What was spent, of books that are whole."""
    with store.read() as connection:
        assert audit.violations(connection, "s") == []
        return Ledger(connection, "s").balances().spent


def charge_again(store: Store) -> None:
    """What a caller does whose outcome is unknown; here twice."""
    for _ in range(2):
        with store.write() as connection:
            Ledger(connection, "s").charge("gap", IDLE, 100, note="between two runs")


@ON_POSTGRES
def test_a_connection_lost_at_any_step(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that a backend ended before any statement or COMMIT leaves whole books, an error that says what is known,
    and one final state after a repetition. Every third step of every scenario.
    """
    total: Counter[str] = Counter()
    for name, (errors, ends) in zip(
        SCENARIOS, pool.map(lose_everywhere, repeat(storage), SCENARIOS, repeat(3)), strict=True
    ):
        assert len(ends) == 1, f"{name} ended in {len(ends)} ways:\n" + "\n\n".join(sorted(ends))
        assert errors
        total += errors
    print(dict(total))
    assert set(total) == {"StoreUnavailableError", "OutcomeUnknownError"}


@ON_POSTGRES
def test_a_connection_lost_during_commit_before_it_had_an_effect(storage: str, server: Connection) -> None:
    """Proves that a COMMIT cut off in its middle is unknown to the caller, and that a repetition has one effect."""
    store = opened(named(storage, VICTIM), "s", CAP)
    server.exec_driver_sql(SLOW_COMMIT)

    def cut() -> None:
        wait_in(server, "PgSleep")
        terminate(server, VICTIM)

    error = lose_in_commit(store, cut)
    assert isinstance(error, OutcomeUnknownError) and error.exit_code == 6
    assert "repeats what is missing" in error.hint
    server.exec_driver_sql("DROP TRIGGER slow ON sweep_transfer")
    assert spent(store) == 0
    charge_again(store)
    assert spent(store) == 100
    store.dispose()


@ON_POSTGRES
def test_a_connection_lost_during_commit_after_it_had_its_effect(storage: str, server: Connection) -> None:
    """Proves the other fate of the same error: it was committed, and the repetition finds that and adds nothing.

    A standby that never answers keeps COMMIT from returning after the transaction took place.
    """
    store = opened(named(storage, VICTIM), "s", CAP)

    def cut() -> None:
        wait_in(server, "SyncRep")
        terminate(server, VICTIM)

    try:
        server.execute(text("ALTER SYSTEM SET synchronous_standby_names = 'nobody'"))
        server.execute(text("SELECT pg_reload_conf()"))
        error = lose_in_commit(store, cut)
    finally:
        server.execute(text("ALTER SYSTEM RESET synchronous_standby_names"))
        server.execute(text("SELECT pg_reload_conf()"))
    assert isinstance(error, OutcomeUnknownError)
    assert spent(store) == 100
    charge_again(store)
    assert spent(store) == 100
    store.dispose()


def test_the_server_is_restarted_in_mid_commit(own_postgres: tuple[str, Callable[[], None]]) -> None:
    """Proves that a crash of the whole server in mid-COMMIT is an unknown outcome, and that work goes on afterwards."""
    url, restart = own_postgres
    store = opened(named(url, VICTIM), "s", CAP)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as server:
        server.exec_driver_sql(SLOW_COMMIT)

        def crash() -> None:
            wait_in(server, "PgSleep")
            server.close()
            engine.dispose()
            restart()

        error = lose_in_commit(store, crash)
    assert isinstance(error, OutcomeUnknownError)
    with engine.connect() as server:
        server.exec_driver_sql("DROP TRIGGER slow ON sweep_transfer")
    engine.dispose()
    assert spent(store) == 0
    charge_again(store)
    assert spent(store) == 100
    store.dispose()


@ON_POSTGRES
def test_a_client_that_stands_still_in_a_transaction(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a frozen process cannot keep the study's lock: the server ends it, and it is told when it wakes."""
    monkeypatch.setattr(sweep.store, "IDLE_MS", 200)
    store = opened(storage, "s", CAP)
    with pytest.raises(StoreUnavailableError), store.write() as connection:
        ledger = Ledger(connection, "s")
        ledger.charge("gap", IDLE, 100, note="")
        time.sleep(0.6)
        ledger.charge("gap2", IDLE, 100, note="")
    assert spent(store) == 0
    charge_again(store)
    assert spent(store) == 100
    store.dispose()


@ON_POSTGRES
def test_a_server_that_is_not_there(storage: str) -> None:
    """Proves that an unreachable server is one line with exit code 6."""
    with pytest.raises(StoreUnavailableError) as refused:
        Store(str(make_url(storage).set(query={"host": "/nowhere"})), create=True)
    assert refused.value.exit_code == 6
