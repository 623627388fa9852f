"""The ledger's tables, with the same guards on SQLite and PostgreSQL.

    world --fund--> budget --settle/expire--> trial:N | overhead:* | idle
                    budget --move--> reserve          world --overrun--> overrun

A balance is credits minus debits, so all balances of a study sum to zero. Money in flight is `held_micros` on the
account that it will be taken from. Transfers are append-only and closed holds final: triggers (`guard`) refuse UPDATE,
DELETE and, on SQLite, the INSERT OR REPLACE that would slip past them.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
)

metadata = MetaData()

# STRICT tables on SQLite know INTEGER (64 bits there) but not BIGINT.
Micros = BigInteger().with_variant(Integer(), "sqlite")

account = Table(
    "sweep_account",
    metadata,
    Column("study", Text, nullable=False),
    Column("code", Text, nullable=False),
    Column("may_go_negative", Integer, nullable=False, server_default="0"),  # 1 for world alone
    Column("balance_micros", Micros, nullable=False, server_default="0"),
    Column("held_micros", Micros, nullable=False, server_default="0"),
    Column("seq", Micros, nullable=False, server_default="0"),  # on budget: number of the study's last transfer
    Column("frozen", Integer, nullable=False, server_default="0"),  # on budget: 1 after an overrun, no new holds
    PrimaryKeyConstraint("study", "code"),
    CheckConstraint("may_go_negative IN (0, 1)", name="flag"),
    CheckConstraint("frozen IN (0, 1)", name="frozen_flag"),
    CheckConstraint("held_micros >= 0", name="held_not_negative"),
    CheckConstraint("may_go_negative = 1 OR balance_micros - held_micros >= 0", name="never_overdrawn"),
    sqlite_strict=True,
)

hold = Table(
    "sweep_hold",
    metadata,
    Column("id", Text, primary_key=True),  # made by the caller before the first try: replays are safe
    Column("study", Text, nullable=False),
    Column("account", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("request_hash", Text, nullable=False),
    Column("amount_micros", Micros, nullable=False),
    Column("fence", Micros, nullable=False),
    Column("state", Text, nullable=False, server_default="open"),
    Column("settled_micros", Micros),
    Column("resolution", Text),  # hash of the request that closed it: a replay is told from another request
    ForeignKeyConstraint(["study", "account"], ["sweep_account.study", "sweep_account.code"]),
    CheckConstraint("amount_micros > 0", name="amount_positive"),
    CheckConstraint("state IN ('open', 'settled', 'voided', 'expired')", name="known_state"),
    CheckConstraint("settled_micros IS NULL OR settled_micros BETWEEN 0 AND amount_micros", name="settled_within_hold"),
    CheckConstraint("(state = 'open') = (settled_micros IS NULL)", name="closed_has_amount"),
    sqlite_strict=True,
)

transfer = Table(
    "sweep_transfer",
    metadata,
    Column("id", Text, primary_key=True),  # 'settle:<hold>:<account>' and the like: the idempotency key
    Column("study", Text, nullable=False),
    Column("seq", Micros, nullable=False),
    Column("kind", Text, nullable=False),
    Column("debit", Text, nullable=False),
    Column("credit", Text, nullable=False),
    Column("amount_micros", Micros, nullable=False),
    Column("hold_id", Text),
    Column("usage_ms", Micros),
    Column("micros_per_hour", Micros),
    Column("reverses_id", Text),
    Column("note", Text, nullable=False, server_default=""),
    Column("request_hash", Text),  # where the amount depends on the moment, what was asked for
    Column("recorded_unix_ms", Micros, nullable=False),  # for people; no decision reads it
    ForeignKeyConstraint(["study", "debit"], ["sweep_account.study", "sweep_account.code"]),
    ForeignKeyConstraint(["study", "credit"], ["sweep_account.study", "sweep_account.code"]),
    ForeignKeyConstraint(["hold_id"], ["sweep_hold.id"]),
    ForeignKeyConstraint(["reverses_id"], ["sweep_transfer.id"]),
    CheckConstraint("amount_micros > 0", name="amount_positive"),
    CheckConstraint("debit <> credit", name="two_accounts"),
    CheckConstraint("kind IN ('fund', 'move', 'settle', 'expire', 'refund', 'overrun')", name="known_kind"),
    sqlite_strict=True,
)

_SQLITE_GUARDS = {
    # INSERT OR REPLACE deletes what it replaces without firing a delete trigger, unless the connection has
    # recursive_triggers on; the insert guards stop it on any connection.
    ("sweep_transfer", "UPDATE", ""): "sweep_transfer is append-only",
    ("sweep_transfer", "DELETE", ""): "sweep_transfer is append-only",
    (
        "sweep_transfer",
        "INSERT",
        "WHEN EXISTS (SELECT 1 FROM sweep_transfer WHERE id = NEW.id OR (study = NEW.study AND seq = NEW.seq))",
    ): "sweep_transfer is append-only",
    # Under another id, UPDATE OR REPLACE would delete the hold that has it.
    ("sweep_hold", "UPDATE", "WHEN OLD.state <> 'open' OR NEW.id <> OLD.id"): "a closed hold never changes",
    ("sweep_hold", "DELETE", ""): "no hold is ever deleted",
    ("sweep_hold", "INSERT", "WHEN EXISTS (SELECT 1 FROM sweep_hold WHERE id = NEW.id)"): "no hold is ever replaced",
}
_POSTGRES_GUARDS = (
    """
    CREATE OR REPLACE FUNCTION sweep_refuse() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN RAISE EXCEPTION USING MESSAGE = TG_ARGV[0]; END'
    """,
    """
    CREATE OR REPLACE TRIGGER sweep_transfer_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON sweep_transfer
    EXECUTE FUNCTION sweep_refuse('sweep_transfer is append-only')
    """,
    """
    CREATE OR REPLACE TRIGGER sweep_hold_closed BEFORE UPDATE ON sweep_hold
    FOR EACH ROW WHEN (OLD.state <> 'open') EXECUTE FUNCTION sweep_refuse('a closed hold never changes')
    """,
    """
    CREATE OR REPLACE TRIGGER sweep_hold_kept BEFORE DELETE OR TRUNCATE ON sweep_hold
    EXECUTE FUNCTION sweep_refuse('no hold is ever deleted')
    """,
)
_NUMBERED_ONCE = "CREATE UNIQUE INDEX IF NOT EXISTS sweep_transfer_seq ON sweep_transfer (study, seq)"


def guard(connection: Connection) -> None:
    """Puts the triggers up that keep history as it is. Safe to repeat."""
    connection.exec_driver_sql(_NUMBERED_ONCE)
    if connection.dialect.name == "postgresql":
        for statement in _POSTGRES_GUARDS:
            connection.exec_driver_sql(statement)
        return
    for (table, verb, when), message in _SQLITE_GUARDS.items():
        connection.exec_driver_sql(
            f"CREATE TRIGGER IF NOT EXISTS {table}_no_{verb.lower()} BEFORE {verb} ON {table} {when} "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )
