"""LoRA against full training as far as a study's tables allow: plain values for `sweep compare`.

What is compared are confirmations: configurations of the search that were trained again under other seeds. A method's
best one is the one with the lowest mean validation loss (or the best metric) over its confirmations; the test rows
have no say in it. The search's own runs, which led to the choice, are in no figure of the test rows.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, select

from sweep import claims, outlay, records, sentence, space, tables, verdict
from sweep.errors import InvariantError, NotFoundError
from sweep.records import Study, TrialRow
from sweep.sentence import Findings, Side
from sweep.verdict import Array, Estimate

METHODS = ("lora", "full")


@dataclass(frozen=True)
class Scored:
    """What a model makes of a split's examples, each float64 [examples]."""

    nll: Array
    tokens: Array
    metric: Array | None
    majority: float | None


@dataclass(frozen=True)
class Confirmed:
    """A configuration of the search and its confirmations that came to their end and were scored, by seed."""

    source: TrialRow
    runs: dict[int, TrialRow]
    tests: dict[int, Scored]
    retained: dict[int, Scored]
    failed: int  # confirmations that diverged or failed: they are in no mean

    @property
    def method(self) -> str:
        """lora or full."""
        return self.source.config.method

    @property
    def words(self) -> str:
        """As the sentence calls it."""
        return f"LoRA r={self.source.config.rank}" if self.method == "lora" else "full training"


@dataclass(frozen=True)
class Measure:
    """What the test rows are judged by: loss, weighted by completion tokens, or the user's metric."""

    name: str
    higher_is_better: bool
    weights: Array  # [examples]
    untrained: Array | None  # [examples]

    def scores(self, one: Confirmed, seeds: Iterable[int] | None = None) -> Array:
        """[runs, examples], by ascending seed."""
        chosen = sorted(one.tests if seeds is None else seeds)
        return np.array([_values(one.tests[seed], self.higher_is_better) for seed in chosen])

    def validation(self, run: TrialRow) -> float:
        """What chose: over all validation rows; lower is better."""
        found = run.full_loss if not self.higher_is_better else None if run.metric is None else -run.metric
        return math.inf if found is None else found


def _values(scored: Scored, metric: bool) -> Array:
    return scored.metric if metric and scored.metric is not None else scored.nll


def compare(connection: Connection, name: str) -> dict[str, Any]:
    """Returns everything that `sweep compare` shows, as plain values. Raises NotFoundError, InvariantError."""
    study = records.study(connection, name)
    # A finale is longer than what it would be compared with.
    trials = [trial for trial in records.trials(connection, name) if not trial.finale]
    scored = _scored(connection, name)
    base = scored.get((tables.UNTRAINED, "test"))
    confirmed = _confirmed(trials, scored)
    measure = _measure(study, confirmed, base)
    best = {method: chosen(measure, [c for c in confirmed if c.method == method]) for method in METHODS}
    by_rank = _by_rank(measure, confirmed)
    ranks = _against_best(measure, by_rank)
    representatives = {method: one.source for method, one in best.items() if one is not None}
    spent = outlay.read(connection, study, trials, representatives)
    tuning = _tuning(trials, by_rank)
    untuned = {rank for rank, (_, to_the_end) in tuning.items() if not to_the_end}
    findings = _findings(measure, best, ranks, untuned, spent["costs"])
    lora, full, share = findings.lora, findings.full, findings.share
    values: dict[str, Any] = {
        "study": name,
        "model": study.spec.model,
        "sentence": sentence.sentence(findings),
        "measure": _measure_values(measure, base),
        "untrained": findings.untrained,
        "majority": base.majority if base is not None and measure.higher_is_better else None,
        "lora": _side(measure, best["lora"], lora),
        "full": _side(measure, best["full"], full),
        "share": None if share is None else _share(share),
        "difference": _plain(findings.difference),
        "confirmed": [_configuration(measure, one, best) for one in confirmed],
        "ranks": None if ranks is None else _rank_values(measure, by_rank, ranks, tuning),
        "retention": _retention(scored.get((tables.UNTRAINED, "retention")), best, by_rank),
        "overfitting": _overfitting(study, trials),
        **spent,
        "missing": _missing(study, best, base),
        "notes": _notes(confirmed, best),
    }
    return values | {"claims": claims.beside(values, study.facts["parameters"])}


