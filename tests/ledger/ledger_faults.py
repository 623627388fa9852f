"""Faults that need a process of their own; a pool's process imports this and nothing of pytest."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import ledger_scenarios
from ledger_processes import at_every_step, fork, uninterrupted
from sqlalchemy import Connection, Engine, make_url, text

from budgets import audit
from budgets.ledger import Ledger
from sweep.errors import OutcomeUnknownError, StoreUnavailableError
from sweep.store import Store

NOBODY = 65534


def _hold(store: Store, study: str, name: str) -> None:
    with store.write() as connection:
        Ledger(connection, study).hold(name, 1, fence=1, purpose="slice")


def write_until_refused(url: str, study: str) -> tuple[int, str]:
    """Holds h0, h1, ... until a limit on the size of files refuses a write; returns how many there are, and why."""
    store = Store(url)
    written = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Python ignores the signal that comes with it, so that write() fails.
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{store.path}-wal").stat().st_size + 100_000, hard))
        while True:
            _hold(store, study, f"h{written}")
            written += 1
    except Exception as error:
        return written, f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        store.dispose()


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that every user can enter, which pytest's are not."""
    with tempfile.TemporaryDirectory(prefix="ledger") as name:
        yield Path(name)


def hold_as_nobody(url: str, study: str) -> str:
    """What a user without permission gets. Root could write anything, so it becomes somebody else first."""
    results, report = os.pipe()

    def try_it() -> None:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        try:
            store = Store(url)
            _hold(store, study, "refused")
            outcome = "held"
        except Exception as error:
            outcome = f"{type(error).__name__} {getattr(error, 'exit_code', None)}: {error}"
        os.write(report, outcome.encode())

    pid = fork(try_it)
    os.close(report)
    with os.fdopen(results) as lines:
        outcome = lines.read()
    os.waitpid(pid, 0)
    return outcome


def commit_and_die(url: str, study: str, name: str) -> None:
    """Commits a hold and dies before anything closes the database."""
    store = Store(url)
    store.dispose()

    def work() -> None:
        _hold(store, study, name)
        os.kill(os.getpid(), signal.SIGKILL)

    _, status = os.waitpid(fork(work), 0)
    assert os.WIFSIGNALED(status)


def terminate(server: Connection, name: str) -> None:
    """Ends the one connection of that name and returns when it is gone. PostgreSQL's own wait looks every 100 ms."""
    victims = "FROM pg_stat_activity WHERE application_name = :name"
    ended = server.execute(text(f"SELECT pg_terminate_backend(pid) {victims}"), {"name": name}).scalars().all()
    assert ended == [True], f"there should be one connection of {name}: {ended}"
    until = time.monotonic() + 20
    while server.execute(text(f"SELECT count(*) {victims}"), {"name": name}).scalar_one():
        assert time.monotonic() < until, f"the connection of {name} does not end"
        time.sleep(0.001)
        server.rollback()  # within one transaction the view stays as it was first seen


def named(url: str, name: str) -> str:
    """The URL with a name by which the server's list of connections shows its user."""
    return make_url(url).update_query_dict({"application_name": name}).render_as_string(hide_password=False)


def lose_everywhere(url: str, name: str, stride: int) -> tuple[Counter[str], set[str]]:
    """Ends a scenario's connection from the server's side, at every `stride`-th step, and then repeats the scenario.

    Returns how often which error came of it, and the states it all came to.
    """
    judge, victim = Store(url, create=True), Store(named(url, name))
    expected, steps = uninterrupted(victim, name)
    errors: Counter[str] = Counter()
    ends = {expected}
    for lose_at in range(1, steps + 1, stride):
        study = f"{name}-{lose_at:04d}"
        ledger_scenarios.prepare(victim, name, study)
        errors[_run_and_lose(judge, victim, name, study, lose_at)] += 1
        with judge.read() as connection:
            found = audit.violations(connection, study)
        not_yet_opened = name == "opened" and found == [f"study {study} has no accounts"]
        assert found == [] or not_yet_opened, f"{name} lost at step {lose_at}: {found}"
        ledger_scenarios.run(judge, name, study)
        with judge.read() as connection:
            ends.add(ledger_scenarios.state(connection, study))
    judge.dispose()
    victim.dispose()
    return errors, ends


def _run_and_lose(judge: Store, victim: Store, name: str, study: str, lose_at: int) -> str:
    """Returns the name of the error that the loss led to."""
    lost_before = ""

    def cut(step: int, statement: str) -> None:
        nonlocal lost_before
        if step == lose_at:
            lost_before = statement
            with judge.read() as server:
                terminate(server, name)

    try:
        with at_every_step(victim.engine, cut):
            ledger_scenarios.run(victim, name, study)
    except StoreUnavailableError as error:
        unknown = isinstance(error, OutcomeUnknownError)
        assert unknown == (lost_before == "COMMIT"), f"{error} came of a connection lost before {lost_before}"
        return type(error).__name__
    raise AssertionError(f"nobody noticed that the connection was lost before {lost_before}")


def migrate_and_die(path: str, study: str, stride: int) -> tuple[int, set[str]]:
    """Kills the migration of copies of a database at every `stride`-th step and opens each copy once more.

    Returns how many kills there were, and the tables and books that the copies came to.
    """
    ends: set[str] = set()
    for kills, kill_at in enumerate(itertools.count(1, stride)):
        copy = shutil.copy2(path, f"{path}.{kill_at}")
        _, status = os.waitpid(fork(partial(_migrate_and_die, f"sqlite:///{copy}", kill_at)), 0)
        store = Store(f"sqlite:///{copy}")
        with store.read() as connection:
            schema = connection.execute(text("SELECT name, sql FROM sqlite_schema ORDER BY name")).all()
            ends.add(f"{schema}\n{ledger_scenarios.state(connection, study)}")
        store.dispose()
        if not os.WIFSIGNALED(status):
            return kills, ends
    raise AssertionError


def _migrate_and_die(url: str, kill_at: int) -> None:
    # Store() makes its engine itself, so the steps are seen from the class.
    with at_every_step(Engine, lambda step, _: step == kill_at and os.kill(os.getpid(), signal.SIGKILL)):
        Store(url)
