"""Who is stopped because it can't catch up: behind the best by more than anybody in this study ever made good.

    loss (log)   trial      ●  gap at this rung
                 champion   ●───────────────────●  its end
                            └ progress from here on differs between trials: the largest difference seen is `recovery`

The first rung lies within the first tenth of a run, so that is where the hopeless end. A paused trial costs nothing
more, but it may be promoted where better ones are few; one that is dominated is not. Nothing is taken for granted about
curves: what trials of this study did between the rung and their ends is the whole evidence, and three times of it are
allowed for, because those that came to their ends were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sweep.records import TrialRow
from sweep.rungs import Judgement

LEAST_ENDS = 4  # trials that went from a rung to their end, before anybody is judged there
SAFETY = 3.0  # times the largest recovery that was seen
FLOOR = 0.1  # of the log loss: a smaller gap never dominates

_Losses = Mapping[int, Mapping[int, float]]


def overrule(judgement: Judgement, trial: TrialRow, trials: Sequence[TrialRow], losses: _Losses) -> Judgement:
    """The judgement, or `prune` with its reason where the trial is dominated; `losses[rung][trial]`."""
    if judgement.verdict not in {"promote", "pause"}:
        return judgement
    found = dominated(trial, trials, losses)
    return judgement if found is None else replace(judgement, verdict="prune", reason=found)


def dominated(trial: TrialRow, trials: Sequence[TrialRow], losses: _Losses) -> str | None:
    """Why the trial can't catch up with the best completed one, in words; None while it may."""
    there = {number: loss for number, loss in losses.get(trial.rung, {}).items() if loss > 0}
    done = [t for t in trials if t.state == "completed" and t.loss and t.loss > 0 and t.number in there]
    if len(done) < LEAST_ENDS or trial.number not in there:
        return None
    progress = [math.log(there[t.number] / t.loss) for t in done if t.loss]
    recovery = max(progress) - min(progress)
    champion = min(done, key=lambda t: (t.loss or 0.0, t.number))
    gap = math.log(there[trial.number] / there[champion.number])
    if gap <= max(SAFETY * recovery, FLOOR):
        return None
    return (
        f"dominated: loss {_percent(gap)} above trial {champion.number}'s at {trial.tokens:,} tokens; "
        f"from there on nobody made good more than {_percent(recovery)}"
    )


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):.3g} %"
