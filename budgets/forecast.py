"""What a stretch of work will take, learned from what was measured, with an 80 % interval.

Seconds a token (training, evaluation) or seconds a piece (load, compile, checkpoint, restore) are log-normal around a
prior: FLOPs over a guessed speed for work that scales with tokens. A Bayesian linear model on the logarithm, one for
each kind of work, corrects the prior: a common factor (the guess of the machine's speed is usually wrong by as much as
3x), one for full-parameter training, batch size, row length, targets, rank and precision, and one for the trial itself.

Trials that train at once share the machine by their tokens. A part of what a step costs is fixed, and all of them share
it, so that with n at once a token costs p (1 + r / n). On a GPU r is a part of the prior (`floor_seconds`): learned
from wide packs that are still warming up, it makes a trial alone many times too dear. Elsewhere it is learned: the
logarithm is linear in 1 - 1/n where r is small, and in log n where it is large; in both together it is so within 2 % up
to 8 trials, 5 % up to 16 (`beside`, `log_width`). A stretch that n trials shared was measured once and not n times, so
each of them counts as an n-th of a measurement.

What nobody can know beforehand, such as who will share the machine, may be said with the work (`Work.loose`): it
widens intervals, all of them by the same cause, and what was measured has none of it.

Machines warm up, and are slower beside others. So the factors, to which all measurements say the same, are joined by a
level, which follows the last few (`_Model.follow`).

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
SURPRISE = 20.0  # sd of the common factor once anything was measured (_Model.learn)
# sd of each feature's factor, in log seconds a unit of the feature.
SCALES = {"common": 1.5, "full": 0.7, "log_batch": 0.3, "log_row": 0.2, "attention": 0.25, "mlp": 0.2, "rank": 0.2}
SCALES |= {"beside": 0.5, "log_width": 0.5, "rounded": 0.15}

FLOOR_A_LAYER = 0.0005  # seconds that a GPU takes for a layer of a training step, forward and backward, at least

_COMMON = list(SCALES).index("common")

# How the level follows the machine: the gain of one measurement, and the sd of where the level will go from here.
GAIN, DRIFT = 0.3, 0.1

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

    kind: str  # train, evaluate, examine, load, compile, checkpoint, write, restore
    prior_seconds: float  # a unit: a token for train, evaluate and examine, the whole for the others
    features: Mapping[str, float] = field(default_factory=dict)
    owner: str = ""  # a trial's measurements tell most about itself
    loose: float = 0.0  # sd of log seconds that is no measurement's and no machine's: what will only be decided

    @functools.cached_property
    def row(self) -> Array:
        """The features in units of what they may do, float64 [len(SCALES)]."""
        return np.array([sd * self.features.get(name, name == "common") for name, sd in SCALES.items()])

    @property
    def engine(self) -> float:
        """Works that the same engine does share a level."""
        return self.features.get("full", 0.0)


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


def rounded_share(parameters: int) -> float:
    """Of what training over a base in bf16 takes, what it takes over one in 8 bits: the less, the larger the model.

    On an H100 nothing is gained at 135M parameters, 0.86 at 1.5B, 0.73 at 8B (2026-11-27, docs/log.md).
    """
    return min(1.0, max(0.7, 1 - 0.066 * math.log(max(parameters, 1) / 1.35e8)))


def floor_seconds(layers: float, tokens: float) -> float:
    """What a token of a step of so many tokens takes a GPU at least: layers are launched, however little they do.

    Half a millisecond a layer: on an H100 captured steps of a model of 30 layers took 10 to 14 ms for one or two trials
    of a few hundred tokens (2026-11-26, docs/log.md).
    """
    return FLOOR_A_LAYER * layers / max(tokens, 1.0)


class Forecast:
    """Learns from `observe`, answers `seconds`. Deterministic: the same measurements give the same forecasts."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def observe(self, work: Work, units: float, seconds: float, width: float = 1.0) -> None:
        """Learns that `units` (tokens, or 1) took `seconds`, which are an equal share of what `width` trials took
        together. What is too short to measure is left out."""
        if units <= 0 or seconds <= 0:
            return
        model = self._models.setdefault(work.kind, _Model())
        if model.measured:
            model.judge(self.seconds(work, units), seconds)
        ratio = math.log(seconds / units) - math.log(work.prior_seconds)
        if model.measured:
            model.follow(work, ratio, 1 / width)
        model.learn(work, ratio, _noise(seconds * width) * math.sqrt(width))

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

    def mean(self, pieces: Sequence[Piece]) -> float:
        """Returns the mean of `total` alone, in seconds: many times as fast, for what is asked at every step."""
        return sum(
            units * work.prior_seconds * math.exp(self._models.get(work.kind, _UNTAUGHT).mean(work))
            for work, units in pieces
            if units > 0
        )

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
            logs, covariance, scale = self._models.get(kind, _UNTAUGHT).predict([work for work, _ in mine])
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


