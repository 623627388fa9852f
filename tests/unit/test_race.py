"""The race of confirmations as a pure function; then what its outcome is, and what its examinations cost."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recorded
from sqlalchemy import Connection, select

from budgets.money import parse_usd
from sweep import finale, records, summary, tables
from sweep.endgame import Candidate, Run, clearly_behind, confirmation, entered, next_runs, winner
from sweep.projection import examination, untaught
from sweep.spec import Spec, validate
from trainers.messages import Method, TrialConfig

LORA = [Candidate(number, "lora", place) for place, number in enumerate((3, 7, 5), 1)]
FULL = [Candidate(number, "full", place) for place, number in enumerate((8, 2), 1)]
BOTH = [LORA[0], FULL[0], *LORA[1:], FULL[1]]
ALONE: dict[Method, int] = {"lora": 1, "full": 1}
RICH = 1e9


def seconds_of(candidate: Candidate, ordinal: int, width: int) -> float:
    """A LoRA run takes 10 s, half as long in a pack; a full one 100 s."""
    return 100.0 if candidate.method == "full" else 10.0 if width == 1 else 5.0


def raced(
    candidates: list[Candidate],
    measure: Callable[[int, int], float],
    seconds: float = RICH,
    seats: dict[Method, int] | None = None,
    seeds: int = 3,
) -> tuple[dict[Run, float | None], float]:
    """Runs a race to its end, batch by batch; what was measured, and the seconds that are left."""
    runs: dict[Run, float | None] = {}
    method = {c.number: c for c in candidates}
    while chosen := next_runs(candidates, runs, seconds_of, seconds, seats or ALONE, seeds):
        assert not set(chosen) & set(runs)
        runs |= dict.fromkeys(chosen)
        assert not next_runs(candidates, runs, seconds_of, 0.0, seats or ALONE, seeds), "nothing begins without money"
        for run in chosen:
            seconds -= seconds_of(method[run[0]], run[1], len(chosen))
            runs[run] = measure(*run)
    return runs, seconds


def seeds_of(runs: dict[Run, float | None]) -> dict[int, int]:
    """How many seeds each candidate had."""
    return {number: sum(n == number for n, _ in runs) for number, _ in runs}


def test_a_round_is_one_seed_for_everybody() -> None:
    """Proves the order: the best of the search first, one seed each, before anybody gets a second one."""
    runs, _ = raced(BOTH, lambda number, n: 2.0 + 0.01 * random.Random(f"{number}{n}").random())
    order = list(runs)
    assert [run[1] for run in order[:5]] == [1] * 5 and order[:3] == [(3, 1), (8, 1), (7, 1)]
    assert all(count >= 3 for count in seeds_of(runs).values())


def test_who_is_clearly_behind_leaves_and_leaders_that_are_close_get_more() -> None:
    """Proves the race: after two seeds the worse ones leave; leaders get up to twice the seeds, and no more."""
    close = {3: 2.0, 7: 2.0, 5: 2.1}

    def measure(number: int, n: int) -> float:
        sign = 1 if n % 2 else -1  # the two leaders alternate
        return close[number] + 0.03 * n + (0.01 * sign if number == 3 else 0.0)

    runs, _ = raced(LORA, measure)
    assert seeds_of(runs) == {3: 6, 7: 6, 5: 2}
    apart, _ = raced(LORA, lambda number, n: {3: 2.0, 7: 2.02, 5: 2.1}[number] + 0.001 * ((n * number) % 2))
    assert seeds_of(apart)[5] == 2 and max(seeds_of(apart).values()) == 3
    left = winner(LORA, apart, 3)
    assert left is not None and left.number == 3


def test_one_seed_is_no_evidence_unless_it_is_far_off() -> None:
    """Proves the rule of the first round: 4 % stays, 6 % leaves, and a run that failed is behind one that did not."""
    assert not clearly_behind({1: 2.08}, {1: 2.0}) and clearly_behind({1: 2.12}, {1: 2.0})
    assert clearly_behind({1: math.inf}, {1: 2.0}) and not clearly_behind({1: 2.0}, {1: math.inf})
    assert not clearly_behind({1: math.inf}, {1: math.inf})
    assert not clearly_behind({1: 3.0}, {2: 2.0}), "no seed in common"
    assert clearly_behind({1: -0.5}, {1: -0.6}), "a metric, higher is better, is raced by its negative"


def test_differences_are_paired() -> None:
    """Proves that what seeds have in common does not count: a spread of 10 % hides no steady difference of 1 %."""
    better = {1: 2.0, 2: 2.2, 3: 1.9}
    worse = {n: value * 1.01 + 0.0001 * n for n, value in better.items()}
    assert clearly_behind(worse, better) and not clearly_behind(better, worse)
    shuffled = {1: worse[3], 2: worse[1], 3: worse[2]}
    assert not clearly_behind(shuffled, better)


def test_the_test_errs_as_often_as_it_says() -> None:
    """Proves the quantiles: of equal configurations 10 % are found clearly behind, whatever the number of seeds."""
    rng = random.Random(4)
    for count in (2, 3, 6, 11):
        pairs = [[{n: rng.gauss(2, 0.02) for n in range(count)} for _ in range(2)] for _ in range(4000)]
        share = sum(clearly_behind(mine, others) for mine, others in pairs) / 4000
        assert share == pytest.approx(0.1, abs=0.015), count


def test_as_many_enter_as_can_be_paid() -> None:
    """Proves the entry: three seeds each, one of each method at least, the next ones as far as the money goes."""
    for seconds, numbers, least in [
        (1000.0, [3, 8, 7, 5, 2], 3),
        (660.0, [3, 8, 7, 2], 3),
        (659.0, [3, 8, 7, 5], 3),
        (359.0, [3, 8], 3),
        (329.0, [3, 8], 2),
        (219.0, [3], 3),
        (29.0, [3], 2),
        (19.0, [3], 1),
        (9.0, [], 0),
    ]:
        group, count = entered(BOTH, {}, seconds_of, seconds, ALONE, 3)
        assert ([c.number for c in group], count) == (numbers, least), seconds


@pytest.mark.parametrize("seconds", [9.0, 19.0, 35.0, 110.0, 219.0, 359.0, 700.0, 1500.0])
def test_no_more_is_begun_than_can_be_paid(seconds: float) -> None:
    """Proves that the money is never passed, and that what is there is used for what it can confirm."""
    runs, left = raced(BOTH, lambda number, n: 2.0 + 0.01 * random.Random(f"{number}{n}").random(), seconds)
    assert left >= 0 and (runs or seconds < 10)
    if seconds >= 330:
        assert seeds_of(runs)[3] >= 3 and seeds_of(runs)[8] >= 3


def test_packs_are_filled_and_methods_are_not_mixed() -> None:
    """Proves that all seats are used at once, with the next round's runs too, and never by two methods."""
    runs: dict[Run, float | None] = {}
    seats: dict[Method, int] = {"lora": 8, "full": 1}
    first = next_runs(BOTH, runs, seconds_of, RICH, seats, 3)
    assert first == [(3, 1), (7, 1), (5, 1), (3, 2), (7, 2), (5, 2), (3, 3), (7, 3)]
    runs |= dict.fromkeys(first)
    assert next_runs(BOTH, runs, seconds_of, RICH, seats, 3) == []
    runs |= dict.fromkeys(first[:4], 2.0)
    assert next_runs(BOTH, runs, seconds_of, RICH, seats, 3) == [(5, 3)]
    runs |= dict.fromkeys([*first, (5, 3)], 2.0)
    assert next_runs(BOTH, runs, seconds_of, RICH, seats, 3) == [(8, 1)]


