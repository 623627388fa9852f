"""Forecasts learn from measurements and know how sure they are."""

from __future__ import annotations

import math
import random

from budgets.forecast import Forecast, Work


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


def test_intervals_cover_what_they_promise() -> None:
    """Proves calibration on data drawn from the model's own assumptions: about 80 % fall inside."""
    random.seed(1)
    inside = total = 0
    for _ in range(60):
        forecast, speed = Forecast(), math.exp(random.gauss(0, 1))
        for number in range(12):
            own = speed * math.exp(random.gauss(0, 0.1))
            for _ in range(2):
                seconds = 1e-4 * own * 20_000 * math.exp(random.gauss(0, 0.08))
                predicted = forecast.seconds(work(str(number)), 20_000)
                inside += predicted.low <= seconds <= predicted.high
                total += 1
                forecast.observe(work(str(number)), 20_000, seconds)
    assert 0.72 < inside / total < 0.92


def test_a_trial_tells_most_about_itself() -> None:
    """Proves the trial's own term: a slow trial's next stretch is forecast slower than a stranger's."""
    forecast = Forecast()
    for number in range(4):
        forecast.observe(work(str(number)), 1000, 1.0)
    for _ in range(3):
        forecast.observe(work("slow"), 1000, 1.3)
    assert forecast.seconds(work("slow"), 1000).mean > 1.1 * forecast.seconds(work("new"), 1000).mean
