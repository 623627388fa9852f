"""Where the money went: one line a trial, the overheads, idle, the total and what is left."""

from __future__ import annotations

from dataclasses import dataclass

from budgets.ledger import IDLE, OVERHEAD, Balances


@dataclass(frozen=True)
class Statement:
    """All amounts in micro-dollars; `trials + overhead + idle` is `spent` exactly."""

    trials: dict[int, int]
    overhead: dict[str, int]
    idle: int
    spent: int
    held: int
    left: int  # reserve included
    reserve: int
    cap: int
    overrun: int


def statement(balances: Balances) -> Statement:
    """Draws up the statement of one committed state. Raises ValueError if its lines do not add up to what was spent."""
    accounts = balances.accounts
    trials = {int(code.removeprefix("trial:")): m for code, m in accounts.items() if code.startswith("trial:")}
    overhead = {code.removeprefix("overhead:"): accounts[code] for code in OVERHEAD if code in accounts}
    drawn = Statement(
        trials=dict(sorted(trials.items())),
        overhead=overhead,
        idle=accounts[IDLE],
        spent=balances.spent,
        held=balances.held,
        left=balances.left,
        reserve=balances.reserve,
        cap=balances.cap,
        overrun=balances.overrun,
    )
    lines = sum(trials.values()) + sum(overhead.values()) + drawn.idle
    if lines != drawn.spent:
        raise ValueError(f"the lines add up to {lines} micro-dollars, spent is {drawn.spent}")
    return drawn
