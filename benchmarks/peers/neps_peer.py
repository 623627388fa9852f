"""NePS 0.17: PriorBand and ASHA through its own ask and tell; a prior is the `prior` of each parameter.

Both promote from checkpoints, as NePS does where the pipeline reads `previous_pipeline_directory`.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import neps
import numpy as np
import torch

logging.disable(logging.CRITICAL)
CONFIDENCE = "medium"


class _Search:
    def __init__(self, search: str, space: dict[str, Any], prior: Any, units: int) -> None:
        self.at: list[int] = []
        self.promotes = True
        guess = prior[0] if prior else {}

        def belief(name: str) -> dict[str, Any]:
            return {"prior": guess[name], "prior_confidence": CONFIDENCE} if name in guess else {}

        low, high = space["learning_rate"]
        # NePS compares choices as strings or numbers of one type.
        parameters: dict[str, Any] = {
            name: neps.HPOCategorical(values, **belief(name)) for name, values in space["choices"].items()
        }
        parameters["learning_rate"] = neps.HPOFloat(low, high, log=True, **belief("learning_rate"))
        parameters["unit"] = neps.HPOInteger(1, units, is_fidelity=True)
        known = neps.SearchSpace(parameters)
        if search == "priorband":
            optimizer: Any = neps.algorithms.priorband(known, sample_prior_first=bool(prior))
        else:
            options = {"sampler": "prior", "sample_prior_first": True} if prior else {}
            optimizer = neps.algorithms.asha(known, **options)
        self._told = neps.AskAndTell(optimizer=optimizer)
        self._names: dict[int, str] = {}  # NePS's names of our trials at their present rung
        self._ours: dict[str, int] = {}

    def ask(self, trial: int) -> dict[str, Any]:
        asked = self._told.ask()
        name, before = asked.metadata.id, asked.metadata.previous_trial_id
        until = int(asked.config["unit"])
        if before is not None:
            earlier = self._ours[name] = self._ours[before]
            self._names[earlier] = name
            return {"resume": earlier, "until": until}
        self._ours[name] = trial
        self._names[trial] = name
        return {"config": {key: value for key, value in asked.config.items() if key != "unit"}, "until": until}

    def took(self, trial: int, config: dict[str, Any]) -> None:
        known = self._told.trials[self._names[trial]]
        known.config = {**known.config, **config}

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        self._told.tell(self._names[trial], loss)
        return False


def begin(search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> _Search:
    """Starts priorband or asha."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return _Search(search, space, prior, units)
