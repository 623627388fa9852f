"""Rows of our tables as plain objects, and the few statements that read and write them."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, Table, func, select, update

from budgets.tariff import Tariff
from sweep import clock, tables
from sweep.errors import NotFoundError, StudyBusyError
from sweep.spec import Spec
from trainers.messages import TrialConfig

RUNNING = ("waiting", "live", "judging")
ENDED = ("completed", "pruned", "failed")
_ORDINALS = 100  # numbers that the confirmations of one trial may have
_FINALE = 0  # the one of them that stands for its finale
TOKEN_METER = "token_meter.json"  # in the study's folder: what the meter runs on then (sweep/pricing.py)


@dataclass(frozen=True)
class Study:
    """A study's row; `facts` is what was seen before the first hold (model, data, price, rungs)."""

    name: str
    spec: Spec
    facts: dict[str, Any]
    state: str
    fence: int
    folder: str
    micros_per_hour: int
    tariff: Tariff  # what new workers are paid by
    unit: str
    phase: str
    base_loss: float | None
    base_rung_loss: float | None
    created_unix_ms: int
    outcome: str
    last_boot_ms: int | None
    boot_id: str | None

    @property
    def timings(self) -> str | None:
        """The file that the workers' meters run on, if it is not the clock: recorded seconds, or tokens."""
        return str(Path(self.folder) / TOKEN_METER) if self.unit == "Mtok" else self.spec.machine.timings


@dataclass(frozen=True)
class TrialRow:
    """A trial's row; losses in nats a completion token, see sweep/tables.py for the states."""

    number: int
    config: TrialConfig
    state: str
    target: int
    rung: int
    step: int
    tokens: int
    loss: float | None
    full_loss: float | None
    train_loss: float | None
    checkpoint: str | None
    checkpoint_tokens: int
    reason: str
    diverged: bool
    turn: int
    slot: str | None
    attempt: str | None
    told: bool
    metric: float | None = None
    metric_error: float | None = None
    source: int | None = None  # the trial whose configuration this one confirms, or trains in full

    @property
    def promoted(self) -> bool:
        """Whether it was sent beyond its last rung."""
        return self.target > self.rung

    @property
    def run(self) -> tuple[int, int]:
        """Of a confirmation: which trial it repeats, and under which of the new seeds, from 1; 0 is its finale."""
        return divmod(self.number - tables.CONFIRMATIONS, _ORDINALS)

    @property
    def finale(self) -> bool:
        """Whether it is the winner trained in full."""
        return self.source is not None and self.run[1] == _FINALE

    @property
    def label(self) -> str:
        """What people call it."""
        return label(self.number)


_TRIAL_FIELDS = tuple(field.name for field in dataclasses.fields(TrialRow))


@dataclass(frozen=True)
class WorkerRow:
    """A worker's row; all times in ms on its own meter but `origin_boot_ms`."""

    id: str
    ordinal: int
    state: str
    folder: str
    hold: str
    slice: int
    final: bool
    micros_per_hour: int
    tariff: Tariff
    origin_boot_ms: int
    boot_id: str
    paid_ms: int
    work_ms: int
    settled_ms: int
    settled_usage: dict[str, int]
    at_ms: int
    usage: dict[str, int]
    offset: int
    slots: dict[str, int]
    device: str | None
    load_ms: int | None
    exit_code: int | None
    why: str
    occupancy: float | None


def study(connection: Connection, name: str) -> Study:
    """Reads one study. Raises NotFoundError."""
    row = connection.execute(select(tables.study).where(tables.study.c.name == name)).mappings().one_or_none()
    if row is None:
        raise NotFoundError(f"there is no study {name}", "`sweep list` shows the studies of this database")
    values = dict(row)
    # A study from before there were confirmations has none, and one from before the model of curves goes on by rank.
    stored = {"endgame": {"seeds": 0}} | json.loads(values["spec"])
    stored["search"] = {"promote": "halving", "balance": "promise"} | stored.get("search", {})
    values["spec"] = Spec.model_validate(stored)
    values["facts"] = json.loads(values["facts"])
    values["tariff"] = _tariff(row)
    return Study(**values)


