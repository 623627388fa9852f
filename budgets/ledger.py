"""The ledger: a cap that cannot be overspent, in any committed state of the database.

    hold ──> settle    used: charged by cost centre, the rest returns to the account
      ├───> void       provably never used: everything returns
      └───> expire     nobody knows: charged in full, refunded on evidence

What it guarantees: `spent + held <= cap` always, over budget and reserve together, by one conditional UPDATE (what may
be spent is reserved before it is spent) and by CHECK constraints behind it; every hold is resolved at most once; every
verb may be repeated with the same id and has its effect once; money that was lost all the same is posted to `overrun`
and freezes the study. The verbs run in the caller's transaction, so a settlement and what it pays for commit together.
They take the `budget` row's lock first, so that there is one lock order.

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
# `bill` is what a provider charged beyond the time that the sweep saw.
OVERHEAD = tuple(f"overhead:{name}" for name in ("load", "compile", "checkpoint", "teardown", "bill"))
NOT_COSTS = frozenset({WORLD, BUDGET, RESERVE, OVERRUN})
BILL = "overhead:bill"  # what a provider billed beyond what was charged


class LedgerError(Exception):
    """Base of what the ledger refuses."""


class BudgetExhausted(LedgerError):
    """The hold does not fit what is left."""


class BudgetFrozen(LedgerError):
    """An overrun froze the study; no new holds."""


class HoldClosed(LedgerError):
    """The hold was resolved otherwise before, or was taken over under a newer fence."""


class HoldsOpen(LedgerError):
    """The books can't be compared with a bill while money is held."""


class IdempotencyConflict(LedgerError):
    """The same id with another request."""


class CapTooLow(LedgerError):
    """The new cap is under what is spent, held and reserved already."""