def test_what_stands_for_a_rank_has_all_its_seeds() -> None:
    """Proves that ranks are compared under the same seeds although one is clearly behind."""
    stands = [dataclasses.replace(c, representative=True) for c in LORA]
    runs, _ = raced(stands, lambda number, n: {3: 2.0, 7: 2.2, 5: 2.4}[number] + 0.001 * n)
    assert seeds_of(runs) == {3: 3, 7: 3, 5: 3}


def test_a_configuration_that_failed_under_a_seed_is_not_confirmed() -> None:
    """Proves that two good seeds and a diverged one do not win, and that the race goes on without it."""
    losses = {3: 1.8, 7: 2.0, 5: 2.01}  # the others had left after the first seed, and come back
    runs, _ = raced(LORA, lambda number, n: math.inf if (number, n) == (3, 2) else losses[number])
    won = winner(LORA, runs, 3)
    assert won is not None and won.number == 7 and seeds_of(runs)[3] == 2 and seeds_of(runs)[7] == 3
    assert winner(LORA[:1], {(3, 1): 2.0}, 3) is None, "one seed confirms nothing"


def test_late_money_lets_more_in_without_losing_anything() -> None:
    """Proves that a race goes on where it stood when more can be paid: everybody comes to the same seeds."""
    runs, _ = raced(BOTH, lambda number, n: 2.0 + 0.01 * ((number * n) % 3), 359.0)
    assert set(seeds_of(runs)) == {3, 8}
    chosen = next_runs(BOTH, runs, seconds_of, RICH, ALONE, 3)
    assert chosen == [(7, 1)]


