"""What a stretch of work will take, learned from what was measured, with an 80 % interval.

Seconds a token (training, evaluation) or seconds a piece (load, compile, checkpoint, restore) are log-normal around a
prior: FLOPs over a guessed speed for work that scales with tokens. A Bayesian linear model on the logarithm, one for
each kind of work, corrects the prior: a common factor (the guess of the machine's speed is usually wrong by as much as
3x), one for full-parameter training, batch size, row length, targets and rank, and one for the trial itself.

Every measurement is forecast before it is learned, so how well forecasts hold is known at any time (`calibration`), and
intervals are as much wider or narrower than the model's assumptions as the measurements so far turned out to be.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

Z80 = 1.2815515655446004  # the standard normal's 90 % quantile: 10 % above, 10 % below
NOISE = 0.08  # sd of log seconds between two measurements of the same thing
BRIEF = 0.05  # added to it over the root of the seconds: a tenth of a second says less than ten seconds do
SHORTEST = 0.01  # seconds; what is forecast to take less, or nothing, is not the less certain for it
TRIAL = 0.10  # sd of what is a trial's own
# sd of each feature's factor, in log seconds a unit of the feature.
SCALES = {"common": 1.5, "full": 0.7, "log_batch": 0.3, "log_row": 0.2, "attention": 0.25, "mlp": 0.2, "rank": 0.2}

# How the spread of forecasts adapts (_Model.judge).
ASSUMED = 5  # so many measurements the assumptions count for
RECENT = 25  # the last measurements count as so many at least: machines change
OUTLIER = 4.0  # a measurement that is farther off, in sd, counts as if it were so far off
WIDEST, NARROWEST = 8.0, 0.25


@dataclass(frozen=True)
class Seconds:
    """A forecast in seconds: its mean and the ends of its 80 % interval."""

    mean: float
    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        """Of both together if all that can be late is late: for margins. `Forecast.total` is the likelier sum."""
        return Seconds(self.mean + other.mean, self.low + other.low, self.high + other.high)


NOTHING = Seconds(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Work:
    """One kind of work to be forecast: its prior in log seconds a unit, what it resembles, and whose it is."""

    kind: str  # train, evaluate, load, compile, checkpoint, restore
    prior_seconds: float  # a unit: a token for train and evaluate, the whole for the others
    features: Mapping[str, float] = field(default_factory=dict)  # the same whenever the owner is
    owner: str = ""  # a trial's measurements tell most about itself

    @functools.cached_property
    def row(self) -> Array:
        """The features in units of what they may do, float64 [len(SCALES)]."""
        return np.array([sd * self.features.get(name, name == "common") for name, sd in SCALES.items()])


Piece = tuple[Work, float]  # some work and how many units of it


@dataclass(frozen=True)
class Calibration:
    """How forecasts of one kind held, each made just before its measurement was learned, from the second on."""

    count: int
    inside: int  # of them inside their 80 % interval
    median_error: float  # of |forecast / measured - 1|


def flops_per_token(parameters: int, method: str, adapter: int = 0) -> float:
    """Training FLOPs a token of a model of N parameters: 6N in full, 4N + 6A with a LoRA adapter of A parameters.

    A forward pass takes 2 FLOPs a parameter and token, a backward pass 2 for the gradients of the activations and 2 for
    those of the weights (Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1); a frozen base
    needs no gradients of its weights. Attention over a row adds 6 x layers x width x row length, 1.4 % of a 7B model's
    at 512 tokens. All trials of a study share it, so it is left to what is learned.
    """
    return 4.0 * parameters + 6.0 * adapter if method == "lora" else 6.0 * parameters


class Forecast:
    """Learns from `observe`, answers `seconds`. Deterministic: the same measurements give the same forecasts."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def observe(self, work: Work, units: float, seconds: float) -> None:
        """Learns that `units` (tokens, or 1) took `seconds`. What is too short to measure is left out."""
        if units <= 0 or seconds <= 0:
            return
        model = self._models.setdefault(work.kind, _Model())
        if model.measured:
            model.judge(self.seconds(work, units), seconds)
        model.learn(work, math.log(seconds / units) - math.log(work.prior_seconds), _noise(seconds))

    def measured(self, kind: str) -> int:
        """How many measurements of this kind stand behind the forecasts."""
        return self._models[kind].measured if kind in self._models else 0

    def calibration(self, kind: str) -> Calibration | None:
        """How forecasts of this kind held so far; None before the second measurement."""
        model = self._models.get(kind)
        if model is None or not model.errors:
            return None
        return Calibration(len(model.errors), model.inside, statistics.median(model.errors))

    def seconds(self, work: Work, units: float = 1.0) -> Seconds:
        """Returns what `units` of this work will take."""
        return self.total([(work, units)])

    def total(self, pieces: Sequence[Piece]) -> Seconds:
        """Returns what several pieces take together.

        Among pieces of a kind the model's covariance tells what they have in common, the machine's speed above all,
        which adds up in the spread, from what is each one's own, which partly cancels out. Kinds are learned apart, but
        what slows a machine down slows them all, so their spreads add up. The sum is taken for log-normal, as its parts
        are.
        """
        mean = spread = 0.0
        for kind in sorted({work.kind for work, units in pieces if units > 0}):
            mine = [(work, units) for work, units in pieces if work.kind == kind and units > 0]
            logs, covariance, scale = self._models.get(kind, _UNTAUGHT).joint([work for work, _ in mine])
            each = np.array([units * work.prior_seconds for work, units in mine]) * np.exp(logs)
            covariance += np.diag([_noise(seconds) ** 2 for seconds in each])
            mean += float(each.sum())
            spread += scale * math.sqrt(float(each @ covariance @ each))
        if not mean:
            return NOTHING
        factor = math.exp(Z80 * spread / mean)
        return Seconds(mean, mean / factor, mean * factor)


