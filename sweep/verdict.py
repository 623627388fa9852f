"""The statistics of the verdict: what repeated runs on one set of test examples allow to say. Pure; docs/verdict.md.

Two things are random: which examples are in the test rows, and the seed of each run. Both are in every interval.

- Examples: methods are compared on the same ones, so what counts is the residual of each example. A mean weighted by
  completion tokens is a ratio of sums over examples, and its variance that of its linearised residuals (Cochran,
  "Sampling Techniques", 1977, ch. 6).
- Seeds: what runs of one configuration differ by, a variance of each method's own, over its number of runs. Seeds of
  two methods are taken for independent, also where their numbers agree: if that is wrong, the interval is too wide.
- The variances add up; the t quantile's degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946).
- The share of full training's gain is a ratio, whose interval is Fieller's (JRSS B 16, 1954): close to the linearised
  one where the denominator is far from zero, and honest where it is not, since it is then no interval at all.

Scores are float64 [runs, examples]: nats summed over each example's completion, or the user's metric. Weights are
float64 [examples]: completion tokens, or ones for a metric. The untrained model has no seed: its scores are [examples].
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95  # of every interval that is claimed
MIN_SEEDS = 3  # fewer say too little about what seeds do: no interval is claimed
CLEAR_GAIN = 0.5  # full training's gain may be off by this share of itself, or there is no share of it to speak of


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, and the standard errors that it is made of.

    `low` and `high` are None where no interval is claimed; `freedom` are the t quantile's degrees of freedom.
    """

    value: float
    low: float | None
    high: float | None
    examples_error: float  # standard error from which examples are in the test rows
    seeds_error: float | None  # from the seeds of all runs together; None where a method has a single run
    freedom: float | None = None

    @property
    def clear(self) -> bool:
        """Whether an interval is claimed and zero is outside it."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def by_common_seeds(values: Sequence[Mapping[int, float]]) -> list[int]:
    """Places of configurations whose values by seed are given (lower is better), the best first, ties as they come.

    Compared is the mean over the seeds that all of them have, of the first two over all that both have: one more may
    have been given to them alone. Without a seed that all have, each one's own mean.
    """
    if not values:
        return []

    def means(seeds: set[int]) -> list[float]:
        return [statistics.fmean(v[n] for n in seeds) if seeds <= v.keys() and seeds else math.inf for v in values]

    shared = set.intersection(*(set(v) for v in values))
    found = means(shared) if shared else [statistics.fmean(v.values()) for v in values]
    order = sorted(range(len(values)), key=lambda place: found[place])
    if len(order) > 1:
        first, second = order[:2]
        found = means(values[first].keys() & values[second].keys())
        if found[second] < found[first]:
            order[:2] = second, first
    return order


def t_quantile(level: float, freedom: float) -> float:
    """The t with P(|T| < t) = `level` for `freedom` degrees of freedom, a real number of at least 1; inf is the normal.

    With t = sqrt(f) tan(u) the density becomes a power of the cosine, smooth enough for one Gauss-Legendre rule.
    """
    if not 0 < level < 1 or not freedom >= 1:
        raise ValueError(f"no t quantile for level {level} and {freedom} degrees of freedom")
    return _t_quantile(level, round(freedom, 6))


@functools.lru_cache(maxsize=4096)
def _t_quantile(level: float, freedom: float) -> float:
    if freedom > 1e7:
        return statistics.NormalDist().inv_cdf((1 + level) / 2)
    nodes, weights = _legendre()
    constant = 2 * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        inside = constant * angle * float(weights @ np.cos(angle * nodes) ** (freedom - 1))
        low, high = (angle, high) if inside < level else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


@functools.cache
def _legendre() -> tuple[Array, Array]:
    """Nodes and weights on 0 to 1. So many, since the mass stands at one end where the degrees of freedom are many."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return (nodes + 1) / 2, weights / 2


def mean(scores: Array, weights: Array) -> Estimate:
    """The weighted mean over examples of a configuration's runs: its loss a completion token, or its metric."""
    return _weighted(_over_runs(scores), weights, [scores], LEVEL)


