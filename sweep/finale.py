"""The finale: the winner trained in full from what the race has left, and the choice of what is handed over.

Where the finale is as long as the search's longest run, confirmation has trained the winner to that end on the same
rows already, under several seeds: nothing is trained twice, and the finale is a choice. `endgame.finale_length` asks
for a longer run: its money is kept from the race, and it is trained once the race is over, from scratch, because a
schedule that has decayed to zero can't be gone on with. It trains on the training rows alone. The validation rows do
not join them, as they are all that can tell whether the longer run is the better one, and the test rows never choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from budgets.forecast import Seconds
from budgets.money import cost_micros, usd
from sweep import endgame, records, space
from sweep.endgame import Race
from sweep.projection import Projector
from sweep.records import Study, TrialRow
from sweep.spec import Method, Spec
from sweep.store import Store
from trainers.messages import TrialConfig


def examples(spec: Spec, facts: Mapping[str, Any]) -> int | None:
    """How many examples a finale trains on; None where there is none, or the longest run is as long."""
    settings, longest = spec.endgame, int(facts["plan"]["examples"])
    if not settings.finale or settings.finale_length is None:
        return None
    rows = int(facts["data"]["splits"]["train"]["rows"])
    wanted = math.ceil(settings.finale_length * rows)
    return wanted if wanted > longest else None


def finale_cost(spec: Spec, facts: Mapping[str, Any], projector: Projector) -> dict[Method, Seconds]:
    """Machine time of a finale by the method that wins, evaluation and checkpoint included; {} where none is trained.

    `facts` are a study's; `projector` is one of its, taught or not. By the method's cheapest configuration.
    """
    wanted = examples(spec, facts)
    if wanted is None:
        return {}
    number = records.finale_number(0)
    configs = [space.typical(method, spec.search, wanted, spec.seed, number) for method in spec.search.method]
    return {c.method: projector.confirmation(records.newcomer(endgame.whole(c)), 1) for c in configs}


# From here on: the finale as the tables have it.


def go_on(store: Store, race: Race, seconds_left: float, *, alone: bool) -> bool:
    """Lets the next runs of the race begin, and after it the finale; False if there is nothing (more) to begin.

    `alone`: nobody trains or waits. What a finale costs is kept from the race. Once it has begun, the race is over; a
    raised cap opens another one.
    """
    began = any(trial.turn >= race.study.facts.get("endgame_turn", 0) for trial in race.finales)
    chosen = [] if began else race.next(seconds_left - _kept(race))
    if chosen:
        endgame.start(store, race, chosen)
        return True
    source = _subject(race) if alone else None
    if source is None or not _open(race, source) or _seconds(race, source) > seconds_left:
        return False
    _start(store, race, source)
    return True


def say_end(store: Store, race: Race, seconds_left: float) -> None:
    """Notes who won the race, who could not be confirmed, and what became of the finale."""
    found = deliverable(race.study, race.trials, race.confirmations, race.finales)
    source = _subject(race)
    with store.write() as connection:
        if race.study.spec.endgame.seeds:
            endgame.say_end(connection, race, seconds_left)
        if source is not None and _open(race, source):
            price, left = (
                usd(cost_micros(race.study.micros_per_hour, round(1000 * max(seconds, 0.0))))
                for seconds in (_seconds(race, source), seconds_left)
            )
            text = f"no finale was trained: it is forecast at up to {price}, and {left} are left"
            records.note(connection, race.study.name, "finale", text, source.number)
        if found is not None and race.study.spec.endgame.finale:
            words = f"handed over is run {found.trial.label}: {found.words}"
            records.note(connection, race.study.name, "finale", words, found.trial.number)


def _kept(race: Race) -> float:
    """Seconds that the race must leave: for the costliest of each method's best, as far as it has no finale yet."""
    firsts = [c for c in endgame.candidates(race.study, race.trials, race.confirmations) if c.place == 1]
    sources = [next(t for t in race.trials if t.number == c.number) for c in firsts]
    return max((_seconds(race, source) for source in sources if _open(race, source)), default=0.0)


