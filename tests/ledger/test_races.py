"""Processes that meet in the ledger, let loose at once. What a lone process proves, none of them may undo."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import ledger_races
import pytest
from ledger_races import CAP

ROUNDS = 8


@pytest.mark.parametrize("price", [310_000, 31_000])
def test_sixty_four_processes_and_one_dollar(postgres_server: str, pool: ProcessPoolExecutor, price: int) -> None:
    """Proves admission under contention: of 64 holds at once exactly as many win as one dollar pays for."""
    outcomes, left = pool.submit(ledger_races.last_dollar, postgres_server, f"dollar-{price}", 64, price).result()
    assert outcomes.count("held") == CAP // price
    assert outcomes.count("BudgetExhausted") == 64 - CAP // price
    assert left == CAP % price


def test_two_settlements_of_one_hold_are_one_charge(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that a hold is resolved once, whoever comes first: of two requests one is refused."""
    for outcomes, spent, _ in pool.submit(ledger_races.rounds, storage, "settle_twice", ROUNDS).result():
        assert (sorted(outcomes), spent) in [(["HoldClosed", "settled 100"], 100), (["HoldClosed", "settled 200"], 200)]


def test_the_same_settlement_twice_is_one_charge(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that two processes that settle alike both succeed, and that one of them charged."""
    for outcomes, spent, _ in pool.submit(ledger_races.rounds, storage, "settle_alike", ROUNDS).result():
        assert (outcomes, spent) == (["settled 100", "settled 100"], 100)


def test_a_settlement_and_a_void_are_one_or_the_other(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that a hold never ends in two ways."""
    for outcomes, spent, _ in pool.submit(ledger_races.rounds, storage, "settle_and_void", ROUNDS).result():
        assert (outcomes, spent) in [(["settled 100", "HoldClosed"], 100), (["HoldClosed", "voided"], 0)]


def test_a_hold_and_a_lower_cap_never_both_win(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that the cap cannot sink under a hold that is being made, nor a hold rise over a cap that sinks."""
    for outcomes, _, balances in pool.submit(ledger_races.rounds, storage, "hold_and_lower_cap", ROUNDS).result():
        assert outcomes in [["held", "CapTooLow"], ["BudgetExhausted", "lowered"]]
        assert balances["held"] <= balances["cap"]


def test_a_settlement_and_a_take_over(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that an owner that is being replaced either settled in time or was refused, and then the hold is open."""
    for outcomes, spent, balances in pool.submit(ledger_races.rounds, storage, "settle_and_take_over", ROUNDS).result():
        settled = (["settled 100", "taken over"], 100, 0)
        refused = (["HoldClosed", "taken over"], 0, 600_000)
        assert (outcomes, spent, balances["held"]) in [settled, refused]


def test_a_hold_and_a_take_over(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that a hold made during a take-over is counted, and obeys exactly one owner."""
    for outcomes, _, balances in pool.submit(ledger_races.rounds, storage, "hold_and_take_over", ROUNDS).result():
        assert outcomes == ["held", "taken over"]
        assert balances["held"] == 600_000 and balances["fence"] in (1, 2)


def test_raising_together_raises_once_each(storage: str, pool: ProcessPoolExecutor) -> None:
    """Proves that an absolute target that two processes ask for is reached once, not passed by the second."""
    for outcomes, _, balances in pool.submit(ledger_races.rounds, storage, "extend_alike", ROUNDS).result():
        assert (outcomes, balances["held"]) == (["widened", "widened"], 900_000)
