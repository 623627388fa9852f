"""What events from a worker change in our tables. One event, one transaction, together with how far we have read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence

from sqlalchemy import Connection

from sweep import records, tables
from sweep.projection import plan
from sweep.records import Study, TrialRow, WorkerRow
from sweep.store import Store
from trainers.messages import (
    Admitted,
    BaseEvaluated,
    BaseExamined,
    Checkpointed,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Failed,
    Paused,
    Progress,
    Ready,
    Scores,
    TrialEvent,
)

# Events between two steps of the loop, and seconds: a pack may come to a rung as one, and waits for what is decided.
AT_ONCE, LONGEST_S = 32, 0.5


def take_in(
    store: Store, study: Study, worker: WorkerRow, events: Sequence[tuple[int, Event]]
) -> Iterator[tuple[Event, bool]]:
    """Applies a worker's next events, with the offsets past them; yields each, and whether what it measured is stored.

    After the first sign of life, and the last, the loop looks at the worker before it goes on; after LONGEST_S, whether
    that must be paid. On recorded timings it is one event, so that decisions follow from the events alone.
    """
    begun = time.monotonic()
    for offset, event in events[: AT_ONCE if study.timings is None else 1]:
        with store.write() as connection:
            new = apply(connection, study, worker, event, offset)
        yield event, new
        if isinstance(event, Ready | Ended) or time.monotonic() - begun > LONGEST_S:
            return


def apply(connection: Connection, study: Study, worker: WorkerRow, event: Event, offset: int) -> bool:
    """Applies one event of a worker and moves its read offset past it; False if what it measured is not stored."""
    records.set_worker(connection, worker.id, at_ms=event.at_ms, usage=event.usage, offset=offset)
    if isinstance(event, Evaluated | Ended) and event.occupancy is not None:
        records.set_worker(connection, worker.id, occupancy=event.occupancy)
    match event:
        case Ready():
            _ready(connection, study, worker, event)
        case BaseEvaluated():
            records.set_study(connection, study.name, base_loss=event.loss, base_rung_loss=event.rung_loss)
            records.note(connection, study.name, "base", f"the untrained model's validation loss is {event.loss:.4f}")
        case BaseExamined():
            _scores(connection, study.name, tables.UNTRAINED, event.scores, event.majority)
            records.note(connection, study.name, "base", "the untrained model is scored on the test rows")
        case Ended():
            why = f"{event.reason}: {event.message}" if event.message else event.reason
            records.set_worker(connection, worker.id, why=why)
        case TrialEvent():
            trial = records.trial(connection, study.name, event.trial)
            # A worker that was replaced may still have spoken of a trial that has another attempt by now.
            if trial is None or trial.attempt != event.attempt:
                return False
            return _trial_event(connection, study, trial, event)
    return True


def _ready(connection: Connection, study: Study, worker: WorkerRow, event: Ready) -> None:
    records.set_worker(
        connection, worker.id, state="ready", slots=event.slots, device=event.device, load_ms=event.at_ms
    )
    if event.stream_tokens is not None:  # what measured peaks are compared with (sweep/fit.py)
        facts = records.study(connection, study.name).facts | {"stream_tokens": event.stream_tokens}
        records.set_study(connection, study.name, facts=json.dumps(facts))
    text = f"worker {worker.ordinal} is ready on {event.device} after {event.at_ms / 1000:.1f} s"
    records.note(connection, study.name, "ready", text)


def _trial_event(connection: Connection, study: Study, trial: TrialRow, event: TrialEvent) -> bool:
    name, number = study.name, trial.number
    tables_attempt = tables.attempt.update().where(tables.attempt.c.id == event.attempt)
    connection.execute(tables_attempt.values(tokens=event.tokens))
    records.set_trial(connection, name, number, step=event.step, tokens=event.tokens)
    match event:
        case Admitted():
            goes_on = f"goes on at {event.tokens:,} tokens" if event.tokens else "starts"
            text = f"trial {trial.label} {goes_on}"
            records.note(connection, name, "admitted", text, number)
        case Progress():
            records.set_trial(connection, name, number, train_loss=_number(event.train_loss))
        case Checkpointed():
            records.set_trial(connection, name, number, checkpoint=event.checkpoint, checkpoint_tokens=event.tokens)
            _state(connection, name, trial, event.checkpoint_ms)
        case Evaluated():
            return _evaluated(connection, study, trial, event)
        case Paused():
            _left(connection, name, trial, event.attempt, "paused")
            records.set_trial(connection, name, number, checkpoint=event.checkpoint, checkpoint_tokens=event.tokens)
            _state(connection, name, trial, event.checkpoint_ms)
        case Dropped():
            _left(connection, name, trial, event.attempt, "dropped")
            if trial.config.method == "full" and trial.state != "completed":  # the worker removed what was written
                records.set_trial(connection, name, number, checkpoint=None, checkpoint_tokens=0)
        case Failed():
            _failed(connection, name, trial, event)
    return True


def _evaluated(connection: Connection, study: Study, trial: TrialRow, event: Evaluated) -> bool:
    """Stores an evaluation; False if it was known (a rung reached again) or is no number."""
    # Where a run has few steps its last one passes the rungs before: who is at its end is not asked to go on to it.
    rung = plan(study.facts).last if event.final else trial.target
    known = (tables.evaluation.c.study == study.name) & (tables.evaluation.c.trial == trial.number)
    row = tables.evaluation.select().where(known & (tables.evaluation.c.rung == rung))
    new = math.isfinite(event.loss) and connection.execute(row).one_or_none() is None
    if new:
        connection.execute(
            tables.evaluation.insert().values(
                study=study.name,
                trial=trial.number,
                rung=rung,
                tokens=event.tokens,
                step=event.step,
                loss=event.loss,
                full_loss=event.full_loss,
                train_loss=_number(event.train_loss),
                train_tokens=event.train_tokens,
                train_ms=event.train_ms,
                evaluate_tokens=event.evaluate_tokens,
                evaluate_ms=event.evaluate_ms,
                checkpoint_ms=event.checkpoint_ms,
                attempt=event.attempt,
                ordinal=records.next_evaluation(connection, study.name),
                width=event.width,
                shared_batch=event.shared_batch,
                peak_bytes=event.peak_bytes,
                examine_ms=event.examine_ms,
                write_ms=event.write_ms,
                warm_ms=event.warm_ms,
                warm_tokens=event.warm_tokens,
            )
        )
    _scores(connection, study.name, trial.number, event.scores, {})
    # One that was parked while it was evaluated for the last time has nothing left to go on to.
    judged = trial.state == "live" or (event.final and trial.state in {"paused", "waiting"})
    written = {"checkpoint": event.checkpoint, "checkpoint_tokens": event.tokens} if event.checkpoint else {}
    records.set_trial(
        connection,
        study.name,
        trial.number,
        state="judging" if judged else trial.state,
        rung=rung,
        target=rung,
        loss=_number(event.loss),
        full_loss=_number(event.full_loss),
        train_loss=_number(event.train_loss),
        metric=_number(event.metric),
        metric_error=_number(event.metric_error),
        **written,
    )
    return new


def _state(connection: Connection, name: str, trial: TrialRow, ms: int) -> None:
    """Stores how long a full-parameter trial's state took to write, of which there are few, and before which of the
    evaluations: forecasts learn in the same order again."""
    if trial.config.method == "full" and ms:
        facts = records.study(connection, name).facts
        facts["state_ms"] = [*facts.get("state_ms", []), [records.next_evaluation(connection, name), ms]]
        records.set_study(connection, name, facts=json.dumps(facts))


def _scores(
    connection: Connection, name: str, trial: int, scores: Mapping[str, Scores], majority: Mapping[str, float]
) -> None:
    """Stores a model's scores by split; what is there already was measured in a life that ended unheard."""
    for split, found in scores.items():
        mine = (tables.scores.c.study == name) & (tables.scores.c.trial == trial) & (tables.scores.c.split == split)
        connection.execute(tables.scores.delete().where(mine))
        connection.execute(
            tables.scores.insert().values(
                study=name,
                trial=trial,
                split=split,
                nll=json.dumps(found.nll),
                tokens=json.dumps(found.tokens),
                metric=None if found.metric is None else json.dumps(found.metric),
                majority=majority.get(split),
            )
        )


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _left(connection: Connection, name: str, trial: TrialRow, attempt: str, how: str) -> None:
    records.set_trial(connection, name, trial.number, slot=None)
    end_attempt(connection, attempt, how)