def own_study(connection: Connection, name: str, fence: int) -> Study:
    """Reads the study that the caller drives, locked to the transaction's end. Raises StudyBusyError if it lost it."""
    locked = select(tables.study.c.fence).where(tables.study.c.name == name).with_for_update()
    if connection.execute(locked).scalar_one() != fence:
        raise StudyBusyError(f"another orchestrator took study {name} over", "leave it to that one")
    return study(connection, name)


def study_names(connection: Connection) -> list[str]:
    """Names of all studies, oldest first."""
    query = select(tables.study.c.name).order_by(tables.study.c.created_unix_ms, tables.study.c.name)
    return list(connection.execute(query).scalars())


def trials(connection: Connection, name: str) -> list[TrialRow]:
    """All trials of a study by number."""
    return [_trial(tuple(row)) for row in connection.execute(_of_study(name).order_by(tables.trial.c.number))]


def trial(connection: Connection, name: str, number: int) -> TrialRow | None:
    """One trial of a study; None: there is none of this number."""
    row = connection.execute(_of_study(name).where(tables.trial.c.number == number)).one_or_none()
    return None if row is None else _trial(tuple(row))


def _of_study(name: str) -> Select[Any]:
    columns = [tables.trial.c[field] for field in _TRIAL_FIELDS]
    return select(*columns).where(tables.trial.c.study == name)


@functools.lru_cache(maxsize=1 << 14)
def _trial(row: tuple[Any, ...]) -> TrialRow:
    # Most rows are as they were when they were last read, and a loop reads them often.
    values = dict(zip(_TRIAL_FIELDS, row, strict=True))
    values |= {"config": TrialConfig(**json.loads(values["config"]))}
    values |= {"diverged": bool(values["diverged"]), "told": bool(values["told"])}
    return TrialRow(**values)


def workers(connection: Connection, name: str, *, living: bool = False) -> list[WorkerRow]:
    """The workers of a study in order; `living` leaves out those that ended."""
    query = select(tables.worker).where(tables.worker.c.study == name).order_by(tables.worker.c.ordinal)
    if living:
        query = query.where(tables.worker.c.state != "ended")
    found = []
    for row in connection.execute(query).mappings():
        values = {key: row[key] for key in row if key != "study"}
        for key in ("settled_usage", "usage", "slots"):
            values[key] = json.loads(row[key])
        found.append(WorkerRow(**(values | {"final": bool(row["final"]), "tariff": _tariff(row)})))
    return found


def _tariff(row: Any) -> Tariff:
    """What was stored before tariffs were is a single price."""
    return Tariff.flat(row["micros_per_hour"]) if row["tariff"] is None else Tariff.loads(row["tariff"])


def evaluations(connection: Connection, name: str) -> Sequence[Any]:
    """All evaluations of a study, in the order in which they arrived."""
    query = select(tables.evaluation).where(tables.evaluation.c.study == name)
    return connection.execute(query.order_by(tables.evaluation.c.ordinal)).all()


def kept(connection: Connection, name: str) -> tuple[int, ...]:
    """What a study need not do again if its worker dies now: how many trials ended, evaluations and examinations there
    are, and tokens behind checkpoints.
    """
    trial, evaluation, scores = tables.trial.c, tables.evaluation.c, tables.scores.c
    queries = [
        select(func.count()).where(trial.study == name, trial.state.in_(ENDED)),
        select(func.count()).where(evaluation.study == name),
        select(func.count()).where(scores.study == name),
        select(func.coalesce(func.sum(trial.checkpoint_tokens), 0)).where(trial.study == name),
    ]
    return tuple(int(connection.execute(query).scalar_one()) for query in queries)


def next_evaluation(connection: Connection, name: str) -> int:
    """The ordinal of the next evaluation of a study."""
    newest = select(func.coalesce(func.max(tables.evaluation.c.ordinal), 0)).where(tables.evaluation.c.study == name)
    return int(connection.execute(newest).scalar_one()) + 1