def nothing_confirmed(values: Mapping[str, Any]) -> NotFoundError | None:
    """The error of a study in which nothing was confirmed: what is missing and how to get it; None if something was."""
    if values["confirmed"]:
        return None
    message = f"study {values['study']} has no confirmed configuration yet, so there is no verdict"
    return NotFoundError(message, values["missing"][0])


def _scored(connection: Connection, name: str) -> dict[tuple[int, str], Scored]:
    """All scores of a study by trial and split; those that are not finite are left out."""
    found = {}
    for row in connection.execute(select(tables.scores).where(tables.scores.c.study == name)):
        nll, tokens = (np.array(json.loads(text), dtype=np.float64) for text in (row.nll, row.tokens))
        metric = None if row.metric is None else np.array(json.loads(row.metric), dtype=np.float64)
        if len(nll) and np.isfinite(nll).all():
            found[row.trial, row.split] = Scored(nll, tokens, metric, row.majority)
    _same_examples(name, found)
    return found


def _same_examples(name: str, found: Mapping[tuple[int, str], Scored]) -> None:
    """Raises InvariantError if two models were scored on different examples: they can't be paired."""
    first: dict[str, tuple[int, Scored]] = {}
    for (trial, split), one in sorted(found.items(), key=lambda item: item[0]):
        known, other = first.setdefault(split, (trial, one))
        if not np.array_equal(one.tokens, other.tokens) or len(one.nll) != len(one.tokens):
            raise InvariantError(
                f"study {name}: trials {known} and {trial} were scored on different {split} rows",
                "the prepared data was changed after the launch; launch the study again under another name",
            )


def _confirmed(trials: Sequence[TrialRow], scored: Mapping[tuple[int, str], Scored]) -> list[Confirmed]:
    """The configurations of which a confirmation came to its end, in the order of their trials' numbers."""
    known = {trial.number: trial for trial in trials}
    found = []
    for source in sorted({t.source for t in trials if t.source is not None}):
        mine = [trial for trial in trials if trial.source == source]
        done = {t.config.seed: t for t in mine if t.state == "completed" and (t.number, "test") in scored}
        ended = [t for t in mine if t.state in {"pruned", "failed"}]
        if source not in known or not done:
            continue
        tests = {seed: scored[t.number, "test"] for seed, t in done.items()}
        retained = {s: scored[t.number, "retention"] for s, t in done.items() if (t.number, "retention") in scored}
        found.append(Confirmed(known[source], done, tests, retained, len(ended)))
    return found


def _measure(study: Study, confirmed: Sequence[Confirmed], base: Scored | None) -> Measure:
    """The user's metric where every confirmed run has it, else the loss."""
    everyone = [scored for one in confirmed for scored in one.tests.values()]
    name = study.spec.objective.metric
    metric = name != "validation_loss" and bool(everyone) and all(scored.metric is not None for scored in everyone)
    rows = everyone[0] if everyone else base
    weights = np.ones(0) if rows is None else np.ones(len(rows.nll)) if metric else rows.tokens
    untrained = None if base is None or (metric and base.metric is None) else _values(base, metric)
    return Measure(name if metric else "loss", metric, weights, untrained)


