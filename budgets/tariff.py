"""What a machine's time costs: its prices over time, the provider's least charge and quantum, and the ceiling of holds.

    meter  0 ─ paid_ms ──── price A ──── change ──── price B ──── ended_ms ─(rounded up)─ billed
           billed before │ used time costs what it cost when it was used │ a hold ahead costs the ceiling

Costs are differences of one cumulative function with a single rounding, so that however a machine's life is cut into
slices, the parts add up to the whole. A price by the token is a tariff too: the meter then runs on tokens, a million of
them to its hour (sweep/pricing.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from budgets.money import MS_PER_HOUR


@dataclass(frozen=True)
class Tariff:
    """Prices in micro-dollars an hour, times in ms on the meter of one worker."""

    prices: tuple[tuple[int, int], ...]  # (from_ms, micros_per_hour), the first from 0
    ceiling: int  # what holds are made at: the on-demand price of a spot machine; never under a current price
    minimum_ms: int = 0  # the least that is billed
    quantum_ms: int = 1  # what is billed is a multiple of this
    paid_ms: int = 0  # the first so many ms are billed already: the rest of a quantum of the worker before

    def __post_init__(self) -> None:
        """Raises ValueError for a tariff that no hold could cover."""
        starts = [start for start, _ in self.prices]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(f"prices must start at 0 and follow one another: {self.prices}")
        if any(price < 0 for _, price in self.prices) or self.ceiling < self.now or self.ceiling <= 0:
            raise ValueError(f"a ceiling of {self.ceiling} does not cover {self.prices}")
        if self.minimum_ms < 0 or self.quantum_ms < 1 or self.paid_ms < 0:
            raise ValueError(f"cannot bill in quanta of {self.quantum_ms} ms, {self.minimum_ms} at least")

    @classmethod
    def flat(cls, micros_per_hour: int) -> Tariff:
        """A single price, billed to the millisecond."""
        return cls(((0, micros_per_hour),), micros_per_hour)

    @classmethod
    def loads(cls, text: str) -> Tariff:
        """Reads what `dumps` wrote."""
        values = json.loads(text)
        return cls(**(values | {"prices": tuple((start, price) for start, price in values["prices"])}))

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @property
    def now(self) -> int:
        """The newest price."""
        return self.prices[-1][1]

    def changed(self, at_ms: int, micros_per_hour: int, ceiling: int | None = None) -> Tariff:
        """The tariff with another price from `at_ms` on; what was used before keeps its price."""
        before = tuple((start, price) for start, price in self.prices if start < at_ms)
        highest = max(ceiling or micros_per_hour, micros_per_hour)
        return replace(self, prices=(*before, (at_ms if before else 0, micros_per_hour)), ceiling=highest)

    def following(self, paid_ms: int) -> Tariff:
        """For a worker that follows in the same rental: so much is billed already, the least charge too."""
        return replace(self, minimum_ms=0, paid_ms=paid_ms)

    def cost(self, ms: int) -> int:
        """What the first `ms` of use cost, rounded up to a micro-dollar. Raises ValueError for a negative time."""
        return -(-self._used(ms) // MS_PER_HOUR)

    def billed_ms(self, ms: int) -> int:
        """Up to where time is billed that ended at `ms`: the least charge, in whole quanta."""
        beyond = max(ms - self.paid_ms, self.minimum_ms)
        return self.paid_ms + -(-max(beyond, 0) // self.quantum_ms) * self.quantum_ms

    def hold(self, from_ms: int, to_ms: int) -> int:
        """What must be held so that use from `from_ms` to the end of `to_ms`'s quantum is covered at the ceiling.

        Additive: settling a part of the time and holding the rest never takes more than was held.
        """
        ahead = max(self.billed_ms(to_ms) - max(from_ms, self.paid_ms), 0)
        return -(-(self._used(from_ms) + self.ceiling * ahead) // MS_PER_HOUR) - self.cost(from_ms)

    def affordable_ms(self, from_ms: int, micros: int) -> int:
        """The latest moment, at the end of a quantum, whose `hold` from `from_ms` on is within `micros`; else 0."""
        room = MS_PER_HOUR * (self.cost(from_ms) + max(micros, 0)) - self._used(from_ms)
        beyond = max(from_ms - self.paid_ms, 0) + room // self.ceiling
        latest = self.paid_ms + beyond // self.quantum_ms * self.quantum_ms
        return latest if latest >= max(self.billed_ms(0), from_ms) else 0

    def pieces(self, ms: int) -> list[tuple[int, int]]:
        """(price, ms) for each stretch of the first `ms` that is not billed already."""
        ends = [start for start, _ in self.prices[1:]] + [ms]
        spans = [
            (price, min(end, ms) - max(start, self.paid_ms))
            for (start, price), end in zip(self.prices, ends, strict=True)
        ]
        return [(price, span) for price, span in spans if span > 0]

    def _used(self, ms: int) -> int:
        if ms < 0:
            raise ValueError(f"a negative time: {ms} ms")
        return sum(price * span for price, span in self.pieces(ms))
