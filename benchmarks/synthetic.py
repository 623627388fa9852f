"""Tables that are made up, to develop and test searches on before there is a recording. They prove nothing about tasks.

Their statistics are those of 352 curves of SmolLM2-135M on an H100 (240 steps, warm-up over 5 %, linear decay, learning
rates from 1e-5 to 1e-2), of two kinds of tasks:

    synthetic-forgiving   9 % of the configurations within 1 % of the best, 37 % within 5 %; seed noise 0.2 %
    synthetic-spread      1 % and 2 %: labels, losses near zero, relative differences that are large

In both the rank correlation of an early loss with the final one is high at 5 %, lower in the middle of the schedule,
where trials near their peak rate look worse than they will end, and high again late. `describe` measures all of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.tables import SHARES, Row, Run, Table

EXAMPLES, TOKENS = 1920, 300  # of a run, and of an example
SPACE: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": [2, 4, 8, 16, 32, 64],
        "alpha": [8.0, 16.0, 32.0, 64.0, 128.0],
        "targets": ["attention", "mlp", "all-linear"],
        "learning_rate": [1e-5, 1e-2],
        "batch_size": [4, 8, 16],
    },
    "full": {"learning_rate": [1e-6, 1e-3], "batch_size": [4, 8, 16]},
}
SPEED = {"attention": 0.9, "mlp": 0.95, "all-linear": 1.0}  # of a token, relative


@dataclass(frozen=True)
class Kind:
    """How a family of losses behaves; spreads are in log loss, rates in decades of rate times alpha over rank."""

    base: float
    best: float
    rate: float  # log10 of the best learning rate x (alpha / rank)^0.5
    below: float  # how fast the loss rises a decade below and above the best rate
    above: float
    power: float  # of the distance
    features: float  # spread of what rank, targets and batch size do
    noise: float  # between configurations, which no feature explains
    seed: float  # between seeds, relative
    pace: float  # how much faster one configuration gets there than another
    hump: float  # how much worse a high rate looks in the middle of its schedule
    jitter: float  # of one evaluation
    limit: float  # log10 of the effective rate above which runs diverge


KINDS = {
    "synthetic-forgiving": Kind(1.508, 0.904, -2.85, 0.045, 0.16, 1.7, 0.012, 0.007, 0.002, 0.035, 0.06, 0.002, -1.75),
    "synthetic-spread": Kind(12.67, 0.0226, -2.85, 1.0, 1.7, 1.2, 0.42, 0.28, 0.05, 0.08, 0.55, 0.35, -1.75),
}


def _config(source: np.random.Generator, method: str) -> dict[str, Any]:
    space = SPACE[method]
    low, high = np.log(space["learning_rate"])
    drawn = {"method": method, "learning_rate": float(np.exp(source.uniform(low, high)))}
    for name in ("rank", "alpha", "targets", "batch_size"):
        choices = space.get(name)
        drawn[name] = None if choices is None else choices[int(source.integers(len(choices)))]
    return drawn


def _away(kind: Kind, config: dict[str, Any]) -> float:
    """Decades between the configuration's effective learning rate and the best one."""
    lora = config["method"] == "lora"
    scale = math.sqrt(config["alpha"] / config["rank"]) if lora else 10.0
    batch = math.sqrt(8 / config["batch_size"])  # a larger batch wants a larger rate
    return math.log10(config["learning_rate"] * scale * batch) - kind.rate


def _excess(kind: Kind, config: dict[str, Any], source: np.random.Generator) -> float:
    """Log of the final loss over the best one that there can be."""
    away = _away(kind, config)
    slope = kind.above if away > 0 else kind.below
    excess = slope * abs(away) ** kind.power + abs(source.normal(0, kind.noise))
    if config["method"] == "lora":
        excess += kind.features * {"attention": 1.0, "mlp": 0.35, "all-linear": 0.0}[config["targets"]]
        excess += kind.features * 0.12 * abs(math.log2(config["rank"] / 12)) ** 1.3
    return excess + kind.features * 0.25 * abs(math.log2(config["batch_size"] / 8))


