"""Seats: how many trials train at once on a worker, and who takes a free one.

LoRA trials share a worker's slots, so that what a step costs whatever it trains is paid by all of them together; a
full-parameter trial has the machine to itself. A worker trains one method at a time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence

from sqlalchemy import Connection

from sweep import records, tables
from sweep.records import Study, TrialRow, WorkerRow

AHEAD = 0.25  # of a pack's slots: so many trials wait for one


def probes(study: Study) -> bool:
    """Whether the study's workers find out by themselves how many LoRA trials should train at once: on a GPU."""
    on_gpu = study.facts["device"] not in {"cpu", "replay"} and study.spec.machine.device != "cpu"
    return on_gpu and study.spec.machine.slots == "auto" and "lora" in study.spec.search.method


def slots(study: Study, workers: Sequence[WorkerRow]) -> int:
    """How many LoRA trials train at once on the study's worker, as the newest said; before one did, as many as may."""
    search, wanted = study.spec.search, study.spec.machine.slots
    said = [worker.slots["lora"] for worker in workers if "lora" in worker.slots]
    if "lora" not in search.method:
        return 1
    if said:
        return said[-1]
    if wanted != "auto":
        return wanted
    return search.live if probes(study) else 1


def live(study: Study, workers: Sequence[WorkerRow]) -> int:
    """How many trials take turns: as many as the spec says, but no slot stays empty for it.

    In a pack a few more, so that a slot that becomes free is taken while the sampler thinks about the next question.
    """
    return places(slots(study, workers), study.spec.search.live)


def places(count: int, least: int) -> int:
    """How many trials take turns in so many slots, if the spec wants `least` of them."""
    return max(least, count if count == 1 else count + math.ceil(count * AHEAD))


def width(count: int, trials: Sequence[TrialRow]) -> int:
    """How many LoRA trials train at once as things stand, on a worker of `count` slots."""
    return max(1, min(count, sum(t.state in records.RUNNING and t.config.method == "lora" for t in trials)))


def batch(trials: Sequence[TrialRow]) -> float | None:
    """The mean batch size of the LoRA trials that train or wait, which share what a step costs; None without any."""
    sizes = [t.config.batch_size for t in trials if t.state in records.RUNNING and t.config.method == "lora"]
    return statistics.fmean(sizes) if sizes else None


def free(worker: WorkerRow, trial: TrialRow, trials: Sequence[TrialRow], alone: Collection[int] = frozenset()) -> bool:
    """Whether a trial can be seated; `alone` are those that share a worker with nobody, by number."""
    # One that was told to leave has left by the time the worker reads the next command.
    seated = [t for t in trials if t.slot == worker.id and t.state in {"live", "judging"}]
    if seated and any(t.number in alone for t in [trial, *seated]):
        return False
    same = all(t.config.method == trial.config.method for t in seated)
    return same and len(seated) < worker.slots.get(trial.config.method, 0)


def take(connection: Connection, name: str, worker: WorkerRow, trial: TrialRow) -> None:
    """Seats a trial: its next attempt begins, from its last checkpoint."""
    mine = (tables.attempt.c.study == name) & (tables.attempt.c.trial == trial.number)
    count = len(connection.execute(tables.attempt.select().where(mine)).all())
    attempt = f"{name}:t{trial.number}:a{count + 1}:w{worker.ordinal}"
    values = {"study": name, "trial": trial.number, "worker": worker.id, "tokens": trial.tokens}
    connection.execute(tables.attempt.insert().values(id=attempt, from_tokens=trial.tokens, **values))
    records.set_trial(connection, name, trial.number, state="live", slot=worker.id, attempt=attempt)
