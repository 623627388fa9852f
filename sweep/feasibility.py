"""What the sampler learns of memory: a trial that ran out of it is data, and nothing that needs as much is tried again.

Two things are done, since neither is enough. The sampler is shown such trials as violating a constraint (Optuna's own;
Watanabe & Hutter, "c-TPE", 2023): it turns away from their region, but only by likelihood, and not before its first
random trials are over. So a configuration that needs at least what one ran out of, part by part, is not started: that
costs nothing, where trying costs loading, compiling and whatever the neighbours in a pack lose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sweep import space
from sweep.records import RUNNING, Study, TrialRow, newcomer
from trainers.memory import needs_at_least
from trainers.messages import Method, TrialConfig

REASON = "out of memory"  # sweep/apply.py's, for the failure code out_of_memory
MOST = 24  # configurations in a row that came to nothing: the sampler finds nothing else


def infeasible(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Trials that ran out of memory, or were not started since they would."""
    return [trial for trial in trials if trial.state == "failed" and trial.reason.startswith(REASON)]


def view(trials: Sequence[TrialRow]) -> tuple[dict[int, int], set[int], set[int]]:
    """What the sampler is told beside its own tables: paused trials with their rung, diverged ones, infeasible ones."""
    paused = {trial.number: trial.rung for trial in trials if trial.state == "paused"}
    diverged = {trial.number for trial in trials if trial.diverged}
    return paused, diverged, {trial.number for trial in infeasible(trials)}


def refusal(config: TrialConfig, trials: Sequence[TrialRow]) -> str | None:
    """Why a configuration is not started; None where nothing that ran out of memory speaks against it."""
    for trial in infeasible(trials):
        if trial.reason.startswith(f"{REASON}: not started"):
            continue
        if needs_at_least(config, trial.config):
            return f"{REASON}: not started: it needs at least what trial {trial.number} ran out of"
    return None


def exhausted(trials: Sequence[TrialRow]) -> bool:
    """Whether so many configurations of a method in a row came to nothing that no other is to be expected.

    They were not started, or they diverged or failed and none of the method was ever evaluated: where that costs
    nothing, on a meter of tokens, no cap would end it.
    """
    over = (trial for trial in trials if trial.state not in RUNNING)
    last = sorted(over, key=lambda trial: trial.number)[-MOST:]
    if len(last) < MOST:
        return False
    refused = all(trial.reason.startswith(f"{REASON}: not started") for trial in last)
    return refused or (all(map(lost, last)) and all(trial.loss is None for trial in trials))


def lost(trial: TrialRow) -> bool:
    """Whether a trial diverged, failed or ran out of memory."""
    return trial.diverged or trial.state == "failed"


def newcomers(study: Study, trials: Sequence[TrialRow], method: Method | None = None) -> list[TrialRow]:
    """The cheapest trial of each method, or of one, as the next one to be asked; none where no more may be asked.

    Of a stated number of trials each method has its share where their money is kept even.
    """
    search, number, examples = study.spec.search, len(trials), study.facts["plan"]["examples"]
    if study.phase != "search" or (search.trials is not None and number >= search.trials):
        return []
    mine = [trial for trial in trials if method in (None, trial.config.method)]
    share = math.inf if search.trials is None else math.ceil(search.trials / len(search.method))
    if method is not None and len(mine) >= share:
        return []
    methods = [
        one
        for one in (search.method if method is None else [method])
        if not exhausted([trial for trial in mine if trial.config.method == one])
    ]
    return [newcomer(space.typical(one, search, examples, study.spec.seed, number)) for one in methods]
