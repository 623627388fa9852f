"""A study written by hand: a database as a finished search and race would leave it, with a known truth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, insert

from budgets.ledger import Ledger, trial_account
from sweep import launch, pricing, spec, tables
from sweep.store import Store
from trainers.messages import TrialConfig

Array = NDArray[np.float64]

ROWS, RETAINED = 60, 40
SEEDS = (101, 102, 103)
FACTS = {
    "parameters": 10_000_000,
    "device": "cpu",
    "cores": 2,
    "seconds": 1.0,
    "data": {"splits": {"train": {"rows": 1000, "tokens": 20_000}, "validation": {"rows": 64, "tokens": 1_300}}},
    "plan": {
        "examples": 1000,
        "run_tokens": 20_000,
        "rungs": [1_000, 2_000],
        "rung_rows": 16,
        "rung_tokens": 325,
        "validation_tokens": 1_300,
    },
}
MILLISECONDS = {"lora": 2_000, "full": 20_000}  # of a whole run, as charged; LoRA in a pack of four
WIDTH = {"lora": 4.0, "full": 1.0}
MICROS = {"lora": 2_000, "full": 25_000}


@dataclasses.dataclass(frozen=True)
class Told:
    """A trial of the search, and the losses of its confirmations on validation and test rows, by seed."""

    number: int
    method: str = "lora"
    rank: int | None = 16
    loss: float = 1.0  # of the search's run, over all validation rows
    confirmed: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    failed: int = 0  # confirmations that diverged
    state: str = "completed"
    metric: float | None = None


def examples(seed: int = 0) -> tuple[Array, Array]:
    """Completion tokens of each test example, and the untrained model's nats on it: 1.5 a token on average."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, ROWS).astype(np.float64)
    nll = tokens * 1.5 * np.exp(rng.normal(0, 0.2, ROWS))
    return tokens, nll * 1.5 * tokens.sum() / nll.sum()


def trained(loss: float, key: int) -> Array:
    """Nats of each test example of a run whose loss over all of them is exactly `loss`."""
    tokens, base = examples()
    nll = base * np.exp(np.random.default_rng(1000 + key).normal(0, 0.05, ROWS))
    scaled: Array = nll * loss * tokens.sum() / nll.sum()
    return scaled


def hits(share: float, key: int) -> list[float]:
    """A metric of ones and zeros by example, `share` of them ones."""
    order = np.random.default_rng(key).permutation(ROWS)
    return [float(place < round(share * ROWS)) for place in order]


USUAL: Sequence[Told] = (
    Told(0, loss=0.98, confirmed={s: (0.97 + d, 0.96 + d) for s, d in zip(SEEDS, (0.002, -0.001, 0.0), strict=True)}),
    Told(1, rank=64, loss=0.975, confirmed={s: (0.98, 0.965 + 0.002 * i) for i, s in enumerate(SEEDS)}),
    Told(2, rank=4, loss=1.3, confirmed={s: (1.21, 1.2 + 0.001 * i) for i, s in enumerate(SEEDS)}),
    Told(3, rank=8, state="paused"),
    Told(4, "full", None, loss=0.93, confirmed={s: (0.92, 0.91 - 0.001 * i) for i, s in enumerate(SEEDS)}),
    Told(5, "full", None, loss=1.1),
)


def write(
    folder: Path,
    told: Sequence[Told] = USUAL,
    *,
    changes: Mapping[str, Any] | None = None,
    base: bool = True,
    retention: bool = True,
    peaks: bool = True,
) -> str:
    """Writes the study `words` into folder/studies.db and returns the database's URL. `changes`: parts of the spec."""
    folder.mkdir(exist_ok=True)
    url = f"sqlite:///{folder}/studies.db"
    values = {
        "study": "words",
        "model": "org/tiny",
        "data": {"train": "rows.jsonl"},
        "machine": {"price": "$3.60/hour", "device": "cpu"},
        "budget": {"cap": "$5"},
        "search": {"method": ["lora", "full"]},
    }
    made = spec.validate({**values, **(changes or {})}, "words.yaml")
    store = Store(url, create=True)
    launch.create(store, made, FACTS, pricing.quote(made), folder / "runs" / "words", ("boot", 0))
    with store.write() as connection:
        connection.execute(tables.study.update().values(base_loss=1.5, base_rung_loss=1.5))
        metric = made.objective.metric != "validation_loss"
        if base:
            _score(connection, tables.UNTRAINED, examples()[1], hits(0.1, 1) if metric else None, retention, 0.0)
        for one in told:
            _search(connection, one, peaks)
            for place, (seed, losses) in enumerate(one.confirmed.items()):
                _confirm(connection, one, place, seed, losses, metric, retention, peaks)
            for place in range(one.failed):
                number = tables.CONFIRMATIONS + 100 * one.number + 50 + place
                row = {"state": "pruned", "source": one.number, "diverged": 1}
                _trial(connection, _config(one, number, 900 + place), row, one.method)
    store.dispose()
    return url


