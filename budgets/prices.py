"""What machines cost: `prices.csv`, one row an instance, each with its date and its source.

A price that the user states always wins. Listed prices are a convenience: they age, and `Price.age_days` says how far.
"""

from __future__ import annotations

import csv
import datetime
import difflib
import functools
from dataclasses import dataclass
from importlib import resources

from budgets.money import parse_usd

STALE_DAYS = 90  # older prices are shown with a warning


class UnknownGPU(LookupError):
    """No listed machine has this GPU."""


@dataclass(frozen=True)
class Price:
    """An hourly price of one machine and where it comes from."""

    micros_per_hour: int
    provider: str
    instance: str
    gpu: str
    gpu_count: int
    gpu_memory_gib: int
    spot_micros_per_hour: int | None
    minimum_seconds: int
    quantum_seconds: int
    region: str
    as_of: datetime.date
    source: str

    def stale(self, today: datetime.date) -> bool:
        """Whether the price is too old to be trusted without a look."""
        return self.age_days(today) > STALE_DAYS

    def age_days(self, today: datetime.date) -> int:
        """Days since the price was seen."""
        return (today - self.as_of).days


@functools.cache
def listed() -> tuple[Price, ...]:
    """Reads the price list that ships with the package."""
    text = resources.files("budgets").joinpath("prices.csv").read_text(encoding="utf-8")
    return tuple(
        Price(
            micros_per_hour=parse_usd(row["usd_per_hour"]),
            provider=row["provider"],
            instance=row["instance"],
            gpu=row["gpu"],
            gpu_count=int(row["gpu_count"]),
            gpu_memory_gib=int(float(row["gpu_memory_gib"])),
            spot_micros_per_hour=parse_usd(row["spot_usd_per_hour"]) if row["spot_usd_per_hour"] else None,
            minimum_seconds=int(row["minimum_seconds"]),
            quantum_seconds=int(row["quantum_seconds"]),
            region=row["region"],
            as_of=datetime.date.fromisoformat(row["as_of"]),
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def lookup(gpu: str, provider: str | None = None, gpu_count: int = 1) -> tuple[Price, int]:
    """Returns the dearest listed price of a machine with `gpu_count` of these GPUs, and how many there are.

    The dearest, because a cap must hold at any of them. Raises UnknownGPU, naming the nearest known one.
    """
    wanted = [
        price
        for price in listed()
        if price.gpu.lower() == gpu.lower()
        and price.gpu_count == gpu_count
        and (provider is None or price.provider.lower() == provider.lower())
    ]
    if not wanted:
        known = sorted({price.gpu for price in listed()})
        near = difflib.get_close_matches(gpu, known, n=1, cutoff=0.3)
        where = f" at {provider}" if provider else ""
        raise UnknownGPU(
            f"no listed price for {gpu_count} x {gpu}{where}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return max(wanted, key=lambda price: (price.micros_per_hour, price.provider, price.instance)), len(wanted)
