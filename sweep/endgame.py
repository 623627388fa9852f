"""What happens with the reserve: the search cannot touch it; when the search ends it brings the leader to its end."""

from __future__ import annotations

from sqlalchemy import Connection, update

from budgets.ledger import Ledger
from budgets.money import usd
from sweep import records, tables
from sweep.records import Study


def begin(connection: Connection, study: Study) -> int:
    """Ends the search: releases the reserve and returns how much that was, 0 if there is none (any more).

    From here on nobody new is asked for. A living worker's last slice is no longer its last.
    """
    if study.phase != "search":
        return 0
    freed = Ledger(connection, study.name).release("endgame", note="the search is over")
    if freed:
        records.set_study(connection, study.name, phase="endgame")
        mine = (tables.worker.c.study == study.name) & (tables.worker.c.state != "ended")
        connection.execute(update(tables.worker).where(mine).values(final=0))
        records.note(connection, study.name, "endgame", f"the search is over; the reserve of {usd(freed)} is released")
    return freed
