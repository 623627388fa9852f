"""What trials will still take: forecasts put together, and the interval of their sum in the status."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recorded
from sqlalchemy import Connection

from budgets.forecast import Seconds, rounded_share
from budgets.ledger import Balances
from sweep import records, summary, tables, triage
from sweep.projection import Plan, Projector, projector_of
from sweep.records import TrialRow
from sweep.rungs import Results
from trainers.messages import TrialConfig

PLAN = Plan(examples=100, run_tokens=10_000, rungs=(1_000, 2_500), rung_rows=16, rung_tokens=300, validation_tokens=900)


def config(number: int, **values: Any) -> TrialConfig:
    """A LoRA trial's configuration."""
    usual = {"method": "lora", "learning_rate": 1e-3, "batch_size": 4, "examples": 100, "seed": 0}
    return TrialConfig(number=number, **(usual | {"rank": 8, "alpha": 8.0, "targets": "mlp"} | values))


def trial(number: int, **values: Any) -> TrialRow:
    """A trial's row."""
    return dataclasses.replace(records.newcomer(config(number)), **values)


def measured(tokens: int, seconds: float, *, final: bool = False) -> SimpleNamespace:
    """What the worker says of a stretch of 1,000 tokens that ended at `tokens`."""
    row = {"tokens": tokens, "train_tokens": 1_000, "train_ms": round(1000 * seconds), "checkpoint_ms": 100}
    row |= {"examine_ms": 0, "write_ms": 100, "warm_ms": 0, "warm_tokens": 0}
    row |= {"width": 1.0, "shared_batch": None}
    return SimpleNamespace(**row, evaluate_tokens=300, evaluate_ms=500, full_loss=2.0 if final else None)


def taught(**more: Any) -> Projector:
    """Forecasts after two stretches of each of eight trials, at about two milliseconds a token."""
    projector = Projector(PLAN, 10_000_000, "cpu", 2, **more)
    for number in range(8):
        for tokens in (1_000, 2_000):
            projector.observe_evaluation(config(number), measured(tokens, 2.0 * 1.1 ** (number % 3)))
    projector.observe_load(4_000)
    return projector


def spread(seconds: Seconds) -> float:
    """The upper end of an interval over the mean, as a logarithm."""
    return math.log(seconds.high / seconds.mean)


@pytest.mark.parametrize("state", ["live", "waiting", "judging", "paused"])
def test_what_is_ahead_is_the_sum_of_what_is_projected(state: str) -> None:
    """Proves that the interval is one of the very sum that triage decides by, wherever the leader stands."""
    projector = taught()
    lead = {"state": state, "rung": 0, "target": 1 if state in {"live", "waiting"} else 0, "tokens": 1_000, "loss": 2.0}
    leader = trial(1, **lead, slot="w" if state == "live" else None, checkpoint="ckpt-4")
    rows = [trial(0, state="live", slot="w"), leader, trial(2, state="waiting")]
    funds = triage.Funds(Balances(10**12, 0, 0, 10**12, 0, 0, False, {}), 3_600_000, 0, 0, 0)
    funds = triage.with_finish(funds, rows, Results([(1, 0, 2.0)]), projector)
    assert funds.leader == 1
    running = [t for t in rows if t.state in {"live", "waiting"}]
    mean = sum(projector.to_target(t).mean for t in running) + funds.finish_seconds
    assert math.isclose(projector.ahead(running, leader, launch=False).mean, mean, rel_tol=1e-9)
    launched = projector.ahead(running, leader, launch=True)
    assert math.isclose(launched.mean, mean + projector.load().mean, rel_tol=1e-9)
    assert projector.ahead([], None, launch=False) == Seconds(0.0, 0.0, 0.0)


def test_trials_are_late_together_only_as_far_as_the_machine_is() -> None:
    """Proves the combination: before anything was measured the speed is in common, afterwards trials differ apart."""
    running = [trial(number, state="waiting") for number in range(10, 26)]
    unknown, known = Projector(PLAN, 10_000_000, "cpu", 2), taught()
    for projector, low, high in ((unknown, 0.9, 1.01), (known, 0.3, 0.7)):
        one, all_of_them = (spread(projector.ahead(some, None, launch=False)) for some in (running[:1], running))
        assert low < all_of_them / one < high
    assert spread(known.to_target(running[0])) < 0.5 < spread(unknown.to_target(running[0]))