def difference(one: Array, other: Array, weights: Array) -> Estimate:
    """`one` less `other`, paired by example; either may be the untrained model's [examples]."""
    return _weighted(_over_runs(one) - _over_runs(other), weights, [one, other], LEVEL)


def _over_runs(scores: Array) -> Array:
    return scores if scores.ndim == 1 else scores.mean(axis=0)


def _weighted(values: Array, weights: Array, runs: Sequence[Array], level: float) -> Estimate:
    total = weights.sum()
    value = float(values.sum() / total)
    parts = [(_spread(values - value * weights) / total**2, len(values) - 1)]
    parts += [(_between(scores) / total**2, len(scores) - 1) for scores in runs if scores.ndim == 2]
    return _estimate(value, parts, level)


def _spread(residuals: Array) -> float:
    """The variance of a sum over examples."""
    return len(residuals) * float(residuals.var(ddof=1)) if len(residuals) > 1 else 0.0


def _between(scores: Array) -> float:
    """The variance that seeds give to the sum over examples of the mean run; nan for a single run."""
    return float(scores.sum(axis=1).var(ddof=1)) / len(scores) if len(scores) > 1 else math.nan


def _estimate(value: float, parts: Sequence[tuple[float, int]], level: float) -> Estimate:
    """Puts (variance, degrees of freedom) together: the examples' first, then those of the methods' seeds."""
    seeds = sum(variance for variance, _ in parts[1:])
    errors = (math.sqrt(parts[0][0]), None if math.isnan(seeds) else math.sqrt(seeds))
    if errors[1] is None or any(freedom < MIN_SEEDS - 1 for _, freedom in parts):
        return Estimate(value, None, None, *errors)
    freedom = satterthwaite(parts)
    half = t_quantile(level, freedom) * math.sqrt(parts[0][0] + seeds)
    return Estimate(value, value - half, value + half, *errors, freedom)


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent variances, each given with its own."""
    below = sum(variance**2 / freedom for variance, freedom in parts if variance > 0)
    # Squares of tiny variances may vanish; then there is nothing to be uncertain about.
    return sum(variance for variance, _ in parts) ** 2 / below if below > 0 else math.inf


@dataclass(frozen=True)
class Share:
    """The share of full training's gain that LoRA reached.

    `gained` says whether full training's own gain is known well enough: if it is not, there is no share to speak of.
    Being clear of zero is not enough. Studies in which a small gain happens to be that have overestimated it, so that
    their intervals covered the share 86 % of the time (benchmarks/verdict.py).
    """

    estimate: Estimate
    lora_seeds_error: float | None
    full_seeds_error: float | None
    gained: bool


def share(lora: Array, full: Array, base: Array, weights: Array, *, higher_is_better: bool = False) -> Share:
    """(base - lora) / (base - full), ratio of sums over the test examples of the means over seeds.

    The same for a metric, where both differences are negative. Weights cancel in the ratio itself; they decide, with
    the interval of full training's gain, whether there is a denominator.
    """
    sign = -1.0 if higher_is_better else 1.0
    a, b = sign * (base - _over_runs(lora)), sign * (base - _over_runs(full))
    above, below = float(a.sum()), float(b.sum())
    ratio = above / below if below else math.nan
    examples = _spread(a - ratio * b) if below else math.nan
    seeds = (_between(lora), _between(full))
    parts = [(examples, len(a) - 1), (seeds[0], len(lora) - 1), (ratio**2 * seeds[1], len(full) - 1)]
    scale = abs(below) or math.nan
    errors = [None if math.isnan(v) else math.sqrt(v) / scale for v in (parts[1][0], parts[2][0])]
    point = _estimate(ratio, [(variance / scale**2, freedom) for variance, freedom in parts], LEVEL)
    gain = _gain(full, base, weights, sign)
    if point.freedom is None or not gain:
        return Share(_pointwise(point), errors[0], errors[1], gain)
    t = t_quantile(LEVEL, point.freedom)
    ends = _fieller(above, below, (_spread(a) + seeds[0], _covariance(a, b), _spread(b) + seeds[1]), t)
    if ends is None:
        return Share(_pointwise(point), errors[0], errors[1], False)
    found = Estimate(ratio, *ends, point.examples_error, point.seeds_error, point.freedom)
    return Share(found, errors[0], errors[1], True)


def _pointwise(estimate: Estimate) -> Estimate:
    return Estimate(estimate.value, None, None, estimate.examples_error, estimate.seeds_error)


def _gain(full: Array, base: Array, weights: Array, sign: float) -> bool:
    """Whether full training's gain is known to within CLEAR_GAIN of itself; under few seeds as far as examples tell."""
    gained = difference(base, full, weights)
    if gained.low is not None:
        half = gained.value - gained.low
    else:
        half = t_quantile(LEVEL, max(len(base) - 1, 1)) * gained.examples_error
    return half < CLEAR_GAIN * sign * gained.value


