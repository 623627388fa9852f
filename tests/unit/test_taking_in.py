"""How many of a worker's events are taken in before the loop looks up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import recorded

from budgets.tariff import Tariff
from sweep import apply, records, tables
from trainers.messages import BaseEvaluated, Ended, Event, Ready

COMMON: dict[str, Any] = {"at_ms": 1, "usage": {}}
SCORED = BaseEvaluated(**COMMON, loss=4.8, rung_loss=4.7, tokens=100, evaluate_ms=1)
READY = Ready(**COMMON, device="cpu", slots={"lora": 4}, parameters=10)
ENDED = Ended(**COMMON, reason="stop")


@pytest.mark.parametrize(
    ("events", "timings", "taken"),
    [
        ([SCORED] * 5, False, 5),
        ([SCORED] * (apply.AT_ONCE + 1), False, apply.AT_ONCE),
        ([SCORED, READY, SCORED], False, 2),
        ([SCORED, ENDED, SCORED], False, 2),
        ([SCORED] * 5, True, 1),
    ],
)
def test_events_are_taken_in_together_on_a_clock(
    tmp_path: Path, events: list[Event], timings: bool, taken: int
) -> None:
    """Proves that a pack's events are taken in many at a time, each with its offset, so that no kill applies one twice;
    that a worker's first and last words are seen at once; and that on recorded timings each is decided upon alone."""
    (tmp_path / "timings.json").write_text("{}")
    machine = {"price": "$1/hour"} | ({"timings": str(tmp_path / "timings.json")} if timings else {})
    store = recorded.study(tmp_path, machine=machine)
    row = {"id": "words:w001", "study": "words", "ordinal": 1, "state": "started", "folder": "", "hold": "", "slice": 1}
    row |= {"micros_per_hour": 1, "tariff": Tariff.flat(1).dumps(), "origin_boot_ms": 0, "boot_id": "boot"}
    with store.write() as connection:
        connection.execute(tables.worker.insert().values(**row, paid_ms=1_000, work_ms=1_000))
        study = records.study(connection, "words")
        (worker,) = records.workers(connection, "words")
    lines = [(100 * (place + 1), event) for place, event in enumerate(events)]
    assert len(list(apply.take_in(store, study, worker, lines))) == taken
    with store.read() as connection:
        (worker,) = records.workers(connection, "words")
    assert worker.offset == 100 * taken
    store.dispose()
