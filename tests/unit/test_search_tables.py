"""Tables of curves, the searches that run on them in simulated time, and what is made of their results."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import race, replay, search, synthetic, tables
from benchmarks.replay import Replayed, Seen
from benchmarks.simulated import LOAD_SECONDS, MICROS_PER_HOUR
from benchmarks.tables import Pool, Row, Run, Table
from sweep import priors
from sweep.spec import SearchSpec

DOLLARS_A_SECOND = MICROS_PER_HOUR / 3600 / 1e6


@pytest.fixture(scope="module")
def small() -> Table:
    """Twelve made-up LoRA configurations."""
    return synthetic.make("synthetic-forgiving", seed=3, lora=12, full=2).lasting(600.0)


class OneByOne:
    """A search that takes whatever row is nearest to one point, and trains it to its end; it keeps what it was told."""

    def __init__(self, at: list[int]) -> None:
        self.at = at
        self.told: list[tuple[int, int, float]] = []

    def begin(self, search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> dict[str, Any]:
        self.units = units
        return {"at": self.at}

    def ask(self, trial: int) -> dict[str, Any]:
        config = {"rank": 8, "alpha": 16.0, "targets": "mlp", "batch_size": 8, "learning_rate": 1e-3}
        return {"config": config, "until": self.units}

    def took(self, trial: int, config: dict[str, Any]) -> None:
        pass

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        self.told.append((trial, unit, loss))
        return True


def test_a_table_survives_its_file(tmp_path: Path, small: Table) -> None:
    """Proves that what is read is what was written, to the precision of a recorded loss, divergence included."""
    tables.write(tmp_path / "made.parquet", small)
    found = tables.read(tmp_path / "made.parquet")
    assert (found.name, found.facts, found.synthetic) == (small.name, small.facts, True)
    assert [replace(row, runs={}) for row in found.rows] == [replace(row, runs={}) for row in small.rows]
    for ours, theirs in zip(small.rows, found.rows, strict=True):
        assert ours.runs.keys() == theirs.runs.keys()
        for seed, run in ours.runs.items():
            assert run.diverged == theirs.runs[seed].diverged
            np.testing.assert_array_equal(run.tokens, theirs.runs[seed].tokens)
            np.testing.assert_allclose(run.losses, theirs.runs[seed].losses, rtol=1e-6)


def test_a_file_that_is_no_table_is_refused_in_a_line(tmp_path: Path) -> None:
    """Proves that a damaged file and an empty folder are named, without a traceback."""
    (tmp_path / "no.parquet").write_text("curves")
    with pytest.raises(tables.TableError, match=r"no\.parquet: is no table"):
        tables.read(tmp_path / "no.parquet")
    with pytest.raises(tables.TableError, match="has no tables"):
        tables.find([], tmp_path / "nowhere")


def test_a_pool_gives_the_nearest_row_once(small: Table) -> None:
    """Proves that a row's own configuration gets that row, the same wish then another one, and the last leaves none."""
    pool = Pool(small.of("lora"))
    rows = small.of("lora").rows
    assert pool.take(rows[4].config).number == rows[4].number
    taken = [pool.take(rows[4].config).number for _ in range(len(rows) - 1)]
    assert sorted([*taken, rows[4].number]) == [row.number for row in rows]
    with pytest.raises(LookupError):
        pool.take(rows[4].config)


def test_a_pool_keeps_the_learning_rate_rather_than_the_rank(small: Table) -> None:
    """Proves the weight: a row of another rank, targets and batch size is nearer than one of ten times the rate."""
    one = small.rows[0]
    config = {"rank": 8, "alpha": 16.0, "targets": "mlp", "batch_size": 8, "learning_rate": 1e-3}
    ends = [{**config, "learning_rate": rate, "rank": rank} for rate, rank in ((1e-5, 2), (1e-2, 64))]
    other = {**config, "rank": 32, "targets": "attention", "batch_size": 16}
    rows = [replace(one, number=n, config=c) for n, c in enumerate([*ends, {**config, "learning_rate": 1e-4}, other])]
    assert Pool(replace(small, rows=rows)).take(config).number == 3


@pytest.mark.parametrize("seed", range(3))
def test_made_up_tables_behave_as_measured(seed: int) -> None:
    """Proves what synthetic tables are made for: shares near the best, seed noise, misleading middles."""
    forgiving = synthetic.describe(synthetic.make("synthetic-forgiving", seed))
    spread = synthetic.describe(synthetic.make("synthetic-spread", seed))
    near = "within 1 %, 5 % of the best"
    assert 0.04 <= forgiving[near][0] <= 0.15 and 0.3 <= forgiving[near][1] <= 0.5
    assert spread[near][1] <= 0.03
    assert 0.001 <= forgiving["seed difference, median"] <= 0.004
    early, _, middle, _, _, late = forgiving["the same within 10 % of the best"]
    assert middle < early < late and middle < 0.8
    assert all(correlation >= 0.65 for correlation in spread["rank correlation at 5 ... 80 %"])
    assert 1 <= forgiving["diverged"] <= 20 and 1 <= spread["diverged"] <= 20


