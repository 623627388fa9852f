"""The orchestrator's tables, beside the ledger's (budgets/schema.py) and Optuna's own.

A trial's state:

    waiting ──> live ──> judging ──> waiting | live        (promoted: to the next rung)
       ^                    ├──────> paused ──> waiting     (promoted later, or more money)
       └── its worker died  ├──────> completed
                            └──────> pruned | failed
"""

from __future__ import annotations

from sqlalchemy import (
    REAL,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)
from sqlalchemy.types import TypeEngine

from budgets.schema import Micros

metadata = MetaData()

CONFIRMATIONS = 1_000_000  # the number of the first trial that confirms another
UNTRAINED = -1  # stands for the base model where there is a trial's number

Real: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")  # the only name that STRICT tables know

study = Table(
    "sweep_study",
    metadata,
    Column("name", Text, primary_key=True),
    Column("spec", Text, nullable=False),  # the resolved spec, JSON
    Column("facts", Text, nullable=False),  # what trainers.check saw and what the price is, JSON
    Column("state", Text, nullable=False, server_default="open"),  # open, closed
    Column("fence", Micros, nullable=False, server_default="0"),
    Column("folder", Text, nullable=False),
    Column("micros_per_hour", Micros, nullable=False),  # the price now
    Column("tariff", Text),  # budgets.tariff.Tariff, JSON: what new workers are paid by
    Column("unit", Text, nullable=False, server_default="hour"),  # hour, or Mtok: the meter's hour is a million tokens
    Column("phase", Text, nullable=False, server_default="search"),  # search, then endgame: the reserve is released
    Column("base_loss", Real),
    Column("base_rung_loss", Real),
    Column("created_unix_ms", Micros, nullable=False),
    Column("outcome", Text, nullable=False, server_default=""),  # how the last run of the orchestrator ended
    Column("last_boot_ms", Micros),  # where the machine's clock stood when it was last charged, on boot `boot_id`
    Column("boot_id", Text),
    sqlite_strict=True,
)

trial = Table(
    "sweep_trial",
    metadata,
    Column("study", Text, nullable=False),
    Column("number", Integer, nullable=False),  # Optuna's trial number; from CONFIRMATIONS on it is none of Optuna's
    Column("config", Text, nullable=False),  # TrialConfig, JSON
    Column("state", Text, nullable=False),
    Column("target", Integer, nullable=False, server_default="0"),  # index of the rung it trains towards
    Column("rung", Integer, nullable=False, server_default="-1"),  # the last rung it was evaluated at
    Column("step", Integer, nullable=False, server_default="0"),
    Column("tokens", Micros, nullable=False, server_default="0"),
    Column("loss", Real),  # at its last rung, over the rung rows
    Column("full_loss", Real),  # at its end, over all validation rows
    Column("train_loss", Real),
    Column("checkpoint", Text),
    Column("checkpoint_tokens", Micros, nullable=False, server_default="0"),
    Column("reason", Text, nullable=False, server_default=""),
    Column("diverged", Integer, nullable=False, server_default="0"),
    Column("turn", Micros, nullable=False, server_default="0"),  # order among the waiting
    Column("slot", Text),  # the worker that it occupies a slot of
    Column("attempt", Text),
    Column("told", Integer, nullable=False, server_default="0"),  # Optuna knows its end
    Column("metric", Real),  # the user's, at its end, over all validation rows
    Column("metric_error", Real),  # its standard error
    Column("source", Integer),  # the trial whose configuration it repeats under another seed: a confirmation
    PrimaryKeyConstraint("study", "number"),
    ForeignKeyConstraint(["study"], ["sweep_study.name"]),
    sqlite_strict=True,
)

