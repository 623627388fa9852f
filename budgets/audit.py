"""The ledger's invariants, each checked against the rows themselves. Silent when they hold."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, case, func, select

from budgets.ledger import BUDGET, OVERRUN, RESERVE, WORLD
from budgets.schema import account, hold, transfer


def violations(connection: Connection, study: str) -> list[str]:
    """Returns a sentence for every invariant of one study that does not hold, in the order below; [] when all hold."""
    accounts: dict[str, Any] = {
        row.code: row for row in connection.execute(select(account).where(account.c.study == study))
    }
    if not accounts:
        return [f"study {study} has no accounts"]
    found = _balances(connection, study, accounts) if (WORLD in accounts and BUDGET in accounts) else ["no budget"]
    return found + _holds(connection, study, accounts) + _sequence(connection, study, accounts)


def _balances(connection: Connection, study: str, accounts: dict[str, Any]) -> list[str]:
    found = []
    moved = dict.fromkeys(accounts, 0)
    query = select(transfer.c.debit, transfer.c.credit, func.sum(transfer.c.amount_micros).label("amount"))
    for row in connection.execute(query.where(transfer.c.study == study).group_by(transfer.c.debit, transfer.c.credit)):
        moved[row.debit] -= int(row.amount)
        moved[row.credit] += int(row.amount)
    for code, row in accounts.items():
        balance, held = row.balance_micros, row.held_micros
        if balance != moved[code]:
            found.append(f"account {code} says {balance} micro-dollars, its transfers {moved[code]}")
        if code != WORLD and balance - held < 0:
            found.append(f"account {code} is overdrawn: balance {balance}, held {held}")
    if sum(moved.values()) != 0:
        found.append(f"all accounts sum to {sum(moved.values())} micro-dollars, not 0")
    cap = -moved[WORLD] - moved.get(OVERRUN, 0)
    inside = moved[BUDGET] + moved.get(RESERVE, 0)
    held = sum(accounts[code].held_micros for code in (BUDGET, RESERVE) if code in accounts)
    if cap - inside + held > cap:
        found.append(f"spent {cap - inside} + held {held} is over the cap of {cap} micro-dollars")
    if moved.get(OVERRUN, 0) and not accounts[BUDGET].frozen:
        found.append(f"{moved[OVERRUN]} micro-dollars were overrun but the study is not frozen")
    return found


def _holds(connection: Connection, study: str, accounts: dict[str, Any]) -> list[str]:
    found = []
    is_open = case((hold.c.state == "open", hold.c.amount_micros), else_=0)
    query = select(hold.c.account, func.sum(is_open).label("held")).where(hold.c.study == study)
    held = {row.account: int(row.held) for row in connection.execute(query.group_by(hold.c.account))}
    for code, row in accounts.items():
        if row.held_micros != held.get(code, 0):
            found.append(
                f"account {code} says {row.held_micros} micro-dollars held, its open holds {held.get(code, 0)}"
            )
    paid = (
        select(transfer.c.hold_id, func.sum(transfer.c.amount_micros).label("paid"))
        .where(transfer.c.study == study, transfer.c.kind.in_(("settle", "expire")))
        .group_by(transfer.c.hold_id)
        .subquery()
    )
    joined = select(hold.c.id, hold.c.settled_micros, paid.c.paid).outerjoin(paid, paid.c.hold_id == hold.c.id)
    for row in connection.execute(joined.where(hold.c.study == study)):
        if int(row.paid or 0) != int(row.settled_micros or 0):
            found.append(f"hold {row.id} was settled with {row.settled_micros}, its transfers say {row.paid}")
    return found


def _sequence(connection: Connection, study: str, accounts: dict[str, Any]) -> list[str]:
    query = select(
        func.count(), func.min(transfer.c.seq), func.max(transfer.c.seq), func.count(transfer.c.seq.distinct())
    )
    count, first, last, distinct = connection.execute(query.where(transfer.c.study == study)).one()
    seq = accounts[BUDGET].seq if BUDGET in accounts else None
    if count and (first != 1 or last != count or distinct != count or seq != count):
        return [f"transfers are not numbered 1 to {count} without a gap (first {first}, last {last}, counter {seq})"]
    return []