def chosen(measure: Measure, confirmed: Sequence[Confirmed]) -> Confirmed | None:
    """The best by the validation rows: by the mean over common seeds, of those that were confirmed over enough.

    Enough are three seeds, or as many as anyone has; who left the race early has fewer, because it was behind. One that
    failed under a seed is chosen only where every other one did too.
    """
    if not confirmed:
        return None
    sound = [one for one in confirmed if not one.failed] or confirmed
    enough = min(max(len(one.runs) for one in sound), verdict.MIN_SEEDS)
    kept = [one for one in sound if len(one.runs) >= enough]
    kept.sort(key=lambda one: one.source.number)
    values = [{seed: measure.validation(run) for seed, run in one.runs.items()} for one in kept]
    return kept[verdict.by_common_seeds(values)[0]]


def _by_rank(measure: Measure, confirmed: Sequence[Confirmed]) -> dict[int, Confirmed]:
    """Each LoRA rank's best configuration, with the rate that was tuned for it.

    A rank with few seeds stays out where two others have enough for an interval.
    """
    found: dict[int, Confirmed] = {}
    for rank in sorted({one.source.config.rank or 0 for one in confirmed if one.method == "lora"}):
        best = chosen(measure, [c for c in confirmed if c.method == "lora" and c.source.config.rank == rank])
        assert best is not None
        found[rank] = best
    enough = {rank: one for rank, one in found.items() if len(one.runs) >= verdict.MIN_SEEDS}
    return enough if len(enough) > 1 else found


def _common_seeds(by_rank: Mapping[int, Confirmed]) -> set[int]:
    return set.intersection(*(set(one.runs) for one in by_rank.values()))


def _against_best(measure: Measure, by_rank: Mapping[int, Confirmed]) -> dict[int, Estimate | None] | None:
    if len(by_rank) < 2 or not (seeds := _common_seeds(by_rank)):
        return None
    scores = {rank: measure.scores(one, seeds) for rank, one in by_rank.items()}
    return verdict.against_best(scores, measure.weights, higher_is_better=measure.higher_is_better)


def _tuning(trials: Sequence[TrialRow], ranks: Iterable[int]) -> dict[int, tuple[int, int]]:
    """How many configurations of each rank the search tried, and how many of them it trained to their end."""
    own = [trial for trial in trials if trial.source is None and trial.config.method == "lora"]
    tried = {rank: [trial for trial in own if trial.config.rank == rank] for rank in ranks}
    return {rank: (len(those), sum(t.state == "completed" for t in those)) for rank, those in tried.items()}


def _findings(
    measure: Measure,
    best: Mapping[str, Confirmed | None],
    ranks: Mapping[int, Estimate | None] | None,
    untuned: Collection[int],
    costs: Mapping[str, Any],
) -> Findings:
    sides, scores = {}, {}
    for method, one in best.items():
        if one is not None:
            scores[method] = measure.scores(one)
            sides[method] = Side(one.words, len(one.runs), verdict.mean(scores[method], measure.weights))
    both, base, share = len(sides) == 2, measure.untrained, None
    if both and base is not None:
        higher = measure.higher_is_better
        share = verdict.share(scores["lora"], scores["full"], base, measure.weights, higher_is_better=higher)
    return Findings(
        measure=measure.name,
        higher_is_better=measure.higher_is_better,
        untrained=None if base is None else float(base.sum() / measure.weights.sum()),
        lora=sides.get("lora"),
        full=sides.get("full"),
        share=share,
        difference=verdict.difference(scores["lora"], scores["full"], measure.weights) if both else None,
        charged=costs["ratio"]["charged"],
        alone=costs["ratio"]["alone"],
        ranks=ranks,
        untuned=untuned,
    )


def _plain(estimate: Estimate | None) -> dict[str, Any] | None:
    if estimate is None:
        return None
    return {name: _finite(value) for name, value in dataclasses.asdict(estimate).items()}


def _finite(value: float | None) -> float | None:
    """JSON has neither nan nor infinity."""
    return value if value is not None and math.isfinite(value) else None


