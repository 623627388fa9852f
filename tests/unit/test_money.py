"""Money arithmetic is exact."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgets.meter import charges
from budgets.money import MoneyError, affordable_ms, cost_micros, parse_rate, parse_usd, split_micros, usd
from budgets.tariff import Tariff

RATES = st.integers(min_value=1, max_value=10**9)
TIMES = st.integers(min_value=0, max_value=10**10)


@given(st.integers(0, 10**12), st.dictionaries(st.text(min_size=1), st.integers(0, 10**6), min_size=1))
def test_a_split_sums_exactly(total: int, weights: dict[str, int]) -> None:
    """Proves that no micro-dollar is lost or made by splitting, and that no part is off by one or more."""
    if sum(weights.values()) == 0:
        total = 0
    parts = split_micros(total, weights)
    assert sum(parts.values()) == total
    for name, part in parts.items():
        assert abs(part - total * weights[name] / sum(weights.values())) < 1 + 1e-6 * total


@given(RATES, st.integers(0, 10**12))
def test_affordable_time_is_the_longest_that_fits(rate: int, micros: int) -> None:
    """Proves that affordable_ms inverts cost_micros: it fits, and one millisecond more would not."""
    ms = affordable_ms(rate, micros)
    assert cost_micros(rate, ms) <= micros < cost_micros(rate, ms + 1) or cost_micros(rate, ms + 1) == micros + 0


@given(RATES, st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_slices_add_up_to_one_bill(rate: int, steps: list[int]) -> None:
    """Proves that a worker's charges, however it was cut into slices, are the cost of its whole time."""
    at, total = 0, 0
    for step in steps:
        total += sum(charges(Tariff.flat(rate), at, at + step, {}, {"idle": step}, "idle").values())
        at += step
    assert total == cost_micros(rate, at)


@pytest.mark.parametrize(
    ("text", "micros"), [("$200", 200_000_000), ("1.29", 1_290_000), ("$1,000.50", 1_000_500_000), (0.04, 40_000)]
)
def test_amounts_are_read(text: str | float, micros: int) -> None:
    """Proves the ways in which people write dollars."""
    assert parse_usd(text) == micros


@pytest.mark.parametrize("text", ["", "abc", "$", "1e3", "0.0000001", "$1e400", "nan", "$99999999999"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    """Proves that nothing odd becomes money."""
    with pytest.raises(MoneyError):
        parse_usd(text)


def test_rates_and_display() -> None:
    """Proves rates with and without their unit, and that small amounts keep their digits."""
    assert parse_rate("$1.29/hour") == parse_rate("1.29/h") == parse_rate(1.29) == (1_290_000, "hour")
    assert parse_rate("$0.32/kWh") == (320_000, "kWh") and str(parse_rate("0.48/Mtok")) == "$0.48/Mtok"
    with pytest.raises(MoneyError):
        parse_rate("$1.29/day")
    assert [usd(m) for m in (200_000_000, 1_290_000, 41, -5_000_000)] == ["$200.00", "$1.2900", "$0.000041", "-$5.0000"]
