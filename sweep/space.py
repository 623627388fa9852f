"""The search space as conditional branches, and a trial's configuration out of what the sampler chose.

LoRA's and full-parameter training's parameters have names of their own, because they exist in one branch alone and
the learning rates differ: full training's range is a tenth of LoRA's (Schulman et al., "LoRA Without Regret", 2025:
the best LoRA rate is about ten times the best full rate over 14 models).
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from sweep.spec import Method, RangeSpec, SearchSpec
from trainers.messages import TrialConfig

FULL_RATE_RATIO = 0.1


class Suggests(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Chooses one."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Chooses from a range."""


def suggest(trial: Suggests, search: SearchSpec) -> dict[str, Any]:
    """Asks for every parameter of one configuration, branch by branch; returns them by Optuna's names."""
    chosen: dict[str, Any] = {"method": trial.suggest_categorical("method", list(search.method))}
    if chosen["method"] == "lora":
        chosen["lora_rank"] = trial.suggest_categorical("lora_rank", list(search.rank))
        chosen["lora_alpha"] = trial.suggest_categorical("lora_alpha", list(search.alpha))
        chosen["lora_targets"] = trial.suggest_categorical("lora_targets", list(search.targets))
        chosen["lora_learning_rate"] = _rate(trial, "lora_learning_rate", search, 1.0)
    else:
        chosen["full_learning_rate"] = _rate(trial, "full_learning_rate", search, FULL_RATE_RATIO)
    chosen["batch_size"] = trial.suggest_categorical("batch_size", list(search.batch_size))
    return chosen


def _rate(trial: Suggests, name: str, search: SearchSpec, ratio: float) -> float:
    space = search.learning_rate
    if isinstance(space, RangeSpec):
        return trial.suggest_float(name, space.low * ratio, space.high * ratio, log=space.log)
    return float(trial.suggest_categorical(name, [rate * ratio for rate in space]))


def config(number: int, chosen: dict[str, Any], search: SearchSpec, examples: int, seed: int) -> TrialConfig:
    """Builds the complete configuration of a trial. All trials of a search share the study's seed: paired noise."""
    lora = chosen["method"] == "lora"
    return TrialConfig(
        number=number,
        method=chosen["method"],
        learning_rate=chosen["lora_learning_rate" if lora else "full_learning_rate"],
        batch_size=chosen["batch_size"],
        examples=examples,
        seed=seed,
        rank=chosen.get("lora_rank"),
        alpha=chosen.get("lora_alpha"),
        targets=chosen.get("lora_targets"),
        dropout=search.dropout if lora else 0.0,
        warmup=search.warmup,
        weight_decay=search.weight_decay,
        clip_norm=search.clip_norm,
    )


def describe(config: TrialConfig) -> str:
    """Returns a configuration in a few words: `lora r16 a32 all-linear lr 3.1e-4 b8`."""
    rate = f"lr {config.learning_rate:.1e}".replace("e-0", "e-")
    if config.method == "lora":
        return f"lora r{config.rank} a{config.alpha:g} {config.targets} {rate} b{config.batch_size}"
    return f"full {rate} b{config.batch_size}"


def run_examples(search: SearchSpec, train_rows: int) -> int:
    """Examples of the longest run: at least one of the largest batches."""
    return max(math.ceil(search.epochs * train_rows), *search.batch_size)


def typical(method: Method, search: SearchSpec, examples: int, seed: int, number: int = 0) -> TrialConfig:
    """A cheap configuration of a method: smallest rank, largest batch. Forecasts before a question start from it."""
    rate = 1e-4 if method == "lora" else 1e-5
    chosen: dict[str, Any] = {"method": method, f"{method}_learning_rate": rate, "batch_size": max(search.batch_size)}
    if method == "lora":
        chosen |= {"lora_rank": min(search.rank), "lora_alpha": search.alpha[0], "lora_targets": search.targets[0]}
    return config(number, chosen, search, examples, seed)
