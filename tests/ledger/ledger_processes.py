"""Processes that are killed at a step, and processes that race. Forked from a small process without open connections.

SQLite's locks belong to a process, so its connections must never be carried across a fork.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NoReturn

import ledger_scenarios
from sqlalchemy import Engine, event

from budgets import audit
from budgets.ledger import Ledger, LedgerError
from sweep.store import Store

Work = Callable[[Store], object]


def fork(work: Callable[[], object]) -> int:
    """Does `work` in a forked process that ends with it; returns the process's id."""
    pid = os.fork()
    if pid == 0:
        _work_and_exit(work)
    return pid


def _work_and_exit(work: Callable[[], object]) -> NoReturn:
    try:
        work()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


@contextlib.contextmanager
def at_every_step(engine: Engine | type[Engine], act: Callable[[int, str], object]) -> Iterator[None]:
    """Calls `act` before every statement and before every COMMIT, with the number of the step and what comes next.

    These are all boundaries there are: after a statement the database is as it is before the next one.
    """
    steps = itertools.count(1)

    def statement_comes(_: object, __: object, statement: str, *___: object) -> None:
        act(next(steps), statement)

    def commit_comes(_: object) -> None:
        act(next(steps), "COMMIT")

    event.listen(engine, "before_cursor_execute", statement_comes)
    event.listen(engine, "commit", commit_comes)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", statement_comes)
        event.remove(engine, "commit", commit_comes)


def die_everywhere(url: str, name: str) -> tuple[int, set[str]]:
    """Kills a scenario at every step and then repeats it; returns how many kills there were and the ends it came to."""
    judge = Store(url, create=True)
    victim = Store(url)
    expected, steps = uninterrupted(victim, name)
    studies = [f"{name}-{step:04d}" for step in range(1, steps + 1)]
    ledger_scenarios.prepare(judge, name, *studies)
    ends = {expected}
    for kill_at, study in enumerate(studies, start=1):
        if judge.is_sqlite:
            judge.dispose()
        _, status = os.waitpid(fork(partial(_run_and_die, victim, name, study, kill_at)), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{name} ended by itself: {status}"
        with judge.read() as connection:
            found = audit.violations(connection, study)
        not_yet_opened = name == "opened" and found == [f"study {study} has no accounts"]
        assert found == [] or not_yet_opened, f"{name} killed at step {kill_at}: {found}"
        ledger_scenarios.run(judge, name, study)
        with judge.read() as connection:
            ends.add(ledger_scenarios.state(connection, study))
    judge.dispose()
    return steps, ends


def uninterrupted(store: Store, name: str) -> tuple[str, int]:
    """Runs a scenario as it should be; returns where it ended and in how many steps.

    That also warms SQLAlchemy's cache for the forks.
    """
    study = f"{name}-whole"
    ledger_scenarios.prepare(store, name, study)
    steps: list[int] = []
    with at_every_step(store.engine, lambda step, _: steps.append(step)):
        ledger_scenarios.run(store, name, study)
    with store.read() as connection:
        assert audit.violations(connection, study) == []
        assert ledger_scenarios.end(connection, study) == ledger_scenarios.ENDS[name]
        whole = ledger_scenarios.state(connection, study)
    store.dispose()
    return whole, len(steps)


def _run_and_die(store: Store, name: str, study: str, kill_at: int) -> None:
    with at_every_step(store.engine, lambda step, _: step == kill_at and os.kill(os.getpid(), signal.SIGKILL)):
        ledger_scenarios.run(store, name, study)


def race(store: Store, works: Sequence[Work]) -> list[str]:
    """Does each work in a process of its own, all let loose at once; returns what each came to, in their order.

    That is what the work returned, or the name of the error that stopped it. Every process is connected before the
    start, so that they meet in the ledger and not on the way there.
    """
    store.dispose()
    start, starter = os.pipe()
    results, report = os.pipe()

    def rival(number: int, work: Work) -> None:
        os.close(starter)
        with store.read() as connection:
            connection.exec_driver_sql("SELECT 1")
        os.write(report, b"ready\n")
        os.read(start, 1)
        try:
            outcome = str(work(store))
        except LedgerError as error:
            outcome = type(error).__name__
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}".splitlines()[0]
        os.write(report, f"{number} {outcome}\n".encode())

    pids = [fork(partial(rival, number, work)) for number, work in enumerate(works)]
    os.close(report)
    os.close(start)
    with os.fdopen(results) as lines:
        for _ in works:
            assert lines.readline() == "ready\n"
        os.close(starter)
        outcomes = dict(line.rstrip("\n").split(" ", 1) for line in lines)
    for pid in pids:
        os.waitpid(pid, 0)
    return [outcomes.get(str(number), "died") for number in range(len(works))]


def opened(url: str, study: str, cap: int) -> Store:
    """A database with one more funded study."""
    store = Store(url, create=True)
    with store.write() as connection:
        Ledger(connection, study).open(cap)
    return store