def test_seeds_and_numbers_are_common_and_never_the_searchs() -> None:
    """Proves the scheme: one seed for all candidates of a round, numbers that say what is repeated."""
    config = TrialConfig(number=12, method="lora", learning_rate=1e-3, batch_size=4, examples=9, seed=2**32 - 5, rank=8)
    other = dataclasses.replace(config, number=4, learning_rate=1e-4)
    rows = [records.newcomer(one) for one in (config, other)]
    made = [[confirmation(row, n, 2**32 - 5) for n in range(1, 41)] for row in rows]
    assert [c.seed for c in made[0]] == [c.seed for c in made[1]] and len({c.seed for c in made[0]}) == 40
    assert all(0 <= c.seed < 2**32 and c.seed != config.seed for c in made[0])
    second = records.newcomer(made[0][1])
    assert second.run == (12, 2) and second.label == "12·2" and second.number >= tables.CONFIRMATIONS
    assert dataclasses.replace(made[0][1], number=12, seed=config.seed) == config


def test_the_reserve_is_a_quarter_where_something_is_confirmed() -> None:
    """Proves the default, that an explicit amount and an explicit nothing win, and that the stored copy keeps it."""
    values = {"study": "w", "model": "m", "data": {"train": "t"}, "machine": {"price": "$1/hour"}}

    def reserve(budget: dict[str, str], **more: object) -> int:
        spec = validate(values | {"budget": budget} | more, "here")
        assert Spec.model_validate(spec.resolved()) == spec
        return spec.budget.reserve

    assert reserve({"cap": "$200"}) == parse_usd("$50")
    assert reserve({"cap": "$200"}, endgame={"seeds": 0}) == 0
    assert reserve({"cap": "$200", "reserve": "$0"}) == 0
    assert reserve({"cap": "$200", "reserve": "$7"}) == parse_usd("$7")


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """A study that chooses by exact match: three trials at their ends, two of them over three new seeds each."""
    store = recorded.study(tmp_path, objective="exact_match", splits={"test": {"rows": 64, "tokens": 1_300}})
    with store.write() as connection:
        # The one with the lower loss has the lower metric; trial 2 was lucky once.
        for number, (loss, metric) in enumerate([(2.0, 0.50), (2.5, 0.60), (2.6, 0.62)]):
            rate = 1e-3 * (number + 1)
            shape: dict[str, Any] = {"method": "lora", "rank": 8, "alpha": 16.0, "targets": "mlp", "examples": 100}
            config = TrialConfig(number=number, learning_rate=rate, batch_size=4, seed=0, **shape)
            add(connection, config, loss, metric)
            for n in (1, 2, 3) if number else ():
                value = {1: 0.60, 2: 0.55}[number] + 0.01 * n + 0.001 * number * n
                run = confirmation(records.newcomer(config), n, 0)
                add(connection, run, loss, value, source=number)
                scores(connection, run.number, [loss, loss + 0.1 * n], [1, 1], [value, value])
        scores(connection, tables.UNTRAINED, [4.0, 6.0], [1, 1], [0.0, 0.1], majority=0.25)
        yield connection
    store.dispose()


def add(connection: Connection, config: TrialConfig, loss: float, metric: float, **more: Any) -> None:
    """Adds a trial that came to its end."""
    records.add_trial(connection, "words", config, 1, **more)
    end = {"state": "completed", "rung": 4, "loss": loss, "full_loss": loss, "metric": metric, "metric_error": 0.05}
    records.set_trial(connection, "words", config.number, **end, checkpoint=f"ckpt-of-{config.number}")


def scores(
    connection: Connection, trial: int, nll: list[float], tokens: list[int], metric: list[float], **more: Any
) -> None:
    """Stores scores on the test rows."""
    values = {"nll": json.dumps(nll), "tokens": json.dumps(tokens), "metric": json.dumps(metric)} | more
    connection.execute(tables.scores.insert().values(study="words", trial=trial, split="test", **values))


