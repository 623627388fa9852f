"""The search space as conditional branches, and a trial's configuration out of what the sampler chose.

LoRA's and full-parameter training's parameters have names of their own, because they exist in one branch alone and
the learning rates differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from sweep.spec import Method, RangeSpec, SearchSpec, full_rates
from trainers.messages import TrialConfig

PLACE = "_place"  # of an ordered choice, for a sampler that knows numbers alone


class Suggests(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Chooses one."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Chooses from a range."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Chooses a whole number."""


def rates(method: Method, search: SearchSpec) -> RangeSpec | tuple[float, ...]:
    """The learning rates of a method."""
    return search.learning_rate if method == "lora" else full_rates(search.learning_rate)


def branch(method: Method, search: SearchSpec) -> dict[str, RangeSpec | tuple[Any, ...]]:
    """The parameters of a method by Optuna's names, in the order in which they are asked for."""
    own: dict[str, RangeSpec | tuple[Any, ...]] = {}
    if method == "lora":
        own = {"lora_rank": search.rank, "lora_alpha": search.alpha, "lora_targets": search.targets}
    return own | {f"{method}_learning_rate": rates(method, search), "batch_size": search.batch_size}


def suggest(trial: Suggests, search: SearchSpec) -> dict[str, Any]:
    """Asks for every parameter of one configuration, branch by branch; returns them by Optuna's names."""
    chosen: dict[str, Any] = {"method": trial.suggest_categorical("method", list(search.method))}
    for name, values in branch(chosen["method"], search).items():
        if isinstance(values, RangeSpec):
            chosen[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
        elif _placed(values, search):
            chosen[name] = sorted(values)[trial.suggest_int(name + PLACE, 0, len(values) - 1)]
        else:
            chosen[name] = trial.suggest_categorical(name, list(values))
    return chosen


def _placed(values: tuple[Any, ...], search: SearchSpec) -> bool:
    """Whether the sampler is asked for a place in the list: CMA-ES knows numbers alone, all others know choices."""
    return search.sampler == "cmaes" and not any(isinstance(value, str) for value in values)


def encoded(chosen: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """A configuration as the sampler's parameters: places instead of values where it is asked for them."""
    parameters = {"method": chosen["method"]}
    for name, values in branch(chosen["method"], search).items():
        placed = isinstance(values, tuple) and _placed(values, search)
        parameters |= {name + PLACE: sorted(values).index(chosen[name])} if placed else {name: chosen[name]}
    return parameters


def decoded(parameters: Mapping[str, Any], search: SearchSpec) -> dict[str, Any] | None:
    """The configuration of a sampler's parameters, the reverse of `encoded`; None if it is not whole."""
    if parameters.get("method") not in search.method:
        return None
    chosen = {"method": parameters["method"]}
    for name, values in branch(chosen["method"], search).items():
        if name + PLACE in parameters and isinstance(values, tuple):
            chosen[name] = sorted(values)[parameters[name + PLACE]]
        elif name in parameters:
            chosen[name] = parameters[name]
        else:
            return None
    return chosen


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
        precision=search.precision if lora else "bf16",
    )


def chosen(config: TrialConfig) -> dict[str, Any]:
    """What was chosen for a configuration, by Optuna's names: the reverse of `config`."""
    found: dict[str, Any] = {"method": config.method}
    if config.method == "lora":
        found |= {"lora_rank": config.rank, "lora_alpha": config.alpha, "lora_targets": config.targets}
    return found | {f"{config.method}_learning_rate": config.learning_rate, "batch_size": config.batch_size}


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
