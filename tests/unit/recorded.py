"""A study on recorded curves of which nothing has run yet, in a database of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sweep import launch, pricing
from sweep.spec import validate
from sweep.store import Store

NAME = "words"
RECORDING = {"parameters": 10_000_000, "train_rows": 800, "validation_rows": 64, "validation_tokens": 1_300}


def study(folder: Path, *, splits: dict[str, Any] | None = None, **changes: Any) -> Store:
    """The store with the study `words`, a dollar an hour, capped at a dollar; who asks for it disposes of it.

    `changes` are parts of the spec, `splits` more splits of the data than the recording has.
    """
    (folder / "curves.json").write_text(json.dumps(RECORDING | {"tokens_per_example": 20}))
    values = {"study": NAME, "model": f"replay:{folder / 'curves.json'}", "data": {"train": "recorded"}}
    values |= {"machine": {"price": "$1/hour"}, "budget": {"cap": "$1"}}
    spec = validate(values | changes, "here")
    facts = launch.look(spec, folder)
    facts["data"]["splits"] |= splits or {}
    store = Store(f"sqlite:///{folder}/studies.db", create=True)
    launch.create(store, spec, facts, pricing.quote(spec), folder / NAME, ("boot", 0))
    return store
