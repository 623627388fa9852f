"""The ledger against a model of it, through whatever sequences of calls Hypothesis finds."""

from __future__ import annotations

from ledger_checks import follows_the_model

from budgets.ledger import Ledger
from sweep.store import Store

EXAMPLES = {"sqlite": 30, "postgresql": 8}


def test_the_ledger_follows_the_model(storage: str) -> None:
    """Proves that every verb does what the model does, in any order, repeated and contradicted; after each the audit.

    Sequences are the same in every run, so a failure can be looked at again.
    """
    store = Store(storage, create=True)
    try:
        follows_the_model(store, Ledger, EXAMPLES["sqlite" if store.is_sqlite else "postgresql"])
    finally:
        store.dispose()