def end_attempt(connection: Connection, attempt: str, how: str) -> None:
    """Notes how an attempt ended."""
    connection.execute(tables.attempt.update().where(tables.attempt.c.id == attempt).values(ended=how))


def _failed(connection: Connection, name: str, trial: TrialRow, event: Failed) -> None:
    _left(connection, name, trial, event.attempt, "failed")
    if trial.state in records.ENDED:
        return
    if event.code == "disk":  # not the trial's fault: it goes on from its last checkpoint
        rewind(connection, name, trial)
        records.note(connection, name, "disk", event.message, trial.number)
        return
    state = "pruned" if event.code == "diverged" else "failed"
    reason = f"{event.code.replace('_', ' ')}: {event.message}"
    records.set_trial(
        connection, name, trial.number, state=state, reason=reason, diverged=int(event.code == "diverged")
    )
    records.note(connection, name, state, f"trial {trial.label} {state}: {reason}", trial.number)


def rewind(connection: Connection, name: str, trial: TrialRow) -> None:
    """Takes a trial that lost its slot back to its last checkpoint; one that was to run waits for its turn again."""
    state = "waiting" if trial.state == "live" else trial.state
    records.set_trial(connection, name, trial.number, state=state, slot=None, tokens=trial.checkpoint_tokens)
