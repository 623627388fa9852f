"""Predicted memory by hand, what follows for a spec, what measured peaks correct, and what is not tried again."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy import Connection

from sweep import feasibility, fit, launch, records, space, standing, tables
from sweep.errors import SpecError, UsageError
from sweep.records import Study, TrialRow
from sweep.spec import Spec
from sweep.store import Store
from sweep.study import Memory
from trainers.memory import (
    GIB,
    Correction,
    Peak,
    Setup,
    Shape,
    correct,
    full_tokens,
    head_rows,
    layer_token,
    needs_at_least,
    peak,
    room,
    slot_bytes,
    stream_rank,
)
from trainers.messages import TrialConfig

# As trainers/shapes.py reads them off SmolLM2-135M and Qwen2.5-7B.
SMOLLM2 = Shape(
    parameters=134_515_008,
    embedding=49_152 * 576,
    tied=True,
    layers=30,
    hidden=576,
    vocabulary=49_152,
    largest_layer=3_540_096,
    linears={"attention": [[576, 576, 60], [576, 192, 60]], "mlp": [[576, 1536, 60], [1536, 576, 30]]},
    group_inputs=30 * (3 * 576 + 1536),
    norm_inputs=30 * 2 * 576,
    norm_rows=60,
    attention=30 * (576 + 2 * 192),
    heads=30 * 9,
    gates=30 * 2 * 1536,
    outside=2564,
    outside_trained=3724,
)
QWEN = Shape(
    parameters=7_615_616_512,
    embedding=152_064 * 3584,
    tied=False,
    layers=28,
    hidden=3584,
    vocabulary=152_064,
    largest_layer=233_057_792,
    linears={"attention": [[3584, 3584, 56], [3584, 512, 56]], "mlp": [[3584, 18944, 56], [18944, 3584, 28]]},
    group_inputs=28 * (3 * 3584 + 18944),
    norm_inputs=28 * 2 * 3584,
    norm_rows=56,
    attention=28 * (3584 + 2 * 512),
    heads=28 * 28,
    gates=28 * 2 * 18944,
    outside=14_852,
    outside_trained=22_028,
)


def lora(**changes: Any) -> Setup:
    """A LoRA setup."""
    return Setup(**{"method": "lora", "tokens": 8192, **changes})


def full(**changes: Any) -> Setup:
    """A full-parameter setup."""
    return Setup(**{"method": "full", "tokens": 8192, **changes})


def spec(**changes: Any) -> Spec:
    """A spec on a GPU."""
    values = {
        "study": "s",
        "model": "m",
        "data": {"train": "rows.jsonl"},
        "machine": {"gpu": "H100-80GB"},
        "budget": {"cap": "$1"},
        "search": {"method": ["lora", "full"], "rank": [16, 64], "batch_size": [8]},
    }
    return Spec.model_validate(values | changes)


def facts(shape: Shape, memory: float, longest: int = 600, **changes: Any) -> dict[str, Any]:
    """What was seen of a model, data and a machine with a GPU of so many GiB."""
    splits = {"train": {"rows": 1000, "tokens": 300_000, "longest": longest}}
    seen = {"device": "NVIDIA H100 80GB HBM3", "gpu_memory_bytes": round(memory * GIB), "gpus": 1}
    return {**seen, "shape": dataclasses.asdict(shape), "data": {"splits": splits}, **changes}


# --- the formulas -----------------------------------------------------------------------------------------------------


def test_lora_by_hand() -> None:
    """Proves every part of a pack of 135M parameters: 4 slots of rank 40 on the MLP, 8,192 tokens."""
    parts = peak(SMOLLM2, lora(targets="mlp", rank=40, slots=4)).parts
    assert parts["weights"] == 2 * 134_515_008
    # Stored with 48 rows, 18 bytes a parameter; gate and up (576 + 1536) and down (1536 + 576) in 30 layers.
    assert parts["adapters"] == 4 * 18 * 48 * 30 * 3 * (576 + 1536)
    # A layer: its input, two normed ones and the sum between; q, k, v and attention's output; gate, up and their
    # product; projections of seven linears at the next power of two, 64; the statistics of 9 heads and two norms.
    layer = 2 * (4 * 576 + 2 * 576 + 2 * 192 + 3 * 1536) + 2 * 64 * 7 + 4 * (9 + 2)
    assert layer_token(SMOLLM2, 40) == 30 * layer
    assert parts["activations"] == 8192 * (30 * layer + 2564 + 8 * 576)
    assert head_rows(49_152) == 4096 and parts["logits"] == 3 * 2 * 4096 * 49_152
    assert parts["passing"] == 2 * 8192 * (2 * 576 + 3 * 1536)
    assert sum(parts.values()) == peak(SMOLLM2, lora(targets="mlp", rank=40, slots=4)).total


def test_a_rounded_base_by_hand() -> None:
    """Proves what 8-bit floats add: both roundings of every linear of the layers, and the gradients of gate and up."""
    whole, rounded = (peak(shape, lora()).parts for shape in (SMOLLM2, dataclasses.replace(SMOLLM2, weight_bytes=4.0)))
    linears = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    changed = {"weights": whole["weights"] + 2 * linears, "passing": whole["passing"] + 8192 * 2 * 1536}
    assert rounded == whole | changed


def test_full_by_hand() -> None:
    """Proves the states of full training: 18 bytes a parameter, 12.03 with 8-bit moments, and half on two GPUs; and
    that the peak of a large model is its optimizer's step, of a small one its loss."""
    count = 7_615_616_512
    step = peak(QWEN, full(checkpointing=True, tokens=1024)).parts
    assert set(step) == {"weights", "masters", "moments", "gradients", "passing"}
    assert sum(step.values()) - step["passing"] == 18 * count
    eight = peak(QWEN, full(checkpointing=True, tokens=1024, optimizer="adamw-8bit")).parts
    assert eight["moments"] == pytest.approx(2.03125 * count, abs=1)
    two = peak(QWEN, full(checkpointing=True, processes=2)).parts
    assert two["masters"] == 2 * count and two["moments"] == 4 * count and "weights" not in two
    assert two["gathered"] == 4 * 233_057_792 + 2 * 2 * 152_064 * 3584 + 4 * 233_057_792
    loss = peak(SMOLLM2, full()).parts
    assert loss["gradients"] == 4 * 134_515_008  # fixed, for graphs
    assert "gradients" not in peak(SMOLLM2, full(checkpointing=True)).parts
    assert loss["logits"] == 3 * 2 * 4096 * 49_152 + 4 * 49_152 * 576
    whole, again = peak(SMOLLM2, full()).parts["activations"], peak(SMOLLM2, full(checkpointing=True))
    kept = 8192 * (30 * 2 * 576 + 3724 + 4 * 576)
    assert again.parts["activations"] == kept < whole / 8