def _open(race: Race, source: TrialRow) -> bool:
    """Whether a finale of this trial is still to be trained, or gone on with."""
    known = _known(race.finales, source)
    return examples(race.study.spec, race.study.facts) is not None and (known is None or known.state == "paused")


def _known(finales: Sequence[TrialRow], source: TrialRow) -> TrialRow | None:
    return next((t for t in finales if t.source == source.number), None)


def _subject(race: Race) -> TrialRow | None:
    """Whose finale it is: the winner's, or where nothing is confirmed, of the search's best that did not fail since."""
    won = endgame.outcome(race.study, race.trials, race.confirmations)
    if won is not None:
        return won.source
    runs = endgame.runs_of(race.study, race.confirmations)
    failed = {number for (number, _), value in runs.items() if value == math.inf}
    left = [c.number for c in endgame.candidates(race.study, race.trials, race.confirmations) if c.number not in failed]
    return next((t for number in left[:1] for t in race.trials if t.number == number), None)


def _seconds(race: Race, source: TrialRow) -> float:
    """The upper end of the forecast, from where a parked one stands."""
    trial = _known(race.finales, source) or records.newcomer(_config(race, source))
    return race.projector.confirmation(trial, 1).high


def _config(race: Race, source: TrialRow) -> TrialConfig:
    """The winner's configuration over the whole length, under the seed of the run that would be handed over else."""
    won = endgame.outcome(race.study, race.trials, race.confirmations)
    seed = won.export.config.seed if won is not None and won.source.number == source.number else source.config.seed
    wanted = examples(race.study.spec, race.study.facts)
    assert wanted is not None
    number = records.finale_number(source.number)
    return replace(endgame.whole(source.config), number=number, seed=seed, examples=wanted)


def _start(store: Store, race: Race, source: TrialRow) -> None:
    name, known = race.study.name, _known(race.finales, source)
    turn = records.next_turn([*race.trials, *race.confirmations, *race.finales])
    with store.write() as connection:
        if known is not None:
            values = {"state": "waiting", "turn": turn, "reason": "the finale goes on"}
            records.set_trial(connection, name, known.number, **values)
            return
        words = f"is the finale of trial {source.number}: {race.study.spec.endgame.finale_length:g} epochs"
        endgame.enter(connection, race, source, _config(race, source), turn, words)


@dataclass(frozen=True)
class Deliverable:
    """The trial whose weights are handed over, and why that one."""

    trial: TrialRow
    words: str


def deliverable(
    study: Study, trials: Sequence[TrialRow], confirmations: Sequence[TrialRow], finales: Sequence[TrialRow]
) -> Deliverable | None:
    """What is handed over, chosen on the validation rows; None where nothing is confirmed and no finale came to its
    end, so that the best trial of the search stands for itself."""
    won, metric = endgame.outcome(study, trials, confirmations), study.spec.objective.metric
    done = [t for t in finales if t.state == "completed" and endgame.value(t, metric) is not None]
    if won is None:
        last = max(done, key=lambda t: t.turn, default=None)
        return None if last is None else Deliverable(last, "the finale of a configuration that is not confirmed")
    mine = next((t for t in done if t.source == won.source.number), None)
    best = f"the best of its runs on the validation rows, of {len(won.runs)}"
    if mine is None:
        wanted = study.spec.endgame.finale and examples(study.spec, study.facts) is None
        free = "; the finale cost nothing, they were trained in full already" if wanted else ""
        return Deliverable(won.export, best + free)
    length = f"{study.spec.endgame.finale_length:g} epochs"
    ours, theirs = (abs(endgame.value(t, metric) or 0.0) for t in (mine, won.export))
    figures = f"{ours:.4g} against {theirs:.4g} on the validation rows"
    if (endgame.value(mine, metric) or 0.0) <= (endgame.value(won.export, metric) or 0.0):
        return Deliverable(mine, f"the finale of {length}, {figures} of run {won.export.label}")
    return Deliverable(won.export, f"{best}; the finale of {length} is worse, {figures}")