def _covariance(a: Array, b: Array) -> float:
    return len(a) * float(np.cov(a, b)[0, 1])


def _fieller(above: float, below: float, variances: tuple[float, float, float], t: float) -> tuple[float, float] | None:
    """All ratios that are not refuted: (above - r below)^2 <= t^2 V(r). None where that is not an interval."""
    v_above, covariance, v_below = variances
    square = below**2 - t**2 * v_below
    if square <= 0:
        return None
    middle = above * below - t**2 * covariance
    root = math.sqrt(max(middle**2 - square * (above**2 - t**2 * v_above), 0.0))
    return (middle - root) / square, (middle + root) / square


def against_best(
    scores: Mapping[int, Array], weights: Array, *, higher_is_better: bool = False
) -> dict[int, Estimate | None]:
    """Each configuration less the best one on the test rows; None for the best itself. `scores` by its name.

    Run i of every configuration has the same seed, so runs are paired by seed too: what remains of a table of
    configurations by seeds when both means are taken away is the noise of all of them (randomised blocks), which has
    more degrees of freedom than a pair's own; where the pair's own is larger, that one counts. The level is
    Bonferroni's over all comparisons with the best, which covers that the best was found on the same rows: it bounds
    Hsu's multiple comparisons with the best (1984).
    """
    losses = np.array([[run.sum() / weights.sum() for run in runs] for runs in scores.values()])
    count, seeds = losses.shape
    names = list(scores)
    means = losses.mean(axis=1)
    best = int(means.argmax() if higher_is_better else means.argmin())
    rest = losses - means[:, None] - losses.mean(axis=0) + losses.mean()
    freedom = (count - 1) * (seeds - 1)
    noise = float((rest**2).sum()) / freedom if freedom else math.nan
    found: dict[int, Estimate | None] = {names[best]: None}
    for name, runs in scores.items():
        if name == names[best]:
            continue
        values = runs.mean(axis=0) - scores[names[best]].mean(axis=0)
        value = float(values.sum() / weights.sum())
        examples = _spread(values - value * weights) / float(weights.sum()) ** 2
        own = float((losses[names.index(name)] - losses[best]).var(ddof=1)) if freedom else math.nan
        pair = max(2 * noise, own) / seeds
        if seeds < MIN_SEEDS:
            error = math.sqrt(pair) if freedom else None
            found[name] = Estimate(value, None, None, math.sqrt(examples), error)
        else:
            parts = [(examples, len(weights) - 1), (pair, freedom)]
            found[name] = _estimate(value, parts, 1 - (1 - LEVEL) / (count - 1))
    return {name: found[name] for name in names}


def best_of(values: Sequence[float], count: int, *, higher_is_better: bool = False) -> float:
    """The expected best of `count` drawn from `values` without replacement, in closed form by order statistics.

    The i-th best of N is the best of the drawn ones in C(N - i, k - 1) of all C(N, k) draws.
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"cannot draw {count} of {len(values)}")
    ordered = sorted(values, reverse=higher_is_better)
    size = len(ordered)
    ways = [math.comb(size - place, count - 1) for place in range(1, size - count + 2)]
    whole = math.comb(size, count)
    # Shares of whole numbers: a float of either alone may be too large.
    return sum(value * (way / whole) for value, way in zip(ordered, ways, strict=False))