def test_ordinary_figures() -> None:
    """Proves the figures that people quote: 7B in half precision is 14 GiB, in training 128 GiB; 16 adapters of rank 16
    on it are few of them."""
    assert peak(QWEN, lora()).parts["weights"] / GIB == pytest.approx(14.2, abs=0.05)
    assert peak(QWEN, full(checkpointing=True)).total / GIB == pytest.approx(128.7, abs=0.1)
    assert 16 * slot_bytes(QWEN, "all-linear", 16) / GIB == pytest.approx(10.8, abs=0.1)


@pytest.mark.parametrize("shape", [SMOLLM2, QWEN])
def test_more_never_needs_less(shape: Shape) -> None:
    """Proves that a peak grows with tokens, rank, slots, targets and states, and shrinks with GPUs."""
    for tokens, rank, slots in itertools.product((2048, 8192), (8, 40), (1, 8)):
        here = peak(shape, lora(tokens=tokens, rank=rank, slots=slots)).total
        for more in ({"tokens": 2 * tokens}, {"rank": 4 * rank}, {"slots": slots + 1}):
            assert peak(shape, lora(**{"tokens": tokens, "rank": rank, "slots": slots} | more)).total > here
        assert peak(shape, lora(tokens=tokens, rank=rank, slots=slots, targets="mlp")).total < here
    for setup in (full(), full(tokens=1024), full(checkpointing=True)):
        here = peak(shape, setup).total
        assert peak(shape, dataclasses.replace(setup, optimizer="adamw-8bit")).total < here
        assert peak(shape, dataclasses.replace(setup, checkpointing=True)).total <= here
        assert peak(shape, dataclasses.replace(setup, accumulates=True)).total >= here
        assert peak(shape, dataclasses.replace(setup, processes=2)).total < here


