"""The statistics of the verdict, against brute force and hand-computed cases."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import verdict as simulation
from sweep import verdict

Array = NDArray[np.float64]

# Two-sided 95 % and 99 % quantiles as printed in tables of Student's t.
PRINTED = [(0.95, 1, 12.706), (0.95, 2, 4.303), (0.95, 4, 2.776), (0.99, 3, 5.841), (0.95, 30, 2.042)]
PRINTED += [(0.99, 120, 2.617), (0.95, math.inf, 1.960), (0.99, math.inf, 2.576)]


def two_methods(rng: np.random.Generator, *, noise: float = 0.0, count: int = 50) -> tuple[Array, ...]:
    """Runs of LoRA (2 nats gained a token) and of full training (4 gained), the untrained model's nats, and tokens."""
    tokens = rng.integers(2, 30, count).astype(np.float64)
    base = tokens * (10 + rng.normal(0, 1, count))

    def runs(gain: float) -> Array:
        seeds = 1 + noise * rng.normal(0, 1, 3)
        own = base * (1 - gain / 10) + rng.normal(0, 2, count)
        return own * seeds[:, None]

    return runs(2), runs(4), base, tokens


@pytest.mark.parametrize(("level", "freedom", "printed"), PRINTED)
def test_the_t_quantile_is_the_printed_one(level: float, freedom: float, printed: float) -> None:
    assert verdict.t_quantile(level, freedom) == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize("freedom", [1.0, 2.5, 3.7, 400.0])
def test_the_t_quantile_bounds_the_share_of_its_density(freedom: float) -> None:
    """Proves fractional degrees of freedom by a sum over the density itself."""
    end = verdict.t_quantile(0.9, freedom)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    middles = (np.arange(200_000) + 0.5) * end / 200_000
    inside = 2 * constant * float(np.mean((1 + middles**2 / freedom) ** (-(freedom + 1) / 2))) * end
    assert inside == pytest.approx(0.9, abs=1e-6)


@pytest.mark.parametrize(("level", "freedom"), [(0.0, 5), (1.0, 5), (0.95, 0.5), (0.95, math.nan)])
def test_a_quantile_that_does_not_exist_is_refused(level: float, freedom: float) -> None:
    with pytest.raises(ValueError, match="no t quantile"):
        verdict.t_quantile(level, freedom)


def test_a_loss_is_weighted_by_completion_tokens() -> None:
    """Proves by hand: 3 + 12 nats over 1 + 9 tokens is 1.5, whatever the mean over examples is."""
    found = verdict.mean(np.array([[3.0, 12.0, 0.0]] * 3), np.array([1.0, 9.0, 0.0]))
    assert found.value == pytest.approx(1.5)
    assert found.seeds_error == 0


def test_both_parts_of_a_difference_by_hand() -> None:
    """Proves the standard errors: paired by example within weights of one, and each method's own seeds."""
    one = np.array([[1.0, 2.0, 4.0], [2.0, 3.0, 5.0], [3.0, 4.0, 6.0]])
    other = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 4.0]])
    found = verdict.difference(one, other, np.ones(3))
    gaps = [2 - 1, 3 - 1, 5 - 2]
    assert found.value == pytest.approx(statistics.mean(gaps))
    assert found.examples_error == pytest.approx(statistics.stdev(gaps) / math.sqrt(3))
    seeds = [statistics.variance([7 / 3, 10 / 3, 13 / 3]) / 3, statistics.variance([1, 1, 2]) / 3]
    assert found.seeds_error == pytest.approx(math.sqrt(sum(seeds)))
    parts = [found.examples_error**2, *seeds]
    assert found.freedom == pytest.approx(sum(parts) ** 2 / sum(part**2 / 2 for part in parts))
    half = verdict.t_quantile(0.95, found.freedom or 0) * math.sqrt(sum(parts))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_the_errors_are_those_that_repetition_shows() -> None:
    """Proves that the share's standard errors are what it scatters by over many studies, examples and seeds anew."""
    rng = np.random.default_rng(4)
    shares = [verdict.share(*two_methods(rng, noise=0.01)) for _ in range(1500)]
    scatter = statistics.stdev(share.estimate.value for share in shares)
    told = statistics.fmean(share.estimate.examples_error**2 + share.estimate.seeds_error**2 for share in shares)
    assert scatter == pytest.approx(math.sqrt(told), rel=0.06)
    assert statistics.fmean(share.estimate.value for share in shares) == pytest.approx(0.5, abs=0.01)
    covered = [share.estimate.low <= 0.5 <= share.estimate.high for share in shares]
    assert 0.935 < statistics.fmean(covered) < 0.975