def _config(one: Told, number: int, seed: int) -> TrialConfig:
    lora = one.method == "lora"
    return TrialConfig(
        number=number,
        method="lora" if lora else "full",
        learning_rate=3e-4 if lora else 3e-5,
        batch_size=8,
        examples=1000,
        seed=seed,
        rank=one.rank,
        alpha=32.0 if lora else None,
        targets="all-linear" if lora else None,
    )


def _trial(connection: Connection, config: TrialConfig, row: Mapping[str, Any], method: str) -> None:
    text = json.dumps(dataclasses.asdict(config))
    connection.execute(insert(tables.trial).values(study="words", number=config.number, config=text, **row))
    account = trial_account(config.number)
    Ledger(connection, "words").charge(f"hand:{config.number}", account, MICROS[method], note="by hand")


def _search(connection: Connection, one: Told, peaks: bool) -> None:
    done = one.state == "completed"
    row = {
        "state": one.state,
        "rung": 2 if done else 0,
        "loss": one.loss,
        "full_loss": one.loss if done else None,
        "train_loss": one.loss - 0.02,
        "metric": one.metric,
    }
    _trial(connection, _config(one, one.number, 0), row, one.method)
    _evaluation(connection, one.number, one.method, 2 if done else 0, one.loss, done, peaks)


def _confirm(
    connection: Connection,
    one: Told,
    place: int,
    seed: int,
    losses: tuple[float, float],
    metric: bool,
    retention: bool,
    peaks: bool,
) -> None:
    number = tables.CONFIRMATIONS + 100 * one.number + place + 1
    row = {
        "state": "completed",
        "rung": 2,
        "loss": losses[0],
        "full_loss": losses[0],
        "train_loss": losses[0] - 0.03,
        "metric": losses[0] if metric else None,
        "source": one.number,
    }
    _trial(connection, _config(one, number, seed), row, one.method)
    _evaluation(connection, number, one.method, 2, losses[0], True, peaks)
    values = hits(losses[1], number) if metric else None
    forgotten = {"lora": 0.02, "full": 0.1}[one.method]
    _score(connection, number, trained(1.0 if metric else losses[1], number), values, retention, forgotten)


def _evaluation(
    connection: Connection, number: int, method: str, rung: int, loss: float, done: bool, peaks: bool
) -> None:
    count = connection.execute(tables.evaluation.select()).all()
    values = {
        "rung": rung,
        "tokens": 20_000,
        "step": 125,
        "loss": loss,
        "full_loss": loss if done else None,
        "train_tokens": 20_000,
        "train_ms": MILLISECONDS[method],
        "evaluate_tokens": 1_300,
        "evaluate_ms": 50,
        "checkpoint_ms": 10,
        "ordinal": len(count) + 1,
        "width": WIDTH[method],
        "peak_bytes": {"lora": 2 * 2**30, "full": 8 * 2**30}[method] if peaks else None,
    }
    connection.execute(insert(tables.evaluation).values(study="words", trial=number, attempt="a", **values))


def _score(
    connection: Connection, number: int, nll: Array, metric: list[float] | None, retention: bool, forgotten: float
) -> None:
    tokens = examples()[0]
    rows = [("test", nll, tokens, metric)]
    if retention:
        rng = np.random.default_rng(9)
        kept = rng.integers(5, 60, RETAINED).astype(np.float64)
        noise = np.random.default_rng(abs(number)).normal(0, 0.01, RETAINED)
        rows.append(("retention", kept * (2.0 + forgotten) * (1 + (noise if number >= 0 else 0.0)), kept, None))
    for split, values, counts, measured in rows:
        connection.execute(
            insert(tables.scores).values(
                study="words",
                trial=number,
                split=split,
                nll=json.dumps(list(values)),
                tokens=json.dumps(counts.astype(int).tolist()),
                metric=None if measured is None else json.dumps(measured),
                majority=0.3 if number == tables.UNTRAINED and measured is not None else None,
            )
        )