def test_margins_and_lengths() -> None:
    """Proves the margin (2 GiB, or 8 % where that is more), the ranks at work and how many tokens run at once."""
    assert room(16 * GIB) == 14 * GIB
    assert room(80 * GIB) == 80 * GIB - math.ceil(0.08 * 80 * GIB)
    assert [stream_rank(rank) for rank in (1, 16, 17, 40, 64, 65)] == [16, 16, 32, 64, 64, 128]
    assert full_tokens([4, 8], 300) == (2400, False)
    assert full_tokens([4, 8], 2000) == (8192, True)
    assert full_tokens([1], 9000) == (9000, False)
    assert full_tokens([5], 4000, processes=2, most=16384) == (12000, False)


# --- a spec on a GPU --------------------------------------------------------------------------------------------------


def test_classes_and_remedies_of_7b_on_80_gib() -> None:
    """Proves the issue's case: LoRA of 7B fits beside itself many times, full training needs two GPUs, and everything
    that is cheaper is shown with what it needs."""
    card = fit.listed_card("h100-80gb")
    assert card is not None and card.memory == 80 * GIB
    found = fit.rows(spec(), QWEN, card, 1024, {})
    assert [row.words for row in found][-2:] == ["full adamw", "full adamw checkpointed"]
    assert len(found) == 3 * 2 + 2
    assert all(row.fits and (row.slots or 0) >= 8 for row in found[:-2])
    for row in found[-2:]:
        assert not row.fits and row.remedy is not None and row.remedy.fits
        peaks = [remedy.peak for remedy in row.remedies]
        assert peaks == sorted(peaks, reverse=True) and [r.fits for r in row.remedies].count(True) == 1
    assert [r.words for r in found[-2].remedies] == [
        "full.checkpointing: true",
        "full.optimizer: adamw-8bit",
        "full: {checkpointing: true, optimizer: adamw-8bit}",
        "full.processes: 2",
    ]
    for row in found:
        slots = row.slots or 1
        assert peak(QWEN, dataclasses.replace(row.setup, slots=slots)).total <= card.room or not row.fits
        if row.slots is not None and row.slots < 64:
            assert peak(QWEN, dataclasses.replace(row.setup, slots=row.slots + 1)).total > card.room


@pytest.mark.parametrize(
    ("memory", "checkpointing"), [(40.0, False), (6.0, True)], ids=["fits without", "does not fit without"]
)
def test_auto_checkpoints_where_it_must(memory: float, checkpointing: bool) -> None:
    """Proves that `full.checkpointing: auto` keeps activations where they fit; and that it is said what is needed."""
    wanted = spec(search={"method": ["full"], "batch_size": [16]})
    settled = fit.settle(wanted, facts(SMOLLM2, memory), {})
    assert settled["checkpointing"] is checkpointing
    assert ("checkpointed" in settled["memory"]) is checkpointing


def test_several_gpus_take_long_parts_where_they_fit() -> None:
    """Proves that shorter parts are taken before activations are computed twice, and what one GPU takes."""
    several = spec(search={"method": ["full"], "batch_size": [128]}, full={"processes": 4})
    settled = [fit.settle(several, facts(QWEN, memory) | {"gpus": 4}, {}) for memory in (143.0, 79.6, 48.0)]
    assert [found["full_tokens"] for found in settled] == [16384, 8192, 16384]
    assert [found["full_gathered"] for found in settled] == [True, False, False]
    assert [found["checkpointing"] for found in settled] == [False, False, True]
    alone = spec(search={"method": ["full"], "batch_size": [64]})
    assert fit.settle(alone, facts(QWEN, 200.0), {})["full_tokens"] == 8192


