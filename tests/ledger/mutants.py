"""Broken ledgers, each with one mistake that somebody could make. The suite must catch every one.

    mutant               its mistake                               caught by                          on
    ReadsThenWrites      reads what is held, writes the sum        turn: the audit                    PostgreSQL
    ChecksBeforeTheLock  what it compares with may be old          turn: CHECK never_overdrawn        PostgreSQL
    ForgetsTheRest       a settled hold keeps what it did not use  model: the audit                   SQLite
    ResolvesTwice        resolves a hold that is closed            model: trigger "closed hold"       both
    ResolvesUnseen       ... with the state in the WHERE, but      model: the audit, or CHECK         both
                         no look at whether a row was hit          held_not_negative
    IgnoresTheFence      obeys an owner that was replaced          model: HoldClosed is missing       SQLite
    ChargesAgain         a repeated charge is one more charge      model: the balances                SQLite
    ReturnsTheExpired    takes silence for no use                  model: the balances                SQLite
    ExtendsByAmount      the target is taken for a difference      model: the holds, or a refusal     SQLite
    HidesTheOverrun      what was lost is posted nowhere           model: the balances, or a bill     SQLite
    RefundsAgain         a repeated refund is one more refund      model: the balances, a refusal, or SQLite
                                                                   CHECK never_overdrawn

`model` is ledger_model.Books; `turn` is ledger_checks.waits_its_turn, a hold that waits behind another's transaction.
SQLite shows neither of the first two: BEGIN IMMEDIATE lets one transaction in at a time, so nothing that was read can
be old. That is why the suite runs on PostgreSQL too. The others do not depend on the database, unless it stops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, select, update

from budgets.ledger import BUDGET, RESERVE, BudgetExhausted, BudgetFrozen, Ledger
from budgets.schema import account, hold, transfer


class ReadsThenWrites(Ledger):
    """No lock, and no condition in the UPDATE."""

    def _lock(self) -> None:
        """Leaves the row to whoever wants it."""

    def _raise_held(self, code: str, amount: int, *, even_frozen: bool = False) -> None:
        if self.balances().frozen and not even_frozen:
            raise BudgetFrozen("frozen")
        row = self.connection.execute(select(account).where(self._where(code))).one()
        if row.balance_micros - row.held_micros < amount:
            raise BudgetExhausted("exhausted")
        raised = update(account).where(self._where(code)).values(held_micros=row.held_micros + amount)
        self.connection.execute(raised)


class ChecksBeforeTheLock(Ledger):
    """Compares with what was free before it waited."""

    def _lock(self) -> None:
        self.seen = {code: self._available(code) for code in (BUDGET, RESERVE)}
        super()._lock()

    def _raise_held(self, code: str, amount: int, *, even_frozen: bool = False) -> None:
        if self.balances().frozen and not even_frozen:
            raise BudgetFrozen("frozen")
        if self.seen[code] < amount and not even_frozen:
            raise BudgetExhausted("exhausted")
        raised = update(account).where(self._where(code)).values(held_micros=account.c.held_micros + amount)
        self.connection.execute(raised)


class ForgetsTheRest(Ledger):
    """Gives free only what was used of a settled hold."""

    def _close(self, row: Any, state: str, amount: int, actual: int, resolution: str) -> None:
        super()._close(row, state, actual if state == "settled" else amount, actual, resolution)


class ResolvesTwice(Ledger):
    """Asks nowhere whether the hold is open."""

    def _open_hold(self, identifier: str, fence: int, resolution: str) -> Any:
        row = self.connection.execute(select(hold).where(hold.c.id == identifier)).one()
        return row if row.fence == fence else super()._open_hold(identifier, fence, resolution)

    def _close(self, row: Any, state: str, amount: int, actual: int, resolution: str) -> None:
        values = {"state": state, "settled_micros": actual, "resolution": resolution}
        self.connection.execute(update(hold).where(hold.c.id == row.id).values(**values))
        free = update(account).where(self._where(row.account)).values(held_micros=account.c.held_micros - amount)
        self.connection.execute(free)


class ResolvesUnseen(ResolvesTwice):
    """Asks in the UPDATE, but goes on when it hit nothing."""

    def _close(self, row: Any, state: str, amount: int, actual: int, resolution: str) -> None:
        values = {"state": state, "settled_micros": actual, "resolution": resolution}
        self.connection.execute(update(hold).where(hold.c.id == row.id, hold.c.state == "open").values(**values))
        free = update(account).where(self._where(row.account)).values(held_micros=account.c.held_micros - amount)
        self.connection.execute(free)


class IgnoresTheFence(Ledger):
    """Obeys whoever knows the hold's id."""

    def _open_hold(self, identifier: str, fence: int, resolution: str) -> Any:
        newest = self.connection.execute(select(hold.c.fence).where(hold.c.id == identifier)).scalar_one()
        return super()._open_hold(identifier, newest, resolution)


class ChargesAgain(Ledger):
    """Numbers its charges itself, so that no repetition is known as one."""

    def charge(self, identifier: str, code: str, amount: int, *, note: str) -> None:
        """Charges whatever was charged before."""
        super().charge(_unused(self.connection, "charge:", identifier), code, amount, note=note)


class ReturnsTheExpired(Ledger):
    """Treats an expired hold as TigerBeetle does."""

    def expire(self, identifier: str, weights: Mapping[str, int], *, fence: int, note: str = "") -> None:
        """Charges nothing."""
        self.void(identifier, fence=fence)


class ExtendsByAmount(Ledger):
    """Widens by `to_amount`, so that a repetition widens again."""

    def extend(self, identifier: str, to_amount: int, *, fence: int) -> None:
        """Widens every time."""
        held = self.connection.execute(select(hold.c.amount_micros).where(hold.c.id == identifier)).scalar_one()
        super().extend(identifier, held + to_amount, fence=fence)


class HidesTheOverrun(Ledger):
    """Charges what the cap covers and forgets what it does not."""

    def _post_overrun(self, identifier: str, amount: int, note: str, **more: Any) -> None:
        """Posts nothing, freezes nothing."""


class RefundsAgain(Ledger):
    """Numbers its refunds itself, and so knows none again."""

    def _replayed(self, identifier: str, request: Mapping[str, object]) -> bool:
        return not identifier.startswith("refund:") and super()._replayed(identifier, request)

    def _transfer(self, identifier: str, kind: str, debit: str, credit: str, amount: int, **more: Any) -> None:
        if kind == "refund":
            identifier = _unused(self.connection, "", identifier)
        super()._transfer(identifier, kind, debit, credit, amount, **more)


def _unused(connection: Connection, prefix: str, identifier: str) -> str:
    while connection.execute(select(transfer.c.id).where(transfer.c.id == prefix + identifier)).one_or_none():
        identifier += "+"
    return identifier
