"""What neighbours do changes no bit of a trial, on the CPU; a trial moves from one width to another.

The model's MLP has an odd width: a tensor of all trials' activations would end short of a whole vector of the
processor, and torch rounds such a rest in another way.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Trained, apart, curve, equal, in_double, lora_trial, save_model, taken
from transformers import LlamaConfig

from trainers.engine import TrialFailed
from trainers.lora.engine import LoraEngine
from trainers.models import load_base
from trainers.splits import load_split

STEPS = 16
OBSERVED = lora_trial(number=1, rank=5, batch_size=3, examples=90, dropout=0.1, weight_decay=0.1)
NEIGHBOUR = lora_trial(number=2, rank=20, targets="mlp", batch_size=5, examples=200, seed=3)
OTHER = lora_trial(number=3, rank=3, targets="attention", batch_size=1, examples=30, seed=4)
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Make:
    """Makes an engine of some slots over a base of its own."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    folder = save_model(tmp_path_factory.mktemp("odd") / "odd", config)
    train, validation = load_split(data_folder, "train"), load_split(data_folder, "validation")

    def engine(slots: int, double: bool = False) -> LoraEngine:
        base = load_base(str(folder), "cpu")
        if double:
            in_double(base.model)
        return LoraEngine(base, train, validation, 5, 60, slots=slots)

    return engine


def observe(engine: Any, happens: dict[int, Callable[[], None]]) -> Trained:
    """Trains the observed trial, which is there already or comes now; what `happens` comes before its steps."""
    losses: list[float] = []
    if OBSERVED.number not in engine._trials:
        engine.admit(OBSERVED, None, None)
    for step in range(STEPS):
        happens.get(step, lambda: None)()
        losses += curve(engine, OBSERVED.number, 1)
    return taken(engine, OBSERVED.number, losses)


@pytest.fixture(scope="module")
def alone(make: Make) -> Trained:
    """The observed trial in four slots, by itself."""
    return observe(make(4), {})


def test_neighbours_come_and_go(make: Make, alone: Trained) -> None:
    """Neighbours that come mid-way, in slots before and after, and go change no bit of a trial with dropout."""
    engine = make(4)
    engine.admit(NEIGHBOUR, None, None)

    def more() -> None:
        engine.admit(OTHER, None, None)
        engine.admit(lora_trial(number=4, rank=33, batch_size=6), None, None)

    again = {4: more, 8: lambda: engine.drop(2), 12: lambda: engine.admit(NEIGHBOUR, None, None)}
    equal(observe(engine, again), alone)
    assert engine.position(2).step > 0


def test_a_neighbour_pauses_and_comes_back(make: Make, alone: Trained, tmp_path: Path) -> None:
    """A neighbour's checkpoint, drop, and return into another slot change no bit."""
    engine = make(4)
    engine.admit(NEIGHBOUR, None, None)

    def pause() -> None:
        engine.checkpoint(2, tmp_path / "paused")
        engine.drop(2)
        engine.admit(OTHER, None, None)

    def back() -> None:
        assert engine.admit(NEIGHBOUR, tmp_path / "paused", None).step > 0

    equal(observe(engine, {5: pause, 9: back}), alone)


def test_a_neighbour_with_dropout(make: Make, alone: Trained) -> None:
    """A neighbour's dropout changes no bit; a trial without it is the same beside one with it."""
    engine = make(4)
    engine.admit(lora_trial(number=2, rank=20, dropout=0.5, batch_size=5, examples=200), None, None)
    equal(observe(engine, {}), alone)
    plain = lora_trial(number=5, batch_size=2, examples=90)
    found = []
    for beside in ([], [OBSERVED]):
        engine = make(4)
        for config in (*beside, plain):
            engine.admit(config, None, None)
        found.append(taken(engine, 5, curve(engine, 5, STEPS)))
    equal(found[1], found[0])


def test_a_neighbour_turns_nan(make: Make, alone: Trained) -> None:
    """A neighbour whose weights turn NaN fails as `diverged`, its slot is free, and no bit of the trial changes."""
    engine = make(4)
    engine.admit(lora_trial(number=9, rank=20, learning_rate=1e30, batch_size=5), None, None)
    engine.admit(OBSERVED, None, None)
    losses: list[float] = []
    failures = []
    while len(losses) < STEPS:
        try:
            engine.advance(lambda: True)
        except TrialFailed as failure:
            failures.append((failure.trial, failure.code))
            assert not engine._trials[1].slot.weights.isnan().any()
        if engine.position(1).step > len(losses):
            losses.append(engine.train_loss(1))
    assert failures == [(9, "diverged")]
    assert list(engine._trials) == [1]
    equal(taken(engine, 1, losses), alone)


def test_two_failures_at_once_are_told_one_after_the_other(make: Make) -> None:
    """Of two trials that turn NaN in one step each fails by its name; one that is dropped first is not told of."""
    bad = [lora_trial(number=n, learning_rate=1e30, warmup=0.0) for n in (7, 8)]
    for drops in (False, True):
        engine = make(4)
        for config in (*bad, OBSERVED):
            engine.admit(config, None, None)
        with pytest.raises(TrialFailed) as first:
            engine.advance(lambda: False)
        assert first.value.trial == 7
        if drops:
            engine.drop(8)
            engine.admit(lora_trial(number=8), None, None)
            engine.advance(lambda: True)
            assert set(engine._trials) == {1, 8}
        else:
            with pytest.raises(TrialFailed) as second:
                engine.advance(lambda: False)
            assert second.value.trial == 8


@pytest.mark.parametrize("double", [True, False], ids=["float64", "fp32"])
def test_a_trial_moves_to_another_width(make: Make, tmp_path: Path, double: bool) -> None:
    """Paused in a pack of 8, resumed in one of 3 by a fresh engine: the curve, adapter and moments of the whole.

    In float64 within 1e-9, and in both precisions equal to the bit.
    """
    whole = make(1, double)
    whole.admit(OBSERVED, None, None)
    expected = taken(whole, 1, curve(whole, 1, STEPS))
    wide = make(8, double)
    for number in range(2, 9):
        wide.admit(lora_trial(number=number, rank=3 * number, batch_size=1 + number % 6, seed=number), None, None)
    wide.admit(OBSERVED, None, None)
    losses = curve(wide, 1, 7)
    wide.advance(lambda: True)  # half a batch is under way, or one that is not in the checkpoint
    step = wide.position(1).step
    losses += [wide.train_loss(1)] * (step - 7)
    wide.checkpoint(1, tmp_path / "paused")
    narrow = make(3, double)
    narrow.admit(NEIGHBOUR, None, None)
    narrow.admit(OTHER, None, None)
    assert narrow.admit(OBSERVED, tmp_path / "paused", None).step == step
    found = taken(narrow, 1, losses + curve(narrow, 1, STEPS - step))
    for mine, theirs in ((found.losses, expected.losses), (found.adapter, expected.adapter)):
        assert apart(mine, theirs) < 1e-9
    equal(found, expected)
