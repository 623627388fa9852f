"""A worker's first slice, where the worker before it was charged beyond its own end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from budgets.ledger import Ledger
from budgets.tariff import Tariff
from sweep import slices
from sweep.errors import BudgetError
from sweep.records import Study
from sweep.slices import Lengths
from sweep.store import Store

LENGTHS = Lengths(load=3_000, expected_load=1_000, slice=10_000, tail=4_000)
STUDY = cast(Study, SimpleNamespace(name="s", fence=1))
RATE = Tariff.flat(3_600_000)  # a millisecond is a micro-dollar


def first_slice(folder: Path, *, cap: int, spent: int, billed_already: int) -> tuple[tuple[int, int, bool], int]:
    """Opens a worker's first slice when of its time so many ms are billed; also returns what is held for it."""
    store = Store(f"sqlite:///{folder}/studies.db", create=True)
    try:
        with store.write() as connection:
            ledger = Ledger(connection, "s")
            ledger.open(cap)
            if spent:
                ledger.charge("before", "idle", spent, note="the worker before")
            slice_ = slices.open_slice(connection, STUDY, "s:w002", RATE.following(billed_already), LENGTHS)
            return slice_, ledger.open_holds()[slices.hold_id("s:w002", 1)]
    finally:
        store.dispose()


def test_only_what_is_not_billed_yet_is_held(tmp_path: Path) -> None:
    """Proves that a worker launched within its predecessor's charged time has the rest of it for nothing."""
    assert first_slice(tmp_path, cap=100_000, spent=0, billed_already=84) == ((13_000, 17_000, False), 17_000 - 84)


@pytest.mark.parametrize("billed_already", [17_000, 3_600_000])
def test_a_slice_that_is_billed_already_in_full_can_be_opened(tmp_path: Path, billed_already: int) -> None:
    """Proves the resume within an hour's quantum: the smallest hold stands for time that costs nothing more."""
    opened, held = first_slice(tmp_path, cap=100_000, spent=99_999, billed_already=billed_already)
    assert opened == (billed_already - LENGTHS.tail, billed_already, False) and held == 1


def test_without_a_micro_dollar_nothing_is_opened(tmp_path: Path) -> None:
    """Proves that a spent cap is said to be spent, also where the machine's time is billed already."""
    with pytest.raises(BudgetError, match="left"):
        first_slice(tmp_path, cap=100_000, spent=100_000, billed_already=3_600_000)


@pytest.mark.parametrize(("until_ms", "parts"), [(1_010, [103, 203, 4]), (1_000, [100, 200, 0]), (900, [100, 200, 0])])
def test_what_no_report_explains_is_everybodys(until_ms: int, parts: list[int]) -> None:
    """Proves the split of a dead pack's last moments: in equal parts, to the millisecond, and never less than none."""
    worker = SimpleNamespace(settled_ms=700, settled_usage={"load": 700})
    usage = {"load": 700, "trial:0": 100, "trial:1": 200}
    rest = ["trial:0", "trial:1", "trial:2"]
    found = slices._explained(worker, usage, until_ms, rest)  # type: ignore[arg-type]
    assert [found[centre] for centre in rest] == parts and found["load"] == 700