attempt = Table(
    "sweep_attempt",
    metadata,
    Column("id", Text, primary_key=True),
    Column("study", Text, nullable=False),
    Column("trial", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("from_tokens", Micros, nullable=False),
    Column("tokens", Micros, nullable=False),
    Column("ended", Text),  # paused, dropped, failed, lost, crashed (sweep/blame.py); NULL while it lasts
    ForeignKeyConstraint(["study", "trial"], ["sweep_trial.study", "sweep_trial.number"]),
    sqlite_strict=True,
)

evaluation = Table(
    "sweep_evaluation",
    metadata,
    Column("study", Text, nullable=False),
    Column("trial", Integer, nullable=False),
    Column("rung", Integer, nullable=False),
    Column("tokens", Micros, nullable=False),
    Column("step", Integer, nullable=False),
    Column("loss", Real, nullable=False),
    Column("full_loss", Real),
    Column("train_loss", Real),
    Column("train_tokens", Micros, nullable=False),
    Column("train_ms", Micros, nullable=False),
    Column("evaluate_tokens", Micros, nullable=False),
    Column("evaluate_ms", Micros, nullable=False),
    Column("checkpoint_ms", Micros, nullable=False),
    Column("attempt", Text, nullable=False),
    Column("ordinal", Integer, nullable=False, server_default="0"),  # the order in which they arrived, from 1
    Column("width", Real, nullable=False, server_default="1"),  # trials that trained at once: the stretch's mean
    Column("shared_batch", Real),  # examples of one step of all of them: the mean; NULL where nobody measured it yet
    Column("peak_bytes", Micros),  # of the worker's GPU memory, since the evaluation before
    Column("examine_ms", Micros, nullable=False, server_default="0"),  # of metric and scores
    Column("write_ms", Micros, nullable=False, server_default="0"),  # until the checkpoint was on the disk
    Column("warm_ms", Micros, nullable=False, server_default="0"),  # of train_ms, compiling and capturing
    Column("warm_tokens", Micros, nullable=False, server_default="0"),  # of train_tokens, in that time
    PrimaryKeyConstraint("study", "trial", "rung"),
    ForeignKeyConstraint(["study", "trial"], ["sweep_trial.study", "sweep_trial.number"]),
    sqlite_strict=True,
)

# By example, since methods are compared on the same examples.
scores = Table(
    "sweep_scores",
    metadata,
    Column("study", Text, nullable=False),
    Column("trial", Integer, nullable=False),  # UNTRAINED: the base model
    Column("split", Text, nullable=False),  # test, retention
    Column("nll", Text, nullable=False),  # JSON list: nats of each example's completion
    Column("tokens", Text, nullable=False),  # JSON list: completion tokens of each
    Column("metric", Text),  # JSON list: the user's metric of each
    Column("majority", Real),  # of the base model's: what the most frequent completion alone would score
    PrimaryKeyConstraint("study", "trial", "split"),
    ForeignKeyConstraint(["study"], ["sweep_study.name"]),
    sqlite_strict=True,
)

worker = Table(
    "sweep_worker",
    metadata,
    Column("id", Text, primary_key=True),
    Column("study", Text, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("state", Text, nullable=False),  # intended, started, ready, ended
    Column("folder", Text, nullable=False),
    Column("hold", Text, nullable=False),  # the open slice's
    Column("slice", Integer, nullable=False),
    Column("final", Integer, nullable=False, server_default="0"),  # the next slice was refused
    Column("micros_per_hour", Micros, nullable=False),
    Column("tariff", Text),  # budgets.tariff.Tariff, JSON: its prices so far
    Column("origin_boot_ms", Micros, nullable=False),
    Column("boot_id", Text, nullable=False),
    Column("paid_ms", Micros, nullable=False),
    Column("work_ms", Micros, nullable=False),
    Column("settled_ms", Micros, nullable=False, server_default="0"),
    Column("settled_usage", Text, nullable=False, server_default="{}"),
    Column("at_ms", Micros, nullable=False, server_default="0"),
    Column("usage", Text, nullable=False, server_default="{}"),
    Column("offset", Micros, nullable=False, server_default="0"),  # bytes of events.jsonl that were applied
    Column("slots", Text, nullable=False, server_default="{}"),
    Column("device", Text),
    Column("load_ms", Micros),
    Column("exit_code", Integer),
    Column("why", Text, nullable=False, server_default=""),
    Column("occupancy", Real),  # real tokens over tokens computed, in training LoRA trials
    ForeignKeyConstraint(["study"], ["sweep_study.name"]),
    sqlite_strict=True,
)

price = Table(
    "sweep_price",
    metadata,
    Column("study", Text, nullable=False),
    Column("number", Integer, nullable=False),  # from 1: the price at launch
    Column("micros_per_hour", Micros, nullable=False),
    Column("ceiling", Micros, nullable=False),
    Column("source", Text, nullable=False),
    Column("boot_id", Text, nullable=False),  # of the machine on which it was said, and its clock then:
    Column("boot_ms", Micros, nullable=False),  # a worker on the same machine is charged it from that moment on
    Column("unix_ms", Micros, nullable=False),  # for people
    PrimaryKeyConstraint("study", "number"),
    ForeignKeyConstraint(["study"], ["sweep_study.name"]),
    sqlite_strict=True,
)

log = Table(
    "sweep_event",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("study", Text, nullable=False),
    Column("unix_ms", Micros, nullable=False),  # for people
    Column("kind", Text, nullable=False),
    Column("trial", Integer),
    Column("text", Text, nullable=False),
    Index("sweep_event_study", "study", "id"),
    sqlite_strict=True,
)

schema = Table("sweep_schema", metadata, Column("version", Integer, primary_key=True), sqlite_strict=True)
