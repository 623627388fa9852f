"""The ledger's tables, with the same guards on SQLite and PostgreSQL.

    world --fund--> budget --settle/expire--> trial:N | overhead:* | idle
                    budget --move--> reserve          world --overrun--> overrun

A balance is credits minus debits, so all balances of a study sum to zero. Money in flight is `held_micros` on the
account that it will be taken from. Transfers are append-only: triggers refuse UPDATE and DELETE (on SQLite the store
also sets `recursive_triggers`, without which INSERT OR REPLACE would slip past the delete trigger).
"""

from __future__ import annotations

from sqlalchemy import (
    DDL,
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    event,
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

_SQLITE_GUARD = """
CREATE TRIGGER IF NOT EXISTS sweep_transfer_no_{verb} BEFORE {verb} ON sweep_transfer
BEGIN SELECT RAISE(ABORT, 'sweep_transfer is append-only'); END
"""
_POSTGRES_GUARD = """
CREATE OR REPLACE FUNCTION sweep_transfer_guard() RETURNS trigger LANGUAGE plpgsql AS
'BEGIN RAISE EXCEPTION ''sweep_transfer is append-only''; END';
DROP TRIGGER IF EXISTS sweep_transfer_append_only ON sweep_transfer;
CREATE TRIGGER sweep_transfer_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON sweep_transfer
EXECUTE FUNCTION sweep_transfer_guard()
"""
_GUARDS = [(_SQLITE_GUARD.format(verb="UPDATE"), "sqlite"), (_SQLITE_GUARD.format(verb="DELETE"), "sqlite")]
for _statement, _dialect in [*_GUARDS, (_POSTGRES_GUARD, "postgresql")]:
    event.listen(transfer, "after_create", DDL(_statement).execute_if(dialect=_dialect))  # type: ignore[no-untyped-call]