def test_what_cannot_fit_is_refused_with_a_remedy() -> None:
    """Proves the refusals of a launch: full training, a rank, stated slots and GPUs that are not there."""
    with pytest.raises(SpecError, match=r"search.method: full adamw checkpointed needs 128.7 GiB") as caught:
        fit.settle(spec(), facts(QWEN, 79.6), {})
    assert "full.processes: 2: 61.5 GiB" in caught.value.hint
    with pytest.raises(SpecError, match=r"search\.rank: lora attention r16 needs"):
        fit.settle(spec(search={"rank": [16, 64]}), facts(QWEN, 20.0), {})
    rounded = dataclasses.replace(QWEN, weight_bytes=4.0)
    with pytest.raises(SpecError, match=r"search\.targets: lora attention r16 needs") as caught:
        fit.settle(spec(search={"rank": [16], "precision": "fp8"}), facts(rounded, 30.0), {})
    assert "search.precision: bf16: " in caught.value.hint, caught.value.hint
    machine = {"gpu": "H100-80GB", "slots": 40}
    with pytest.raises(SpecError, match=r"machine.slots: 40 trials of rank 64 on all-linear need") as caught:
        fit.settle(spec(machine=machine, search={"rank": [16, 64]}), facts(QWEN, 79.6), {})
    most = int(caught.value.hint.split()[0])
    machine["slots"] = most
    assert fit.settle(spec(machine=machine, search={"rank": [16, 64]}), facts(QWEN, 79.6), {})["memory"]
    with pytest.raises(SpecError, match=r"full\.processes: 2 GPUs are wanted, this machine has 1"):
        fit.settle(spec(full={"processes": 2}), facts(QWEN, 79.6), {})


def test_a_launch_settles_memory_before_anything_is_stored(tmp_path: Path) -> None:
    """Proves the launch's own step: it refuses, or adds to the facts what the study is stored with."""
    store = Store(f"sqlite:///{tmp_path}/studies.db", create=True)
    small, large = facts(QWEN, 79.6), facts(QWEN, 143.0)
    with pytest.raises(SpecError, match="full adamw checkpointed needs"):
        launch.settle_memory(store, spec(), small)
    launch.settle_memory(store, spec(), large)
    assert "checkpointing" not in small and large["checkpointing"] is False and "GiB" in large["memory"]
    store.dispose()


def test_without_a_gpu_nothing_is_refused() -> None:
    """Proves that a CPU, recorded curves and a model that cannot be predicted are left alone."""
    for seen in (facts(QWEN, 0.0), {"device": "replay"}, facts(QWEN, 8.0) | {"shape": None}):
        assert fit.settle(spec(), seen, {}) == {"checkpointing": False}
        assert fit.settle(spec(full={"checkpointing": True}), seen, {}) == {"checkpointing": True}


def test_the_gpu_that_is_meant() -> None:
    """Proves the order: stated, named and listed, this machine's; and the words where there is none."""
    here = {"gpu_memory_bytes": 7 * GIB, "device": "a card"}
    nowhere = {"gpu_memory_bytes": None, "device": "cpu"}
    unnamed = spec(machine={"price": "$1/hour"})
    assert fit.pick_card(spec(), here, 9 * GIB).memory == 9 * GIB
    assert fit.pick_card(spec(), here, None).memory == 80 * GIB
    assert fit.pick_card(unnamed, here, None) == fit.Card("a card", 7 * GIB, "this machine")
    with pytest.raises(UsageError, match="no listed GPU"):
        fit.pick_card(unnamed, nowhere, None)


# --- what was measured ------------------------------------------------------------------------------------------------


def test_a_correction_is_found_again() -> None:
    """Proves that peaks whose activations are 20 % over what was predicted teach that, more surely the more there are,
    and that one wild peak among them does not count."""
    setups = [lora(tokens=tokens, rank=rank) for tokens in (4096, 8192, 16384) for rank in (8, 64)]
    predicted = [peak(SMOLLM2, setup) for setup in setups]
    measured = [round(p.total + 0.2 * p.moving) for p in predicted]
    once, often = correct(predicted[:1], measured[:1]), correct(predicted, measured)
    assert 1.05 < once.factor < often.factor < 1.2 and often.factor > 1.15
    assert once.measured == 1 and often.measured == 6
    assert often.error is not None and often.error < 0.03 <= 0.2 * predicted[0].moving / measured[0]
    wild = correct(predicted, [*measured[:-1], 3 * measured[-1]])
    assert wild.factor == pytest.approx(often.factor, rel=0.02) and wild.worst is not None and wild.worst > 0.5


def test_a_correction_is_careful() -> None:
    """Proves that nothing measured corrects nothing, that counted parts stay, and that a factor has bounds."""
    one = peak(SMOLLM2, lora())
    assert correct([], []) == Correction() and Correction().apply(one) == one
    assert correct([one], [20 * one.total]).factor == pytest.approx(2**0.5)
    halved = Correction(0.5).apply(one)
    assert halved.parts["weights"] == one.parts["weights"]
    assert halved.total == pytest.approx(one.total - one.moving / 2, abs=2)
    assert correct([Peak({"weights": 5})], [7]) == Correction()


