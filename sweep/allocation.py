"""Who gets the next dollar: a paused trial, or a new configuration, and which one.

The model of learning curves (sweep/curves.py) gives each step a rate: the improvement of the best end known that it is
expected to bring for a dollar, when whoever disappoints at its next rung is left there. The step with the highest rate
is taken. A new configuration's rate is the median of what the model thinks of configurations that might be drawn, not
the best of them: the best of many guesses is the one that is most overrated.

All follows from the study's seed and its tables, so a killed study decides as it would have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sweep import feasibility, space
from sweep.curves import TINY, Array, Curves, Outlook, Points, fitted, rates, standardised
from sweep.projection import Projector
from sweep.proposals import anything, near
from sweep.records import RUNNING, Study, TrialRow
from sweep.rungs import DERIVED, Judgement, Results, promotable
from sweep.spec import Method, RangeSpec, SearchSpec
from trainers.messages import TrialConfig

STARTED = 4  # configurations with a loss before the model is asked
MODELLED = 256  # trials that the model knows at most: those that came farthest, then the best
FITTED = 192  # losses at most by which it is chosen how far early ones may be trusted
PRICED = 12  # paused trials whose next step is priced: those that might end best
DRAWN, NEAR_EACH, NEARBY = 50, 10, 3  # candidates anywhere, and near each of so many promising trials
NEWCOMER = 0.5  # the quantile of the candidates' rates that a new configuration counts with
OPTIMISM = 2.0  # standard deviations by which the trials to be priced are chosen
WORDS = 0.5  # how far different words are from each other, in the units of the space


@dataclass(frozen=True)
class _View:
    """What the model says of the trials that it knows: `reference` is the best end there is to beat."""

    model: Curves
    trials: list[TrialRow]
    points: Points  # at their next rungs
    outlook: Outlook
    reference: int


class Allocation:
    """Decides for one study. `shares` are the rungs before the end, as shares of the longest run."""

    def __init__(self, search: SearchSpec, shares: Sequence[float], seed: int) -> None:
        """Decides by the model of curves unless the spec says otherwise, or has a policy of its own."""
        self.decides = search.promote == "curves" and (not isinstance(search.rungs, str) or search.rungs in DERIVED)
        self._search, self._seed = search, seed
        self._lengths = np.log([*shares, 1.0])
        self._features: dict[TrialConfig, Array] = {}
        self._views: dict[frozenset[Method], tuple[Any, _View | None]] = {}  # the last ones, by who is compared

    def thaw(
        self, trials: Sequence[TrialRow], results: Results, projector: Projector, newcomers: Sequence[TrialRow]
    ) -> TrialRow | None:
        """The paused trial that deserves the next dollar; None if a new trial deserves it more.

        `newcomers` are what new ones may cost. Without any it is the best of the paused ones, None if there are none.
        Where the model does not decide, it is who has earned the next rung by its place.
        """
        if not self.decides:
            return promotable(trials, results, self._search.eta)
        view = self._view(trials, results)
        if view is None:
            return None
        chosen, rate = self._best_paused(view, projector)
        if chosen is None or not newcomers:
            return chosen
        _, fresh = self._fresh(view, projector, newcomers)
        return chosen if rate >= float(np.quantile(fresh, NEWCOMER)) else None

    def propose(
        self, trials: Sequence[TrialRow], results: Results, projector: Projector, newcomers: Sequence[TrialRow]
    ) -> dict[str, Any]:
        """The configuration of the next trial, by Optuna's names: the best candidate by the model.

        `newcomers` are of the methods that it may have, and say what these cost.
        """
        view = self._view(trials, results)
        if view is None:
            return anything(self._of_methods(newcomers), self._draw(newcomers[0].number))
        candidates, worth = self._fresh(view, projector, newcomers)
        return candidates[int(np.argmax(worth))]

    def review(
        self,
        judgement: Judgement,
        trial: TrialRow,
        trials: Sequence[TrialRow],
        results: Results,
        projector: Projector,
        newcomers: Sequence[TrialRow],
    ) -> Judgement:
        """What becomes of a trial at a rung: it goes on if it deserves the next dollar itself, else it pauses."""
        if not self.decides or judgement.verdict not in {"promote", "pause"}:
            return judgement
        standing = [replace(t, state="paused") if t.number == trial.number else t for t in trials]
        chosen = self.thaw(standing, results, projector, newcomers)
        if chosen is not None and chosen.number == trial.number:
            return replace(judgement, verdict="promote", reason=f"its curve is worth most, {judgement.reason}")
        return replace(judgement, verdict="pause")

    # What the model is asked

    def _view(self, trials: Sequence[TrialRow], results: Results) -> _View | None:
        known = (t for t in trials if t.rung >= 0 or feasibility.lost(t))
        parked = {t.number: (t.tokens, t.slot, t.checkpoint) for t in trials if t.state == "paused"}
        key = tuple((t.number, t.state, t.rung, t.diverged, parked.get(t.number)) for t in known)
        group = frozenset(trial.config.method for trial in trials)
        if group not in self._views or self._views[group][0] != key:
            self._views[group] = key, self._look(trials, results)
        return self._views[group][1]

    def _look(self, trials: Sequence[TrialRow], results: Results) -> _View | None:
        first = np.array(list(results.losses.get(0, {}).values()))
        if len(first) < STARTED:
            return None
        known = [t for t in trials if t.number in results.losses.get(t.rung, {})]
        lost = [t for t in trials if t.rung < 0 and feasibility.lost(t)][-MODELLED // 4 :]
        known = sorted(known, key=lambda t: (-t.rung, results.losses[t.rung][t.number], t.number))[:MODELLED]
        # Those that came to nothing repel as those that diverged later do.
        rows, rungs, losses = list(lost), [0] * len(lost), [math.inf] * len(lost)
        for trial in known:
            for rung in range(trial.rung + 1):
                if trial.number in results.losses.get(rung, {}):
                    rows.append(trial)
                    rungs.append(rung)
                    losses.append(math.inf if trial.diverged else results.losses[rung][trial.number])
        seen = self._points(rows, rungs)
        model = self._model(seen, standardised(np.array(losses), first))
        open_ones = [t for t in known if not feasibility.lost(t)]
        if not open_ones:
            return None
        last = len(self._lengths) - 1
        points = self._points(open_ones, [min(t.rung + 1, last) for t in open_ones])
        outlook = model.outlook(points)
        # Those under way count with what is expected of them, or their places would all go to the same kind.
        done = [place for place, t in enumerate(open_ones) if t.state == "completed" or t.state in RUNNING]
        if not any(open_ones[place].state == "completed" for place in done):
            done = list(range(len(open_ones)))
        reference = min(done, key=lambda place: (outlook.mean[place], place))
        return _View(model, open_ones, points, outlook, reference)

    def _model(self, seen: Points, losses: Array) -> Curves:
        """The model of all that was seen, which trusts early losses as far as those who came farthest say."""
        first = float(self._lengths[0])
        if len(seen) <= FITTED:
            return fitted(seen, losses, first)
        few = slice(FITTED)
        return Curves(seen, losses, first, fitted(seen.at(few), losses[few], first).early)

    def _best_paused(self, view: _View, projector: Projector) -> tuple[TrialRow | None, float]:
        ahead = view.outlook.mean - OPTIMISM * np.sqrt(view.outlook.variance)
        paused = sorted((p for p, t in enumerate(view.trials) if t.state == "paused"), key=lambda p: (ahead[p], p))
        if not paused:
            return None, 0.0
        places = np.array(paused[:PRICED])
        points, outlook = _some(view.points, view.outlook, places)
        step, rest = np.array([_price(view.trials[place], projector) for place in places]).T
        worth = self._worth(view, points, outlook, step, rest)
        best = int(np.argmax(worth))
        return view.trials[places[best]], float(worth[best])

    def _fresh(
        self, view: _View, projector: Projector, newcomers: Sequence[TrialRow]
    ) -> tuple[list[dict[str, Any]], Array]:
        """Candidates for the next trial, and the rate of each, at the price of its own method."""
        fresh = self._candidates(newcomers, view)
        count = len(fresh)
        features = np.array([self._encoded(chosen) for chosen in fresh])
        lengths, rungs = np.full(count, self._lengths[0]), np.zeros(count, np.int64)
        points = Points(features, np.full(count, -1), lengths, rungs)
        prices = {newcomer.config.method: _price(newcomer, projector) for newcomer in newcomers}
        step, rest = np.array([prices[chosen["method"]] for chosen in fresh]).T
        return fresh, self._worth(view, points, view.model.outlook(points), step, rest)

    def _worth(self, view: _View, points: Points, outlook: Outlook, step: Array, rest: Array) -> Array:
        at = view.reference
        apart = view.model.apart(points, outlook, at, view.outlook, view.points.features[at])
        apart = np.where(points.trials == view.points.trials[at], outlook.variance, apart)
        apart = np.minimum(apart, outlook.variance)
        # A step to the end is not looked at halfway: all of it is improvement.
        explained = np.where(rest <= 0, 0.0, np.minimum(outlook.explained, apart))
        return rates(float(view.outlook.mean[at]), outlook.mean, explained, apart - explained, step, rest)

    # Configurations

    def _draw(self, number: int) -> random.Random:
        return random.Random(f"{self._seed}:{number}:candidates")

    def _of_methods(self, newcomers: Sequence[TrialRow]) -> SearchSpec:
        return self._search.model_copy(update={"method": tuple(newcomer.config.method for newcomer in newcomers)})

    def _candidates(self, newcomers: Sequence[TrialRow], view: _View) -> list[dict[str, Any]]:
        draw, search = self._draw(newcomers[0].number), self._of_methods(newcomers)
        known = [place for place, trial in enumerate(view.trials) if trial.config.method in search.method]
        promising = sorted(known, key=lambda place: (view.outlook.mean[place], place))[:NEARBY]
        around = [space.chosen(view.trials[place].config) for place in promising]
        fresh = [anything(search, draw) for _ in range(DRAWN)]
        return fresh + [near(search, best, draw) for best in around for _ in range(NEAR_EACH)]

    def _points(self, trials: Sequence[TrialRow], rungs: Sequence[int]) -> Points:
        features = np.array([self._of(trial.config) for trial in trials])
        numbers = np.array([trial.number for trial in trials])
        return Points(features, numbers, self._lengths[list(rungs)], np.array(rungs))

    def _of(self, config: TrialConfig) -> Array:
        if config not in self._features:
            self._features[config] = self._encoded(space.chosen(config))
        return self._features[config]

    def _encoded(self, chosen: Mapping[str, Any]) -> Array:
        """A configuration as a point: the learning rate first, then both methods' parameters, from 0 to 1."""
        method = chosen["method"]
        rate = [_place(chosen[f"{method}_learning_rate"], space.rates(method, self._search))]
        for name, values in space.branch("lora", self._search).items():
            if name == "lora_learning_rate" or isinstance(values, RangeSpec):
                continue
            if isinstance(values[0], str):
                rate += [WORDS * (chosen.get(name) == value) for value in values]
            else:
                rate.append(_place(chosen[name], values) if name in chosen else WORDS)
        return np.array([*rate, 2.0 * (method == "full")])


def _price(trial: TrialRow, projector: Projector) -> tuple[float, float]:
    """Seconds to a trial's next rung, and from there to its end: 0 where the next rung is the end."""
    woken = replace(trial, target=max(trial.target, trial.rung + 1))
    step = projector.seconds_to_target(woken)
    return max(step, TINY), max(projector.seconds_to_end(woken) - step, 0.0)


def allocation_of(study: Study, shares: Sequence[float]) -> Allocation:
    """The allocation of a study that compares trials at these shares of its longest run."""
    return Allocation(study.spec.search, shares, study.spec.seed)


def _place(value: float, values: RangeSpec | tuple[Any, ...]) -> float:
    low, high = (values.low, values.high) if isinstance(values, RangeSpec) else (min(values), max(values))
    return math.log(value / low) / math.log(high / low) if high > low else 0.0


def _some(points: Points, outlook: Outlook, places: Any) -> tuple[Points, Outlook]:
    known = outlook.mean[places], outlook.variance[places], outlook.explained[places], outlook.against[:, places]
    return points.at(places), Outlook(*known)