def test_the_examples_part_is_a_bootstrap_over_examples() -> None:
    rng = np.random.default_rng(5)
    lora, full, base, tokens = two_methods(rng, count=200)
    found = verdict.share(lora, full, base, tokens).estimate
    a, b = base - lora.mean(axis=0), base - full.mean(axis=0)
    drawn = rng.integers(0, 200, (4000, 200))
    ratios = a[drawn].sum(axis=1) / b[drawn].sum(axis=1)
    assert found.examples_error == pytest.approx(float(ratios.std()), rel=0.06)


def test_fiellers_interval_is_every_ratio_that_is_not_refuted() -> None:
    """Proves the closed form by trying ratios one by one, seeds and examples in the variance."""
    lora, full, base, tokens = two_methods(np.random.default_rng(6), noise=0.05)
    found = verdict.share(lora, full, base, tokens).estimate
    assert found.low is not None and found.high is not None and found.freedom is not None
    t = verdict.t_quantile(0.95, found.freedom)
    a, b = base - lora.mean(axis=0), base - full.mean(axis=0)
    seeds = [float(runs.sum(axis=1).var(ddof=1)) / 3 for runs in (lora, full)]

    def kept(ratio: float) -> bool:
        examples = len(a) * float((a - ratio * b).var(ddof=1))
        return (a.sum() - ratio * b.sum()) ** 2 <= t**2 * (examples + seeds[0] + ratio**2 * seeds[1])

    for end, outward in ((found.low, -1e-6), (found.high, 1e-6)):
        assert kept(end - outward) and not kept(end + outward)
    assert found.high - found.value > found.value - found.low  # a ratio's interval leans to where the gain is less


def test_a_share_of_nothing_is_not_claimed() -> None:
    """Proves that there is no share where full training gained nothing, or so little that examples may have made it."""
    rng = np.random.default_rng(7)
    lora, full, base, tokens = two_methods(rng)
    level = base + rng.normal(0, 1, (3, 50))
    assert not verdict.share(lora, level, base, tokens).gained
    worse = verdict.share(lora, base + 0 * full + 5.0, base, tokens)
    assert not worse.gained and worse.estimate.low is None
    exactly = verdict.share(lora, np.array([base] * 3), base, tokens)
    assert not exactly.gained and exactly.estimate.low is None


def test_a_metric_has_the_share_of_a_loss_with_its_sign_turned() -> None:
    lora, full, base, tokens = two_methods(np.random.default_rng(8), noise=0.01)
    loss = verdict.share(lora, full, base, tokens)
    metric = verdict.share(-lora, -full, -base, tokens, higher_is_better=True)
    assert metric == loss and loss.gained
    assert not verdict.share(-lora, -full, -base, tokens).gained  # as a loss it would have risen


@pytest.mark.parametrize(("lora_seeds", "full_seeds"), [(1, 3), (2, 3), (3, 2), (1, 1)])
def test_under_three_seeds_no_interval_is_claimed(lora_seeds: int, full_seeds: int) -> None:
    lora, full, base, tokens = two_methods(np.random.default_rng(9), noise=0.01)
    share = verdict.share(lora[:lora_seeds], full[:full_seeds], base, tokens)
    gap = verdict.difference(lora[:lora_seeds], full[:full_seeds], tokens)
    assert share.gained and 0.3 < share.estimate.value < 0.7
    for found in (share.estimate, gap):
        assert found.low is None and found.high is None and not found.clear
    assert (share.estimate.seeds_error is None) == (min(lora_seeds, full_seeds) == 1)