def test_a_run_ends_where_the_first_one_ended() -> None:
    """Proves that the run's length, an average over the data at first, is known once a trial came to its end."""
    projector, row = taught(), trial(9, state="live", slot="w", rung=1, target=2, tokens=2_500)
    before = projector.to_end(row).mean
    projector.observe_evaluation(config(0), measured(8_500, 2.0, final=True))
    assert math.isclose(projector.to_end(row).mean / before, 6_000 / 7_500, rel_tol=0.05)


def test_the_prior_knows_adapters_and_the_model_long_rows() -> None:
    """Proves the FLOPs of an adapter, and that row length is a feature that a study of longer rows differs in."""
    plain, adapted = (Projector(PLAN, 10_000_000, "cpu", 2, per_rank=p) for p in (None, {"mlp": 100_000}))
    larger = config(0, rank=64)
    prior = adapted.train(larger, 1_000).mean / plain.train(larger, 1_000).mean
    assert math.isclose(prior, 1 + 6 * 6_400_000 / 40_000_000)
    longer = Projector(dataclasses.replace(PLAN, run_tokens=400_000), 10_000_000, "cpu", 2)
    rows = [projector._train(config(0), 1.0).features["log_row"] for projector in (plain, longer)]
    assert rows == [math.log(100 / 512), math.log(4_000 / 512)]


def test_what_is_confirmed_takes_longer_than_the_search_in_8_bits_taught() -> None:
    """Proves the prior of precision: a study of fp8 trials alone forecasts those in bf16 as much dearer as is usual of
    models so large, which at 135M parameters is nothing."""
    shares = [rounded_share(parameters) for parameters in (1000, 135_000_000, 1_500_000_000, 8_000_000_000, 10**12)]
    assert [round(share, 2) for share in shares] == [1.0, 1.0, 0.84, 0.73, 0.7]
    projector, share = Projector(PLAN, 3_000_000_000, "cpu", 2), rounded_share(3_000_000_000)
    untaught = [projector.train(config(0, precision=one), 1_000).mean for one in ("fp8", "bf16")]
    assert math.isclose(untaught[0], share * untaught[1])
    for number in range(8):
        projector.observe_evaluation(config(number, precision="fp8"), measured(1_000, 2.0))
    rounded, whole = (projector.train(config(9, precision=one), 1_000) for one in ("fp8", "bf16"))
    assert math.isclose(rounded.mean, 2.0, rel_tol=0.05)
    assert math.isclose(whole.mean, 2.0 / share, rel_tol=0.1) and spread(whole) > spread(rounded)


def test_compilation_is_learned_apart_and_counts_at_the_next_start() -> None:
    """Proves that what workers compile is a kind of its own, and nothing where they do not."""
    projector = taught()
    start = projector.load().mean
    projector.observe_compile(0)
    assert projector.load().mean == start
    projector.observe_compile(30_000)
    assert math.isclose(projector.load().mean, start + 30, rel_tol=0.2)


def test_a_pack_is_projected_at_its_present_width() -> None:
    """Proves that the next decision is forecast at the width as it stands, and the way beyond it alone."""
    projector = Projector(PLAN, 10_000_000, "cpu", 2)
    for number in range(24):
        row = measured(1_000, 1.0 + 3.0 / (number % 4 + 1))
        row.width = float(number % 4 + 1)
        projector.observe_evaluation(config(number), row)
    waits = trial(30, state="live", slot="w")
    alone = projector.train(config(30), 1_000).mean
    assert math.isclose(alone, 4.0, rel_tol=0.1)
    to_target, to_end = projector.to_target(waits).mean, projector.to_end(waits).mean
    projector.width = 4
    saved = to_target - projector.to_target(waits).mean
    assert math.isclose(saved, alone - projector.train(config(30), 1_000, 4).mean, rel_tol=1e-9)
    assert math.isclose(saved, 4.0 - 1.75, rel_tol=0.15)
    assert math.isclose(to_end - projector.to_end(waits).mean, saved, rel_tol=1e-9)
    full = trial(31, config=config(31, method="full", rank=None, alpha=None, targets=None))
    at_four = projector.to_target(full)
    projector.width = 1
    assert at_four == projector.to_target(full), "a full-parameter trial has the machine to itself"


