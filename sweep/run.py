"""Drives a stored study: takes it over, runs the loop, answers signals."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from sqlalchemy import Connection

from budgets.ledger import Balances, CapTooLow, HoldClosed, HoldsOpen, Ledger
from budgets.money import usd
from sweep import records, telling
from sweep.audit import violations
from sweep.errors import InvariantError, StoreUnavailableError, StudyBusyError, UsageError, WorkerError
from sweep.launchers.base import LaunchError
from sweep.launchers.local import LocalLauncher
from sweep.loop import Stopping, Sweep
from sweep.proposals import guide_of
from sweep.records import Study
from sweep.store import Store
from sweep.study import Memory

RETRY_SECONDS = (0.5, 1, 2, 4, 8)  # between two tries while the database is out of reach
CALM_SECONDS = 300.0  # a run that lasted this long starts the count anew


def take(store: Store, name: str, cap: int | None = None) -> None:
    """Takes a study over under a new fence, audits it, and sets its cap if one is given.

    Raises NotFoundError, UsageError (closed, or a cap under what is spent and held) and InvariantError.
    """
    with store.write() as connection:
        study = records.study(connection, name)
        if study.state == "closed":
            raise UsageError(f"study {name} is closed", "launch a new one; its trials stay for `sweep best`")
        found = violations(connection, name)
        if found:
            raise InvariantError(found[0], f"`sweep audit {name}` lists what does not hold")
        records.set_study(connection, name, fence=study.fence + 1)
        ledger = Ledger(connection, name)
        ledger.take_over(study.fence + 1)
        before = ledger.balances()
        if cap is not None:
            try:
                ledger.set_cap(cap, f"fence{study.fence + 1}")
            except CapTooLow as error:
                balances = ledger.balances()
                raise UsageError(
                    f"{usd(cap)} is under the {usd(balances.spent + balances.held)} that is spent and held already"
                    + (f" and the reserve of {usd(balances.reserve)}" if balances.reserve else "")
                ) from error
            records.note(connection, name, "cap", f"the cap is {usd(cap)} now")
            if cap > before.cap:
                records.pay_on(connection, name)
            if study.phase != "endgame" or cap > before.cap or "stopped" in study.facts:
                _search_on(connection, study, before, ledger.balances())


def _search_on(connection: Connection, study: Study, before: Balances, after: Balances) -> None:
    """The search goes on with what the cap was raised by, less the endgame's share of it.

    There is money to ask for more, and whoever had enough wants to go on. What raced waits for that; what is left of
    the reserve that was released for it is set apart again.
    """
    facts = {key: value for key, value in study.facts.items() if key not in {"stopped", "endgame_until"}}
    facts["patience_from"] = records.next_evaluation(connection, study.name) - 1
    records.set_study(connection, study.name, phase="search", facts=facts)
    share = study.spec.budget.reserve / study.spec.budget.cap
    kept = max(int((after.cap - before.cap) * share), 0)
    if study.phase == "endgame":
        kept += max(min(before.left, study.facts.get("endgame_until", before.cap) - before.spent), 0)
    kept = min(kept, after.left - after.reserve)
    if study.spec.endgame.trains and kept > 0:
        Ledger(connection, study.name).set_aside(kept, f"fence{study.fence + 1}")
    for trial in records.trials(connection, study.name):
        if trial.source is not None and trial.state in {"live", "waiting"}:
            values = {"state": "paused", "reason": "parked: the search goes on first"}
            records.set_trial(connection, study.name, trial.number, **values)


def drive(store: Store, name: str, notify: Callable[[], None]) -> None:
    """Runs a study to its end. The caller holds `Store.drive` and called `take`. Raises what Sweep.run raises.

    The first Ctrl-C or SIGTERM checkpoints and settles; a second one leaves at once and the worker, which ends with
    its slice, to itself.
    """
    with store.read() as connection:
        study = records.study(connection, name)
    stopping = Stopping()

    def stop(number: int, frame: FrameType | None) -> None:
        if stopping.asked:
            sys.stderr.write(f"\nleft at once; the worker ends with its paid slice. Resume: sweep resume {name}\n")
            sys.stderr.flush()
            os._exit(130)
        stopping.asked = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _patiently(lambda: _run(store, study, stopping, notify))
    except HoldClosed as error:
        raise StudyBusyError(f"another orchestrator took study {name} over: {error}", "leave it to that one") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(store: Store, study: Study, stopping: Stopping, notify: Callable[[], None]) -> None:
    memory = Memory(store, study.name, study.spec.seed, study.spec.search.sampler, guide_of(study))
    try:
        Sweep(store, study.name, LocalLauncher(), memory, stopping, notify).run()
    except LaunchError as error:
        raise WorkerError(
            str(error), f"see {Path(study.folder) / 'workers'}, then: sweep resume {study.name}"
        ) from error
    finally:
        memory.close()


def _patiently(run: Callable[[], None]) -> None:
    """Runs; starts afresh from the tables, a few times, when the database was out of reach for a moment.

    Nothing is lost by it: whatever was under way either is in the tables or is repeated under the same id. The worker
    trains on meanwhile, as far as it is paid. Raises the last StoreUnavailableError.
    """
    for pause in RETRY_SECONDS:
        started = time.monotonic()
        try:
            return run()
        except StoreUnavailableError as error:
            sys.stderr.write(f"{error}; trying again in {pause:g} s\n")
            time.sleep(pause)
            if time.monotonic() - started > CALM_SECONDS:
                return _patiently(run)  # that was another trouble
    return run()


def reconcile(store: Store, name: str, bill_micros: int, note: str) -> tuple[int, Balances]:
    """Brings a study's books in line with a bill; returns the bill less what was charged, and the balances after.

    Raises NotFoundError, UsageError while a worker was not settled.
    """
    with store.write() as connection:
        records.study(connection, name)
        ledger = Ledger(connection, name)
        words = f"bill of {usd(bill_micros)}" + (f": {note}" if note else "")
        try:
            difference = ledger.reconcile(bill_micros, note=words)
        except HoldsOpen as error:
            raise UsageError(str(error), f"end it first, or: sweep resume {name}") from error
        if difference:
            records.note(connection, name, "bill", f"{words}; it differs by {usd(difference)} from what was charged")
        return difference, ledger.balances()


def close(store: Store, name: str) -> int:
    """Ends a study for good: what is paused is told to Optuna as pruned. Returns how many trials that were."""
    with store.read() as connection:
        study = records.study(connection, name)
    with store.drive(name, Path(study.folder)):
        with store.read() as connection:
            if records.workers(connection, name, living=True):
                raise UsageError(f"study {name} has a worker that was not settled", f"run: sweep resume {name}")
            parked = [t for t in records.trials(connection, name) if t.state not in records.ENDED]
        memory = Memory(store, name, study.spec.seed)
        try:
            for trial in parked:
                with store.write() as connection:
                    values = {"state": "pruned", "reason": f"the study was closed ({trial.reason})"}
                    records.set_trial(connection, name, trial.number, **values)
                    unwanted = telling.forget_state(connection, name, trial)
                if unwanted is not None:
                    shutil.rmtree(unwanted, ignore_errors=True)
                if trial.source is not None:
                    continue  # the sampler never knew of it
                memory.tell(trial.number, "pruned", None, {"reason": "the study was closed"})
                with store.write() as connection:
                    records.set_trial(connection, name, trial.number, told=1)
        finally:
            memory.close()
        with store.write() as connection:
            records.set_study(connection, name, state="closed")
            Ledger(connection, name).release("close", note="the study was closed")
            records.note(connection, name, "closed", f"closed; {len(parked)} paused trials were told as pruned")
    return len(parked)
