"""Drives a stored study: takes it over, runs the loop, answers signals."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from budgets.ledger import CapTooLow, Ledger
from budgets.money import usd
from sweep import records
from sweep.audit import violations
from sweep.errors import InvariantError, UsageError
from sweep.launchers.local import LocalLauncher
from sweep.loop import Sweep
from sweep.store import Store
from sweep.study import Memory


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
        if cap is not None:
            try:
                ledger.set_cap(cap, f"fence{study.fence + 1}")
            except CapTooLow as error:
                balances = ledger.balances()
                raise UsageError(
                    f"{usd(cap)} is under the {usd(balances.spent + balances.held)} that is spent and held already"
                ) from error
            records.note(connection, name, "cap", f"the cap is {usd(cap)} now")


def drive(store: Store, name: str, notify: Callable[[], None]) -> None:
    """Runs a study to its end. The caller holds `Store.drive` and called `take`. Raises what Sweep.run raises.

    The first Ctrl-C or SIGTERM checkpoints and settles; a second one leaves at once and the worker, which ends with
    its slice, to itself.
    """
    with store.read() as connection:
        study = records.study(connection, name)
    memory = Memory(store, name, study.spec.seed)
    try:
        sweep = Sweep(store, name, LocalLauncher(), memory, notify)

        def stop(number: int, frame: FrameType | None) -> None:
            if sweep.interrupted:
                sys.stderr.write(f"\nleft at once; the worker ends with its paid slice. Resume: sweep resume {name}\n")
                sys.stderr.flush()
                os._exit(130)
            sweep.interrupted = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            sweep.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    finally:
        memory.close()


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
                memory.tell(trial.number, "pruned", None, {"reason": "the study was closed"})
                with store.write() as connection:
                    records.set_trial(connection, name, trial.number, told=1)
        finally:
            memory.close()
        with store.write() as connection:
            records.set_study(connection, name, state="closed")
            records.note(connection, name, "closed", f"closed; {len(parked)} paused trials were told as pruned")
    return len(parked)
