"""What the tables say now, read once for all decisions until the next write.

Nobody else writes a study's tables while it is driven, so they are read anew after a write of ours alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sweep import endgame, records, seats
from sweep.endgame import Race
from sweep.projection import Projector
from sweep.records import Study, TrialRow, WorkerRow
from sweep.rungs import Policy, Results
from sweep.store import Store
from sweep.tables import CONFIRMATIONS
from trainers.messages import Method


@dataclass(frozen=True)
class Current:
    """A study's rows. The search and the race are kept apart: rungs, triage and the sampler see the search alone."""

    writes: int  # the store's when these were read
    trials: list[TrialRow]  # of the search
    results: Results  # of these
    evaluations: list[Any]  # of these, as they are stored, in the order in which they arrived
    confirmations: list[TrialRow]
    finales: list[TrialRow]
    examined: bool  # whether the untrained model's scores are known
    worker: WorkerRow | None  # that lives
    slots: int
    live: int

    @property
    def everyone(self) -> list[TrialRow]:
        """All that may sit in a slot."""
        return [*self.trials, *self.confirmations, *self.finales]

    def race(self, study: Study, projector: Projector) -> Race:
        """The race as it stands."""
        seats: dict[Method, int] = {"lora": self.slots, "full": 1}
        return Race(study, self.trials, self.confirmations, self.finales, projector, seats, self.examined)

    @property
    def anybody_runs(self) -> bool:
        """Whether any of them waits, trains or is judged."""
        return any(trial.state in records.RUNNING for trial in self.everyone)


def read(store: Store, study: Study, policy: Policy | None) -> Current:
    """Reads the rows of a study that we drive; `policy` decides at its rungs."""
    writes = store.writes
    with store.read() as connection:
        workers = records.workers(connection, study.name)
        trials = records.trials(connection, study.name)
        rows = records.evaluations(connection, study.name)
        examined = endgame.examined(connection, study.name)
    return Current(
        writes=writes,
        trials=records.searched(trials),
        results=Results.of_search(rows, policy),
        evaluations=[row for row in rows if row.trial < CONFIRMATIONS],
        confirmations=records.confirmations(trials),
        finales=records.finales(trials),
        examined=examined,
        worker=next((worker for worker in workers if worker.state != "ended"), None),
        slots=seats.slots(study, workers),
        live=seats.live(study, workers),
    )