@dataclass(frozen=True)
class Balances:
    """Where a study's money is, in micro-dollars; read in one statement, so of one committed state."""

    cap: int
    spent: int  # trials + overhead + idle; overrun is not in it
    held: int
    left: int  # what budget and reserve could still hold
    overrun: int
    reserve: int  # what of it is not held
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

    # The cap and the reserve

    def open(self, cap_micros: int) -> None:
        """Makes the study's accounts and funds the budget with the cap. Safe to repeat."""
        if cap_micros <= 0:
            raise ValueError("the cap must be positive")
        for code in (WORLD, BUDGET, RESERVE, IDLE, OVERRUN, *OVERHEAD):
            self._account(code)
        self._lock()
        self._transfer(f"fund:{self.study}:0", "fund", WORLD, BUDGET, cap_micros, note="cap at launch")

    def set_cap(self, cap_micros: int, request: str) -> None:
        """Raises or lowers the cap by one more transfer.

        Raises CapTooLow, never touching what is spent, held or reserved; IdempotencyConflict.
        """
        if cap_micros <= 0:
            raise ValueError("the cap must be positive")
        self._lock()
        identifier = f"fund:{self.study}:{request}"
        if self._replayed(identifier, {"cap": cap_micros}):
            return
        balances = self.balances()
        change = cap_micros - balances.cap
        asked = {"request_hash": _digest({"cap": cap_micros})}
        if change > 0:
            self._transfer(identifier, "fund", WORLD, BUDGET, change, note="cap raised", **asked)
        elif change < 0:
            if self._available(BUDGET) < -change:
                promised = balances.spent + balances.held + balances.reserve
                raise CapTooLow(f"spent, held and reserved are {promised} micro-dollars of {cap_micros}")
            self._transfer(identifier, "fund", BUDGET, WORLD, -change, note="cap lowered", **asked)

    def set_aside(self, amount: int, request: str) -> None:
        """Moves `amount` from the budget to the reserve, which no search can hold. Raises BudgetExhausted."""
        if amount <= 0:
            raise ValueError(f"a reserve must be positive, not {amount}")
        self._lock()
        if self._replayed(f"reserve:{self.study}:{request}", {"amount": amount}):
            return
        if self._available(BUDGET) < amount:
            raise BudgetExhausted(f"{amount} micro-dollars do not fit the {self._available(BUDGET)} left")
        asked = {"request_hash": _digest({"amount": amount}), "note": "set aside for the endgame"}
        self._transfer(f"reserve:{self.study}:{request}", "move", BUDGET, RESERVE, amount, **asked)

    def release(self, request: str, *, note: str) -> int:
        """Returns to the budget what of the reserve is neither used nor held; returns how much that was."""
        self._lock()
        free = self._available(RESERVE)
        if free and not self._replayed(f"release:{self.study}:{request}", {}):
            asked = {"request_hash": _digest({}), "note": note}
            self._transfer(f"release:{self.study}:{request}", "move", RESERVE, BUDGET, free, **asked)
            return free
        return 0

    # Holds

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
        self._raise_held(account_code, amount)
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

    def extend(self, identifier: str, to_amount: int, *, fence: int) -> None:
        """Widens an open hold to `to_amount` in all; an absolute target, so that a repetition changes nothing.

        Raises BudgetExhausted or BudgetFrozen, and has then written nothing; HoldClosed.
        """
        self._lock()
        row = self._open_hold(identifier, fence, "")
        if row is None or to_amount <= row.amount_micros:
            return
        self._raise_held(row.account, to_amount - row.amount_micros)
        self.connection.execute(update(hold).where(hold.c.id == identifier).values(amount_micros=to_amount))

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

        Charges over the hold are first taken from what budget and reserve have left; the rest is posted to `overrun`
        and freezes the study. Raises HoldClosed if the hold was resolved otherwise before or has a newer fence.
        """
        if any(charge <= 0 for charge in charges.values()):
            raise ValueError(f"charges must be positive: {dict(charges)}")
        self._lock()
        resolution = _digest({"settle": dict(charges)})
        row = self._open_hold(identifier, fence, resolution)
        if row is None:
            return
        excess = max(sum(charges.values()) - row.amount_micros, 0)
        covered = self._cover(identifier, row.account, excess)
        if covered:
            self._raise_held(row.account, covered, even_frozen=True)
            widened = row.amount_micros + covered
            self.connection.execute(update(hold).where(hold.c.id == identifier).values(amount_micros=widened))
        paid = _cut(charges, excess - covered)
        self._close(row, "settled", row.amount_micros + covered, sum(paid.values()), resolution)
        for code in sorted(paid):
            self._account(code)
            self._transfer(
                f"settle:{identifier}:{code}",
                "settle",
                row.account,
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
        resolution = _digest({"void": True})
        row = self._open_hold(identifier, fence, resolution)
        if row is not None:
            self._close(row, "voided", row.amount_micros, 0, resolution)

    def expire(self, identifier: str, weights: Mapping[str, int], *, fence: int, note: str = "") -> None:
        """Charges a hold in full, split by `weights`: no record says how much was used. Raises HoldClosed."""
        self._lock()
        resolution = _digest({"expire": dict(weights)})
        row = self._open_hold(identifier, fence, resolution)
        if row is None:
            return
        self._close(row, "expired", row.amount_micros, row.amount_micros, resolution)
        for code, part in sorted(split_micros(row.amount_micros, weights).items()):
            self._account(code)
            words = {"hold_id": identifier, "note": note}
            self._transfer(f"expire:{identifier}:{code}", "expire", row.account, code, part, **words)

    def take_over(self, fence: int) -> None:
        """Puts every open hold under a newer fence: its former owner can no longer resolve it."""
        self._lock()
        self.connection.execute(
            update(hold)
            .where(hold.c.study == self.study, hold.c.state == "open", hold.c.fence < fence)
            .values(fence=fence)
        )

    # Corrections

    def charge(self, identifier: str, code: str, amount: int, *, note: str) -> None:
        """Charges time that no hold covered (a rented machine between two runs); what does not fit is overrun.

        Raises IdempotencyConflict.
        """
        self._lock()
        self._account(code)
        asked = {"account": code, "amount": amount}
        if self._replayed(f"charge:{identifier}", asked) or self._replayed(f"overrun:{identifier}", asked):
            return
        covered = self._cover(identifier, BUDGET, amount)
        words = {"note": note, "request_hash": _digest(asked)}
        if covered:
            self._transfer(f"charge:{identifier}", "settle", BUDGET, code, covered, **words)
        if amount > covered:
            self._post_overrun(f"overrun:{identifier}", amount - covered, note, request_hash=_digest(asked))

    def refund(self, transfer_id: str, amount: int, *, note: str) -> None:
        """Returns part of an earlier charge on evidence, by one more transfer.

        Raises ValueError beyond the charge, IdempotencyConflict when another part of it was returned before.
        """
        self._lock()
        mine = and_(transfer.c.id == transfer_id, transfer.c.study == self.study)
        row = self.connection.execute(select(transfer).where(mine)).one_or_none()
        if row is None or row.kind not in {"settle", "expire"} or not 0 < amount <= row.amount_micros:
            raise ValueError(f"{amount} micro-dollars cannot be refunded of {transfer_id}")
        request = {"refund": amount}
        if self._replayed(f"refund:{transfer_id}", request):
            return
        if self._available(row.credit) < amount:  # a bill has returned it before
            raise ValueError(f"{row.credit} holds less than the {amount} micro-dollars to be refunded of {transfer_id}")
        words = {"reverses_id": transfer_id, "note": note, "request_hash": _digest(request)}
        self._transfer(f"refund:{transfer_id}", "refund", row.credit, row.debit, amount, **words)

    def reconcile(self, bill_micros: int, *, note: str) -> int:
        """Makes the books say what the provider's bill says; returns the bill less what was charged.

        A lower bill is refunded: off the overrun first, then off what an earlier, higher bill was charged, which may
        have been a slip, then off every cost centre in proportion. A higher one is charged to `overhead:bill`; what the
        cap does not cover is overrun. Raises HoldsOpen.
        """
        self._lock()
        if self.open_holds():
            raise HoldsOpen(f"study {self.study} holds money for a worker that was not settled")
        balances = self.balances()
        difference = bill_micros - balances.spent - balances.overrun
        # Numbered by the books' own state: a repetition finds no difference, so it needs no key of the caller's.
        seq = self.connection.execute(select(account.c.seq).where(self._where(BUDGET))).scalar_one()
        name = f"{self.study}:bill:{seq}"
        if difference > 0:
            self.charge(name, BILL, difference, note=note)
        elif difference < 0:
            found = min(-difference, balances.overrun)
            if found:
                self._transfer(f"refund:{name}:{OVERRUN}", "refund", OVERRUN, WORLD, found, note=note)
            if found == balances.overrun:  # nothing was lost after all
                self.connection.execute(update(account).where(self._where(BUDGET)).values(frozen=0))
            costs = {c: b for c, b in balances.accounts.items() if c not in NOT_COSTS and b > 0}
            slip = min(-difference - found, costs.pop(BILL, 0))
            parts = split_micros(-difference - found - slip, costs) | ({BILL: slip} if slip else {})
            for code, part in sorted(parts.items()):
                self._transfer(f"refund:{name}:{code}", "refund", code, BUDGET, part, note=note)
        return difference

    # Reading

    def reconciled(self) -> bool:
        """Whether a bill was ever compared with the books and differed."""
        bills = transfer.c.id.startswith(f"charge:{self.study}:bill:", autoescape=True) | transfer.c.id.startswith(
            f"refund:{self.study}:bill:", autoescape=True
        )
        found = select(func.count()).where(transfer.c.study == self.study, bills)
        return bool(self.connection.execute(found).scalar_one())

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
            reserve=reserve.balance_micros - reserve.held_micros,
            frozen=bool(budget.frozen),
            accounts={row.code: row.balance_micros for row in rows},
        )

    # What the verbs are made of

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

    def _raise_held(self, code: str, amount: int, *, even_frozen: bool = False) -> None:
        """The one conditional UPDATE that admits a hold. Raises BudgetExhausted or BudgetFrozen."""
        open_study = [] if even_frozen else [self._not_frozen()]
        raised = self.connection.execute(
            update(account)
            .where(self._where(code), account.c.balance_micros - account.c.held_micros >= amount, *open_study)
            .values(held_micros=account.c.held_micros + amount)
        )
        if raised.rowcount == 1:
            return
        if self.balances().frozen and not even_frozen:
            raise BudgetFrozen(f"study {self.study} is frozen after an overrun")
        raise BudgetExhausted(f"{amount} micro-dollars do not fit the {self._available(code)} left")

    def _not_frozen(self) -> Any:
        return select(func.count()).where(self._where(BUDGET), account.c.frozen == 0).scalar_subquery() == 1

    def _cover(self, identifier: str, code: str, amount: int) -> int:
        """Returns how much of `amount` account `code` can still pay; the reserve stands in where the budget can't."""
        free = max(self._available(code), 0)
        short = min(amount - free, max(self._available(RESERVE), 0)) if code == BUDGET else 0
        if short > 0:
            self._transfer(f"cover:{identifier}", "move", RESERVE, BUDGET, short, note="the budget did not cover it")
        return min(amount, free + max(short, 0))

    def _open_hold(self, identifier: str, fence: int, resolution: str) -> Any:
        """Returns the hold's row, or None if it was closed by this very request. Raises HoldClosed."""
        mine = and_(hold.c.id == identifier, hold.c.study == self.study)
        row = self.connection.execute(select(hold).where(mine)).one_or_none()
        if row is None:
            raise LedgerError(f"there is no hold {identifier}")
        if row.state != "open":
            if row.resolution == resolution:
                return None
            raise HoldClosed(f"hold {identifier} is {row.state} with {row.settled_micros} micro-dollars")
        if row.fence != fence:
            raise HoldClosed(f"hold {identifier} was taken over (fence {row.fence}, not {fence})")
        return row

    def _close(self, row: Any, state: str, amount: int, actual: int, resolution: str) -> None:
        """Closes an open hold of `amount` and gives its money free. Raises HoldClosed if somebody was faster."""
        closed = self.connection.execute(
            update(hold)
            .where(hold.c.id == row.id, hold.c.state == "open", hold.c.fence == row.fence)
            .values(state=state, settled_micros=actual, resolution=resolution)
        )
        if closed.rowcount != 1:
            raise HoldClosed(f"hold {row.id} was closed or taken over in between")
        self.connection.execute(
            update(account).where(self._where(row.account)).values(held_micros=account.c.held_micros - amount)
        )

    def _replayed(self, identifier: str, request: Mapping[str, object]) -> bool:
        """Says whether this very request was carried out. Raises IdempotencyConflict if the id was another's."""
        known = self.connection.execute(
            select(transfer.c.request_hash).where(transfer.c.id == identifier)
        ).one_or_none()
        if known is not None and known.request_hash != _digest(request):
            raise IdempotencyConflict(f"transfer {identifier} exists with another request")
        return known is not None

    def _transfer(self, identifier: str, kind: str, debit: str, credit: str, amount: int, **more: Any) -> None:
        existing = self.connection.execute(select(transfer).where(transfer.c.id == identifier)).one_or_none()
        if existing is not None:
            content = (existing.kind, existing.debit, existing.credit, existing.amount_micros)
            if content != (kind, debit, credit, amount):
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

    def _post_overrun(self, identifier: str, amount: int, note: str, **more: Any) -> None:
        self._transfer(identifier, "overrun", WORLD, OVERRUN, amount, note=note, **more)
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
