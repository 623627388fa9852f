"""Where the next configuration comes from: the priors, uniform chance, near the best so far, or the sampler.

The idea is PriorBand's (Mallik et al., "PriorBand: Practical Hyperparameter Optimization in the Age of Deep Learning",
NeurIPS 2023): trust moves from the priors to the evidence as trials accumulate, and away from the priors where those
do better that the priors thought unlikely. A fixed share is always uniform, so that a wrong prior is found out.

    trial number   0 … first-1        then, by weights that follow from what was seen
    source         known-good ones    prior | uniform | incumbent | sampler

Everything follows from (study seed, trial number) and from what the sampler is shown; nothing here draws elsewhere.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from sweep import priors, space
from sweep.priors import Priors
from sweep.records import Study
from sweep.spec import Method, RangeSpec, SearchSpec

SourceName = Literal["first", "prior", "uniform", "incumbent", "sampler"]

UNIFORM = 0.1  # always
DOUBT = 0.15  # of the priors' share is uniform as well while nothing speaks for or against them
MODELLED = 5  # configurations that a sampler needs before it may be asked
SAMPLED_AT = 8  # configurations after which the sampler has half of its share
NEAR_AT = 8  # the same for the neighbourhood of the best
BEST = 1 / 3  # of all configurations are the ones to learn from
PLACES, NEAR, STAY = 0.8, 2.0, 0.8  # a neighbour: places in a list, a factor in the rate, the chance of the same word
SHARPNESS = 3  # how fast trust follows the rates of success
GOLDEN = (math.sqrt(5) - 1) / 2
TINY = 1e-12


@dataclass(frozen=True)
class Proposal:
    """A whole configuration by Optuna's names; `chosen` is None where the sampler shall choose."""

    source: SourceName
    chosen: dict[str, Any] | None


class Guide:
    """Proposes the configurations of one study."""

    def __init__(self, known: Priors, search: SearchSpec, examples: int, seed: int) -> None:
        """`examples` are those of the longest run."""
        self.priors = known
        self.search = search
        self._examples = examples
        self._seed = seed
        self._densities: dict[tuple[Any, ...], float] = {}  # of what was seen; computed once, as trials are many
        digest = hashlib.sha256(f"{seed}:sources".encode()).digest()
        self._offset = int.from_bytes(digest[:4], "big") / 2**32

    def propose(
        self,
        number: int,
        seen: Sequence[Mapping[str, Any]],
        measured: int | None = None,
        method: Method | None = None,
    ) -> Proposal:
        """Proposes trial `number`. `seen` are the configurations with a result, the best first.

        The first `measured` of them have a loss (None: all); the others diverged or ran out of memory. With `method`
        one of that method, if it is none of the first ones, which are whose they are.
        """
        if number < len(self.priors.first):
            return Proposal("first", dict(self.priors.first[number]))
        if not self.priors.guided:
            return Proposal("sampler", None)
        search = self.search
        if method is not None:
            search = search.model_copy(update={"method": (method,)})
            known = [chosen["method"] == method for chosen in seen[:measured]]
            seen, measured = [chosen for chosen in seen if chosen["method"] == method], sum(known)
        shares = self.shares(seen, measured)
        # Multiples of the golden ratio fill the line evenly: of ten trials in a row one is uniform, not by luck none.
        at = (self._offset + number * GOLDEN) % 1.0
        source = _pick(list(shares), list(shares.values()), at)
        draw = random.Random(f"{self._seed}:{number}")
        if source == "prior":
            return Proposal(source, self._likely(draw, search.method))
        if source == "uniform":
            return Proposal(source, anything(search, draw))
        return Proposal(source, near(search, seen[0], draw) if source == "incumbent" else None)

    def shares(self, seen: Sequence[Mapping[str, Any]], measured: int | None = None) -> dict[SourceName, float]:
        """How likely each source is for the next configuration; the sum is 1. `measured` as in `propose`."""
        count = len(seen)
        sampler = (1 - UNIFORM) * count / (count + SAMPLED_AT) if count >= MODELLED else 0.0
        rest = 1 - UNIFORM - sampler
        # Next to what diverged or ran out of memory there is nothing to look for.
        near = rest * count / (count + NEAR_AT) if count > 1 and measured != 0 else 0.0
        # A trust of a half, or more, leaves the priors all that doubt does not take.
        prior = (rest - near) * min(2 * self.trust(seen, measured), 1.0) * (1 - DOUBT)
        free = rest - near - prior
        if count >= MODELLED:
            sampler, free = sampler + free, 0.0
        return {"prior": prior, "uniform": UNIFORM + free, "incumbent": near, "sampler": sampler}

    def trust(self, seen: Sequence[Mapping[str, Any]], measured: int | None = None) -> float:
        """How far the priors are to be believed, 0 to 1; a half if nothing speaks for or against them.

        Compared is how often configurations that the priors think likely are among the best third, and how often
        others are. One without a loss is never among the best (`measured` as in `propose`).
        """
        likely = [1 - 1 / (1 + self.density(chosen)) for chosen in seen]
        best = min(math.ceil(BEST * len(seen)), len(seen) if measured is None else measured)
        inside = (1 + sum(likely[:best])) / (1 / BEST + sum(likely))
        outside = (1 + best - sum(likely[:best])) / (1 / BEST + len(seen) - sum(likely))
        return inside**SHARPNESS / (inside**SHARPNESS + outside**SHARPNESS)

    def density(self, chosen: Mapping[str, Any]) -> float:
        """How many times likelier the priors make a configuration than uniform chance does."""
        key = tuple(chosen.values())
        if key not in self._densities:
            self._densities[key] = self._density(chosen)
        return self._densities[key]

    def _density(self, chosen: Mapping[str, Any]) -> float:
        ratio = 1.0
        for name, values in space.branch(chosen["method"], self.search).items():
            if isinstance(values, RangeSpec):
                ratio *= self._rate_density(values, chosen, chosen[name])
            else:
                weights = self._weights(name, values, chosen)
                ratio *= weights[values.index(chosen[name])] * len(values) / sum(weights)
        return ratio

    # Draws

    def _likely(self, draw: random.Random, methods: Sequence[Method]) -> dict[str, Any]:
        chosen: dict[str, Any] = {"method": draw.choice(methods)}
        # The likeliest rate depends on alpha and on how many steps there are, so it comes last.
        parameters = space.branch(chosen["method"], self.search)
        rate = f"{chosen['method']}_learning_rate"
        for name in [*(name for name in parameters if name != rate), rate]:
            values = parameters[name]
            if isinstance(values, RangeSpec):
                law = _law(self.priors.rate(chosen, self._examples), self.priors.rate_spread)
                chosen[name] = _truncated(law, values, draw.random())
            else:
                chosen[name] = _pick(values, self._weights(name, values, chosen), draw.random())
        return chosen

    # What the priors say

    def _weights(self, name: str, values: Sequence[Any], chosen: Mapping[str, Any]) -> list[float]:
        """How likely each of the values is; TINY at least, so that a prior can be wrong about any."""
        known = self.priors
        if name == "lora_targets":
            weights = [known.targets.weights.get(value, 0.0) for value in values]
        elif name == "lora_alpha":
            rules = [(rule.weight, rule.center(chosen["lora_rank"])) for rule in known.alpha.rules]
            weights = [
                sum(weight * _bell(value, center, known.alpha.spread) for weight, center in rules) for value in values
            ]
        elif name == "lora_rank":
            weights = [_bell(value, known.rank.center, known.rank.spread) for value in values]
        elif name == "batch_size":
            weights = [_bell(value, known.batch_size.center, known.batch_size.spread) for value in values]
        else:
            rate = known.rate(chosen, self._examples)
            weights = [_bell(value, rate, known.rate_spread) for value in values]
        return [max(weight, TINY) for weight in weights]

    def _rate_density(self, values: RangeSpec, chosen: Mapping[str, Any], rate: float) -> float:
        if values.low == values.high:
            return 1.0
        law = _law(self.priors.rate(chosen, self._examples), self.priors.rate_spread)
        low, high = math.log(values.low), math.log(values.high)
        inside = law.cdf(high) - law.cdf(low)
        return law.pdf(math.log(rate)) / inside * (high - low) if inside > TINY else 1.0