def _noise(seconds: float) -> float:
    return NOISE + BRIEF / math.sqrt(max(seconds, SHORTEST))


@dataclass
class _Group:
    """What the measurements of one trial say together, or those of work without a trial that has the same features."""

    row: Array
    own: float  # variance of what is the trial's own
    precision: float = 0.0  # sum of 1 / noise**2
    total: float = 0.0  # sum of log ratio / noise**2

    @property
    def mean(self) -> float:
        return self.total / self.precision if self.precision else 0.0

    @property
    def weight(self) -> float:
        """Of its mean as a measurement of what its features do."""
        return 1 / (self.own + 1 / self.precision) if self.precision else 0.0


class _Model:
    """One kind of work: a linear model of log(seconds / prior) on features of unit variance, and how well it did."""

    def __init__(self) -> None:
        self.measured = 0
        self.inside = 0
        self.errors: list[float] = []
        self.scale = 1.0  # of all predictive sd
        self._groups: dict[object, _Group] = {}
        self._information = np.eye(len(SCALES))
        self._toward = np.zeros(len(SCALES))
        self._solved: tuple[Array, Array] | None = None

    def judge(self, forecast: Seconds, seconds: float) -> None:
        """Compares a forecast with what was measured, and adapts the spread of the next ones.

        The scale's square is the mean square of the standardised errors, with the assumptions as ASSUMED measurements
        that came out just as assumed: the posterior mean of a common variance factor. One wild measurement moves it
        little, because it is clipped, and one that is calm for long does not make it deaf, because old ones fade.
        """
        error = math.log(seconds / forecast.mean)
        standardised = error * Z80 / math.log(forecast.high / forecast.mean)
        self.errors.append(abs(forecast.mean / seconds - 1))
        self.inside += forecast.low <= seconds <= forecast.high
        gain = 1 / min(ASSUMED + len(self.errors), RECENT)
        self.scale *= math.sqrt(1 + gain * (min(standardised**2, OUTLIER**2) - 1))
        self.scale = min(max(self.scale, NARROWEST), WIDEST)

    def learn(self, work: Work, ratio: float, noise: float) -> None:
        """Takes one more log ratio in. A trial has one row of features, so the sums of its measurements are enough."""
        self.measured += 1
        self._solved = None
        group = self._groups.setdefault(_key(work), _Group(work.row, TRIAL**2 if work.owner else 0.0))
        self._count(group, -1)
        group.precision += 1 / noise**2
        group.total += ratio / noise**2
        self._count(group, 1)

    def _count(self, group: _Group, sign: int) -> None:
        self._information += sign * group.weight * np.outer(group.row, group.row)
        self._toward += sign * group.weight * group.mean * group.row

    def joint(self, works: Sequence[Work]) -> tuple[Array, Array, float]:
        """Mean and covariance of the log ratios of several works, noise apart, and the factor of their sd."""
        if self._solved is None:
            inverse = np.linalg.inv(self._information)
            self._solved = inverse, inverse @ self._toward
        inverse, factors = self._solved
        rows = np.array([work.row for work in works])
        groups = [self._groups.get(_key(work)) for work in works]
        # How far a trial's own measurements are trusted over those of its like.
        trust = np.array([group.own * group.weight if group else 0.0 for group in groups])
        means = np.array([group.mean if group else 0.0 for group in groups])
        left = rows * (1 - trust)[:, None]
        own = np.array([TRIAL**2 if work.owner else 0.0 for work in works]) * (1 - trust)
        same = np.array([[a.owner == b.owner for b in works] for a in works])
        return left @ factors + trust * means, left @ inverse @ left.T + own * same, self.scale


def _key(work: Work) -> object:
    return work.owner or tuple(work.row)


_UNTAUGHT = _Model()
