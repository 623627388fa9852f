"""The ledger: a cap that cannot be overspent, in any committed state of the database.

    hold ──> settle    used: charged by cost centre, the rest returns to the account
      ├───> void       provably never used: everything returns
      └───> expire     nobody knows: charged in full, refunded on evidence

What it guarantees: `spent + held <= cap` always, by one conditional UPDATE (reserve what may be spent before it is
spent) and by CHECK constraints behind it; every hold is resolved at most once; every verb may be repeated with the
same id and has its effect once; money that was lost all the same is posted to `overrun` and freezes the study.
The verbs run in the caller's transaction, so a settlement and what it pays for commit together. They take the
`budget` row's lock first, so that there is one lock order.

The model is TigerBeetle's two-phase transfers with pessimistic limits (docs/coding/two-phase-transfers.md there),
except that an expired hold is charged, not returned: a machine that fell silent may well have run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Table, and_, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from budgets.money import split_micros
from budgets.schema import account, hold, transfer

WORLD, BUDGET, RESERVE, IDLE, OVERRUN = "world", "budget", "reserve", "idle", "overrun"
OVERHEAD = tuple(f"overhead:{name}" for name in ("load", "compile", "checkpoint", "teardown"))


class LedgerError(Exception):
    """Base of what the ledger refuses."""


class BudgetExhausted(LedgerError):
    """The hold does not fit what is left."""


class BudgetFrozen(LedgerError):
    """An overrun froze the study; no new holds."""


class HoldClosed(LedgerError):
    """The hold was resolved otherwise before, or was taken over under a newer fence."""


class IdempotencyConflict(LedgerError):
    """The same id with another request."""


class CapTooLow(LedgerError):
    """The new cap is under what is spent and held already."""


@dataclass(frozen=True)
class Balances:
    """Where a study's money is, in micro-dollars; read in one statement, so of one committed state."""

    cap: int
    spent: int  # trials + overhead + idle; overrun is not in it
    held: int
    left: int  # what budget and reserve could still hold
    overrun: int
    reserve: int
    frozen: bool
    accounts: dict[str, int]


def trial_account(number: int) -> str:
    """Returns the account of a trial."""
    return f"trial:{number}"


