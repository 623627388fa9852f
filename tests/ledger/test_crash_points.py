"""kill -9 at every SQL boundary of every verb, on both databases; then the same intents again."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
from ledger_processes import die_everywhere
from ledger_scenarios import SCENARIOS


@pytest.fixture
def urls(storage: str) -> list[str]:
    """A database for each scenario: PostgreSQL's rows lock one by one, SQLite's file as a whole."""
    return [f"{storage}.{name}" if storage.startswith("sqlite") else storage for name in SCENARIOS]


def test_a_kill_at_any_step_leaves_one_final_state(urls: list[str], pool: ProcessPoolExecutor, record_property) -> None:
    """Proves that whenever a process is killed the books are whole, and that repeating its intents heals everything.

    After each kill the audit is clean and spent + held within the cap; after the repetition the rows are those of a run
    that nobody interrupted.
    """
    found = dict(zip(SCENARIOS, pool.map(die_everywhere, urls, SCENARIOS), strict=True))
    for name, (kills, ends) in found.items():
        print(f"{name}: {kills} kills, {len(ends)} final state")
        assert len(ends) == 1, f"{name} ended in {len(ends)} ways:\n" + "\n\n".join(sorted(ends))
    record_property("crash_points", sum(kills for kills, _ in found.values()))
    assert all(kills > 20 for kills, _ in found.values()), "every scenario has dozens of boundaries"
