"""What launch and resume have in common: drive a study while showing it, then say how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from budgets.money import usd
from sweep import records, run, summary
from sweep.errors import BudgetError, InvariantError
from sweep.launchers.local import LocalLauncher
from sweep.projection import projector_of
from sweep.standing import beyond_money, more_money
from sweep.store import Store


def drive(store: Store, name: str, cap: int | None, *, as_json: bool) -> None:
    """Takes the study over and drives it to its end. Raises every SweepError a study can end with."""
    from sweep.views import live

    with store.read() as connection:
        study = records.study(connection, name)
        before = [row.id for row in records.log_after(connection, name, 0)]
    launcher = LocalLauncher()
    seen = before[-1] if before else 0

    def status() -> dict[str, Any]:
        with store.read() as connection:
            living = records.workers(connection, name, living=True)
            now = {} if study.timings else {w.id: launcher.boot()[1] - w.origin_boot_ms for w in living}
            return summary.status(connection, name, now)

    def events_after(last: int) -> list[dict[str, Any]]:
        with store.read() as connection:
            rows = records.log_after(connection, name, max(last, seen))
        return [{"id": r.id, "unix_ms": r.unix_ms, "kind": r.kind, "trial": r.trial, "text": r.text} for r in rows]

    for words in study.facts.get("warm_start", []) if study.fence else []:
        click.echo(words, err=True)  # the plan of a launch has said it
    with store.drive(name, Path(study.folder)):
        run.take(store, name, cap)
        with live.follow(live.pick_mode(as_json), status, events_after) as view:
            run.drive(store, name, view.notify)
    conclude(store, name)


def conclude(store: Store, name: str) -> None:
    """Says what the study cost and what to type next. Raises BudgetError if no trial came to its end."""
    with store.read() as connection:
        study = records.study(connection, name)
        state = summary.status(connection, name)
    spent, cap = state["spent"]["micros"], state["cap"]["micros"]
    if state["frozen"]:
        overrun = usd(state["overrun"]["micros"])
        raise InvariantError(f"study {name} is frozen: {overrun} were used beyond what was held", f"sweep audit {name}")
    winner = state["best"]
    if winner is None or winner["full_loss"] is None:
        with store.read() as connection:
            trials, projector = records.trials(connection, name), projector_of(study, connection)
            advice = beyond_money(study, trials)
            if advice is None:
                more = more_money(connection, study, trials, projector)
                advice = f"{more}; or launch one with a smaller search.epochs"
        raise BudgetError(f"{usd(spent)} of {usd(cap)} are spent and no trial was trained to its end", advice)
    if state["stopped"] is not None:
        click.echo(f"the search had enough: {state['stopped']}. {usd(cap - spent)} of the cap stay with you", err=True)
    click.echo(
        f"study {name}: {state['trials']} trials, {usd(spent)} of {usd(cap)} spent. Next: sweep best {name}", err=True
    )
    if study.spec.machine.stop_command is None and study.facts["device"] not in {"cpu", "replay"}:
        click.echo("no machine.stop_command: a rented machine's meter runs on until you stop it", err=True)