def anything(search: SearchSpec, draw: random.Random) -> dict[str, Any]:
    """A configuration drawn evenly from the whole space."""
    chosen: dict[str, Any] = {"method": draw.choice(search.method)}
    for name, values in space.branch(chosen["method"], search).items():
        if not isinstance(values, RangeSpec):
            chosen[name] = draw.choice(values)
        elif values.log:
            logarithm = draw.uniform(math.log(values.low), math.log(values.high))
            chosen[name] = min(max(math.exp(logarithm), values.low), values.high)
        else:
            chosen[name] = draw.uniform(values.low, values.high)
    return chosen


def near(search: SearchSpec, best: Mapping[str, Any], draw: random.Random) -> dict[str, Any]:
    """A configuration in the neighbourhood of another one, of the same method."""
    chosen: dict[str, Any] = {"method": best["method"]}
    for name, values in space.branch(best["method"], search).items():
        if isinstance(values, RangeSpec):
            chosen[name] = _truncated(_law(best[name], NEAR), values, draw.random())
            continue
        if name == "lora_targets":
            weights = [STAY if value == best[name] else (1 - STAY) / len(values) for value in values]
        else:
            order = sorted(values)
            home = order.index(best[name])
            weights = [math.exp(-0.5 * ((order.index(value) - home) / PLACES) ** 2) for value in values]
        chosen[name] = _pick(values, weights, draw.random())
    return chosen


def guide_of(study: Study) -> Guide | None:
    """The guide of a study that was launched with priors, or with configurations to try first."""
    stored = priors.of(study.facts)
    if stored is None:
        return None
    return Guide(stored, study.spec.search, study.facts["plan"]["examples"], study.spec.seed)


def _law(center: float, spread: float) -> NormalDist:
    return NormalDist(math.log(center), math.log(spread))


def _bell(value: float, center: float, spread: float) -> float:
    return math.exp(-0.5 * (math.log(value / center) / math.log(spread)) ** 2)


def _truncated(law: NormalDist, values: RangeSpec, at: float) -> float:
    """The value below which the share `at` of the law inside the range lies; the nearest end if none of it does."""
    low, high = law.cdf(math.log(values.low)), law.cdf(math.log(values.high))
    share = low + at * (high - low)
    if not TINY < share < 1 - TINY or high - low < TINY:
        return min(max(math.exp(law.mean), values.low), values.high)
    return min(max(math.exp(law.inv_cdf(share)), values.low), values.high)


def _pick(values: Sequence[Any], weights: Sequence[float], at: float) -> Any:
    """The value at the share `at` of the weights' sum."""
    left = at * sum(weights)
    for value, weight in zip(values, weights, strict=True):
        left -= weight
        if left < 0:
            return value
    return max(zip(weights, values, strict=True), key=lambda pair: pair[0])[1]
