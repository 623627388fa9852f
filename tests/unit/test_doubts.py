"""What a plan warns of in the data."""

from __future__ import annotations

from typing import Any

from sweep.doubts import of_data
from sweep.spec import validate
from sweep.views.tables import seen

SPEC = validate(
    {
        "study": "words",
        "model": "m",
        "data": {"train": "rows.jsonl", "max_tokens": 64},
        "machine": {"price": "$1/hour"},
        "budget": {"cap": "$1"},
        "objective": {"metric": "exact_match", "max_new_tokens": 16},
    },
    "here",
)


def data(validation: int = 100, **more: Any) -> dict[str, Any]:
    """What was counted of prepared data, with so many validation rows."""
    return {"splits": {"validation": {"rows": validation, "tokens": 900}}} | more


def test_data_that_may_mislead_are_named() -> None:
    """Proves that few validation rows, rows that lose their end and answers that can't be generated are warned of."""
    long = data(
        12, rows_read=700, truncated=350, dropped={"duplicates": 300, "cut": 100}, objective={"longer_answers": 5}
    )
    few, cut, answers = of_data(SPEC, long)
    assert few.what == "12 validation rows can hardly tell configurations apart"
    assert (
        "350 of 700 rows are longer than data.max_tokens, 64: 100 have" in cut.what and "250 lose their end" in cut.what
    )
    assert "5 of 12 validation answers are longer than objective.max_new_tokens, 16" in answers.what


def test_data_in_order_are_not_doubted() -> None:
    """Proves that a row or two in a hundred raise no warning, nor do older studies that counted nothing of it."""
    assert not list(of_data(SPEC, data(rows_read=700, truncated=14, dropped={"duplicates": 3, "cut": 0})))
    assert not list(of_data(SPEC, data()))


def test_rows_that_are_left_out_are_said() -> None:
    """Proves the line of a plan on what was read, and that there is none where all of it is trained on."""
    facts = {"parameters": 1, "device": "cpu", "seconds": 1.0}
    some = data(rows_read=700, truncated=350, dropped={"duplicates": 300, "cut": 100})
    said = "rows read: 700, 300 left out as duplicates, 100 left out as too long, 250 cut at data.max_tokens"
    assert said in seen(facts | {"data": some})
    for none in (data(), data(rows_read=700, truncated=0, dropped={"duplicates": 0, "cut": 0})):
        assert not any(line.startswith("rows read") for line in seen(facts | {"data": none}))