class _Owner:
    """What the measurements of one trial say together of what is its own, beside what their features explain."""

    def __init__(self) -> None:
        self.precision = 0.0  # sum of 1 / noise**2
        self.total = 0.0  # sum of log ratio / noise**2
        self.rows: Array = np.zeros(len(SCALES))  # sum of row / noise**2

    @property
    def own(self) -> float:
        """The variance that is left of what is its own, given the factors of all features."""
        return TRIAL**2 / (1 + TRIAL**2 * self.precision)

    def learn(self, row: Array, ratio: float, precision: float) -> None:
        """Takes one more measurement in."""
        self.precision += precision
        self.total += ratio * precision
        self.rows = self.rows + row * precision


class _Model:
    """One kind of work: a linear model of log(seconds / prior) on features of unit variance, and how well it did."""

    def __init__(self) -> None:
        self.measured = 0
        self.inside = 0
        self.errors: list[float] = []
        self.scale = 1.0  # of all predictive sd
        self._levels: dict[float, tuple[float, float, float]] = {}  # by engine, see _level
        self._owners: dict[str, _Owner] = {}
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
        """Takes one more log ratio in. What is a trial's own is summed out, so sums of its measurements are enough.

        How fast the machine may be says how wide the first forecast is, and nothing from then on: where the guess of it
        is off by ten thousand, any firmer belief would explain a part of that by whatever the first measurements have
        in common, such as that all were made in a wide pack, and a narrow one would be forecast many times too dear.
        """
        if not self.measured:
            self._information[_COMMON, _COMMON] *= (SCALES["common"] / SURPRISE) ** 2
        self.measured += 1
        self._solved = None
        row, precision = work.row, 1 / noise**2
        self._information += precision * np.outer(row, row)
        self._toward += precision * ratio * row
        if work.owner:
            owner = self._owners.setdefault(work.owner, _Owner())
            self._sum_out(owner, 1)
            owner.learn(row, ratio, precision)
            self._sum_out(owner, -1)

    def _sum_out(self, owner: _Owner, sign: int) -> None:
        # By the Sherman-Morrison formula for the inverse of diag(noise**2) + TRIAL**2 among one trial's measurements.
        self._information += sign * owner.own * np.outer(owner.rows, owner.rows)
        self._toward += sign * owner.own * owner.total * owner.rows

    def follow(self, work: Work, ratio: float, weight: float) -> None:
        """Moves the level by a part of what a measurement that is about to be learned is off; `weight`: as how many
        measurements it counts.

        It is an average with weights that fade. One that has moved by more than measurements differ will move again.
        """
        level, drift, before = self._level(work.engine)
        usual = NOISE**2 + TRIAL**2
        farthest = OUTLIER * math.sqrt(self.scale**2 * usual + drift)
        moved = ratio - self.mean(work)
        moved = min(max(moved, -farthest), farthest)
        gain = 1 - (1 - GAIN) ** weight
        drift = max(drift + gain * (moved * before - drift), 0.0)
        self._levels[work.engine] = level + gain * moved, drift, moved

    def _level(self, engine: float) -> tuple[float, float, float]:
        """The level now, in log seconds, the variance of how far it will have moved by then, and its last move."""
        return self._levels.get(engine, (0.0, 0.0, 0.0))

    def predict(self, works: Sequence[Work]) -> tuple[Array, Array, float]:
        """`joint` at the present level, which may be another one by then: for all that one engine does alike.

        How far it drifted was measured: the factor by which all is off that is assumed does not apply to it. Nor to
        what is loose.
        """
        means, covariance, scale = self.joint(works)
        engines = np.array([work.engine for work in works])
        levels, drifts, _ = np.array([self._level(engine) for engine in engines]).T
        assumed = DRIFT**2 if self.measured else 0.0
        drifted = np.maximum(drifts / scale**2, assumed) * (engines[:, None] == engines[None, :])
        loose = np.array([work.loose for work in works]) / scale
        return means + levels, covariance + drifted + np.outer(loose, loose), scale

    def mean(self, work: Work) -> float:
        """The mean of one work's log ratio at the present level, as `predict` has it."""
        _, factors = self._factors()
        level = self._level(work.engine)[0]
        owner = self._owners.get(work.owner) if work.owner else None
        if owner is None:
            return float(work.row @ factors) + level
        own = owner.own
        return float((work.row - own * owner.rows) @ factors) + own * owner.total + level

    def _factors(self) -> tuple[Array, Array]:
        """The covariance of the features' factors, and their means."""
        if self._solved is None:
            inverse = np.linalg.inv(self._information)
            self._solved = inverse, inverse @ self._toward
        return self._solved

    def joint(self, works: Sequence[Work]) -> tuple[Array, Array, float]:
        """Mean and covariance of the log ratios of several works, noise apart, and the factor of their sd."""
        inverse, factors = self._factors()
        owners = [self._owners.get(work.owner, _NOBODY) for work in works]
        own = np.array([owner.own if work.owner else 0.0 for owner, work in zip(owners, works, strict=True)])
        # A trial's own part follows its measurements as far as its features do not explain them.
        left = np.array([work.row - part * owner.rows for work, part, owner in zip(works, own, owners, strict=True)])
        means = left @ factors + own * np.array([owner.total for owner in owners])
        same = np.array([[a.owner == b.owner for b in works] for a in works])
        return means, left @ inverse @ left.T + own * same, self.scale


_NOBODY = _Owner()
_UNTAUGHT = _Model()
