"""Forecasts learn from measurements and know how sure they are."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from budgets import forecast as module
from budgets.forecast import NOTHING, Calibration, Forecast, Work, flops_per_token


def work(owner: str = "", full: float = 0.0) -> Work:
    """Training on a machine that the prior takes for five times as fast as it is."""
    return Work("train", 1e-4, {"full": full}, owner)


def test_a_wrong_prior_is_corrected_by_the_first_measurements() -> None:
    """Proves that the prior's guess of the speed may be off fivefold."""
    forecast = Forecast()
    before = forecast.seconds(work(), 1000)
    assert before.low < 1000 * 5e-4 < before.high, "the prior's interval is wide enough for the truth"
    for number in range(3):
        forecast.observe(work(str(number)), 500, 0.25)
    after = forecast.seconds(work("9"), 1000)
    assert math.isclose(after.mean, 0.5, rel_tol=0.1)
    assert after.high / after.low < 2 < before.high / before.low


def study(
    rng: random.Random, noise: float, own: float, drift: Callable[[int], float], trials: int
) -> list[tuple[Work, float]]:
    """What a sweep measures: four trials at a time, each in four stretches of 20,000 tokens."""
    speed, batch = rng.gauss(0, 1), rng.gauss(0, 0.3)
    works = [
        Work("train", 1e-4, {"log_batch": math.log(rng.choice([0.5, 1]))}, owner=str(number))
        for number in range(trials)
    ]
    speeds = [speed + batch * w.features["log_batch"] + rng.gauss(0, own) for w in works]
    order = [first + n for first in range(0, trials, 4) for _ in range(4) for n in range(4)]
    logs = [speeds[number] + drift(i) + rng.gauss(0, noise) for i, number in enumerate(order)]
    return [(works[number], 2.0 * math.exp(log)) for number, log in zip(order, logs, strict=True)]


