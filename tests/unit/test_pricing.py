"""Tariffs are additive and never under-hold; the price list and the spec become the tariff that they say."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgets import prices
from budgets.money import MS_PER_HOUR
from budgets.prices import UnknownGPU, listed, lookup
from budgets.tariff import Tariff
from sweep import pricing
from sweep.errors import SpecError
from sweep.spec import Spec, validate

PRICES = st.integers(1, 10**9)
TIMES = st.integers(0, 10**8)


@st.composite
def tariffs(draw: st.DrawFn) -> Tariff:
    """Up to four prices, a ceiling at or over them, any least charge and quantum."""
    starts = [0, *sorted(draw(st.sets(st.integers(1, 10**8), max_size=3)))]
    steps = tuple((start, draw(PRICES)) for start in starts)
    ceiling = max(price for _, price in steps) + draw(st.integers(0, 10**6))
    quantum = draw(st.sampled_from([1, 1_000, 60_000, 3_600_000]))
    minimum, paid = draw(st.sampled_from([0, 1_500, 60_000, 600_000])), draw(st.sampled_from([0, 0, 17_000, 3_000_000]))
    return Tariff(steps, ceiling, minimum_ms=0 if paid else minimum, quantum_ms=quantum, paid_ms=paid)


@given(tariffs(), st.lists(TIMES, min_size=1, max_size=8))
def test_a_slice_settled_in_parts_never_takes_more_than_was_held(tariff: Tariff, cuts: list[int]) -> None:
    """Proves additivity: what a hold gives back when a part is settled covers the hold of the rest, to the micro."""
    end = max(cuts)
    at, left = 0, tariff.hold(0, end)
    for cut in sorted(cuts):
        left -= tariff.cost(cut) - tariff.cost(at)
        assert left >= tariff.hold(cut, end) >= 0
        at = cut
    assert left >= tariff.cost(tariff.billed_ms(end)) - tariff.cost(end), "rounding up to the quantum is covered too"


@given(tariffs(), TIMES, st.integers(0, 10**12))
def test_the_affordable_time_is_the_longest_that_fits(tariff: Tariff, start: int, micros: int) -> None:
    """Proves that a hold up to the affordable moment fits, that it ends a quantum, and that one more would not fit."""
    end = tariff.affordable_ms(start, micros)
    if end:
        assert tariff.hold(start, end) <= micros
        assert (end - tariff.paid_ms) % tariff.quantum_ms == 0 and tariff.billed_ms(end) == end
    after = max(end + tariff.quantum_ms, tariff.billed_ms(start), tariff.billed_ms(0))
    assert tariff.hold(start, after) > micros or after == tariff.billed_ms(start) != end


@given(tariffs(), TIMES, TIMES, PRICES)
def test_a_changed_price_leaves_the_past_alone(tariff: Tariff, at: int, later: int, price: int) -> None:
    """Proves that time before the change costs what it did, and time after it the new price, with one rounding."""
    changed = tariff.changed(at, price)
    assert changed.cost(min(at, later)) == tariff.cost(min(at, later))
    after = max(later - at, 0)
    billed_before = max(min(tariff.paid_ms, at + after) - at, 0)
    expected = tariff.cost(at) + -(-price * (after - billed_before) // MS_PER_HOUR)
    assert abs(changed.cost(at + after) - expected) <= 1
    assert Tariff.loads(changed.dumps()) == changed and changed.ceiling >= price


@pytest.mark.parametrize(
    "values",
    [
        {"prices": (), "ceiling": 1},
        {"prices": ((5, 1),), "ceiling": 1},
        {"prices": ((0, 2),), "ceiling": 1},
        {"prices": ((0, 0),), "ceiling": 0},
        {"prices": ((0, 1),), "ceiling": 1, "quantum_ms": 0},
    ],
)
def test_a_tariff_that_no_hold_covers_is_refused(values: dict[str, object]) -> None:
    """Proves the tariff's own checks."""
    with pytest.raises(ValueError, match=r"prices|ceiling|quanta"):
        Tariff(**values)  # type: ignore[arg-type]


def test_every_listed_price_has_a_source_and_a_date() -> None:
    """Proves what the list promises: enough machines of enough providers, none from the future, none without source."""
    rows = listed()
    assert len(rows) >= 40 and len({row.provider for row in rows}) >= 8
    for row in rows:
        assert row.source and row.micros_per_hour > 0 and row.as_of <= datetime.date.today()
        assert row.quantum_seconds >= 1 and row.minimum_seconds >= 0
        assert row.spot_micros_per_hour is None or row.spot_micros_per_hour > 0


def test_a_gpu_without_a_provider_takes_the_dearest_machine() -> None:
    """Proves the careful choice, and that another provider, count or name finds its own row or says what is near."""
    price, count = lookup("h100-80gb")
    same = [row for row in listed() if row.gpu == "H100-80GB" and row.gpu_count == 1]
    assert count == len(same) > 5 and price.micros_per_hour == max(row.micros_per_hour for row in same)
    assert lookup("H100-80GB", "lambda")[0].provider == "lambda"
    with pytest.raises(UnknownGPU, match="did you mean A100-80GB"):
        lookup("A100-81GB")


def spec(**machine: object) -> Spec:
    """A spec with this machine."""
    values = {"study": "s", "model": "m", "data": {"train": "t"}, "budget": {"cap": "$10"}, "machine": machine}
    return validate(values, "spec.yaml")


def test_quotes_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves price, ceiling, rounding and note of each way to state a machine."""
    dearest = pricing.quote(spec(gpu="H100-80GB"))
    assert "the dearest of" in dearest.note and dearest.tariff.quantum_ms >= 1_000
    own = pricing.quote(spec(price="$1.29/hour"))
    assert own.tariff == Tariff.flat(1_290_000) and own.note == "from the spec"
    named = pricing.quote(spec(gpu="H100-80GB", provider="lambda", price="$2/hour"))
    assert (named.tariff.now, named.tariff.quantum_ms) == (2_000_000, 60_000)
    spot = pricing.quote(spec(gpu="L4-24GB", provider="gcp", market="spot"))
    assert spot.tariff.now < spot.tariff.ceiling and "held at the on-demand price" in spot.note
    unlisted = pricing.quote(spec(gpu="H100-80GB", provider="openrelay", market="spot"))
    assert unlisted.tariff.now == unlisted.tariff.ceiling and "no spot price is listed" in unlisted.note
    assert pricing.quote(spec(price="$0.30/kWh", watts=350)).tariff.now == 105_000
    assert pricing.quote(spec(price="$0.48/Mtok")).unit == "Mtok"
    assert pricing.quote(spec(gpu="RTX 9090", price="$1/hour")).tariff.now == 1_000_000
    monkeypatch.setattr(prices, "STALE_DAYS", 0)
    assert "days old" in pricing.quote(spec(gpu="H100-80GB")).note


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"gpu": "H900"}, "no listed price"),
        ({"price": "$1/hour", "market": "spot"}, "needs `on_demand`"),
        ({"price": "$1/hour", "on_demand": "$2/hour"}, "needs market: spot"),
        ({"price": "$1/kWh"}, "watts"),
        ({"price": "$1/hour", "watts": 100}, "watts"),
        ({"price": "$1/Mtok", "quantum_seconds": 60}, "a million tokens"),
        ({"price": "$1/day"}, r"\$1\.29/hour"),
        ({"price": "$0/hour"}, "must be positive"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(machine: dict[str, object], message: str) -> None:
    """Proves that each mistake is named before anything is paid."""
    with pytest.raises(SpecError, match=message):
        pricing.quote(spec(**machine))
