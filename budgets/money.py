"""Dollars as whole micro-dollars. No float ever holds money.

Times are milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Literal, NamedTuple

MICROS = 1_000_000
MS_PER_HOUR = 3_600_000
MAX_MICROS = 10**15  # a billion dollars: far below what a 64-bit column holds, far above any cap

Unit = Literal["hour", "kWh", "Mtok"]  # Mtok: a million tokens, as rented training services count them
_UNITS: dict[str, Unit] = {
    **dict.fromkeys(("", "h", "hr", "hour"), "hour"),
    "kwh": "kWh",
    **dict.fromkeys(("mtok", "m tokens", "1m tokens", "million tokens"), "Mtok"),
}
_USD = re.compile(r"\s*\$?\s*([+-]?[0-9][0-9_,]*(?:\.[0-9]*)?|[+-]?\.[0-9]+)\s*(?:USD|usd)?\s*")


class MoneyError(ValueError):
    """A text that is not an amount of dollars."""


def parse_usd(text: str | int | float) -> int:
    """Returns micro-dollars for `$200`, `200`, `1.29 USD` or `$1,000.50`.

    Raises MoneyError for anything else, for amounts finer than a micro-dollar and for amounts over a billion dollars.
    """
    match = _USD.fullmatch(str(text))
    if match is None:
        raise MoneyError(f"{str(text)!r} is not an amount of dollars; write it as $200 or 1.29")
    try:
        micros = Decimal(match[1].replace(",", "").replace("_", "")) * MICROS
    except InvalidOperation as error:
        raise MoneyError(f"{str(text)!r} is not an amount of dollars") from error
    if micros != micros.to_integral_value():
        raise MoneyError(f"{str(text)!r} is finer than a micro-dollar ($0.000001)")
    if abs(micros) > MAX_MICROS:
        raise MoneyError(f"{str(text)!r} is over a billion dollars")
    return int(micros)


class Rate(NamedTuple):
    """A price: micro-dollars for one unit."""

    micros: int
    unit: Unit

    def __str__(self) -> str:
        return f"${(Decimal(self.micros) / MICROS).normalize():f}/{self.unit}"


def parse_rate(text: str | int | float) -> Rate:
    """Returns the price in `$1.29/hour`, `1.29/h`, a bare `1.29` (an hour), `$0.32/kWh` or `$0.48/Mtok`.

    Raises MoneyError.
    """
    amount, _, unit = str(text).partition("/")
    known = _UNITS.get(unit.strip().lower())
    if known is None:
        raise MoneyError(f"{str(text)!r} is not a price; write it as $1.29/hour, $0.32/kWh or $0.48/Mtok")
    return Rate(parse_usd(amount), known)


def usd(micros: int, places: int | None = None) -> str:
    """Returns `$1.29`. Without `places`: two decimals from $10 up, four below, six under a cent."""
    if places is None:
        size = abs(micros)
        places = 2 if size >= 10 * MICROS or size == 0 else 4 if size >= MICROS // 100 else 6
    sign = "-" if micros < 0 else ""
    return f"{sign}${Decimal(abs(micros)) / MICROS:,.{places}f}"


def cost_micros(micros_per_hour: int, ms: int) -> int:
    """Returns what `ms` of machine time cost, rounded up to a whole micro-dollar."""
    if ms < 0 or micros_per_hour < 0:
        raise ValueError(f"negative time or price: {ms} ms at {micros_per_hour}")
    return -(-micros_per_hour * ms // MS_PER_HOUR)


def affordable_ms(micros_per_hour: int, micros: int) -> int:
    """Returns the longest time in ms whose cost stays within `micros`; the inverse of cost_micros."""
    if micros_per_hour == 0:
        raise ValueError("a free machine has no longest affordable time")
    return max(micros, 0) * MS_PER_HOUR // micros_per_hour


def split_micros(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Splits `total` in proportion to non-negative integer weights; the parts sum to it exactly (largest remainder).

    Ties go to the name that sorts first, so that a replay splits alike. Parts of zero are left out.
    """
    base = sum(weights.values())
    if total < 0 or any(w < 0 for w in weights.values()) or (base == 0 and total > 0):
        raise ValueError(f"cannot split {total} by {dict(weights)}")
    if base == 0:
        return {}
    parts = {name: total * weight // base for name, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda name: (-(total * weights[name] % base), name))
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return {name: part for name, part in parts.items() if part}
