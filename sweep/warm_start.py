"""What earlier studies of the same database teach a new one: configurations to try first, and how fast the machine is.

Their best configurations join the priors' known-good ones as guesses (sweep/proposals.py): each is a trial like any
other, stopped at its first rung where it is no good, so a wrong one costs little. Their measured speed is the prior of
the forecasts. Nothing else is taken: no trial, no loss and no cent of theirs counts in the new study. What was taken is
stored with its facts, so a resume depends on no other study.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from sweep import endgame, priors, projection, records, space
from sweep.errors import NotFoundError
from sweep.priors import KnownValues, Priors
from sweep.records import Study, TrialRow
from sweep.spec import SearchSpec, Spec

GUESSES = 3  # of each method, from all studies together
OF_ONE = 2  # of each method from one study: its second may do better on other data
WIDTHS = 2.0  # factor within which two models of a family are alike
SPEED = "warm start: the machine's speed is forecast"
LEAST_MEASURED = 3  # stretches of training behind a speed


def apply(connection: Connection, spec: Spec, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a launch's facts with what earlier studies add to them; see `search.warm_start`.

    Raises NotFoundError for a study that is named and not there.
    """
    named, found = spec.search.warm_start, dict(facts)
    if named == "off" or (named == "auto" and spec.search.priors == "none"):
        return found
    studies = _studies(connection, spec, facts, None if named == "auto" else named)
    known = priors.of(facts) or _unguided(spec.search, facts)
    first, notes = _guesses(connection, spec, known, studies, int(facts["plan"]["examples"]))
    if first:
        mine = known.first if spec.search.first else ()
        every = [*mine, *first, *(one for one in known.first if one not in mine)]
        distinct = [one for place, one in enumerate(every) if one not in every[:place]]
        found["priors"] = known.model_copy(update={"first": tuple(distinct)}).model_dump(mode="json")
    device = facts["device"]
    wanted = (spec.model, spec.search.precision, device, "hour")
    alike = [s for s in studies if (s.spec.model, s.spec.search.precision, s.facts["device"], s.unit) == wanted]
    # Who trained longest measured best: one that ended after some steps knows what its first ones took.
    for study in sorted(alike, key=lambda s: _trained_ms(connection, s), reverse=True):
        speed = _flops(connection, study)
        if speed is not None:
            found["flops"] = speed
            notes.append(f"{SPEED} as study {study.name} measured it; search.warm_start: off forgets it")
            break
    found["notes"] = [*facts.get("notes", []), *notes]
    return found | {"warm_start": notes}


def speed_from(facts: Mapping[str, Any]) -> list[str]:
    """What a launch's facts say of where the machine's speed comes from; nothing where it is a guess."""
    return [note for note in facts.get("warm_start", []) if note.startswith(SPEED)]


def _studies(connection: Connection, spec: Spec, facts: Mapping[str, Any], named: Sequence[str] | None) -> list[Study]:
    """The studies to learn from, the most similar first, then the newest."""
    names = [name for name in records.study_names(connection) if name != spec.study]
    missing = [name for name in named or () if name not in names]
    if missing:
        hint = "`sweep list` shows those there are; or write auto, or off"
        raise NotFoundError(f"search.warm_start: there is no study {missing[0]} in this database", hint)
    studies = [records.study(connection, name) for name in names if named is None or name in named]
    ranked = sorted(studies, key=lambda s: (likeness(spec, facts, s), s.created_unix_ms), reverse=True)
    return [study for study in ranked if named is not None or likeness(spec, facts, study)]


def likeness(spec: Spec, facts: Mapping[str, Any], study: Study) -> int:
    """How much a study resembles the new one; 0: not enough to learn from it unasked.

    The same model counts most; then one of its family and about its width; the same training data are a start too.
    """
    family = facts.get("model_type")
    widths = [float(one.get("hidden_size") or 0) for one in (facts, study.facts)]
    related = family is not None and family == study.facts.get("model_type") and min(widths) > 0
    near = related and max(widths) <= WIDTHS * min(widths)
    same_model, same_data = study.spec.model == spec.model, study.spec.data.train == spec.data.train
    return 4 * same_model + 2 * (near and not same_model) + same_data


def _unguided(search: SearchSpec, facts: Mapping[str, Any]) -> Priors:
    """Priors that guess nothing by themselves: for a study that wants none, and names studies to start from."""
    selected = priors.select(search.model_copy(update={"priors": "default"}), facts, int(facts["plan"]["examples"]))
    assert selected is not None
    return selected.model_copy(update={"guided": False, "first": (), "notes": ()})


def _guesses(
    connection: Connection, spec: Spec, known: Priors, studies: Sequence[Study], examples: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Whole configurations inside the study's space, and in words where each comes from."""
    first: list[dict[str, Any]] = []
    notes = []
    count = dict.fromkeys(spec.search.method, 0)
    for study in studies:
        for trial in _best(connection, study):
            method = trial.config.method
            if count.get(method, GUESSES) >= GUESSES:
                continue
            values = _values(trial, study, known)
            chosen, moved = priors.inside(values, known, spec.search, examples)
            if chosen in first:
                continue
            first.append(chosen)
            count[method] += 1
            result = f"loss {trial.loss:.4f}" if trial.loss is not None else "no loss"
            words = f"warm start: trial {trial.number} of study {study.name} is tried first"
            notes.append("; ".join([f"{words}: {space.describe(trial.config)}, {result}", *moved]))
    return first, notes


def _best(connection: Connection, study: Study) -> list[TrialRow]:
    """The study's best trials that came to their ends, of each method, the winner of its race before others."""
    rows = records.trials(connection, study.name)
    searched, confirmations = records.searched(rows), records.confirmations(rows)
    won = endgame.outcome(study, searched, confirmations)
    places = [c for c in endgame.candidates(study, searched, confirmations) if c.place <= OF_ONE]
    trials = [next(t for t in searched if t.number == c.number) for c in places]
    done = [t for t in trials if t.state == "completed" or (won is not None and t.number == won.source.number)]
    return sorted(done, key=lambda t: won is None or t.number != won.source.number)


def _values(trial: TrialRow, study: Study, known: Priors) -> KnownValues:
    """A configuration as a guess: its rate is moved by as much as the priors' rates for the two models differ."""
    theirs = priors.of(study.facts)
    ratio = 1.0
    if theirs is not None and study.facts.get("hidden_size"):
        full = trial.config.method == "full"
        ratio = (known.full_rate / theirs.full_rate) if full else (known.lora_rate / theirs.lora_rate)
    config = trial.config
    return KnownValues(
        method=config.method,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
        learning_rate=config.learning_rate * ratio,
        batch_size=config.batch_size,
    )


def _trained_ms(connection: Connection, study: Study) -> int:
    return sum(row.train_ms for row in records.evaluations(connection, study.name))


def _flops(connection: Connection, study: Study) -> float | None:
    """FLOP/s that make the forecasts' prior agree with what a study measured; None where it measured too little."""
    taught, prior = projection.projector_of(study, connection), projection.untaught(study)
    if taught.forecast.measured("train") < LEAST_MEASURED:
        return None
    method = study.spec.search.method[0]
    config = space.typical(method, study.spec.search, taught.plan.examples, study.spec.seed, records.finale_number(0))
    tokens = taught.plan.run_tokens
    speed = prior.flops * prior.train(config, tokens).mean / taught.train(config, tokens).mean
    return speed if math.isfinite(speed) and speed > 0 else None