@pytest.fixture
def connection(tmp_path: Path) -> Any:
    """A database to write in."""
    store = Store(f"sqlite:///{tmp_path}/studies.db", create=True)
    with store.write() as opened:
        yield opened
    store.dispose()


def measured_study(connection: Connection, name: str, seen: dict[str, Any], model: str = "m") -> None:
    """A study with one LoRA and one full trial, whose activations took 1.3 times and twice what is predicted."""
    resolved = spec(study=name, model=model).resolved()
    values = {"name": name, "spec": json.dumps(resolved), "facts": json.dumps(seen), "folder": "f"}
    connection.execute(tables.study.insert().values(**values, micros_per_hour=1, created_unix_ms=0))
    full_peak = peak(SMOLLM2, full(tokens=2400))
    sizes = [
        (config(0), peak(SMOLLM2, lora(tokens=16384, rank=16, slots=3)), 1.3, 3.0),
        (config(1), full_peak, 2.0, 1.0),
    ]
    for trial, predicted, factor, width in sizes:
        row = {"study": name, "number": trial.number, "config": json.dumps(dataclasses.asdict(trial)), "state": "live"}
        connection.execute(tables.trial.insert().values(**row))
        counts = dict.fromkeys(
            ("rung", "tokens", "step", "train_tokens", "train_ms", "evaluate_tokens", "evaluate_ms", "checkpoint_ms"), 1
        )
        size = round(predicted.total + (factor - 1) * predicted.moving)
        values = {"study": name, "trial": trial.number, "loss": 1.0, "attempt": "a", "width": width, **counts}
        connection.execute(tables.evaluation.insert().values(**values, peak_bytes=size))


def config(number: int, **changes: Any) -> TrialConfig:
    """An even number's is a LoRA trial, an odd one's full-parameter."""
    own: dict[str, Any] = {"method": "lora", "rank": 16, "alpha": 16.0, "targets": "all-linear"}
    if number % 2:
        own = {"method": "full"}
    values = {"number": number, "learning_rate": 1e-4, "batch_size": 8, "examples": 100, "seed": 0, **own}
    return TrialConfig(**{**values, **changes})


def test_corrections_come_from_earlier_studies(connection: Connection) -> None:
    """Proves that peaks of studies of the same model on the same GPU are learned from, by method; of others not."""
    seen = facts(SMOLLM2, 79.6) | {"stream_tokens": 16384}
    assert fit.learned(connection, "m", seen["device"]) == {}
    measured_study(connection, "one", seen)
    measured_study(connection, "other-model", seen, model="n")
    measured_study(connection, "other-card", seen | {"device": "NVIDIA A100"})
    found = fit.learned(connection, "m", seen["device"])
    assert found == fit.learned(connection, "m", "H100-80GB") and fit.learned(connection, "m", "H200-141GB") == {}
    assert found["lora"].measured == found["full"].measured == 1
    assert found["lora"].factor == pytest.approx(1.3**0.5, rel=1e-3)
    assert found["full"].factor == pytest.approx(2**0.5, rel=1e-3)
    measured_study(connection, "two", {k: v for k, v in seen.items() if k != "stream_tokens"})
    again = fit.learned(connection, "m", seen["device"])
    assert again["lora"].measured == 1 and again["full"].measured == 2, "a stream's unknown length teaches nothing"


# --- out of memory ----------------------------------------------------------------------------------------------------


def test_who_needs_at_least_as_much() -> None:
    """Proves the order of configurations: no part less, the same method."""
    failed = config(0, rank=32, targets="mlp")
    assert needs_at_least(config(2, rank=32, targets="mlp", batch_size=1), failed)
    assert needs_at_least(config(2, rank=17, targets="all-linear"), failed), "both are stored with 32 rows"
    assert not needs_at_least(config(2, rank=16, targets="all-linear"), failed)
    assert not needs_at_least(config(2, rank=64, targets="attention"), failed)
    assert not needs_at_least(config(1), failed)
    assert needs_at_least(config(1), config(3)) and not needs_at_least(config(1, batch_size=4), config(3))


