"""Tells what becomes of trials: our tables first, then the sampler's memory; what a crash left untold is told again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import Connection

from budgets.ledger import Ledger, trial_account
from budgets.money import MICROS
from sweep import records
from sweep.records import TrialRow
from sweep.rungs import Results
from sweep.store import Store
from sweep.study import Memory


def replay(memory: Memory, trials: Sequence[TrialRow], results: Results) -> None:
    """Reports the losses that Optuna may have missed: the step between our commit and its own."""
    for trial in trials:
        if trial.told or trial.diverged or trial.state == "judging":
            continue
        for rung in range(trial.rung + 1):
            loss = results.losses.get(rung, {}).get(trial.number)
            if loss is not None:
                memory.report(trial.number, rung, loss)


def tell_ended(store: Store, name: str, memory: Memory, trials: Sequence[TrialRow]) -> None:
    """Tells Optuna who ended, whether we decided it or the worker reported it, with what it has cost so far."""
    for trial in trials:
        if trial.state not in records.ENDED or trial.told:
            continue
        with store.read() as connection:
            cost = Ledger(connection, name).balances().accounts.get(trial_account(trial.number), 0)
        labels: dict[str, str | float] = {"reason": trial.reason, "usd_when_told": cost / MICROS}
        memory.tell(trial.number, trial.state, trial.full_loss, labels)
        with store.write() as connection:
            records.set_trial(connection, name, trial.number, told=1)


def forget_state(connection: Connection, name: str, trial: TrialRow) -> Path | None:
    """Forgets what a full-parameter trial without a slot wrote, 14 bytes a parameter, when nobody goes on from it.

    Returns the folder, which is to be removed when that is committed.
    """
    if trial.config.method != "full" or trial.slot is not None or trial.checkpoint is None:
        return None
    records.set_trial(connection, name, trial.number, checkpoint=None, checkpoint_tokens=0)
    return Path(trial.checkpoint).parent


def change(store: Store, name: str, trial: TrialRow, state: str, reason: str, **values: int) -> None:
    """Moves a trial into another state and notes why, with its loss; `values` are more columns of its row.

    At its end that is the loss over all validation rows, with the metric where there is one, as other views show it.
    """
    known = trial.loss if trial.full_loss is None else trial.full_loss
    loss = f", loss {known:.4f}" if known is not None else ""
    if trial.metric is not None:
        loss += f", metric {trial.metric:.4f}"
    words = reason if reason.startswith("promoted") else f"{state}: {reason}"
    with store.write() as connection:
        records.set_trial(connection, name, trial.number, state=state, reason=reason, **values)
        unwanted = forget_state(connection, name, trial) if state == "pruned" else None
        records.note(connection, name, state, f"trial {trial.label} {words}{loss}", trial.number)
    if unwanted is not None:
        shutil.rmtree(unwanted, ignore_errors=True)
