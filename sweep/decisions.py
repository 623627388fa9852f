"""What becomes of a trial that stands at a rung: by its place, by the model of curves, by what it can catch up."""

from __future__ import annotations

from collections.abc import Sequence

from sweep import feasibility, rungs, turns
from sweep.allocation import Allocation
from sweep.dominance import overrule
from sweep.projection import Projector
from sweep.records import Study, TrialRow
from sweep.rungs import Judgement, Results


def decide(
    study: Study,
    trial: TrialRow,
    trials: Sequence[TrialRow],
    results: Results,
    projector: Projector,
    allocation: Allocation,
) -> Judgement:
    """Decides about a trial that was just evaluated, a confirmation or a finale too; all else is the search's.

    Where methods are kept even, a trial is compared with those of its own.
    """
    method = trial.config.method if turns.balanced(study.spec.search) else None
    peers, theirs = turns.among(trials, results, method)
    # Without a slot, since its worker died, there is nothing to be written.
    can_pause = trial.config.method == "lora" or trial.slot is None or projector.parking_pays(trial)
    judgement = rungs.judge(
        trial,
        theirs,
        last=projector.plan.last,
        eta=study.spec.search.eta,
        base_loss=study.base_rung_loss,
        can_pause=can_pause,
    )
    if can_pause:
        newcomers = feasibility.newcomers(study, trials, method)
        judgement = allocation.review(judgement, trial, peers, theirs, projector, newcomers)
    return judgement if trial.source is not None else overrule(judgement, trial, peers, theirs.losses)