def test_a_race_charges_what_was_trained(small: Table) -> None:
    """Proves, with one slot, that an evaluation's price is loading, the tokens and all evaluations up to then."""
    table = replace(
        small, rows=[row for row in small.of("lora").rows if not any(r.diverged for r in row.runs.values())]
    )
    course = OneByOne([1, 20])
    done = race.race(table, course, "", None, 0, 3.5, slots=1)
    expected, seconds = [], LOAD_SECONDS
    pool = Pool(table)
    for _ in range(3):
        row = pool.take(course.ask(0)["config"])
        for units in (1, 19):
            seconds += units / 20 * table.run_tokens * row.seconds_per_token + row.evaluate_seconds
            expected.append(seconds * DOLLARS_A_SECOND)
    assert [seen.dollars for seen in done.seen[:6]] == pytest.approx(expected)
    assert done.spent <= 3.5 * table.run_seconds() * DOLLARS_A_SECOND * (1 + 1e-9)
    assert len(done.seen) <= 7


def test_slots_share_the_money_and_not_the_news(small: Table) -> None:
    """Proves that four slots get as many whole runs from a cap as one does, but for those under way at its end."""
    alone = race.race(small, OneByOne([20]), "", None, 0, 6.0, slots=1)
    together = race.race(small, OneByOne([20]), "", None, 0, 6.0, slots=4)
    assert together.spent == pytest.approx(alone.spent)
    assert len(alone.seen) - 3 <= len(together.seen) <= len(alone.seen)


def test_a_diverged_run_is_charged_and_worth_nothing(small: Table) -> None:
    """Proves that a run that diverges after an evaluation is charged up to the next one, and told as untrained."""
    row = small.of("lora").rows[0]
    gone = Run(np.arange(1, 8), np.full(6, 1.2), True)  # its sixth evaluation was at a tenth, the next at 15 %
    table = replace(small, rows=[Row(0, row.config, {0: gone}, row.seconds_per_token, row.evaluate_seconds, None)])
    course = OneByOne([1, 4, 20])
    done = race.race(table, course, "", None, 0, 50.0, slots=1)
    assert course.told == [(0, 1, 1.2), (0, 4, table.base_loss), (0, 20, table.base_loss)]
    trained = 0.15 * table.run_tokens * row.seconds_per_token + row.evaluate_seconds
    assert done.spent == pytest.approx((LOAD_SECONDS + trained) * DOLLARS_A_SECOND)


def test_one_rung_finishes_the_best_of_the_first_unit(small: Table) -> None:
    """Proves the baseline: all rows are looked at for one unit, then the best of them trains on, without repeating."""
    table = small.of("lora")
    done = race.race(small, race.OneRung(8.0, len(table.rows)), "", None, 0, 8.0)
    first = [seen for seen in done.seen if seen.share < 1]
    ends = [seen.row for seen in done.seen if seen.share == 1]
    assert len(first) == len(table.rows)
    losses = {seen.row: seen.loss for seen in first}
    assert ends and set(ends) <= set(sorted(losses, key=lambda row: losses[row])[: len(ends) + 4])


@pytest.mark.parametrize("name", ["random", "tpe+halving"])
def test_a_peer_plays_in_a_process_of_its_own(small: Table, name: str) -> None:
    """Proves that a library is driven over a pipe, that a seed decides all it does, and that it keeps to the cap."""
    with race.peers({"optuna": sys.executable}) as peers:
        first, again, other = (race.race(small, peers["optuna"], name, None, seed, 6.0) for seed in (0, 0, 1))
    assert first == again and first.seen != other.seen
    assert first.seen and first.spent <= 6.0 * small.of("lora").run_seconds() * DOLLARS_A_SECOND * (1 + 1e-9)


def test_a_first_guess_is_taken_first(small: Table) -> None:
    """Proves that a prior reaches the peer: the row nearest to the first guess is the first that it trains."""
    table = small.of("lora")
    prior = tables.prior_of(tables.space_of(table))
    with race.peers({"optuna": sys.executable}) as peers:
        done = race.race(table, peers["optuna"], "tpe", prior, 0, 2.0, slots=1)
    assert done.seen[0].row == Pool(table).take(prior.guesses[0]).number


def test_a_peer_that_dies_is_named(small: Table, capfd: pytest.CaptureFixture[str]) -> None:
    """Proves that an unknown search ends in one line that says which library failed, after its own words."""
    with (
        race.peers({"optuna": sys.executable}) as peers,
        pytest.raises(race.PeerError, match="optuna ended with exit code 1"),
    ):
        race.race(small, peers["optuna"], "sorcery", None, 0, 2.0)
    assert "KeyError: 'sorcery'" in capfd.readouterr().err