def test_a_gpu_takes_a_while_for_a_step_however_short() -> None:
    """Proves the floor: before anything was measured a small model's step on a GPU is no faster than its layers can be
    launched, so that a pack of short streams saves most of it; long streams and CPUs know nothing of it."""
    gpu = Projector(PLAN, 135_000_000, "NVIDIA H100 80GB HBM3", 16, layers=30)
    step = 16 * PLAN.run_tokens // PLAN.examples
    alone, packed = (gpu.train(config(0, batch_size=16), step, width) for width in (1.0, 32.0))
    assert alone.low < 0.011 < 0.015 < alone.mean < 0.03 < alone.high
    assert 3 < alone.mean / packed.mean < 4, "a step of 1,600 tokens is mostly arithmetic in a pack of 32"
    full = gpu.train(config(1, method="full", rank=None, alpha=None, targets=None, batch_size=16), step)
    assert full.low < 0.015 < 0.075 < full.high, "what was measured with graphs and without them"
    long = dataclasses.replace(PLAN, run_tokens=400_000)
    large = Projector(long, 8_000_000_000, "NVIDIA H100 80GB HBM3", 16, layers=32)
    assert large.train(config(0), step).mean < 1.05 * large.train(config(0), step, 8).mean
    cpu = [Projector(PLAN, 135_000_000, "cpu", 2, layers=layers).train(config(0), step).mean for layers in (0, 30)]
    assert cpu[0] == cpu[1]


