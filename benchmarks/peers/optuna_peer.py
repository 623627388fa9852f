"""Optuna 5: samplers and pruners with their defaults; a first guess is enqueued.

A pruner is asked at its own rungs alone, so that it pays for no evaluation that it would not look at.
"""

from __future__ import annotations

from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

optuna.logging.set_verbosity(optuna.logging.ERROR)


class _Search:
    def __init__(
        self, sampler: BaseSampler, pruner: BasePruner, at: list[int], space: dict[str, Any], prior: Any, units: int
    ) -> None:
        self.at = at
        self.promotes = False
        self._units = units
        # Hyperband draws each trial's bracket from a hash of the study's name, which would be a random one.
        self._study = optuna.create_study(study_name="peer", sampler=sampler, pruner=pruner)
        low, high = space["learning_rate"]
        self._space: dict[str, Any] = {
            name: optuna.distributions.CategoricalDistribution(values) for name, values in space["choices"].items()
        }
        self._space["learning_rate"] = optuna.distributions.FloatDistribution(low, high, log=True)
        for guess in prior or []:
            self._study.enqueue_trial(guess)
        self._trials: dict[int, optuna.Trial] = {}

    def ask(self, trial: int) -> dict[str, Any]:
        asked = self._trials[trial] = self._study.ask(self._space)
        return {"config": asked.params, "until": self._units}

    def took(self, trial: int, config: dict[str, Any]) -> None:
        storage, identifier = self._study._storage, self._trials[trial]._trial_id
        for name, distribution in self._space.items():
            storage.set_trial_param(identifier, name, distribution.to_internal_repr(config[name]), distribution)

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        asked = self._trials[trial]
        asked.report(loss, unit)
        if unit >= self._units:
            self._study.tell(asked, loss)
            return False
        if asked.should_prune():
            self._study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            return False
        return True


def begin(search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> _Search:
    """Starts random, tpe, gp, tpe+halving or tpe+hyperband."""
    name, _, rule = search.partition("+")
    samplers: dict[str, Any] = {"random": RandomSampler, "tpe": TPESampler, "gp": GPSampler}
    pruner: BasePruner = NopPruner()
    at = [units]
    if rule == "halving":
        pruner = SuccessiveHalvingPruner(min_resource=1)
        at = [unit for unit in (1, 4, 16, 64) if unit < units] + [units]
    elif rule == "hyperband":
        pruner = HyperbandPruner(min_resource=1, max_resource=units)
        at = [unit for unit in (1, 3, 9, 27) if unit < units] + [units]
    return _Search(samplers[name](seed=seed), pruner, at, space, prior, units)
