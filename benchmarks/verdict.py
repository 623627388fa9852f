"""How far the verdict can be trusted: simulated studies whose truth is known, beside the naive best-of-N.

    python -m benchmarks.verdict [--studies 500] [--seed 1] [--race "all seeds"|racing] [--json]

A study draws N LoRA and n full configurations, trains each once, takes the leading ones of each method by their loss on
a finite set of validation rows, confirms them under other seeds, chooses each method's best by its mean validation loss
over the confirmations, and judges on test rows with sweep/verdict.py, as `sweep compare` does. The truth is the loss
that the chosen configurations have on average over all examples and all seeds.

Two naive rules compare the single best runs of the search instead, on the validation rows that chose them: one claims a
difference where it is over 1 %, the other where the paired interval over examples excludes zero.

A claim is false if what the rule itself chose differs by less than 0.1 % in truth, or the other way round. What is
drawn is as measured on 352 curves of a 135M model: seeds differ by 0.2 % in the median and by up to 1.5 %, 9 % of all
configurations are within 1 % of the best and 37 % within 5 %. `flat` scenarios put the best 9 % level, so that methods
of equal floors end with configurations that are equal in truth. Losses of examples spread as those of a log-loss do.

The exit code is 1 if an interval covers in under 92 % of the studies of a scenario that claim one, where those are at
least 200: with 500 and 95 % in truth that happens once in a thousand.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sweep import verdict

Array = NDArray[np.float64]
Key = tuple[str, int]  # a method and the number of one of its configurations
Found = dict[Key, list[float]]  # validation losses under the seeds 0, 1, ...
Confirm = Callable[[Key, int], float]  # trains a configuration under a seed: its validation loss
Race = Callable[[Mapping[str, Sequence[int]], Confirm, int], Found]  # leading configurations, the best of each first

METHODS = ("lora", "full")

EQUAL = 0.001  # a true difference under this share of the loss is none: half of what two seeds differ by
NAIVE = 0.01  # a difference between two single runs that people take for one
LEAST_COVERAGE = 0.92
FEWEST = 200  # studies that a coverage is judged by


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What is true, and what a study can afford. Losses in nats a completion token."""

    name: str
    lora: float = 0.904  # the loss of the method's best configuration
    full: float = 0.904
    base: float = 1.508
    flat: bool = False
    lora_tried: int = 40
    full_tried: int = 12
    candidates: int = 3  # of each method that are confirmed
    seeds: int = 3
    validation_rows: int = 300
    test_rows: int = 300
    seed_noise: float = 0.0021  # of the median configuration, a share of its loss
    noise_spread: float = 0.8  # sd of its logarithm between configurations


SCENARIOS = [
    Scenario("no difference", flat=True),
    Scenario("no difference, 100 against 4", flat=True, lora_tried=100, full_tried=4),
    Scenario("no difference, 5 seeds", flat=True, seeds=5),
    Scenario("no difference, 10 candidates", flat=True, candidates=10),
    Scenario("no difference, noise x 3", flat=True, seed_noise=0.0063),
    Scenario("no difference, 2,000 rows", flat=True, validation_rows=2000, test_rows=2000),
    Scenario("no difference, not flat"),
    Scenario("full 1 % better", full=0.904 * 0.99, flat=True),
    Scenario("full 1 % better, 5 seeds", full=0.904 * 0.99, flat=True, seeds=5),
    Scenario("LoRA reaches 90 %", lora=1.508 - 0.9 * (1.508 - 0.904), flat=True),
    Scenario("gain of 5 %", lora=1.435, full=1.433, flat=True),
    Scenario("gain of 3 %", lora=1.466, full=1.463, flat=True),
    Scenario("gain of 1 %", lora=1.495, full=1.49, flat=True),
    Scenario("no gain", lora=1.508, full=1.508, flat=True),
]