def row(number: int, reason: str, **changes: Any) -> TrialRow:
    """A failed trial."""
    return dataclasses.replace(records.newcomer(config(number, **changes)), state="failed", reason=reason)


def test_what_ran_out_of_memory_is_not_tried_again() -> None:
    """Proves who is refused and why, that refused ones refuse nobody themselves, and when asking ends."""
    ran_out = row(0, "out of memory: step 1: CUDA out of memory", rank=32)
    refused = row(2, "out of memory: not started: it needs at least what trial 0 ran out of", rank=64)
    other = row(4, "error: no such file", rank=8)
    trials = [ran_out, refused, other]
    assert feasibility.view(trials)[2] == {0, 2}
    said = feasibility.refusal(config(6, rank=64), trials)
    assert said is not None and said.endswith("what trial 0 ran out of")
    assert feasibility.refusal(config(6, rank=16), trials) is None
    assert feasibility.refusal(config(6, rank=8), trials) is None
    known = dataclasses.replace(ran_out, loss=3.0)  # it was evaluated before it ran out
    assert not feasibility.exhausted([known, *[dataclasses.replace(refused, number=n) for n in range(1, 24)]])
    assert feasibility.exhausted([ran_out, *[dataclasses.replace(refused, number=n) for n in range(1, 25)]])
    diverged = dataclasses.replace(other, state="pruned", diverged=True, reason="diverged: the loss is nan")
    lost = [dataclasses.replace(one, number=n) for n, one in enumerate([diverged, ran_out, refused] * 8)]
    waiting = dataclasses.replace(other, number=24, state="waiting", reason="")
    assert feasibility.exhausted([*lost, waiting]) and not feasibility.exhausted([*lost[1:], waiting])
    assert not feasibility.exhausted([dataclasses.replace(known, state="completed"), *lost]), "one can be trained"


def test_what_no_money_mends_is_said() -> None:
    """Proves when a raised cap is not advised: all that began was lost, or nobody is left to go on and none to ask."""

    def said(trials: list[TrialRow], allowed: int | None = None) -> str | None:
        study = SimpleNamespace(spec=SimpleNamespace(search=SimpleNamespace(trials=allowed)))
        return standing.beyond_money(cast(Study, study), trials)

    lost = [dataclasses.replace(row(n, "diverged: the loss is nan"), state="pruned", diverged=True) for n in (0, 1)]
    dear = dataclasses.replace(row(2, "not started: its end is forecast at $1"), state="pruned")
    found = said([*lost, dear])
    assert found is not None and found.startswith("all 2 that began diverged or failed (the last one diverged: the los")
    assert "search.learning_rate" in found and "search.batch_size" in str(said([row(0, "out of memory: step 1")]))
    stopped = dataclasses.replace(dear, reason="projected $2 of $1", tokens=100, loss=3.0)
    assert said([*lost, stopped]) is None, "with more money another is asked"
    assert "raise search.trials" in str(said([*lost, stopped], allowed=3))
    parked = dataclasses.replace(stopped, state="paused")
    assert said([*lost, parked], allowed=3) is None and said([]) is None, "it may go on with more"


@pytest.mark.parametrize(("kind", "package"), [("tpe", "optuna"), ("gp", "scipy"), ("cmaes", "cmaes")])
def test_the_sampler_turns_away_from_what_does_not_fit(tmp_path: Path, kind: str, package: str) -> None:
    """Proves that ranks that run out of memory are asked for less and less, though no other has a better loss.

    GP takes a constraint of all trials or of none.
    """
    pytest.importorskip(package)
    search = spec(search={"rank": [8, 64], "alpha": [8], "targets": ["mlp"], "batch_size": [8]}).search
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    late: dict[bool, int] = {}
    for shown in (True, False):
        memory, failed = Memory(store, f"s{shown}", 0, kind), set()
        ranks = []
        for number in range(26):
            infeasible = failed if shown else set()
            _, chosen = memory.ask(number, lambda trial: space.suggest(trial, search), {}, set(), infeasible)
            ranks.append(chosen["lora_rank"])
            if chosen["lora_rank"] == 64:
                failed.add(number)
                memory.tell(number, "failed", None, {})
            else:
                memory.tell(number, "completed", 2.0 + 0.1 * number % 0.7, {})
        late[shown] = ranks[14:].count(64)
        memory.close()
    store.dispose()
    assert late[True] < late[False] / 2, late
