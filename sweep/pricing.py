"""What a study's machine costs: from the spec and the price list to a tariff, and the changes of a price later on.

A price that the user states wins. A GPU without a provider takes the dearest listed machine, so that the cap holds
wherever it is rented. A spot machine is charged its own price and held under the on-demand price. A price a kWh becomes
an hourly one by the machine's watts. A price a million tokens becomes an hourly one too: the worker's meter then runs
on tokens instead of the clock, one million to its hour, and a machine that waits costs nothing.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, func, select

from budgets.money import Rate, Unit, usd
from budgets.prices import STALE_DAYS, Price, UnknownGPU, lookup
from budgets.tariff import Tariff
from sweep import clock, records, tables
from sweep.errors import SpecError, UsageError
from sweep.records import TOKEN_METER, Study
from sweep.spec import MachineSpec, Spec

SECONDS_A_TOKEN = 3600 / 1_000_000  # on a meter whose hour is a million tokens


@dataclass(frozen=True)
class Quote:
    """A tariff and where it comes from."""

    tariff: Tariff
    unit: Unit  # hour, or Mtok where the meter runs on tokens
    note: str


def quote(spec: Spec) -> Quote:
    """Returns what the spec's machine costs. Raises SpecError for a GPU that is not listed where it would be needed."""
    machine = spec.machine
    listed = _listed(machine) if machine.gpu is not None else None
    if machine.price is None:
        assert listed is not None  # the spec has either
        return _by_list(machine, *listed)
    # A stated price is for the user's own contract, so a listed quantum counts only if the provider was named as well.
    row = listed[0] if listed is not None and machine.provider is not None else None
    price = _hourly(machine.price, machine)
    ceiling, note = price, "from the spec"
    if machine.market == "spot":
        ceiling = machine.on_demand.micros if machine.on_demand else listed[0].micros_per_hour if listed else price
        note += f"; held at the on-demand price of {usd(ceiling)}/hour"
    if machine.price.unit == "kWh":
        note = f"{machine.watts} W at {machine.price}"
    unit: Unit = "Mtok" if machine.price.unit == "Mtok" else "hour"
    return Quote(_tariff(machine, price, max(ceiling, price), row), unit, note)


def _by_list(machine: MachineSpec, price: Price, count: int) -> Quote:
    note = f"{price.provider} {price.instance}"
    if count > 1:
        note += f", the dearest of {count} listed machines with {machine.gpu_count} x {price.gpu}"
    note += f", listed {price.as_of} ({price.source})"
    if price.stale(datetime.date.today()):
        note += f"; over {STALE_DAYS} days old, better give machine.price"
    charged, ceiling = price.micros_per_hour, price.micros_per_hour
    if machine.market == "spot":
        charged = price.spot_micros_per_hour or charged
        ceiling = max(machine.on_demand.micros if machine.on_demand else ceiling, charged)
        note += f"; spot, held at the on-demand price of {usd(ceiling)}/hour"
        note += "" if price.spot_micros_per_hour else ", which is charged too: no spot price is listed"
    return Quote(_tariff(machine, charged, ceiling, price), "hour", note)


def _listed(machine: MachineSpec) -> tuple[Price, int] | None:
    try:
        return lookup(machine.gpu or "", machine.provider, machine.gpu_count)
    except UnknownGPU as error:
        if machine.price is not None and (machine.market != "spot" or machine.on_demand is not None):
            return None  # an unlisted GPU is fine where its price is said
        raise SpecError(f"machine.gpu: {error}", "`sweep prices` lists them; or give machine.price") from error


def _hourly(price: Rate, machine: MachineSpec) -> int:
    """Micro-dollars an hour of the meter, rounded up."""
    return -(-price.micros * machine.watts // 1000) if price.unit == "kWh" and machine.watts else price.micros


def _tariff(machine: MachineSpec, price: int, ceiling: int, row: Price | None) -> Tariff:
    minimum, quantum = machine.minimum_seconds, machine.quantum_seconds
    if row is not None:
        minimum = row.minimum_seconds if minimum is None else minimum
        quantum = row.quantum_seconds if quantum is None else quantum
    return Tariff(((0, price),), ceiling, minimum_ms=1000 * (minimum or 0), quantum_ms=1000 * quantum if quantum else 1)


def write_token_meter(folder: Path) -> None:
    """Writes the file that a worker's meter runs on when tokens are paid for (trainers/meter.py): time is free."""
    train = {"lora": SECONDS_A_TOKEN, "full": SECONDS_A_TOKEN}
    meter = {"load": 0.0, "evaluate": SECONDS_A_TOKEN, "checkpoint": 0.0, "restore": 0.0, "train": train}
    (folder / TOKEN_METER).write_text(json.dumps(meter))


def store_price(connection: Connection, name: str, tariff: Tariff, source: str, boot: tuple[str, int]) -> None:
    """Makes `tariff` what the study's workers are paid by, from now on, and keeps the price in its history."""
    rows = select(func.count()).where(tables.price.c.study == name)
    connection.execute(
        tables.price.insert().values(
            study=name,
            number=int(connection.execute(rows).scalar_one()) + 1,
            micros_per_hour=tariff.now,
            ceiling=tariff.ceiling,
            source=source,
            boot_id=boot[0],
            boot_ms=boot[1],
            unix_ms=clock.unix_ms(),
        )
    )
    records.set_study(connection, name, micros_per_hour=tariff.now, tariff=tariff)


def reprice(connection: Connection, study: Study, rate: Rate, boot: tuple[str, int], note: str) -> Tariff:
    """Changes the price of a study from now on; what was used before keeps the old one. Returns the new tariff.

    A running worker is charged the new price from this moment on, as soon as its orchestrator sees it. A spot machine's
    ceiling stays, unless the price rises above it. Raises UsageError for a price in another unit.
    """
    expected = "Mtok" if study.unit == "Mtok" else "kWh" if study.spec.machine.watts else "hour"
    if rate.unit != expected:
        raise UsageError(f"study {study.name} is priced by the {expected}, not by the {rate.unit}")
    price = _hourly(rate, study.spec.machine)
    if price <= 0:
        raise UsageError(f"a price must be positive, not {rate}")
    ceiling = max(study.tariff.ceiling, price) if study.spec.machine.market == "spot" else price
    tariff = Tariff(((0, price),), ceiling, study.tariff.minimum_ms, study.tariff.quantum_ms)
    store_price(connection, study.name, tariff, note or "sweep price", boot)
    words = f"the price is {usd(price)}/{study.unit} from now on, it was {usd(study.tariff.now)}"
    records.note(connection, study.name, "price", words)
    return tariff


def history(connection: Connection, name: str) -> list[tuple[int, int, str, int]]:
    """The study's prices in their order: (micros an hour, ceiling, boot_id and boot_ms of when it was said)."""
    price = tables.price.c
    query = select(price.micros_per_hour, price.ceiling, price.boot_id, price.boot_ms).where(price.study == name)
    return [tuple(row) for row in connection.execute(query.order_by(price.number))]


def newest(connection: Connection, name: str) -> tuple[int, int, str, int]:
    """The last of `history`; zeros where a study has none."""
    return (history(connection, name) or [(0, 0, "", 0)])[-1]