class World:
    """One simulated study: its configurations' true losses, and the examples' scores of any run of them."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self.scenario = scenario
        self.rng = rng
        tried = {"lora": scenario.lora_tried, "full": scenario.full_tried}
        floors = {"lora": scenario.lora, "full": scenario.full}
        self.true = {method: floors[method] * (1 + self._excess(count)) for method, count in tried.items()}
        self.noise = {
            method: scenario.seed_noise * np.exp(scenario.noise_spread * rng.standard_normal(count))
            for method, count in tried.items()
        }
        self.validation, self.test = (self._examples(n) for n in (scenario.validation_rows, scenario.test_rows))
        self._own: dict[tuple[str, int, int], Array] = {}

    def _excess(self, count: int) -> Array:
        """How far configurations are above the best: 9 % of them up to 1 %, 37 % up to 5 %."""
        power = math.log(5) / math.log(0.37 / 0.09)
        found = 0.01 * (self.rng.random(count) / 0.09) ** power
        return np.maximum(found - 0.01, 0.0) if self.scenario.flat else found

    def _examples(self, count: int) -> dict[str, Array]:
        """Tokens, the untrained model's nats, and what is common to all trained models and to those of a method."""
        rng = self.rng
        tokens = np.maximum(np.rint(np.exp(rng.normal(math.log(60), 0.6, count))), 1.0)
        return {
            "tokens": tokens,
            "base": tokens * self.scenario.base * _around_one(rng, 0.35, count),
            "all": _around_one(rng, 0.15, count),
            "lora": _around_one(rng, 0.03, count),
            "full": _around_one(rng, 0.03, count),
        }

    def run(self, method: str, configuration: int) -> tuple[Array, Array]:
        """Trains a configuration under a new seed: nats of each validation and of each test example."""
        level = self.true[method][configuration] * (1 + self.noise[method][configuration] * self.rng.standard_normal())
        return self._scores(method, configuration, level, 0), self._scores(method, configuration, level, 1)

    def _scores(self, method: str, configuration: int, level: float, split: int) -> Array:
        rows = (self.validation, self.test)[split]
        key, count = (method, configuration, split), len(rows["tokens"])
        if key not in self._own:  # of the configuration, whatever its seed
            self._own[key] = _around_one(self.rng, 0.02, count)
        own = self._own[key] * _around_one(self.rng, 0.02, count)
        return rows["base"] * rows["all"] * rows[method] * own * (level / self.scenario.base)


def _around_one(rng: np.random.Generator, spread: float, count: int) -> Array:
    return np.exp(rng.normal(-(spread**2) / 2, spread, count))


def all_seeds(candidates: Mapping[str, Sequence[int]], confirm: Confirm, seeds: int) -> Found:
    """The plainest race: every candidate runs under every seed."""
    keys = [(method, candidate) for method, mine in candidates.items() for candidate in mine]
    return {key: [confirm(key, seed) for seed in range(seeds)] for key in keys}


def racing(candidates: Mapping[str, Sequence[int]], confirm: Confirm, seeds: int) -> Found:
    """Of each method all run under the first seed, the better two thirds under the second, then the better half."""
    found: Found = {(method, candidate): [] for method, mine in candidates.items() for candidate in mine}
    for method, mine in candidates.items():
        for seed in range(seeds):
            keep = max(math.ceil(len(mine) * (1.0, 2 / 3, 0.5)[min(seed, 2)]), 1)
            alive = [(method, c) for c in mine if len(found[method, c]) == seed]
            for key in sorted(alive, key=lambda k: sum(found[k]))[:keep]:
                found[key].append(confirm(key, seed))
    return found


RACES: dict[str, Race] = {"all seeds": all_seeds, "racing": racing}


def study(scenario: Scenario, rng: np.random.Generator, race: Race) -> dict[str, Any]:
    """One study from search to verdict, and what the naive rules say of its search."""
    world = World(scenario, rng)
    tokens = world.validation["tokens"]
    leading, searched, naive = {}, {}, {}
    for method in METHODS:
        runs = np.array([world.run(method, c)[0] for c in range(len(world.true[method]))])
        order = np.argsort(runs.sum(axis=1))
        naive[method] = int(order[0])
        searched[method] = runs[order[0]]
        leading[method] = [int(c) for c in order[: scenario.candidates]]
    tested: dict[Key, list[Array]] = {}

    def confirm(key: Key, _: int) -> float:
        validation, test = world.run(*key)
        tested.setdefault(key, []).append(test)
        return float(validation.sum() / tokens.sum())

    found = race(leading, confirm, scenario.seeds)
    chosen = {method: _best(method, found) for method in METHODS}
    tests = {method: np.array(tested[method, chosen[method]]) for method in METHODS}
    return _judge(scenario, world, chosen, tests, naive, searched)