def test_the_users_metric_chooses(connection: Connection) -> None:
    """Proves that the winner is the best by the mean metric over seeds, not the lucky one nor the one of least loss,
    and that means and deviations on the test rows are shown beside the untrained model and the majority."""
    best = summary.best(connection, "words")
    assert best["confirmed"] and best["trial"]["number"] == 1 and best["metric"] == "exact_match"
    test = best["confirmation"]["test"]
    assert test["metric"]["mean"] == pytest.approx(0.622) and test["metric"]["sd"] == pytest.approx(0.011)
    assert (test["metric"]["untrained"], test["metric"]["majority"]) == (pytest.approx(0.05), 0.25)
    assert test["loss"]["mean"] == pytest.approx(2.6) and test["loss"]["untrained"] == 5.0
    assert best["confirmation"]["export"]["label"] == "1·3", "the run of the highest metric"
    ranked = [trial["label"] for trial in summary.trials(connection, "words")]
    assert ranked == ["2", "1", "0", "2·1", "2·2", "2·3", "1·1", "1·2", "1·3"]


def test_without_two_seeds_the_best_run_is_shown_as_not_confirmed(connection: Connection) -> None:
    """Proves what is said where the race came to nothing: the best trial of the search, and that it stands alone."""
    connection.execute(tables.trial.delete().where(tables.trial.c.source.is_not(None)))
    best = summary.best(connection, "words")
    assert not best["confirmed"] and best["confirmation"] is None and best["trial"]["number"] == 2


def test_what_is_confirmed_is_trained_in_bf16(connection: Connection) -> None:
    """Proves that a confirmation and a finale of a trial in 8-bit floats are its configuration, but for that."""
    config = TrialConfig(
        number=2, method="lora", learning_rate=1e-3, batch_size=4, examples=90, seed=0, precision="fp8"
    )
    source = records.newcomer(config)
    confirmed = confirmation(source, 1, 0)
    assert confirmed.precision == "bf16" and confirmed.seed != config.seed
    assert dataclasses.replace(confirmed, number=2, seed=0, precision="fp8") == config
    study = records.study(connection, "words")
    search = study.spec.search.model_copy(update={"precision": "fp8", "epochs": 1.0})
    longer = study.spec.endgame.model_copy(update={"finale_length": 2.0})
    spec = study.spec.model_copy(update={"search": search, "endgame": longer})
    whole = finale.finale_cost(study.spec.model_copy(update={"endgame": longer}), study.facts, untaught(study))
    assert whole and finale.finale_cost(spec, study.facts, untaught(study)) == whole


def test_a_study_from_before_confirmation_confirms_nothing(connection: Connection) -> None:
    """Proves that a stored spec without an endgame keeps its meaning: no seeds, no reserve."""
    stored = json.loads(connection.execute(select(tables.study.c.spec)).scalar_one())
    assert stored.pop("endgame")["seeds"] == 3 and stored["budget"]["reserve"] == "$0.25"
    stored["budget"]["reserve"] = "$0"
    records.set_study(connection, "words", spec=json.dumps(stored))
    spec = records.study(connection, "words").spec
    assert spec.endgame.seeds == 0 and spec.budget.reserve == 0


def test_what_is_measured_beyond_the_loss_is_forecast_and_learned(connection: Connection) -> None:
    """Proves that metric and scores count in a run's forecast and in the tail, and are corrected by measurements."""
    study = records.study(connection, "words")
    projector = untaught(study)
    trial = records.trials(connection, "words")[1]
    run = records.newcomer(confirmation(trial, 1, 0))
    every, confirmed = (projector.examined("lora", confirms=confirms).mean for confirms in (False, True))
    generated = 64 * study.spec.objective.max_new_tokens
    assert every > projector.evaluation("lora", generated).mean, "a generated token takes longer than an evaluated one"
    assert confirmed > every and examination(study).scores > examination(study).metric
    tails = [projector.tail(("lora",), 1, confirms=confirms).high for confirms in (False, True)]
    assert tails[1] > tails[0] > projector.examined("lora", confirms=False).high
    ends = [projector.to_end(dataclasses.replace(row, target=4)).mean for row in (records.newcomer(trial.config), run)]
    assert ends[1] - ends[0] == pytest.approx(confirmed - every, rel=0.05)
    took = {
        "train_ms": 1_000,
        "evaluate_ms": 100,
        "checkpoint_ms": 10,
        "write_ms": 10,
        "warm_ms": 0,
        "warm_tokens": 0,
        "examine_ms": round(3_000 * confirmed),
    }
    stretch = {
        "tokens": 2_000,
        "train_tokens": 2_000,
        "evaluate_tokens": 1_300,
        "width": 1.0,
        "shared_batch": None,
        "full_loss": 2.0,
    }
    for _ in range(3):
        projector.observe_evaluation(run.config, SimpleNamespace(**took, **stretch))
    assert projector.examined("lora", confirms=True).mean == pytest.approx(3 * confirmed, rel=0.1)