def test_degrees_of_freedom_add_up_where_variances_are_alike() -> None:
    """Proves Welch's and Satterthwaite's case: two variances of equal size and freedom count as one with both."""
    assert verdict.satterthwaite([(0.5, 7.0), (0.5, 7.0)]) == pytest.approx(14)
    assert verdict.satterthwaite([(1.0, 2.0), (1e-12, 900.0)]) == pytest.approx(2)
    assert verdict.satterthwaite([(0.0, 2.0)]) == math.inf


def _drawn(values: list[float], count: int) -> Iterator[float]:
    return (min(chosen) for chosen in itertools.combinations(values, count))


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_the_expected_best_is_the_mean_over_all_draws(count: int) -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.6]
    assert verdict.best_of(values, count) == pytest.approx(statistics.fmean(_drawn(values, count)))
    turned = verdict.best_of([-v for v in values], count, higher_is_better=True)
    assert turned == pytest.approx(-verdict.best_of(values, count))


def test_the_expected_best_of_thousands_is_a_number() -> None:
    """Proves that binomials beyond a float's range do no harm, and that impossible draws are refused."""
    assert verdict.best_of(list(range(3000)), 1500) == pytest.approx((3001) / 1501 - 1)
    for count in (0, 4):
        with pytest.raises(ValueError, match="cannot draw"):
            verdict.best_of([1.0, 2.0, 3.0], count)


def test_two_ranks_are_a_paired_t_test_over_seeds() -> None:
    """Proves by hand, with examples that differ by nothing: the differences by seed are 1, 2 and 3."""
    seeds = np.array([[5.0], [1.0], [9.0]])
    scores = {4: (seeds + np.array([[1], [2], [3]])) * np.ones(30), 16: seeds * np.ones(30)}
    found = verdict.against_best(scores, np.ones(30))
    gap = found[4]
    assert found[16] is None and gap is not None
    assert gap.value == pytest.approx(2) and gap.seeds_error == pytest.approx(1 / math.sqrt(3))
    half = verdict.t_quantile(0.95, 2) / math.sqrt(3)
    assert (gap.low, gap.high) == pytest.approx((2 - half, 2 + half))
    assert not gap.clear
    higher = verdict.against_best(scores, np.ones(30), higher_is_better=True)
    assert higher[4] is None and higher[16] is not None


def test_ranks_over_two_seeds_are_not_told_apart() -> None:
    rng = np.random.default_rng(1)
    scores = {rank: rank + rng.normal(0, 0.01, (2, 30)) for rank in (4, 16, 64)}
    gaps = [gap for gap in verdict.against_best(scores, np.ones(30)).values() if gap is not None]
    assert len(gaps) == 2 and all(gap.low is None for gap in gaps)
    single = verdict.against_best({rank: runs[:1] for rank, runs in scores.items()}, np.ones(30))
    assert [gap.seeds_error for gap in single.values() if gap is not None] == [None, None]


def test_equal_ranks_are_rarely_told_apart_and_unequal_ones_are() -> None:
    """Proves the level over all comparisons, though the best is found on the same rows."""
    equal = simulation.simulate_ranks(simulation.RANKS[1], 300, 1)
    worse = simulation.simulate_ranks(simulation.RANKS[-1], 100, 1)
    assert equal["false"] < 0.09 and worse["right"] > 0.95


@pytest.mark.parametrize("race", simulation.RACES)
def test_simulated_studies_are_covered(race: str) -> None:
    """Proves on 250 studies from search to verdict that intervals cover the truth where the naive rules mislead."""
    found = simulation.simulate(simulation.SCENARIOS[0], 250, 2, simulation.RACES[race])
    assert found["difference_covered"] > 0.91 and found["share_covered"] > 0.91
    assert found["claim_false"] < 0.06 < found["naive_percent_false"]