def test_a_replay_is_a_whole_study(small: Table) -> None:
    """Proves that the real loop runs on a table: within its cap, books that agree, the same again, recorded losses."""
    done, again = (replay.replay(small, 1, 3.0) for _ in range(2))
    assert done == again
    assert 0 < done.spent <= 3.0 * small.of("lora").run_seconds() * DOLLARS_A_SECOND
    rows = {row.number: row for row in small.rows}
    ends = [seen for seen in done.seen if seen.share == 1]
    assert ends, "nothing was trained to its end"
    for seen in ends:
        run = rows[seen.row].runs[tables.choose_seed(rows[seen.row], 1)]
        assert seen.loss == pytest.approx(run.losses[-1])
    assert [seen.dollars for seen in done.seen] == sorted(seen.dollars for seen in done.seen)
    assert len({seen.row for seen in done.seen}) == len({seen.row for seen in done.seen if seen.share < 0.06}) > 2


@pytest.mark.parametrize(("runs", "seeds"), [(3, (8,)), (4, (1, 5)), (6, (2,)), (9, (7,))])
def test_a_pack_much_wider_than_the_money_brings_somebody_to_an_end(runs: int, seeds: tuple[int, ...]) -> None:
    """Proves that a winner's end stays paid while sixteen trials share the machine and the cap is a few whole runs.

    On these seeds of a recorded task none came to its end, or none did when what is kept back was tried in other ways.
    """
    (table,) = tables.find(["define"])
    for seed in seeds:
        done = replay.replay(table.lasting(600.0), seed, runs, 16)
        assert any(seen.share == 1 for seen in done.seen), f"seed {seed}"
        assert done.spent > 0.6 * runs * 0.6


def test_parts_can_be_switched_off(small: Table) -> None:
    """Proves that the ablation changes what it says: without rungs whole runs alone, without promotion
    others, and that chance is not the model."""
    whole = replay.replay(small, 1, 3.0, **search.OURS["ours-no-rungs"])
    assert {seen.share for seen in whole.seen} == {1.0}
    stopped = replay.replay(small, 1, 3.0, **search.OURS["ours-no-promotion"])
    assert stopped.seen != replay.replay(small, 1, 3.0).seen
    wide = synthetic.make("synthetic-forgiving", seed=3, lora=24, full=0).lasting(600.0)
    options = {"rungs": [0.05]}  # the model of curves is asked from the fifth loss on
    chance = replay.replay(wide, 1, 4.0, **search.OURS["ours-random-sampler"], **options)
    assert chance.trials > 8 and chance.seen != replay.replay(wide, 1, 4.0, **options).seen


def test_a_replay_can_be_given_priors(small: Table) -> None:
    """Proves that a table's study has no priors unless they are asked for, and then begins with a known-good one."""
    led = replay.replay(small, 1, 2.0, priors="default")
    known = priors.select(SearchSpec(), {}, int(small.facts["examples"]))
    assert known is not None
    first = {name.removeprefix("lora_"): value for name, value in known.first[0].items()}
    assert led.seen[0].row == Pool(small.of("lora")).take(first).number
    assert led.seen != replay.replay(small, 1, 2.0).seen


def test_a_sampler_sees_the_rows_that_it_got(small: Table) -> None:
    """Proves that ours is told the parameters of the row, not those that it had suggested."""
    shown: list[dict[str, Any]] = []

    class Watched(replay.TableMemory):
        def close(self) -> None:
            shown.extend(trial.params for trial in self._study.get_trials(deepcopy=False))
            super().close()

    replay.replay(small, 0, 2.0, memory=Watched)
    known = [row.config["learning_rate"] for row in small.of("lora").rows]
    assert shown and all(params["lora_learning_rate"] in known for params in shown)


def test_a_search_is_judged_by_what_it_finished(small: Table) -> None:
    """Proves the two incumbents: the best finished run is the answer, an early look is one only where all count."""
    table = small.of("lora")
    finals = table.finals()
    (best,) = table.best(0.02)
    worst = max(finals, key=lambda number: finals[number])
    unit = table.run_seconds() * DOLLARS_A_SECOND
    seen = [Seen(unit, best, 0.05, 1.3), Seen(2 * unit, worst, 1.0, 1.2), Seen(4 * unit, best, 1.0, 1.1)]
    found = search.judge(table, Replayed(seen, 4 * unit, 2))
    assert found["any"]["reached"] == pytest.approx(1.0) and found["finished"]["reached"] == pytest.approx(4.0)
    assert found["finished"]["trace"][0] == pytest.approx([2.0, finals[worst] / finals[best] - 1], abs=1e-5)
    assert found["finished"]["regret"] == 0.0


def test_a_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a second call adds nothing, and that a report of made-up tables says so."""
    out = tmp_path / "search.jsonl"
    command = ["run", "--synthetic", "--table", "synthetic-spread", "--search", "one-rung", "--prior", "none", "good"]
    assert search.main([*command, "--seeds", "2", "--out", str(out)]) == 0
    once = out.read_text()
    assert search.main([*command, "--seeds", "2", "--out", str(out)]) == 0
    assert out.read_text() == once and len(once.splitlines()) == 4
    assert all(json.loads(line)["synthetic"] for line in once.splitlines())
    assert search.main(["report", str(out)]) == 0
    assert "synthetic-spread (made up: no result about a task), prior: good" in capsys.readouterr().out