def _best(method: str, found: Found) -> int:
    """As sweep/comparison.py chooses: by the mean over common seeds, of those that were confirmed over enough."""
    mine = {key: values for key, values in found.items() if key[0] == method}
    enough = min(max(map(len, mine.values())), verdict.MIN_SEEDS)
    kept = {key: values for key, values in mine.items() if len(values) >= enough}
    common = min(map(len, kept.values()))
    return min(kept, key=lambda key: sum(kept[key][:common]))[1]


def _judge(
    scenario: Scenario,
    world: World,
    chosen: dict[str, int],
    tests: dict[str, Array],
    naive: dict[str, int],
    searched: dict[str, Array],
) -> dict[str, Any]:
    true = {method: float(world.true[method][chosen[method]]) for method in chosen}
    weights, base = world.test["tokens"], world.test["base"]
    gap = verdict.difference(tests["lora"], tests["full"], weights)
    share = verdict.share(tests["lora"], tests["full"], base, weights)
    assert gap.low is not None and gap.high is not None
    gained = scenario.base - true["full"]
    reached = (scenario.base - true["lora"]) / gained if gained > 0 else math.nan
    claimed = share.gained and share.estimate.low is not None and share.estimate.high is not None
    naive_true = {method: float(world.true[method][naive[method]]) for method in naive}
    tokens = world.validation["tokens"]
    between = (searched["lora"] - searched["full"]).sum() / searched["full"].sum()
    gaps = searched["lora"] - searched["full"]
    residuals = gaps - gaps.sum() / tokens.sum() * tokens
    error = math.sqrt(len(gaps) * residuals.var(ddof=1))
    paired = abs(gaps.sum()) > verdict.t_quantile(verdict.LEVEL, len(gaps) - 1) * error
    return {
        "difference_covered": gap.low <= true["lora"] - true["full"] <= gap.high,
        "width": (gap.high - gap.low) / true["full"],
        "share_exists": gained > 0,
        "share_claimed": claimed,
        "share_covered": claimed and share.estimate.low <= reached <= share.estimate.high,
        "share_width": share.estimate.high - share.estimate.low if claimed else math.nan,
        "equal": abs(true["lora"] / true["full"] - 1) < EQUAL,
        "naive_equal": abs(naive_true["lora"] / naive_true["full"] - 1) < EQUAL,
        "claim": _outcome(gap.value, gap.clear, true),
        "naive_interval": _outcome(float(gaps.sum()), paired, naive_true),
        "naive_percent": _outcome(float(between), abs(between) > NAIVE, naive_true),
        "bias": (gap.value - (true["lora"] - true["full"])) / true["full"],
    }


def _outcome(found: float, claims: bool, true: dict[str, float]) -> str:
    """`none` where nothing is claimed, else whether the claim is `right` or `false`."""
    apart = true["lora"] / true["full"] - 1
    return "none" if not claims else "right" if abs(apart) >= EQUAL and (found > 0) == (apart > 0) else "false"