@pytest.mark.parametrize(
    ("noise", "own", "drift", "trials"),
    [
        pytest.param(0.08, 0.10, lambda i: 0.0, 12, id="as assumed"),
        pytest.param(0.24, 0.10, lambda i: 0.0, 12, id="three times the noise"),
        pytest.param(0.24, 0.30, lambda i: 0.0, 12, id="three times everything"),
        pytest.param(0.08, 0.10, lambda i: 0.01 * i, 16, id="a machine that slows down by 1 % a measurement"),
        pytest.param(0.08, 0.10, lambda i: 0.4 if i > 40 else 0.0, 40, id="half as slow again from one moment on"),
    ],
)
def test_intervals_cover_what_they_promise(
    noise: float, own: float, drift: Callable[[int], float], trials: int
) -> None:
    """Proves calibration after eight measurements, where the model's assumptions hold and where they do not."""
    rng = random.Random(1)
    inside = total = 0
    for _ in range(1200 // trials // 4):
        forecast, held = Forecast(), []
        measured = study(rng, noise, own, drift, trials)
        for part in (measured[:8], measured[8:]):
            for training, seconds in part:
                forecast.observe(training, 20_000, seconds)
            held.append(forecast.calibration("train"))
        assert held[1].count == len(measured) - 1
        inside, total = inside + held[1].inside - held[0].inside, total + held[1].count - held[0].count
    assert 0.7 < inside / total < 0.9


def test_calibration_is_of_forecasts_made_before_their_measurements() -> None:
    """Proves that `calibration` says what somebody would have seen who asked before each measurement."""
    forecast, inside, errors = Forecast(), 0, []
    for training, seconds in study(random.Random(2), 0.1, 0.1, lambda i: 0.0, 8):
        if forecast.measured("train"):
            said = forecast.seconds(training, 20_000)
            inside += said.low <= seconds <= said.high
            errors.append(abs(said.mean / seconds - 1))
        else:
            assert forecast.calibration("train") is None
        forecast.observe(training, 20_000, seconds)
    assert forecast.calibration("train") == Calibration(31, inside, sorted(errors)[15])
    assert forecast.calibration("load") is None


def width(forecast: Forecast, training: Work) -> float:
    """The upper end of an interval over the lower one."""
    said = forecast.seconds(training, 20_000)
    return said.high / said.low


def test_one_wild_measurement_does_not_spoil_the_intervals() -> None:
    """Proves robustness: after twenty usual measurements, one that took tenfold widens little, and not for long."""
    forecast = Forecast()
    for number in range(20):
        forecast.observe(work(str(number)), 20_000, 2.0 * 1.05 ** (number % 3))
    before = width(forecast, work("new"))
    forecast.observe(work("wild"), 20_000, 20.0)
    assert before < width(forecast, work("new")) < before**2.2
    for number in range(30, 60):
        forecast.observe(work(str(number)), 20_000, 2.0 * 1.05 ** (number % 3))
    assert width(forecast, work("new")) < 1.1 * before


def test_a_steady_machine_is_forecast_more_sharply() -> None:
    """Proves that intervals narrow too: where all is four times as steady as assumed, they end up half as wide."""
    rng, forecast = random.Random(4), Forecast()
    for training, seconds in study(rng, 0.02, 0.025, lambda i: 0.0, 60):
        forecast.observe(training, 20_000, seconds)
    held = forecast.calibration("train")
    assert held is not None and held.inside > 0.8 * held.count
    assert math.log(width(forecast, work("new"))) < 0.5 * 2 * module.Z80 * math.hypot(module.NOISE, module.TRIAL)


def test_few_measurements_change_the_spread_little() -> None:
    """Proves that two exact forecasts are no reason to be sure, and two bad ones none to despair."""
    widths = []
    for factor in (1.0, 1.0, 1.5):
        forecast = Forecast()
        for seconds in (2.0, 2.0 * factor, 2.0):
            forecast.observe(work("0"), 20_000, seconds)
        widths.append(width(forecast, work("0")))
    assert widths[0] == widths[1], "the same measurements give the same forecast"
    assert 1.1 < widths[0] < widths[2] < widths[0] ** 3


def test_a_trial_tells_most_about_itself() -> None:
    """Proves the trial's own term: a slow trial's next stretch is forecast slower than a stranger's."""
    forecast = Forecast()
    for number in range(4):
        forecast.observe(work(str(number)), 1000, 1.0)
    for _ in range(3):
        forecast.observe(work("slow"), 1000, 1.3)
    assert forecast.seconds(work("slow"), 1000).mean > 1.1 * forecast.seconds(work("new"), 1000).mean


def test_sums_say_what_all_measurements_would() -> None:
    """Proves the algebra: one sum a trial gives what conditioning the joint normal on every measurement gives, where
    the machine's speed may be anything."""
    measured = packed_study(random.Random(3), 3.0, 8)
    forecast = Forecast()
    for training, seconds in measured:
        forecast.observe(training, 20_000, seconds)
    asked = [measured[0][0], measured[-1][0], beside(0, 5), Work("train", 1e-4, {"full": 1.0}, "new")]
    everything = [training for training, _ in measured] + asked
    rows = np.array([training.row for training in everything])
    rows[:, list(module.SCALES).index("common")] = module.SURPRISE
    same = np.array([[a.owner == b.owner for b in everything] for a in everything])
    prior = rows @ rows.T + module.TRIAL**2 * same
    n = len(measured)
    noise = np.diag([(module.NOISE + module.BRIEF / math.sqrt(s)) ** 2 for _, s in measured])
    gain = prior[n:, :n] @ np.linalg.inv(prior[:n, :n] + noise)
    ratios = np.array([math.log(s / 20_000 / 1e-4) for _, s in measured])
    means, covariance, _ = forecast._models["train"].joint(asked)
    np.testing.assert_allclose(means, gain @ ratios, rtol=1e-6)
    np.testing.assert_allclose(covariance, prior[n:, n:] - gain @ prior[:n, n:], rtol=1e-6, atol=1e-7)


def test_what_is_common_adds_up_and_what_is_not_cancels_out() -> None:
    """Proves `total`: strangers on an unknown machine are late together, on a known one each by itself, but for what it
    may do next."""
    strangers = [(work(str(n)), 20_000.0) for n in range(100, 116)]
    forecast = Forecast()
    alone, together = (math.log(said.high / said.mean) for said in map(forecast.total, (strangers[:1], strangers)))
    assert math.isclose(together, alone, rel_tol=0.02)
    for number in range(60):
        forecast.observe(work(str(number)), 20_000, 2.0 * math.exp(0.12 * (-1) ** number))
    alone, together, trial = (
        math.log(said.high / said.mean)
        for said in map(forecast.total, (strangers[:1], strangers, [(work("100"), 20_000.0)] * 16))
    )
    assert alone / 4 < together < alone / 1.6, "sixteen independent ones have a quarter of one's relative spread"
    assert together < trial < alone, "sixteen stretches of one trial share what is its own"
    mean = sum(forecast.seconds(*piece).mean for piece in strangers)
    assert math.isclose(forecast.total(strangers).mean, mean, rel_tol=1e-9)
    assert math.isclose(forecast.mean(strangers), mean, rel_tol=1e-9)
    assert forecast.total([]) == forecast.seconds(work(), 0) == NOTHING


# --- packs ----------------------------------------------------------------------------------------------------------


def beside(number: int, width: float, batch: float = 0.0) -> Work:
    """A stretch of a trial's training, `width` trials at once."""
    features = {"log_batch": batch, "beside": 1 - 1 / width, "log_width": math.log(width)}
    return Work("train", 1e-4, features, owner=str(number))


def packed_study(rng: random.Random, fixed: float, trials: int) -> list[tuple[Work, float]]:
    """What a sweep measures whose trials train one to eight at a time.

    `fixed` is what a step costs beside a token's own, over what its tokens cost, where a trial trains alone.
    """
    speed = rng.gauss(0, 1)
    batches, own = [rng.choice([-0.7, 0.0]) for _ in range(trials)], [rng.gauss(0, 0.1) for _ in range(trials)]
    found = []
    for turn in range(4 * trials):
        number, width = turn % trials, rng.choice([rng.randint(1, 8), 8, rng.uniform(1, 8)])
        log = speed + 0.3 * batches[number] + own[number] + math.log(1 + fixed / width) + rng.gauss(0, 0.08)
        found.append((beside(number, width, batches[number]), 2.0 * math.exp(log)))
    return found


@pytest.mark.parametrize("fixed", [0.0, 0.5, 3.0, 30.0])
def test_intervals_cover_packs_of_any_width(fixed: float) -> None:
    """Proves calibration where a trial's stretches were trained beside one to eight others, whatever they share."""
    rng = random.Random(5)
    inside = total = 0
    for _ in range(30):
        forecast, held = Forecast(), []
        measured = packed_study(rng, fixed, 12)
        for part in (measured[:12], measured[12:]):
            for training, seconds in part:
                forecast.observe(training, 20_000, seconds)
            held.append(forecast.calibration("train"))
        inside, total = inside + held[1].inside - held[0].inside, total + held[1].count - held[0].count
    assert 0.7 < inside / total < 0.9


@pytest.mark.parametrize("fixed", [0.0, 0.5, 3.0, 30.0])
def test_a_token_costs_what_the_width_makes_it(fixed: float) -> None:
    """Proves that what a pack saves is learned: every width from 1 to 8 is forecast within the interval, and close."""
    rng, forecast = random.Random(6), Forecast()
    for turn in range(120):
        number, width = turn % 30, turn % 8 + 1
        seconds = 2.0 * (1 + fixed / width) * math.exp(rng.gauss(0, 0.05))
        forecast.observe(beside(number, width), 20_000, seconds)
    for width in range(1, 9):
        said, truth = forecast.seconds(beside(99, width), 20_000), 2.0 * (1 + fixed / width)
        assert said.low < truth < said.high
        assert math.isclose(said.mean, truth, rel_tol=0.06)


def test_a_stretch_that_a_pack_shared_is_one_measurement() -> None:
    """Proves that thirty-two shares of one slow stretch weigh as one trial's, and not as thirty-two that agree."""
    shared, alone = Forecast(), Forecast()
    for number in range(32):
        shared.observe(work(str(number)), 20_000, 8.0, width=32)
    alone.observe(work("0"), 20_000, 8.0)
    for forecast in (shared, alone):
        for number in range(40, 46):
            forecast.observe(work(str(number)), 20_000, 2.0)
    said, expected = (forecast.seconds(work("new"), 20_000).mean for forecast in (shared, alone))
    assert math.isclose(said, expected, rel_tol=0.15)
    assert said < 3.0


def test_a_machine_that_has_warmed_up_is_forecast_as_it_is_now() -> None:
    """Proves the level: what compiled and captured at first is no reason to expect it of every stretch to come, and of
    two engines each has its own."""
    forecast = Forecast()
    for number in range(20):
        forecast.observe(work(str(number)), 20_000, 10.0)
    forecast.observe(work("full", full=1.0), 20_000, 7.0)
    for number in range(20, 32):
        forecast.observe(work(str(number)), 20_000, 2.0)
    assert math.isclose(forecast.seconds(work("new"), 20_000).mean, 2.0, rel_tol=0.15)
    assert math.isclose(forecast.seconds(work("full", full=1.0), 20_000).mean, 7.0, rel_tol=0.25)


def test_a_trial_that_is_slow_in_a_pack_is_slow_alone() -> None:
    """Proves that what is a trial's own is told apart from what its neighbours do."""
    forecast = Forecast()
    for turn in range(40):
        width = turn % 4 + 1
        forecast.observe(beside(turn % 10, width), 20_000, 2.0 * (1 + 3 / width))
    for _ in range(3):
        forecast.observe(beside(50, 4), 20_000, 1.3 * 2.0 * (1 + 3 / 4))
    slow, new = (forecast.seconds(beside(number, 1), 20_000).mean for number in (50, 51))
    assert 1.15 < slow / new < 1.35


def test_training_costs_four_or_six_flops_a_parameter() -> None:
    """Proves the prior: 6N in full, 4N and the adapter's 6A for LoRA."""
    assert flops_per_token(7_000, "full") == 42_000
    assert flops_per_token(7_000, "lora", 100) == 28_600


@pytest.mark.parametrize(("measured", "asked"), [(30, 1), (1, 30)], ids=["wide packs alone", "narrow packs alone"])
@pytest.mark.parametrize("speed", [1 / 2_000, 1 / 3, 3, 2_000])
def test_a_wrong_guess_of_the_speed_is_not_blamed_on_the_packs_width(measured: int, asked: int, speed: float) -> None:
    """Proves that what packs of one width have in common is the machine's, whatever it was taken for: a pack of another
    width is forecast as dear a token, not many times dearer (or cheaper) for the guess that was wrong."""

    def training(width: int, owner: str) -> Work:
        return Work("train", 1e-4, {"beside": 1 - 1 / width, "log_width": math.log(width)}, owner)

    forecast = Forecast()
    for number in range(20):
        forecast.observe(training(measured, str(number)), 100_000, 10 * speed)
    assert math.isclose(forecast.seconds(training(asked, "new"), 100_000).mean, 10 * speed, rel_tol=0.1)
    assert math.isclose(forecast.seconds(training(measured, "new"), 100_000).mean, 10 * speed, rel_tol=0.02)
