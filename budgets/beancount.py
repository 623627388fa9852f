"""A study's books as a beancount file (https://beancount.github.io/docs/beancount_language_syntax.html).

One transaction a transfer, and at the end one exact balance assertion an account: `bean-check` on the file re-adds what
the database says. Amounts are US dollars with six decimals, the ledger's own precision.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from budgets.ledger import BUDGET, IDLE, OVERRUN, RESERVE, WORLD
from budgets.money import MICROS

_NAMES = {
    WORLD: "Equity:Funding",
    BUDGET: "Assets:Budget",
    RESERVE: "Assets:Reserve",
    IDLE: "Expenses:Idle",
    OVERRUN: "Expenses:Overrun",
}


def account_name(code: str) -> str:
    """The beancount account of a ledger account: `trial:7` is Expenses:Trials:T7."""
    kind, _, name = code.partition(":")
    if kind == "trial":
        return f"Expenses:Trials:T{name}"
    return f"Expenses:Overhead:{name.capitalize()}" if kind == "overhead" else _NAMES[code]


def journal(study: str, balances: Mapping[str, int], transfers: Sequence[Any]) -> str:
    """Writes the file. `balances` are micro-dollars by account, `transfers` are rows of sweep_transfer in order.

    Days are UTC. Transfers are in the order of commits, whatever the wall clock said, so each day is at least the one
    before it.
    """
    days: list[datetime.date] = []
    for row in transfers:
        day = datetime.datetime.fromtimestamp(row.recorded_unix_ms / 1000, datetime.UTC).date()
        days.append(max([day, *days[-1:]]))
    first = days[0] if days else datetime.date(1970, 1, 1)
    lines = [f'option "title" {_text(f"study {study}")}', 'option "operating_currency" "USD"', ""]
    lines += [f"{first} open {account_name(code)} USD" for code in sorted(balances)]
    for day, row in zip(days, transfers, strict=True):
        lines += ["", *_transaction(day, row)]
    # An assertion holds at the beginning of its day.
    after = (days[-1] if days else first) + datetime.timedelta(days=1)
    lines += ["", *(f"{after} balance {account_name(c)}  {_usd(m)} ~ 0 USD" for c, m in sorted(balances.items()))]
    return "\n".join(lines) + "\n"


def _transaction(day: datetime.date, row: Any) -> list[str]:
    lines = [f"{day} * {_text(row.kind)} {_text(row.note or row.kind)}", f"  id: {_text(row.id)}", f"  seq: {row.seq}"]
    lines += [f"  hold: {_text(row.hold_id)}"] if row.hold_id else []
    lines += [f"  usage_ms: {row.usage_ms}"] if row.usage_ms is not None else []
    amount = _usd(row.amount_micros)
    return [*lines, f"  {account_name(row.debit)}  -{amount} USD", f"  {account_name(row.credit)}  {amount} USD"]


def _usd(micros: int) -> str:
    return f"{Decimal(micros) / MICROS:.6f}"


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