def simulate(scenario: Scenario, studies: int, seed: int, race: Race = all_seeds) -> dict[str, Any]:
    """Many studies of one scenario; shares of studies, and medians."""
    rng = np.random.default_rng([seed, *scenario.name.encode()])
    rows = [study(scenario, rng, race) for _ in range(studies)]

    def part(test: Callable[[dict[str, Any]], bool], among: Sequence[dict[str, Any]] = rows) -> float:
        return sum(map(test, among)) / len(among) if among else math.nan

    claimed = [row for row in rows if row["share_claimed"]]
    true = [row for row in claimed if row["share_exists"]]
    return {
        "scenario": scenario.name,
        "difference_covered": part(lambda r: r["difference_covered"]),
        "difference_width": float(np.median([r["width"] for r in rows])),
        "bias": float(np.mean([r["bias"] for r in rows])),
        "share_claimed": len(claimed) / len(rows),
        "share_covered": part(lambda r: r["share_covered"], true),
        "share_width": float(np.median([r["share_width"] for r in claimed])) if claimed else math.nan,
        "equal": part(lambda r: r["equal"]),
        "naive_equal": part(lambda r: r["naive_equal"]),
        **{
            f"{rule}_{outcome}": part(lambda r, rule=rule, outcome=outcome: r[rule] == outcome)
            for rule in ("claim", "naive_interval", "naive_percent")
            for outcome in ("false", "right")
        },
    }


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Ranks that run under the same seeds: how much worse each is in truth than the first, a share of the loss."""

    name: str
    worse: tuple[float, ...]
    seeds: int = 3
    noise_spread: float = 0.0


RANKS = [
    Ranks("2 equal ranks", (0.0, 0.0)),
    Ranks("5 equal ranks", (0.0,) * 5),
    Ranks("5 equal ranks, uneven noise", (0.0,) * 5, noise_spread=0.8),
    Ranks("5 equal ranks, 5 seeds", (0.0,) * 5, seeds=5),
    Ranks("2 ranks, one 2 % worse", (0.0, 0.02)),
    Ranks("5 ranks, one 2 % worse", (0.0, 0.0, 0.0, 0.0, 0.02)),
]


def simulate_ranks(case: Ranks, studies: int, seed: int, rows: int = 300) -> dict[str, Any]:
    """How often a rank that is as good as the best is told apart from it, and how often a worse one is."""
    rng = np.random.default_rng([seed, *case.name.encode()])
    false = right = 0
    for _ in range(studies):
        scenario = Scenario(case.name, test_rows=rows, lora_tried=len(case.worse), noise_spread=case.noise_spread)
        world = World(scenario, rng)
        world.true["lora"] = scenario.lora * (1 + np.array(case.worse))
        scores = {r: np.array([world.run("lora", r)[1] for _ in range(case.seeds)]) for r in range(len(case.worse))}
        found = verdict.against_best(scores, world.test["tokens"])
        apart = {rank for rank, gap in found.items() if gap is not None and gap.clear}
        false += any(case.worse[rank] == 0 for rank in apart)
        right += any(case.worse[rank] > 0 for rank in apart)
    return {"scenario": case.name, "false": false / studies, "right": right / studies}


def main() -> int:
    """Simulates every scenario and prints one line of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--race", choices=list(RACES), default="all seeds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    race = RACES[options.race]
    found = [simulate(scenario, options.studies, options.seed, race) for scenario in SCENARIOS]
    ranks = [simulate_ranks(case, options.studies, options.seed) for case in RANKS]
    if options.json:
        print(json.dumps({**vars(options), "scenarios": found, "ranks": ranks}, indent=2))
    else:
        print("percent of studies; claims of a difference: false / right")
        print(f"{'':<30}{'difference':>16}{'share':>24}{'bias':>7}{'equal':>7}   verdict  naive paired  naive 1 %")
        for row in found:
            print(_line(row))
        print("ranks told apart from the best: false (any of those as good) / right")
        for row in ranks:
            print(f"{row['scenario']:<30}{100 * row['false']:5.1f} /{100 * row['right']:5.1f}")
    return 1 if any(_falls_short(row, options.studies) for row in found) else 0


def _falls_short(row: dict[str, Any], studies: int) -> bool:
    judged = [(row["difference_covered"], studies), (row["share_covered"], round(row["share_claimed"] * studies))]
    return any(covered < LEAST_COVERAGE and count >= FEWEST for covered, count in judged)


def _line(row: dict[str, Any]) -> str:
    percent = {key: 100 * value for key, value in row.items() if key != "scenario"}
    pairs = [
        f"{percent[f'{rule}_false']:5.1f} /{percent[f'{rule}_right']:5.1f}"
        for rule in ("claim", "naive_interval", "naive_percent")
    ]
    gap = f"{percent['difference_covered']:.1f} ({percent['difference_width']:.2f} %)"
    share = f"{percent['share_covered']:.1f} ({percent['share_width']:.1f} of {percent['share_claimed']:.0f})"
    return f"{row['scenario']:<30}{gap:>16}{share:>24}{percent['bias']:7.2f}{percent['equal']:7.1f} " + " ".join(pairs)


if __name__ == "__main__":
    sys.exit(main())
