"""From seconds by cost centre to charges by account, to the micro-dollar."""

from __future__ import annotations

from collections.abc import Mapping

from budgets.ledger import IDLE
from budgets.money import split_micros
from budgets.tariff import Tariff


def account_of(centre: str) -> str:
    """Returns the ledger account of a worker's cost centre: trials and idle keep their name, the rest is overhead."""
    return centre if centre == IDLE or centre.startswith("trial:") else f"overhead:{centre}"


def charges(
    tariff: Tariff, from_ms: int, to_ms: int, before: Mapping[str, int], after: Mapping[str, int], rest: str
) -> dict[str, int]:
    """Splits the cost of a worker's meter between two readings by what it was used for.

    The total is tariff.cost(to_ms) - tariff.cost(from_ms), so that over a worker's life the charges add up to the cost
    of its whole time with a single rounding. `before` and `after` are cumulative ms by cost centre; time that the
    reading does not explain (a process that died between two reports) goes to the centre `rest`.
    Raises ValueError if time ran backwards.
    """
    if to_ms < from_ms:
        raise ValueError(f"the meter ran backwards: {from_ms} to {to_ms} ms")
    used = {centre: ms - before.get(centre, 0) for centre, ms in after.items()}
    if any(ms < 0 for ms in used.values()):
        raise ValueError(f"a cost centre ran backwards: {dict(before)} to {dict(after)}")
    unexplained = to_ms - from_ms - sum(used.values())
    if unexplained > 0:
        used[rest] = used.get(rest, 0) + unexplained
    weights: dict[str, int] = {}
    for centre, ms in used.items():
        weights[account_of(centre)] = weights.get(account_of(centre), 0) + ms
    return split_micros(tariff.cost(to_ms) - tariff.cost(from_ms), weights)