def _share(share: verdict.Share) -> dict[str, Any]:
    """The share; it is claimed only where full training gained for certain, and the seeds are enough."""
    return {
        **(_plain(share.estimate) or {}),
        "lora_seeds_error": _finite(share.lora_seeds_error),
        "full_seeds_error": _finite(share.full_seeds_error),
        "gained": share.gained,
        "claimed": share.gained and share.estimate.low is not None,
    }


def _measure_values(measure: Measure, base: Scored | None) -> dict[str, Any]:
    return {
        "name": measure.name,
        "higher_is_better": measure.higher_is_better,
        "unit": "" if measure.higher_is_better else "nats a completion token",
        "rows": len(measure.weights),
        "tokens": 0 if base is None else int(base.tokens.sum()),
        "level": verdict.LEVEL,
        "least_seeds": verdict.MIN_SEEDS,
    }


def _side(measure: Measure, one: Confirmed | None, side: Side | None) -> dict[str, Any] | None:
    """A method's best configuration on the test rows, and its gain over the untrained model."""
    if one is None or side is None:
        return None
    gain, base, scores = None, measure.untrained, measure.scores(one)
    if base is not None:
        pair = (scores, base) if measure.higher_is_better else (base, scores)
        gain = verdict.difference(*pair, measure.weights)
    return {
        "trial": one.source.number,
        "words": one.words,
        "in_words": space.describe(one.source.config),
        "seeds": len(one.runs),
        "failed": one.failed,
        "test": _plain(side.test),
        "gain": _plain(gain),
    }


def _configuration(measure: Measure, one: Confirmed, best: Mapping[str, Confirmed | None]) -> dict[str, Any]:
    weights, scores = measure.weights, measure.scores(one)
    sign = -1 if measure.higher_is_better else 1
    runs = [
        {
            "number": one.runs[seed].number,
            "seed": seed,
            "validation": sign * measure.validation(one.runs[seed]),
            "test": float(run.sum() / weights.sum()),
        }
        for seed, run in zip(sorted(one.runs), scores, strict=True)
    ]
    return {
        "trial": one.source.number,
        "method": one.method,
        "rank": one.source.config.rank,
        "in_words": space.describe(one.source.config),
        "chosen": one is best[one.method],
        "seeds": len(one.runs),
        "failed": one.failed,
        "validation": statistics.fmean(run["validation"] for run in runs),
        "test": _plain(verdict.mean(scores, weights)),
        "runs": runs,
    }


def _rank_values(
    measure: Measure,
    by_rank: Mapping[int, Confirmed],
    ranks: Mapping[int, Estimate | None],
    tuning: Mapping[int, tuple[int, int]],
) -> dict[str, Any]:
    """One line a rank, over the seeds that all of them have.

    A rank is called worse where the search trained one of its configurations to the end: the others' rates were tuned.
    """
    seeds = _common_seeds(by_rank)
    rows = []
    for rank, one in by_rank.items():
        gap = ranks[rank]
        known = gap is None or gap.low is not None
        tried, to_the_end = tuning[rank]
        behind = "worse" if to_the_end else "untuned"
        rows.append(
            {
                "rank": rank,
                "trial": one.source.number,
                "in_words": space.describe(one.source.config),
                "learning_rate": one.source.config.learning_rate,
                "test": float(measure.scores(one, seeds).mean(axis=0).sum() / measure.weights.sum()),
                "behind": _plain(gap),
                "standing": "best" if gap is None else behind if gap.clear else "tied" if known else "unknown",
                "tried": tried,
                "to_the_end": to_the_end,
            }
        )
    return {"seeds": len(seeds), "rows": rows}


