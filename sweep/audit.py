"""All invariants of a study: the ledger's own, and that the machine's time and its charges are the same thing."""

from __future__ import annotations

import sys
from pathlib import Path

from sqlalchemy import Connection, func, select

from budgets import audit
from budgets.ledger import BUDGET
from budgets.schema import hold, transfer
from sweep import records
from sweep.records import Study
from sweep.tables import CONFIRMATIONS

MARK = "transfers.committed"  # in the study's folder


def violations(connection: Connection, study: str) -> list[str]:
    """Returns a sentence for every invariant that does not hold; [] when all hold. Raises NotFoundError."""
    found = records.study(connection, study)
    ledger = audit.violations(connection, study)
    return ledger + _whole(connection, found) + _time(connection, study) + _trials(connection, study)


def remember(connection: Connection, study: Study) -> None:
    """Notes outside of the database how many transfers are committed; the caller's transaction comes after them.

    A copy of the database that was made without its write-ahead log is consistent and yet too old: only something
    outside of it can tell.
    """
    mark = Path(study.folder) / MARK
    temporary = mark.with_suffix(".new")
    try:
        temporary.write_text(f"{_transfers(connection, study.name)}\n")
        temporary.replace(mark)
    except OSError:
        sys.stderr.write(f"cannot write {mark}; an old copy of the database would not be noticed\n")


def _whole(connection: Connection, study: Study) -> list[str]:
    """The database holds at least the transfers that were committed before, as far as this machine remembers."""
    try:
        known = int((Path(study.folder) / MARK).read_text())
    except (OSError, ValueError):
        return []  # the study is from another machine, or nothing was settled yet
    there = _transfers(connection, study.name)
    if there < known:
        # Our snapshot may be older than the mark, beside a running sweep: another look, that is certainly younger.
        with connection.engine.connect().execution_options(read_only=True) as now:
            there = _transfers(now, study.name)
    if there >= known:
        return []
    return [f"{known} transfers were committed, the database holds {there}: an old copy, or one without its -wal file"]


def _transfers(connection: Connection, study: str) -> int:
    return int(connection.execute(select(func.count()).where(transfer.c.study == study)).scalar_one())


def _time(connection: Connection, study: str) -> list[str]:
    """Every worker's charges are its settled time at its price, and open holds cover exactly the living workers."""
    found = []
    charged = select(func.coalesce(func.sum(transfer.c.amount_micros), 0)).where(
        transfer.c.study == study, transfer.c.kind.in_(("settle", "expire"))
    )
    open_holds = set(
        connection.execute(select(hold.c.id).where(hold.c.study == study, hold.c.state == "open")).scalars()
    )
    for worker in records.workers(connection, study):
        # A worker's holds are `<worker>:s<slice>`.
        mine = charged.where(transfer.c.hold_id.startswith(f"{worker.id}:s", autoescape=True))
        lost = select(func.coalesce(func.sum(transfer.c.amount_micros), 0)).where(
            transfer.c.study == study,
            transfer.c.kind == "overrun",
            transfer.c.id.startswith(f"overrun:{worker.id}:s", autoescape=True),
        )
        returned = select(func.coalesce(func.sum(transfer.c.amount_micros), 0)).where(
            transfer.c.study == study,
            transfer.c.kind == "refund",
            transfer.c.reverses_id.startswith(f"expire:{worker.id}:s", autoescape=True),
        )
        paid = sum(int(connection.execute(q).scalar_one()) * s for q, s in ((mine, 1), (lost, 1), (returned, -1)))
        expected = worker.tariff.cost(worker.settled_ms)
        if paid != expected:
            found.append(f"worker {worker.id} was charged {paid} micro-dollars for {worker.settled_ms} ms: {expected}")
        if worker.state == "ended" and worker.hold in open_holds:
            found.append(f"worker {worker.id} ended but its hold {worker.hold} is open")
        if worker.state != "ended" and worker.hold not in open_holds:
            found.append(f"worker {worker.id} lives without an open hold")
        open_holds.discard(worker.hold)
    return found + [f"hold {identifier} of {BUDGET} belongs to no worker" for identifier in sorted(open_holds)]


def _trials(connection: Connection, study: str) -> list[str]:
    """Trials are numbered without a gap, confirmations by what they repeat; a slot is a living worker's."""
    trials = records.trials(connection, study)
    living = {worker.id for worker in records.workers(connection, study, living=True)}
    found = []
    searched = records.searched(trials)
    repeated = [trial for trial in trials if trial.source is not None]
    if [trial.number for trial in searched] != list(range(len(searched))):
        found.append(f"trials are not numbered 0 to {len(searched) - 1}")
    for trial in repeated:
        source = trial.run[0]
        if trial.number < CONFIRMATIONS or trial.source != source or source >= len(searched):
            found.append(f"trial {trial.number} confirms trial {trial.source}, its number says {source}")
    for trial in trials:
        if trial.slot is not None and trial.slot not in living:
            found.append(f"trial {trial.number} sits in a slot of {trial.slot}, which does not live")
    return found
