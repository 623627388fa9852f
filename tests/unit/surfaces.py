"""Synthetic surfaces of the final loss, shaped like what LoRA runs on two kinds of task were measured to look like."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

Surface = Callable[[Mapping[str, Any]], float]

BEST_RATE = 1.0e-3  # at alpha 32
UNTRAINED = {"reasoned": 1.508, "labels": 12.67}
BEST = {"reasoned": 0.904, "labels": 0.0226}
TARGETS = {
    "reasoned": {"all-linear": 0.0, "mlp": 0.003, "attention": 0.015},
    "labels": {"all-linear": 0.0, "mlp": 0.15, "attention": 0.5},
}
RANK, CURVE, BATCH = (
    {"reasoned": 0.002, "labels": 0.02},
    {"reasoned": 0.16, "labels": 4.0},
    {"reasoned": 2e-3, "labels": 0.02},
)


def reasoned(chosen: Mapping[str, Any]) -> float:
    """Reasoned answers: of random configurations a tenth lies within 1 % of the best, a third within 5 %."""
    return _loss("reasoned", chosen)


def labels(chosen: Mapping[str, Any]) -> float:
    """Labels: one configuration in a hundred lies within 1 % of the best, the median is more than three times it."""
    return _loss("labels", chosen)


def noisy(surface: Surface, chosen: Mapping[str, Any], seed: int) -> float:
    """A loss with the noise of a single run, 0.2 %: the same configuration under the same seed has the same one."""
    return surface(chosen) * (1 + 0.002 * random.Random(f"{seed}:{sorted(chosen.items())}").gauss())


def _loss(kind: str, chosen: Mapping[str, Any]) -> float:
    off = math.log10(chosen["lora_learning_rate"] * (chosen["lora_alpha"] / 32) ** 0.5 / BEST_RATE)
    ranks = max(abs(math.log2(chosen["lora_rank"] / 12)) - 0.6, 0.0)
    batch = max(abs(math.log2(chosen["batch_size"] / 8)) - 1.0, 0.0)
    worse = CURVE[kind] * off**2 + TARGETS[kind][chosen["lora_targets"]] + RANK[kind] * ranks + BATCH[kind] * batch
    if off > 0.8:
        worse += 3 * (off - 0.8)  # beyond the highest stable rate
    return min(BEST[kind] * (1 + worse), UNTRAINED[kind])
