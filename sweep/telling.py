"""Tells what becomes of trials: our tables first, then the sampler's memory; what a crash left untold is told again."""

from __future__ import annotations

from collections.abc import Sequence

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


def change(store: Store, name: str, trial: TrialRow, state: str, reason: str, **values: int) -> None:
    """Moves a trial into another state and notes why, with its loss; `values` are more columns of its row."""
    loss = f", loss {trial.loss:.4f}" if trial.loss is not None else ""
    words = reason if reason.startswith("promoted") else f"{state}: {reason}"
    with store.write() as connection:
        records.set_trial(connection, name, trial.number, state=state, reason=reason, **values)
        records.note(connection, name, state, f"trial {trial.label} {words}{loss}", trial.number)
