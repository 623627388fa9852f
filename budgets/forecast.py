"""What a stretch of work will take, learned from what was measured, with an 80 % interval.

Seconds a token (training, evaluation) or seconds a piece (load, checkpoint, restore) are log-normal around a prior:
FLOPs over a guessed speed for work that scales with tokens. A Gaussian process on the logarithm corrects the prior: a
common factor (the guess of the machine's speed is usually wrong by as much as 3x), one for full-parameter training,
batch size, targets and rank, and one for the trial itself. It is exact on the last few hundred measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

Z80 = 1.2815515655446004  # the standard normal's 90 % quantile: 10 % above, 10 % below
NOISE = 0.08  # sd of log seconds between two measurements of the same thing
TRIAL = 0.10  # sd of what is a trial's own
WINDOW = 200  # measurements kept: a 200 x 200 solve takes under 2 ms


@dataclass(frozen=True)
class Seconds:
    """A forecast in seconds: its mean and the ends of its 80 % interval."""

    mean: float
    low: float
    high: float

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.mean + other.mean, self.low + other.low, self.high + other.high)


NOTHING = Seconds(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Work:
    """One kind of work to be forecast: its prior in log seconds a unit, what it resembles, and whose it is."""

    kind: str  # train, evaluate, load, checkpoint, restore
    prior_seconds: float  # a unit: a token for train and evaluate, the whole for the others
    features: Mapping[str, float] = field(default_factory=dict)
    owner: str = ""  # a trial's measurements tell most about itself


SCALES = {"common": 1.5, "full": 0.7, "log_batch": 0.3, "attention": 0.25, "mlp": 0.2, "rank": 0.2}


def flops_per_token(parameters: int, method: str) -> float:
    """Training FLOPs a token: 4N for LoRA (no weight gradients of the base), 6N for full-parameter training."""
    return (4.0 if method == "lora" else 6.0) * parameters


class Forecast:
    """Learns from `observe`, answers `seconds`. Deterministic: the same measurements give the same forecasts."""

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[Work, float, float]]] = {}
        self._solved: dict[str, tuple[Array, Array]] = {}

    def observe(self, work: Work, units: float, seconds: float) -> None:
        """Learns that `units` (tokens, or 1) took `seconds`. What is too short to measure is left out."""
        if units <= 0 or seconds <= 0:
            return
        noise = NOISE + 0.05 / math.sqrt(seconds)  # a tenth of a second says less than ten seconds do
        seen = self._seen.setdefault(work.kind, [])
        seen.append((work, math.log(seconds / units) - math.log(work.prior_seconds), noise))
        del seen[:-WINDOW]
        self._solved.pop(work.kind, None)

    def measured(self, kind: str) -> int:
        """How many measurements of this kind stand behind the forecasts."""
        return len(self._seen.get(kind, ()))

    def seconds(self, work: Work, units: float = 1.0) -> Seconds:
        """Returns what `units` of this work will take."""
        if units <= 0:
            return NOTHING
        seen = self._seen.get(work.kind, [])
        mean, variance = 0.0, _kernel([work], [work])[0, 0]
        if seen:
            gain, inverse = self._solve(work.kind, seen)
            across = _kernel([work], [w for w, _, _ in seen])[0]
            mean = float(across @ gain)
            variance = max(float(variance - across @ inverse @ across), 0.0)
        sd = math.sqrt(variance + NOISE**2)
        middle = units * work.prior_seconds * math.exp(mean)
        return Seconds(middle, middle * math.exp(-Z80 * sd), middle * math.exp(Z80 * sd))

    def _solve(self, kind: str, seen: Sequence[tuple[Work, float, float]]) -> tuple[Array, Array]:
        if kind not in self._solved:
            works = [work for work, _, _ in seen]
            covariance = _kernel(works, works) + np.diag([noise**2 for _, _, noise in seen])
            inverse = np.linalg.inv(covariance)
            self._solved[kind] = (inverse @ np.array([ratio for _, ratio, _ in seen]), inverse)
        return self._solved[kind]


def _kernel(left: Sequence[Work], right: Sequence[Work]) -> Array:
    same = np.array([[bool(a.owner) and a.owner == b.owner for b in right] for a in left], dtype=np.float64)
    shared: Array = _features(left) @ _features(right).T + TRIAL**2 * same
    return shared


def _features(works: Sequence[Work]) -> Array:
    rows = [[1.0 if name == "common" else work.features.get(name, 0.0) for name in SCALES] for work in works]
    scaled: Array = np.array(rows, dtype=np.float64) * np.array(list(SCALES.values()))
    return scaled