def _retention(
    base: Scored | None, best: Mapping[str, Confirmed | None], by_rank: Mapping[int, Confirmed]
) -> dict[str, Any] | None:
    """Loss on the retention rows before and after, of each method's best and of each rank's; None without such rows."""
    wanted = {one.source.number: one for one in [*best.values(), *by_rank.values()] if one is not None}
    kept = [one for one in wanted.values() if one.retained]
    if base is None or not kept:
        return None
    rows = []
    for one in kept:
        runs = np.array([one.retained[seed].nll for seed in sorted(one.retained)])
        rows.append(
            {
                "trial": one.source.number,
                "method": one.method,
                "rank": one.source.config.rank,
                "in_words": space.describe(one.source.config),
                "seeds": len(runs),
                "after": _plain(verdict.mean(runs, base.tokens)),
                "change": _plain(verdict.difference(runs, base.nll, base.tokens)),
            }
        )
    return {"rows": len(base.nll), "before": float(base.nll.sum() / base.tokens.sum()), "methods": rows}


def _overfitting(study: Study, trials: Sequence[TrialRow]) -> list[dict[str, Any]]:
    """Mean validation loss less training loss of all runs that came to their end, by method and rank.

    The training loss is that of the last stretch before the end, met while training. Where the metric is accuracy, the
    validation loss is normalised over the choices and can't be compared with it: nothing is returned.
    """
    if study.spec.objective.metric == "accuracy":
        return []
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for trial in trials:
        if trial.state == "completed" and trial.full_loss is not None and trial.train_loss is not None:
            key = (trial.config.method, trial.config.rank or 0)
            groups.setdefault(key, []).append((trial.train_loss, trial.full_loss))
    return [
        {
            "method": method,
            "rank": rank or None,
            "runs": len(pairs),
            "train_loss": statistics.fmean(train for train, _ in pairs),
            "validation_loss": statistics.fmean(validation for _, validation in pairs),
            "gap": statistics.fmean(validation - train for train, validation in pairs),
        }
        for (method, rank), pairs in sorted(groups.items(), key=lambda item: (item[0][0] == "full", item[0][1]))
    ]


def _missing(study: Study, best: Mapping[str, Confirmed | None], base: Scored | None) -> list[str]:
    """What the verdict lacks and how to get it, the most important first."""
    name, settings, searched = study.name, study.spec.endgame, study.spec.search.method
    nobody = all(one is None for one in best.values())
    if nobody and (settings.seeds == 0 or study.state == "closed"):
        why = "the study is closed" if settings.seeds else "the spec says endgame.seeds: 0"
        return [f"{why}: launch it again with endgame.seeds: {verdict.MIN_SEEDS} and money in budget.reserve"]
    more = f"sweep resume {name}" if study.phase == "search" else f"sweep resume {name} --cap USD"
    labels = {"lora": "LoRA", "full": "full training"}
    found = []
    if nobody:
        found.append(f"`{more}` goes on to the confirmations, which budget.reserve pays for")
    for method, one in best.items():
        if method not in searched:
            found.append(f"{labels[method]} was not searched: launch with search.method: [lora, full]")
        elif one is None:
            found.append(f"no {labels[method]} configuration is confirmed: `{more}`")
        elif len(one.runs) < verdict.MIN_SEEDS:
            seeds = f"{len(one.runs)} of {verdict.MIN_SEEDS} seeds"
            found.append(f"{one.words} is confirmed under {seeds}, so no interval is claimed: `{more}`")
    if base is None and any(one is not None for one in best.values()):
        found.append(f"the untrained model was not scored on the test rows: `{more}`")
    return found


def _notes(confirmed: Sequence[Confirmed], best: Mapping[str, Confirmed | None]) -> list[str]:
    """What a reader has to know of single figures."""
    found = []
    for one in confirmed:
        if one.failed:
            tried = one.failed + len(one.runs)
            words = f"{one.failed} of {tried} confirmations of {space.describe(one.source.config)}"
            found.append(f"{words} diverged or failed and are in no mean")
    both = [one for one in best.values() if one is not None]
    if any(one.failed for one in both):
        found.append("the verdict speaks of runs that came to their end")
    return found