class Ledger:
    """One study's accounts on one connection. Every method is part of the caller's transaction."""

    def __init__(self, connection: Connection, study: str) -> None:
        self.connection = connection
        self.study = study

    def open(self, cap_micros: int) -> None:
        """Makes the study's accounts and funds the budget with the cap. Safe to repeat."""
        if cap_micros <= 0:
            raise ValueError("the cap must be positive")
        for code in (WORLD, BUDGET, RESERVE, IDLE, OVERRUN, *OVERHEAD):
            self._account(code)
        self._lock()
        self._transfer(f"fund:{self.study}:0", "fund", WORLD, BUDGET, cap_micros, note="cap at launch")

    def set_cap(self, cap_micros: int, request: str) -> None:
        """Raises or lowers the cap by one more transfer. Raises CapTooLow, never touching what is spent or held."""
        self._lock()
        identifier = f"fund:{self.study}:{request}"
        if self._existing(identifier) is not None:
            return
        balances = self.balances()
        change = cap_micros - balances.cap
        if change > 0:
            self._transfer(identifier, "fund", WORLD, BUDGET, change, note="cap raised")
        elif change < 0:
            if self._available(BUDGET) < -change:
                raise CapTooLow(f"spent and held are {balances.spent + balances.held} micro-dollars of {cap_micros}")
            self._transfer(identifier, "fund", BUDGET, WORLD, -change, note="cap lowered")

    def hold(self, identifier: str, amount: int, *, fence: int, purpose: str, account_code: str = BUDGET) -> None:
        """Sets `amount` aside.

        Raises BudgetExhausted or BudgetFrozen, and has then written nothing; IdempotencyConflict.
        """
        if amount <= 0:
            raise ValueError(f"a hold must be positive, not {amount}")
        request_hash = _digest({"study": self.study, "account": account_code, "amount": amount, "purpose": purpose})
        self._lock()
        known = self.connection.execute(select(hold.c.request_hash).where(hold.c.id == identifier)).scalar_one_or_none()
        if known == request_hash:
            return
        if known is not None:
            raise IdempotencyConflict(f"hold {identifier} exists with another request")
        if not self._raise_held(account_code, amount):
            if self.balances().frozen:
                raise BudgetFrozen(f"study {self.study} is frozen after an overrun")
            raise BudgetExhausted(f"{amount} micro-dollars do not fit the {self._available(account_code)} left")
        self.connection.execute(
            hold.insert().values(
                id=identifier,
                study=self.study,
                account=account_code,
                purpose=purpose,
                request_hash=request_hash,
                amount_micros=amount,
                fence=fence,
            )
        )

    def settle(
        self,
        identifier: str,
        charges: Mapping[str, int],
        *,
        fence: int,
        usage_ms: int | None = None,
        micros_per_hour: int | None = None,
        note: str = "",
    ) -> None:
        """Charges a hold by cost centre; what is left of it returns.

        Charges over the hold are first taken from what the account has left; the rest is posted to `overrun` and
        freezes the study. Raises HoldClosed if the hold was resolved otherwise before or belongs to a newer fence.
        """
        if any(charge <= 0 for charge in charges.values()):
            raise ValueError(f"charges must be positive: {dict(charges)}")
        total = sum(charges.values())
        self._lock()
        amount, source, settled = self._claim(identifier, fence)
        lost = self._existing(f"overrun:{identifier}")
        if settled is not None and settled + (lost.amount_micros if lost else 0) == total:
            return
        excess = max(total - amount, 0)
        covered = min(excess, max(self._available(source), 0))
        if covered and settled is None:
            self._widen(identifier, source, covered)
        paid = _cut(charges, excess - covered)
        self._resolve(identifier, fence, "settled", sum(paid.values()))
        for code in sorted(paid):
            self._account(code)
            self._transfer(
                f"settle:{identifier}:{code}",
                "settle",
                source,
                code,
                paid[code],
                hold_id=identifier,
                usage_ms=usage_ms,
                micros_per_hour=micros_per_hour,
                note=note,
            )
        if excess > covered:
            self._post_overrun(f"overrun:{identifier}", excess - covered, f"hold {identifier} was exceeded")

    def void(self, identifier: str, *, fence: int) -> None:
        """Returns a hold whose machine provably never started. Raises HoldClosed."""
        self._lock()
        self._claim(identifier, fence)
        self._resolve(identifier, fence, "voided", 0)

    def expire(self, identifier: str, weights: Mapping[str, int], *, fence: int, note: str = "") -> None:
        """Charges a hold in full, split by `weights`: no record says how much was used. Raises HoldClosed."""
        self._lock()
        amount, source, _ = self._claim(identifier, fence)
        if not self._resolve(identifier, fence, "expired", amount):
            return
        for code, part in sorted(split_micros(amount, weights).items()):
            self._account(code)
            self._transfer(f"expire:{identifier}:{code}", "expire", source, code, part, hold_id=identifier, note=note)

    def charge(self, identifier: str, code: str, amount: int, *, note: str) -> None:
        """Charges time that no hold covered (a rented machine between two runs); what does not fit is overrun."""
        self._lock()
        self._account(code)
        covered = min(amount, max(self._available(BUDGET), 0))
        if covered:
            self._transfer(f"charge:{identifier}", "settle", BUDGET, code, covered, note=note)
        if amount > covered:
            self._post_overrun(f"overrun:{identifier}", amount - covered, note)

    def refund(self, transfer_id: str, amount: int, *, note: str) -> None:
        """Returns part of an earlier charge on evidence, by one more transfer. Raises ValueError beyond it."""
        self._lock()
        row = self.connection.execute(select(transfer).where(transfer.c.id == transfer_id)).one()
        if row.kind not in {"settle", "expire"} or not 0 < amount <= row.amount_micros:
            raise ValueError(f"{amount} micro-dollars cannot be refunded of {transfer_id}")
        self._transfer(
            f"refund:{transfer_id}", "refund", row.credit, row.debit, amount, reverses_id=transfer_id, note=note
        )

    def take_over(self, fence: int) -> None:
        """Puts every open hold under a newer fence: its former owner can no longer resolve it."""
        self.connection.execute(
            update(hold).where(hold.c.study == self.study, hold.c.state == "open").values(fence=fence)
        )

    def open_holds(self) -> dict[str, int]:
        """Returns the open holds and their amounts in micro-dollars."""
        rows = self.connection.execute(
            select(hold.c.id, hold.c.amount_micros).where(hold.c.study == self.study, hold.c.state == "open")
        )
        return {row.id: row.amount_micros for row in rows}

    def balances(self) -> Balances:
        """Reads all accounts at once."""
        rows = self.connection.execute(select(account).where(account.c.study == self.study)).all()
        if not rows:
            raise LedgerError(f"study {self.study} has no accounts")
        by_code = {row.code: row for row in rows}
        budget, reserve, overrun = by_code[BUDGET], by_code[RESERVE], by_code[OVERRUN]
        cap = -by_code[WORLD].balance_micros - overrun.balance_micros
        held = budget.held_micros + reserve.held_micros
        inside = budget.balance_micros + reserve.balance_micros
        return Balances(
            cap=cap,
            spent=cap - inside,
            held=held,
            left=inside - held,
            overrun=overrun.balance_micros,
            reserve=reserve.balance_micros,
            frozen=bool(budget.frozen),
            accounts={row.code: row.balance_micros for row in rows},
        )

    def _insert(self, table: Table) -> Any:
        return (postgresql if self.connection.dialect.name == "postgresql" else sqlite).insert(table)

    def _where(self, code: str) -> Any:
        return and_(account.c.study == self.study, account.c.code == code)

    def _account(self, code: str) -> None:
        values = {"study": self.study, "code": code, "may_go_negative": int(code == WORLD)}
        self.connection.execute(self._insert(account).on_conflict_do_nothing().values(**values))

    def _lock(self) -> None:
        locked = self.connection.execute(update(account).where(self._where(BUDGET)).values(seq=account.c.seq))
        if locked.rowcount != 1:
            raise LedgerError(f"study {self.study} has no accounts")

    def _available(self, code: str) -> int:
        free = account.c.balance_micros - account.c.held_micros
        return int(self.connection.execute(select(free).where(self._where(code))).scalar_one())

    def _raise_held(self, code: str, amount: int) -> bool:
        not_frozen = select(func.count()).where(self._where(BUDGET), account.c.frozen == 0).scalar_subquery()
        raised = self.connection.execute(
            update(account)
            .where(self._where(code), account.c.balance_micros - account.c.held_micros >= amount, not_frozen == 1)
            .values(held_micros=account.c.held_micros + amount)
        )
        return raised.rowcount == 1

    def _widen(self, identifier: str, code: str, amount: int) -> None:
        self.connection.execute(
            update(account)
            .where(self._where(code), account.c.balance_micros - account.c.held_micros >= amount)
            .values(held_micros=account.c.held_micros + amount)
        )
        self.connection.execute(
            update(hold)
            .where(hold.c.id == identifier, hold.c.state == "open")
            .values(amount_micros=hold.c.amount_micros + amount)
        )

    def _claim(self, identifier: str, fence: int) -> tuple[int, str, int | None]:
        """Returns the hold's amount, its account, and what it was settled with if that is so."""
        mine = and_(hold.c.id == identifier, hold.c.study == self.study)
        row = self.connection.execute(select(hold).where(mine)).one_or_none()
        if row is None:
            raise LedgerError(f"there is no hold {identifier}")
        if row.fence != fence:
            raise HoldClosed(f"hold {identifier} was taken over (fence {row.fence}, not {fence})")
        return row.amount_micros, row.account, row.settled_micros if row.state == "settled" else None

    def _resolve(self, identifier: str, fence: int, state: str, actual: int) -> bool:
        """Closes an open hold and gives its money free. Returns False if this very outcome stands already."""
        row = self.connection.execute(select(hold).where(hold.c.id == identifier)).one()
        closed = self.connection.execute(
            update(hold)
            .where(hold.c.id == identifier, hold.c.state == "open", hold.c.fence == fence)
            .values(state=state, settled_micros=actual)
        )
        if closed.rowcount == 0:
            if (row.state, row.settled_micros) == (state, actual):
                return False
            raise HoldClosed(f"hold {identifier} is {row.state} with {row.settled_micros}, not {state} with {actual}")
        self.connection.execute(
            update(account)
            .where(self._where(row.account))
            .values(held_micros=account.c.held_micros - row.amount_micros)
        )
        return True

    def _existing(self, identifier: str) -> Any:
        return self.connection.execute(select(transfer).where(transfer.c.id == identifier)).one_or_none()

    def _transfer(self, identifier: str, kind: str, debit: str, credit: str, amount: int, **more: Any) -> None:
        existing = self._existing(identifier)
        if existing is not None:
            if (existing.kind, existing.debit, existing.credit, existing.amount_micros) != (
                kind,
                debit,
                credit,
                amount,
            ):
                raise IdempotencyConflict(f"transfer {identifier} exists with another content")
            return
        self.connection.execute(
            update(account).where(self._where(debit)).values(balance_micros=account.c.balance_micros - amount)
        )
        self.connection.execute(
            update(account).where(self._where(credit)).values(balance_micros=account.c.balance_micros + amount)
        )
        self.connection.execute(update(account).where(self._where(BUDGET)).values(seq=account.c.seq + 1))
        seq = self.connection.execute(select(account.c.seq).where(self._where(BUDGET))).scalar_one()
        self.connection.execute(
            transfer.insert().values(
                id=identifier,
                study=self.study,
                seq=seq,
                kind=kind,
                debit=debit,
                credit=credit,
                amount_micros=amount,
                recorded_unix_ms=time.time_ns() // 1_000_000,
                **more,
            )
        )

    def _post_overrun(self, identifier: str, amount: int, note: str) -> None:
        self._transfer(identifier, "overrun", WORLD, OVERRUN, amount, note=note)
        self.connection.execute(update(account).where(self._where(BUDGET)).values(frozen=1))


def _cut(charges: Mapping[str, int], too_much: int) -> dict[str, int]:
    """Takes `too_much` off the charges, largest first, so that what is left is covered."""
    left = dict(charges)
    for code in sorted(left, key=lambda code: (-left[code], code)):
        taken = min(too_much, left[code])
        left[code] -= taken
        too_much -= taken
    return {code: charge for code, charge in left.items() if charge}


def _digest(request: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
