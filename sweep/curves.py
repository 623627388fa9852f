"""A model of learning curves over the space: where a trial would end, and what its next dollar is worth.

Freeze-thaw Bayesian optimisation (Swersky, Snoek and Adams, "Freeze-Thaw Bayesian Optimization", 2014) as one Gaussian
process over configurations and training lengths. The standardised log loss of trial i after a share s of the run is

    y_i(s) = level(s) + end(x_i) + own_i + w(s) (early(x_i, s) + own_early_i(s)) + noise

where w falls from 1 at the first rung to 0 at the end, so what is left there is the trial's end: what its configuration
and its neighbours' say, and what is its own. What an early loss tells of the end follows: the model knows that curves
may cross, and that neighbours' curves cross alike.

The worth of training on is the expected improvement per dollar of the best that is known, with the option to stop at
the next rung: the rate at which a step is just worth its price. That is the index of Pandora's boxes (Weitzman, 1979;
Xie et al., "Cost-aware Bayesian Optimization via the Pandora's Box Gittins Index", 2024) for a box in two stages.
How far early losses may be trusted differs from task to task: that alone is chosen, among a few values, by the marginal
likelihood of what was seen (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, ch. 5). The same
losses give the same decisions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Standard deviations in units of the better half's spread at the first rung, and widths of the space, which is 0 to 1.
END, OWN = 1.0, 0.3  # of where a trial ends: by its configuration, and its own
EARLY, OWN_EARLY = 0.3, 0.2  # of how far the first rung is off,
FACTORS = (1.0, 2.0, 4.0)  # times one of these
LEVEL, NOISE = 1.0, 0.1  # between rungs, and of one evaluation
ANYTHING = 10.0  # of the level of all
ALIKE = 1.5  # in log length: how far apart two rungs may be and still be off alike
RATE_WIDTH, WIDTH = 0.25, 1.0  # how far neighbours are: in the learning rate, in everything else
FLOOR = 0.002  # of the unit, in log loss: two seeds of one configuration differ by as much
SPREAD = 0.7  # of the distance between the median and the best that is one unit
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(11)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
HALVINGS = 25  # of the interval in which a rate lies
TINY = 1e-10
BLOCK = 48  # rows of a triangular system that are solved at once


@dataclass(frozen=True)
class Points:
    """Trials at training lengths: `features` (n, d) from 0 to 1, the learning rate first; `trials` (n,) their numbers,
    negative for those that do not exist yet; `lengths` (n,) logs of shares of the run; `rungs` (n,) their indices."""

    features: Array
    trials: NDArray[np.int64]
    lengths: Array
    rungs: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.trials)

    def at(self, places: Any) -> Points:
        """Those at some places: indices, or a slice."""
        return Points(self.features[places], self.trials[places], self.lengths[places], self.rungs[places])


@dataclass(frozen=True)
class Outlook:
    """What is known of where trials end, each (n,): the mean, its variance, and how much of that the next evaluation
    will explain; `against` is the covariance with everything seen, for `apart`."""

    mean: Array
    variance: Array
    explained: Array
    against: Array


class Curves:
    """The model, conditioned on losses. It takes (n,) losses of n points; cubic in n, 2 ms at 150."""

    def __init__(self, seen: Points, losses: Array, first: float, early: float = 1.0) -> None:
        """`losses` are standardised (see `standardised`), `first` is the log of the first rung's share; early losses
        are off by `early` times as much as usual."""
        self.early = early
        self._seen, self._first = seen, first if first < 0 else -1.0  # without rungs all is seen at the end
        covariance = self._covariance(seen, seen)
        covariance[np.diag_indices(len(seen))] += NOISE**2
        self._root: Array = np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
        self._weights = _forward(self._root, losses[:, None])[:, 0]
        # The log of the marginal likelihood, but for a constant.
        self.likelihood = -0.5 * float(self._weights @ self._weights) - float(np.log(np.diag(self._root)).sum())

    def outlook(self, points: Points) -> Outlook:
        """Looks at the ends of trials; `points` say at which length each is evaluated next."""
        count, last = len(points), int(self._seen.rungs.max()) + 1
        # The level of the end is the same for all, so it is left out of what is compared.
        ends = Points(points.features, points.trials, np.zeros(count), np.full(count, -1 - last))
        sides = np.vstack([self._covariance(ends, self._seen), self._covariance(points, self._seen)])
        against, next_against = np.hsplit(_forward(self._root, sides.T), 2)
        end = END**2 + OWN**2 + ANYTHING**2
        early = (self.early * self._fading(points.lengths)) ** 2 * (EARLY**2 + OWN_EARLY**2)
        variance = np.maximum(end - (against**2).sum(0), TINY)
        seen_next = np.maximum(end + early + NOISE**2 + LEVEL**2 - (next_against**2).sum(0), TINY)
        shared = end - (against * next_against).sum(0)
        return Outlook(against.T @ self._weights, variance, np.minimum(shared**2 / seen_next, variance), against)

    def apart(self, points: Points, outlook: Outlook, other: int, reference: Outlook, features: Array) -> Array:
        """The variance of the difference between ends, (n,): of `points` and of trial `other` of `reference`, which
        has these features. What is not known of all alike cancels out."""
        near = END**2 * _alike(points.features, features[None])[:, 0] + ANYTHING**2
        shared = near - outlook.against.T @ reference.against[:, other]
        return np.asarray(np.maximum(outlook.variance + reference.variance[other] - 2 * shared, TINY))

    def _fading(self, lengths: Array) -> Array:
        return np.asarray(np.sqrt(lengths / self._first))

    def _covariance(self, one: Points, two: Points) -> Array:
        alike = _alike(one.features, two.features)
        same = (one.trials[:, None] == two.trials[None]) & (one.trials[:, None] >= 0)
        fading = self._fading(one.lengths)[:, None] * self._fading(two.lengths)[None]
        early = self.early**2 * fading * np.exp(-np.abs(one.lengths[:, None] - two.lengths[None]) / ALIKE)
        level = LEVEL**2 * (one.rungs[:, None] == two.rungs[None]) + ANYTHING**2
        return np.asarray((END**2 + EARLY**2 * early) * alike + (OWN**2 + OWN_EARLY**2 * early) * same + level)


def fitted(seen: Points, losses: Array, first: float) -> Curves:
    """The model under the likeliest of the factors by which early losses may be off."""
    return max((Curves(seen, losses, first, factor) for factor in FACTORS), key=lambda model: model.likelihood)


def _forward(root: Array, sides: Array) -> Array:
    """Solves root @ x = sides, (n, m), for a lower triangular `root`, (n, n), a block of rows at a time.

    numpy's own solver takes any matrix and needs n**3 for it, this one n**2 m.
    """
    found = np.array(sides)
    for start in range(0, len(root), BLOCK):
        stop = start + BLOCK
        found[start:stop] = np.linalg.solve(root[start:stop, start:stop], found[start:stop])
        found[stop:] -= root[stop:, start:stop] @ found[start:stop]
    return found


def _alike(one: Array, two: Array) -> Array:
    widths = np.array([RATE_WIDTH] + [WIDTH] * (one.shape[1] - 1))
    one, two = one / widths, two / widths
    apart = (one**2).sum(1)[:, None] + (two**2).sum(1)[None] - 2 * one @ two.T
    return np.asarray(np.exp(-0.5 * np.maximum(apart, 0.0)))


def standardised(losses: Array, first: Array) -> Array:
    """Log losses in units of the spread of the better half of those at the first rung, `first`.

    What is far worse than the median is taken for just worse: how bad the bad ones are says nothing about the good.
    """
    logs, there = np.log(np.maximum(losses, TINY)), np.log(np.maximum(first, TINY))
    middle, best = float(np.median(there)), float(there.min())
    unit = max(middle - best, FLOOR)
    return np.asarray((np.minimum(logs, middle + unit) - middle) / (SPREAD * unit))


def expected_improvement(best: float, mean: Array, deviation: Array) -> Array:
    """By how much something normally distributed will be below `best`, on average."""
    deviation = np.maximum(deviation, TINY)
    z = (best - mean) / deviation
    return np.asarray(deviation * (z * _below(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)))


def _below(z: Array) -> Array:
    """The normal distribution, to 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, 7.1.26."""
    x = np.abs(z) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * x)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.asarray(0.5 * (1 + np.sign(z) * (1 - tail * np.exp(-x * x))))


def rates(best: float, mean: Array, explained: Array, left: Array, price: Array, rest: Array) -> Array:
    """What each next step is worth a dollar: the rate r at which E[max(EI(after it) - r rest, 0)] = r price.

    `explained` is the variance that is known after the step and `left` what stays until the end; `price` is the step's
    and `rest` what then leads to the end (0 where the step leads there). All are (n,).
    """
    steps = mean[:, None] + np.sqrt(explained)[:, None] * NODES
    gains = expected_improvement(best, steps, np.sqrt(left)[:, None])
    low, high = np.zeros(len(mean)), gains @ WEIGHTS / price
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        pays = np.maximum(gains - (middle * rest)[:, None], 0.0) @ WEIGHTS > middle * price
        low, high = np.where(pays, middle, low), np.where(pays, high, middle)
    return low
