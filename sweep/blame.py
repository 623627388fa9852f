"""Who is to blame where workers die: a trial, the machine, or what the study was given.

A trial that crashes its worker would take the whole study with it: all others of its pack lose what they did since
their checkpoints, and each next worker dies as well. So who was in two crashes since its last checkpoint is seated
alone, after all others, and who is in another one alone has failed. Workers that were killed from outside blame nobody.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from sqlalchemy import Connection, func, select

from sweep import records, tables
from sweep.records import TrialRow, WorkerRow
from trainers.messages import EXIT_DISK, UsageRecord

SUSPECT, BLAMED = 2, 3  # crashes of a trial's workers since its last checkpoint
MAX_DEATHS = 3  # workers that die in a row before anything that they did was kept
_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)  # by the kernel for want of memory, a provider, a user


def crashed(record: UsageRecord | None) -> bool:
    """Whether a worker ended by itself, and not as it should, as its watchdog's last record says."""
    if record is None or not record.ended or record.why != "exit":
        return False
    return record.exit_code not in (None, 0, EXIT_DISK, *_OUTSIDE)


def crashes(connection: Connection, name: str) -> dict[int, int]:
    """How often the workers of each trial of a study crashed while it trained, since its last checkpoint."""
    attempt, trial = tables.attempt.c, tables.trial.c
    mine = (attempt.study == trial.study) & (attempt.trial == trial.number) & (trial.study == name)
    query = select(attempt.trial, func.count()).join_from(tables.attempt, tables.trial, mine)
    query = query.where(attempt.ended == "crashed", attempt.from_tokens == trial.checkpoint_tokens)
    return {int(number): int(count) for number, count in connection.execute(query.group_by(attempt.trial))}


def suspects(connection: Connection, name: str) -> set[int]:
    """The trials that may be to blame: each of them trains alone until it has another checkpoint."""
    return {number for number, count in crashes(connection, name).items() if count >= SUSPECT}


def judge(connection: Connection, name: str, lost: Sequence[TrialRow], why: str) -> None:
    """After a crash in which these trials trained: who was alone, and was in others before, has failed.

    Everybody else who was in them is above suspicion then.
    """
    if len(lost) != 1 or crashes(connection, name).get(lost[0].number, 0) < BLAMED:
        return
    (trial,) = lost
    reason = f"its workers crashed {BLAMED} times, the last one with it alone ({why})"
    records.set_trial(connection, name, trial.number, state="failed", reason=reason)
    records.note(connection, name, "failed", f"trial {trial.label} failed: {reason}", trial.number)
    mine = (tables.attempt.c.study == name) & (tables.attempt.c.ended == "crashed")
    connection.execute(tables.attempt.update().where(mine).values(ended="lost"))


class Deaths:
    """Counts workers that died in a row before anything that they did was kept."""

    def __init__(self) -> None:
        self._count = 0
        self._kept: tuple[int, ...] = ()

    def another(self, worker: WorkerRow, kept: tuple[int, ...]) -> str | None:
        """Counts one more; returns why no other should be paid for, if so. `kept` is `records.kept` after its end."""
        self._count = self._count + 1 if kept == self._kept else 1
        self._kept = kept
        # Model and data that it could not use no other worker on this machine could either.
        if worker.load_ms is None and worker.why.startswith(("error: ModelError: ", "error: DataError: ")):
            return f"the worker could not start: {worker.why.removeprefix('error: ')}"
        if not worker.final and self._count >= MAX_DEATHS:
            why = worker.why or "killed"
            return f"the worker died {self._count} times and nothing that it trained was kept ({why})"
        return None