def newcomer(config: TrialConfig) -> TrialRow:
    """A trial that was just asked, as its row will be."""
    return TrialRow(
        number=config.number,
        config=config,
        state="waiting",
        target=0,
        rung=-1,
        step=0,
        tokens=0,
        loss=None,
        full_loss=None,
        train_loss=None,
        checkpoint=None,
        checkpoint_tokens=0,
        reason="",
        diverged=False,
        turn=0,
        slot=None,
        attempt=None,
        told=False,
    )


def next_turn(trials: Sequence[TrialRow]) -> int:
    """The turn of one that comes last."""
    return max((t.turn for t in trials), default=0) + 1


def add_trial(connection: Connection, name: str, config: TrialConfig, turn: int, **more: Any) -> None:
    """Adds a waiting trial; `more` are other columns."""
    values = {"study": name, "number": config.number, "state": "waiting", "turn": turn} | more
    connection.execute(tables.trial.insert().values(config=json.dumps(dataclasses.asdict(config)), **values))


def confirmation_number(source: int, ordinal: int) -> int:
    """The number of the trial that repeats trial `source` under the new seed number `ordinal`, from 1."""
    return tables.CONFIRMATIONS + source * _ORDINALS + ordinal


def finale_number(source: int) -> int:
    """The number of the finale of trial `source`."""
    return confirmation_number(source, _FINALE)


def label(number: int) -> str:
    """What people call a trial: `12`, `12·2` for what repeats it under the second of the new seeds, `12·0` for its
    finale."""
    if number < tables.CONFIRMATIONS:
        return str(number)
    source, ordinal = divmod(number - tables.CONFIRMATIONS, _ORDINALS)
    return f"{source}·{ordinal}"


def searched(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """The trials of the search: all but those of the endgame."""
    return [trial for trial in trials if trial.source is None]


def confirmations(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """The trials that repeat others under new seeds."""
    return [trial for trial in trials if trial.source is not None and not trial.finale]


def finales(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """The trials that are a winner trained in full: one of each winner that there was."""
    return [trial for trial in trials if trial.finale]


def set_trial(connection: Connection, name: str, number: int, **values: Any) -> None:
    """Updates columns of one trial."""
    _one(connection, tables.trial, (tables.trial.c.study == name) & (tables.trial.c.number == number), values)


def set_worker(connection: Connection, identifier: str, **values: Any) -> None:
    """Updates columns of one worker; dictionaries and tariffs are stored as JSON."""
    _one(connection, tables.worker, tables.worker.c.id == identifier, {k: _plain(v) for k, v in values.items()})


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value.dumps() if isinstance(value, Tariff) else value


def pay_on(connection: Connection, name: str) -> None:
    """A living worker's slice is not its last: there is money again."""
    mine = (tables.worker.c.study == name) & (tables.worker.c.state != "ended")
    connection.execute(update(tables.worker).where(mine).values(final=0))


def set_study(connection: Connection, name: str, **values: Any) -> None:
    """Updates columns of one study."""
    _one(connection, tables.study, tables.study.c.name == name, {k: _plain(v) for k, v in values.items()})


def _one(connection: Connection, table: Table, where: Any, values: dict[str, Any]) -> None:
    changed = connection.execute(update(table).where(where).values(**values))
    if changed.rowcount != 1:
        raise RuntimeError(f"{table.name}: {changed.rowcount} rows instead of one")


def note(connection: Connection, name: str, kind: str, text: str, trial: int | None = None) -> None:
    """Appends to the study's log, which people read and no decision does."""
    values = {"study": name, "unix_ms": clock.unix_ms(), "kind": kind, "trial": trial, "text": text}
    connection.execute(tables.log.insert().values(**values))


def log_after(connection: Connection, name: str, last: int) -> Sequence[Any]:
    """Log rows with an id over `last`, in order."""
    query = select(tables.log).where(tables.log.c.study == name, tables.log.c.id > last).order_by(tables.log.c.id)
    return connection.execute(query).all()
