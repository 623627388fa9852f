"""FLAML 2.7: BlendSearch, its cost being a trial's seconds; a prior is `points_to_evaluate`.

Its local search follows its own points and takes no others, so it alone is not told which row it got.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import optuna
from flaml import BlendSearch, tune

logging.disable(logging.CRITICAL)
optuna.logging.set_verbosity(optuna.logging.ERROR)
TRIES = 20  # it answers None where it wants to be asked again


class _Search:
    def __init__(self, space: dict[str, Any], prior: Any, seed: int, units: int) -> None:
        self.at = [units]
        self.promotes = False
        self._units = units
        known: dict[str, Any] = {name: tune.choice(values) for name, values in space["choices"].items()}
        known["learning_rate"] = tune.loguniform(*space["learning_rate"])
        self._search = BlendSearch(metric="loss", mode="min", space=known, points_to_evaluate=prior or None, seed=seed)
        self._configs: dict[int, Any] = {}

    def ask(self, trial: int) -> dict[str, Any]:
        for _ in range(TRIES):
            config = self._search.suggest(str(trial))
            if config is not None:
                self._configs[trial] = config
                plain = {key: v.item() if isinstance(v, np.generic) else v for key, v in config.items()}
                return {"config": plain, "until": self._units}
        return {"wait": True}

    def took(self, trial: int, config: dict[str, Any]) -> None:
        pass

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        result = {"loss": loss, "config": self._configs[trial], "time_total_s": seconds}
        self._search.on_trial_complete(str(trial), result)
        return False


def begin(search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> _Search:
    """Starts blendsearch."""
    random.seed(seed)
    np.random.seed(seed)
    return _Search(space, prior, seed, units)