def _curve(kind: Kind, config: dict[str, Any], final: float, source: np.random.Generator) -> NDArray[np.float64]:
    """Losses at each evaluation: fast at first, slower for low rates, with a hump where the rate is high."""
    away = _away(kind, config)
    at = np.asarray(SHARES)
    pace, height = source.normal(0, kind.pace), source.normal(0, 0.5)
    # What is left of the way from the untrained model to the end, in log loss; high rates go most of it at once.
    speed = 1.1 + 0.28 * np.clip(away, -2.0, 1.0) + pace
    left = np.exp(-speed * 3.0 * at**0.5) - np.exp(-speed * 3.0)
    # Peak of the schedule is at 5 %, the decay to zero brings the loss down again: a hump in its middle.
    rate = np.clip(np.minimum(at / 0.05, (1 - at) / 0.95), 0.0, 1.0)
    hump = kind.hump * np.exp(np.clip(1.1 * away + height, -4.0, 1.5)) * rate * np.clip(at / 0.2, 0.0, 1.0) ** 2
    logs = math.log(final) + (math.log(kind.base) - math.log(final)) * left + hump
    wobble = source.normal(0, kind.jitter, len(SHARES)) * rate
    return np.asarray(np.exp(np.minimum(logs + wobble, math.log(kind.base) + 0.5)))


def _run(kind: Kind, config: dict[str, Any], excess: float, source: np.random.Generator) -> Run:
    final = min(kind.best * math.exp(excess + source.normal(0, kind.seed)), kind.base * 1.02)
    losses = _curve(kind, config, final, source)
    tokens = np.round(np.asarray(SHARES) * EXAMPLES * TOKENS).astype(np.int64)
    over = _away(kind, config) + kind.rate - kind.limit + source.normal(0, 0.15)
    if over <= 0:
        return Run(tokens, losses, False)
    count = int(source.integers(0, 8))  # it goes before a fifth of the run is over
    return Run(tokens[: count + 1], losses[:count], True)


def make(name: str, seed: int = 0, lora: int = 100, full: int = 16, seconds: float = 600.0) -> Table:
    """Makes up a table of a kind; a run of all-linear, batch 8 takes `seconds` alone. Raises KeyError."""
    kind = KINDS[name]
    source = np.random.default_rng((seed, list(KINDS).index(name)))
    drawn = [_config(source, "lora") for _ in range(lora)] + [_config(source, "full") for _ in range(full)]
    excesses = [_excess(kind, config, source) for config in drawn]
    best = min(excesses)  # so that the best loss is the one measured
    thrice = set(source.permutation(len(drawn))[: len(drawn) // 5].tolist())
    rows = []
    for number, (config, excess) in enumerate(zip(drawn, excesses, strict=True)):
        runs = {s: _run(kind, config, excess - best, source) for s in range(3 if number in thrice else 1)}
        alone = seconds / (EXAMPLES * TOKENS) * SPEED.get(config["targets"], 2.3)
        alone *= {4: 1.2, 8: 1.0, 16: 0.92}[config["batch_size"]]
        rows.append(Row(number, config, runs, alone, seconds / 250, None))
    facts = {
        "synthetic": True,
        "task": name,
        "model": "none: made up",
        "base_loss": kind.base,
        "parameters": 134_515_008,
        "shares": list(SHARES),
        "examples": EXAMPLES,
        "tokens_per_example": TOKENS,
        "space": SPACE,
        "seed": seed,
    }
    return Table(name, facts, rows)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.argsort(np.argsort(values)).astype(np.float64)


def describe(table: Table) -> dict[str, Any]:
    """The statistics by which a table is compared with what was measured: LoRA rows, their first seed."""
    rows = table.of("lora").rows
    runs = [row.runs[0] for row in rows]
    whole = [i for i, run in enumerate(runs) if not run.diverged]
    curves = np.stack([runs[i].losses for i in whole])
    finals = curves[:, -1]
    near = finals <= 1.1 * finals.min()
    shares = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    at = [table.shares.index(share) for share in shares]
    seeds = [
        abs(math.log(row.runs[0].losses[-1] / row.runs[1].losses[-1]))
        for row in rows
        if len(row.runs) > 1 and not any(run.diverged for run in row.runs.values())
    ]

    def correlations(chosen: NDArray[np.float64]) -> list[float]:
        return [round(float(np.corrcoef(_ranks(chosen[:, i]), _ranks(chosen[:, -1]))[0, 1]), 2) for i in at]

    return {
        "table": table.name,
        "rows": len(rows),
        "diverged": len(rows) - len(whole),
        "base, median, best": [table.base_loss, round(float(np.median(finals)), 4), round(float(finals.min()), 4)],
        "within 1 %, 5 % of the best": [
            round(float((finals <= finals.min() * f).sum()) / len(rows), 3) for f in (1.01, 1.05)
        ],
        "rank correlation at 5 ... 80 %": correlations(curves),
        "the same within 10 % of the best": correlations(curves[near]) if near.sum() > 4 else int(near.sum()),
        "seed difference, median": round(float(np.median(seeds)), 4) if seeds else None,
    }