def test_a_token_of_a_gpu_costs_by_the_batches_of_the_whole_pack() -> None:
    """Proves that large batches beside a trial make its tokens cheaper, by what was measured and as things stand, and
    that the interval leaves room for others to come, unless all have batches of one size."""

    def seconds(examples: float, tokens: int) -> float:
        return (0.0125 / (100 * examples) + 2.2e-6) * tokens  # 30 layers are launched, and 2.2 us a token

    gpu, same = (Projector(PLAN, 135_000_000, "NVIDIA H100", 16, layers=30, batches=b) for b in ((4, 8, 16), (8,)))
    for number in range(60):
        row = measured(10_000, 0.0)
        row.width, row.shared_batch = 16.0, 16.0 * (4, 8, 16)[number // 5 % 3]
        row.train_tokens, row.train_ms = 100_000, round(1000 * seconds(row.shared_batch, 100_000))
        gpu.observe_evaluation(config(number, batch_size=(4, 8, 16)[number % 3]), row)
    cheapest = math.inf
    for beside in (4.0, 8.0, 16.0):
        gpu.batch = beside
        truth, known = seconds(16 * beside, 10_000), gpu.train(config(99, batch_size=8), 10_000, 16.0, 16 * beside)
        asked = gpu.train(config(99, batch_size=8), 10_000, 16.0)
        assert known.low < truth < known.high and math.isclose(known.mean, truth, rel_tol=0.07)
        assert math.isclose(asked.mean, seconds(8 + 15 * beside, 10_000), rel_tol=0.07)
        assert spread(asked) > (1.15 if beside == 4 else 1) * spread(known)
        assert asked.mean < 0.95 * cheapest
        cheapest = asked.mean
    alone = gpu.train(config(99, batch_size=8), 10_000)
    assert alone == gpu.train(config(99, batch_size=8), 10_000, 1.0, 8.0), "nobody else's batch matters to one alone"
    assert math.isclose(alone.mean, seconds(8, 10_000), rel_tol=0.25)
    packed = same.train(config(0, batch_size=8), 10_000, 16.0)
    assert packed == same.train(config(0, batch_size=8), 10_000, 16.0, 128.0), "all have batches of 8"


def test_a_trial_alone_is_forecast_no_dearer_than_the_pack_that_was_measured() -> None:
    """Proves that narrow packs are not forecast many times too dear where only wide ones were measured, slow at first:
    a step alone takes no longer than one of the whole pack did."""
    gpu = Projector(PLAN, 135_000_000, "NVIDIA H100 80GB HBM3", 16, layers=30)
    for turn, milliseconds in enumerate((400, 140, 90, 60, 50, 45, 45, 45)):
        for number in range(20 * turn, 20 * turn + 20):
            row = measured(1_600, milliseconds / 20 / 1000)
            row.train_tokens, row.train_ms, row.width = 1_600, milliseconds, 20.0 + turn % 2
            gpu.observe_evaluation(config(number, batch_size=16), row)
    alone, packed = (gpu.train(config(999, batch_size=16), 1_600, width).mean for width in (1, 20))
    assert math.isclose(packed, 0.045, rel_tol=0.25)
    assert alone < 20 * packed


def test_the_tail_pays_for_every_slot() -> None:
    """Proves that a slice's tail holds the checkpoints of a whole pack, and one of a full-parameter trial."""
    projector = taught()
    one, four = (projector.tail(("lora",), slots).high for slots in (1, 4))
    assert math.isclose(four - one, 3 * projector.checkpoint("lora").high, rel_tol=1e-9)
    assert projector.tail(("full",), 4) == projector.tail(("full",), 1)


def test_checkpoints_that_are_written_at_once_are_paid_for_by_rounds() -> None:
    """Proves that a pack of 32 whose worker writes four at a time holds a tail of nine late writes, one of them under
    way, where it is they that differ, and of 32 usual ones where a slow disk is what they wait for: not of 32 late
    ones, which kept a fifth of a cap of $0.24 from being used."""
    for spread, times in ((1.0, 32), (8.0, 9)):
        one, four = (Projector(PLAN, 10_000_000, "cpu", 2, writers=writers) for writers in (1, 4))
        for projector in (one, four):
            for number in range(16):
                row = measured(1_000, 2.0)
                row.write_ms = round(1_000 * spread ** (number % 2 - 0.5))
                projector.observe_evaluation(config(number), row)
        last = one.evaluation("lora", PLAN.validation_tokens).high
        writes = [projector.tail(("lora",), 32).high - last for projector in (four, one)]
        each = [writes[1] / 32, one.tail(("lora",), 32).mean / 32]
        assert math.isclose(writes[0], times * (each[0] if times == 9 else each[1]), rel_tol=0.05)
        assert four.tail(("lora",), 1) == one.tail(("lora",), 1)


def test_a_disk_that_hung_for_a_moment_does_not_take_the_money() -> None:
    """Proves that four writes which one hold-up kept waiting count as one: as four they made the tail of a pack of 32
    so dear that a study with half its money left ended, and nobody in it had come to an end."""
    projector = Projector(PLAN, 10_000_000, "NVIDIA H100", 16, layers=30, writers=4)

    def written(number: int, ms: int) -> None:
        row = measured(1_000, 2.0)
        row.width, row.shared_batch, row.write_ms = 32.0, 256.0, ms
        projector.observe_evaluation(config(number), row)

    for number in range(40):
        written(number, 150 + 100 * (number % 4))
    usual = projector.tail(("lora",), 32).high
    for number in range(40, 44):
        written(number, 10_000)
    assert usual < projector.tail(("lora",), 32).high < 6 * usual
    for number in range(44, 60):
        written(number, 150 + 100 * (number % 4))
    assert projector.tail(("lora",), 32).high < 2.5 * usual


def test_a_full_parameter_trials_state_is_paid_for_where_it_is_written() -> None:
    """Proves that a rung costs such a trial its reading alone, its end the model, a seventh of a whole checkpoint, and
    that both learn from what the end took; a LoRA trial's adapter is written at every rung."""
    projector = Projector(PLAN, 1_000_000_000, "NVIDIA H100", 8)
    full = {"method": "full", "rank": None, "alpha": None, "targets": None}
    row = measured(10_000, 2.0, final=True)
    row.checkpoint_ms = row.write_ms = 7_000
    for number in range(8):
        projector.observe_evaluation(config(number, **full), row)
        projector.observe_evaluation(config(number, **full), measured(1_000, 2.0))
    assert projector.kept("full", False).mean == 0
    assert math.isclose(projector.kept("full", True).mean, 7.0, rel_tol=0.05)
    assert math.isclose(projector.checkpoint("full").mean, 49.0, rel_tol=0.05)
    assert projector.kept("lora", False) == projector.kept("lora", True) == projector.checkpoint("lora")
    stands = trial(30, config=config(30, **full), tokens=1_000, rung=0, target=1)
    at_rung = projector.train(stands.config, 1_500).mean + projector.evaluation("full", PLAN.rung_tokens).mean
    assert math.isclose(projector.to_target(stands).mean, at_rung, rel_tol=1e-9)


def test_checkpoints_beside_training_cost_nothing_and_the_tail_is_what_their_writes_take() -> None:
    """Proves that a checkpoint which kept nobody waiting is a measurement too: a pack's tail is forecast from how long
    writes take, and not, for want of anything else, from the upper end of a first guess for every slot."""
    projector = Projector(PLAN, 10_000_000, "cpu", 2)
    unknown = projector.tail(("lora",), 32).high
    for number in range(8):
        row = measured(1_000, 2.0)
        row.checkpoint_ms, row.write_ms = 0, 100
        projector.observe_evaluation(config(number), row)
    assert projector.checkpoint("lora").high < 0.01
    writes = projector.tail(("lora",), 32).high - projector.evaluation("lora", PLAN.validation_tokens).high
    assert 32 * 0.1 < writes < 32 * 0.15 < unknown / 5


# --- in the status --------------------------------------------------------------------------------------------------


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """A study of one running trial in a new database, at a dollar an hour; no worker lives."""
    store = recorded.study(tmp_path, endgame={"seeds": 0})
    with store.write() as connection:
        records.add_trial(connection, "words", config(0), 1)
        yield connection
    store.dispose()


def evaluated(connection: Connection, rung: int, seconds: float) -> None:
    """Adds an evaluation of trial 0 after 1,000 more tokens."""
    values = {"study": "words", "trial": 0, "rung": rung, "step": 9, "loss": 2.0, "attempt": "a", "ordinal": rung + 1}
    connection.execute(tables.evaluation.insert().values(**values, **vars(measured(1_000 * rung, seconds))))


def test_the_status_shows_how_forecasts_held(connection: Connection) -> None:
    """Proves that nothing is said before a forecast was put to the test, and then the count and the error."""
    for rung, seconds in enumerate((2.0, 2.2, 2.0)):
        assert summary.status(connection, "words")["forecasts"] == (
            None if rung < 2 else {"count": 1, "inside": 1, "median_error": pytest.approx(1 - 2.0 / 2.2, abs=0.01)}
        )
        evaluated(connection, rung, seconds)
    assert summary.status(connection, "words")["forecasts"]["count"] == 2


def test_the_status_projects_with_an_interval(connection: Connection) -> None:
    """Proves that the interval holds the projection, counts the worker's start, and closes as measurements come in."""

    def shares() -> tuple[float, float]:
        found = summary.status(connection, "words")
        low, middle, high = (found[name]["micros"] for name in ("projected_low", "projected", "projected_high"))
        assert 0 < low < middle < high
        return low / middle, high / middle

    unknown = shares()
    study = records.study(connection, "words")
    start = projector_of(study, connection).load()
    assert summary.status(connection, "words")["projected"]["micros"] > 1e6 * start.mean / 3600
    for rung in range(3):
        evaluated(connection, rung, 2.0)
    known = shares()
    assert unknown[0] < known[0] and known[1] < unknown[1]


def test_compiling_is_no_speed() -> None:
    """Of 10 s of which 9.5 went into compiling nothing is learned; of 7 s with 6 s of it, in which half of the tokens
    were trained, the rest is the speed."""

    def after(seconds: float, warm_ms: int, tokens: int = 1_000, warm_tokens: int = 0) -> float:
        known, row = Projector(PLAN, 10_000_000, "cpu", 2), measured(1_000, seconds)
        row.warm_ms, row.train_tokens, row.warm_tokens = warm_ms, tokens, warm_tokens
        for _ in range(5):
            known.observe_evaluation(config(1), row)
        return known.seconds_to_target(trial(1))

    nothing, half = after(1.0, 0, tokens=0), after(1.0, 0, tokens=500)
    assert after(10.0, 9_500) == after(7.0, 1_000, warm_tokens=950) == nothing
    assert after(7.0, 6_000, warm_tokens=500) == half != nothing
