"""The suite notices broken ledgers: what cannot fail proves nothing. The table is in mutants.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mutants
import pytest
from ledger_checks import follows_the_model, waits_its_turn

from budgets.ledger import Ledger
from sweep.store import Store

Check = Callable[[Store, type[Ledger]], None]


def model(store: Store, ledger_class: type[Ledger]) -> None:
    """What test_state_machine.py runs, but nobody needs the shortest failure of a mutant."""
    follows_the_model(store, ledger_class, 30, explain=False)


# Which check catches it, and by what. What the model alone sees is looked for on one database.
CAUGHT: dict[type[Ledger], tuple[Check, str]] = {
    mutants.ReadsThenWrites: (waits_its_turn, "its open holds 120"),
    mutants.ChecksBeforeTheLock: (waits_its_turn, "never_overdrawn"),
    mutants.ForgetsTheRest: (model, "its open holds"),
    mutants.ResolvesTwice: (model, "a closed hold never changes"),
    mutants.ResolvesUnseen: (model, "its open holds|held_not_negative"),
    mutants.IgnoresTheFence: (model, "should have been refused with .*HoldClosed"),
    mutants.ChargesAgain: (model, "the balances are"),
    mutants.ReturnsTheExpired: (model, "the balances are"),
    mutants.ExtendsByAmount: (model, "the open holds are|do not fit"),
    mutants.HidesTheOverrun: (model, "the balances are|the bill differs by"),
    mutants.RefundsAgain: (model, "the balances are|never_overdrawn|holds less than"),
}
NEEDS_POSTGRES = (mutants.ReadsThenWrites, mutants.ChecksBeforeTheLock)
STOPPED_BY_THE_DATABASE = (mutants.ResolvesTwice, mutants.ResolvesUnseen)
BOTH = [
    (mutant, storage) for mutant in NEEDS_POSTGRES + STOPPED_BY_THE_DATABASE for storage in ("sqlite", "postgresql")
]
ONE = [(mutant, "sqlite") for mutant in CAUGHT if mutant not in NEEDS_POSTGRES + STOPPED_BY_THE_DATABASE]


@pytest.fixture
def store(storage: str) -> Iterator[Store]:
    """An empty database, whose books may be wrong at the end."""
    opened = Store(storage, create=True)
    yield opened
    opened.dispose()


def test_the_real_ledger_waits_its_turn(store: Store) -> None:
    """Proves that what catches the mutants lets the ledger through; test_state_machine.py says so of the model."""
    waits_its_turn(store, Ledger)


@pytest.mark.parametrize(("mutant", "storage"), BOTH + ONE, indirect=["storage"])
def test_a_mutant_is_caught(store: Store, mutant: type[Ledger]) -> None:
    """Proves that the suite sees this mistake, by the means that were made for it."""
    check, how = CAUGHT[mutant]
    if store.is_sqlite and mutant in NEEDS_POSTGRES:
        check(store, mutant)
        return
    with pytest.raises(Exception, match=how):
        check(store, mutant)
