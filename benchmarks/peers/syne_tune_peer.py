"""Syne Tune 0.16: ASHA (its stopping variant; this version has no other) and BOHB; a prior is `points_to_evaluate`.

Two defaults of BOHB's would leave it a random search for half a table, so it gets better ones: its densities see a
log-uniform rate on a linear scale (the rate is given as its logarithm), and its model waits until 15 % of the trials
are more than there are parameters (`num_min_data_points` is one more than that).
"""

from __future__ import annotations

import datetime
import logging
import math
from typing import Any

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice, logordinal, uniform
from syne_tune.optimizer.baselines import ASHA, BOHB
from syne_tune.optimizer.scheduler import SchedulerDecision

logging.disable(logging.CRITICAL)


class _Search:
    def __init__(self, search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> None:
        self._units = units
        self.at = [unit for unit in (1, 3, 9, 27) if unit < units] + [units]
        self.promotes = False
        known: dict[str, Any] = {
            name: choice(values) if name == "targets" else logordinal(values)
            for name, values in space["choices"].items()
        }
        known["log_rate"] = uniform(*(math.log10(rate) for rate in space["learning_rate"]))
        options: dict[str, Any] = {"metric": "loss", "time_attr": "unit", "max_t": units, "random_seed": seed}
        if prior:
            options["points_to_evaluate"] = [_inner(guess) for guess in prior]
        if search == "bohb":
            options["num_min_data_points"] = len(known) + 1
        self._scheduler: Any = {"asha": ASHA, "bohb": BOHB}[search](known, **options)
        self._trials: dict[int, Trial] = {}

    def ask(self, trial: int) -> dict[str, Any]:
        suggestion = self._scheduler.suggest()
        if suggestion is None:
            return {"wait": True}
        config = {key: _plain(value) for key, value in suggestion.config.items()}
        config["learning_rate"] = 10 ** config.pop("log_rate")
        self._trials[trial] = Trial(trial, suggestion.config, datetime.datetime.now())
        return {"config": config, "until": self._units}

    def took(self, trial: int, config: dict[str, Any]) -> None:
        known = self._trials[trial] = Trial(trial, _inner(config), datetime.datetime.now())
        self._scheduler.on_trial_add(known)

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        result = {"loss": loss, "unit": unit}
        return self._scheduler.on_trial_result(self._trials[trial], result) == SchedulerDecision.CONTINUE


def _inner(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as the scheduler's space has it."""
    inner = {key: value for key, value in config.items() if key != "learning_rate"}
    return inner | {"log_rate": math.log10(config["learning_rate"])}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def begin(search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> _Search:
    """Starts asha or bohb."""
    np.random.seed(seed)  # ASHA draws its brackets from numpy's own generator
    return _Search(search, space, prior, seed, units)
