"""Trials that are trained over a base in 8-bit floats: what is rounded, what is not, and who may ask for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Trained, curve, equal, far, lora_trial, save_model, taken, train_pack
from torch import nn
from transformers import LlamaConfig

from trainers.health import Health
from trainers.lora import float8
from trainers.lora.bank import Group, Layout, Slot
from trainers.lora.engine import LoraEngine
from trainers.lora.linear import PackedGroup, pack
from trainers.lora.packing import Live, turns
from trainers.lora.stream import Span, Stream
from trainers.messages import Precision
from trainers.models import load_base
from trainers.named import ModelError
from trainers.splits import load_split

STEPS = 16
ROUNDED = lora_trial(number=1, rank=5, batch_size=3, examples=90, dropout=0.1, precision="fp8")
WHOLE = replace(ROUNDED, number=2, precision="bf16")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Make:
    """Makes an engine of some slots over a base whose MLP's sizes can be rounded, or can't."""
    folders: dict[int, Path] = {}

    def engine(precision: Precision = "fp8", slots: int = 3, mlp: int = 48) -> LoraEngine:
        if mlp not in folders:
            sizes = {"hidden_size": 32, "intermediate_size": mlp, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True)
            folders[mlp] = save_model(tmp_path_factory.mktemp("model") / "llama", config)
        splits = (load_split(data_folder, name) for name in ("train", "validation"))
        return LoraEngine(load_base(str(folders[mlp]), "cpu"), *splits, 5, 60, slots=slots, precision=precision)

    return engine


def alone(engine: Any, config: Any) -> Trained:
    """The trial by itself."""
    engine.admit(config, None, None)
    return taken(engine, config.number, curve(engine, config.number, STEPS))


def test_rounding_keeps_three_bits_of_each_row() -> None:
    """Values are off by a sixteenth of themselves at most, whatever the row's size; a zero row stays zero."""
    torch.manual_seed(0)
    x = torch.randn(64, 200) * torch.logspace(-20, 20, 64)[:, None]
    x[5] = 0
    found = float8.rounded(x)
    assert torch.equal(found.codes.float().abs().amax(1), torch.full((64,), 448.0).index_fill(0, torch.tensor(5), 0))
    assert ((found.value - x).abs() <= x.abs() / 16 + found.scales / 2**9).all()
    assert torch.equal(float8.rounded(x * 8).codes.view(torch.uint8), found.codes.view(torch.uint8))
    assert (found.value[5] == 0).all()


def test_a_row_changes_no_other() -> None:
    """An infinity or NaN makes all that is computed from its row NaN, and changes no bit of another row's."""
    torch.manual_seed(0)
    x, weights = torch.randn(6, 32), float8.rounded(torch.randn(16, 32))
    expected = float8.product(float8.rounded(x), weights, x.dtype)
    x[1, 3], x[4, 0], x[2] = float("nan"), float("inf"), 1e6
    found = float8.product(float8.rounded(x), weights, x.dtype)
    assert found[1].isnan().all() and found[4].isnan().all() and found[2].isfinite().all()
    assert torch.equal(found[[0, 3, 5]], expected[[0, 3, 5]])


def test_a_group_over_a_rounded_base() -> None:
    """Outputs, the input's gradient and the adapter's are those of the formulas, with W and its inputs rounded."""
    torch.manual_seed(0)
    linears = [nn.Linear(48, size) for size in (48, 16, 32)]
    group = Group(0, "attention", ["q", "k", "v"], linears, [0, 1, 2])
    slot = Slot.fresh(lora_trial(rank=4, precision="fp8"), Layout([group]), torch.float32, torch.device("cpu"))
    slot.put(torch.randn_like(slot.weights) * 0.1)
    packed = PackedGroup(group, "fp8")
    pack(packed)
    empty = torch.empty(0)
    packed.stream = Stream(16, 9, empty, empty, empty, 9, spans=[Span(slot, 0, 9)], rounded=True)
    x = torch.randn(9, 48, requires_grad=True)
    ys = [linear(x) for linear in linears]
    slopes = [torch.randn_like(y) for y in ys]
    torch.autograd.backward(ys, slopes)

    first = slot.first(slot.copy, group)
    given, dx = float8.rounded(x.detach()).value, torch.zeros_like(x)
    for member, (linear, y, slope) in enumerate(zip(linears, ys, slopes, strict=True)):
        second, gradient = slot.second(slot.copy, group, member), slot.second(slot.gradient, group, member)
        assert first is not None and second is not None and gradient is not None
        a, b = first[member, :4], second[:4]
        part = x.detach() @ a.T * slot.scale
        torch.testing.assert_close(y.detach(), given @ float8.rounded(linear.weight).value.T + linear.bias + part @ b)
        torch.testing.assert_close(gradient[:4], part.T @ slope)
        dx += slope @ b.T * slot.scale @ a
    turned = float8.rounded(torch.cat([linear.weight for linear in linears]).T).value
    dx += float8.rounded(torch.cat(slopes, dim=1)).value @ turned.T
    torch.testing.assert_close(x.grad, dx)


def test_trials_learn_over_it_and_are_judged_by_the_whole_base(make: Make) -> None:
    """Losses are near those over the whole base and not equal; the untrained base is judged the same to the bit."""
    rounded, whole = make(), make("bf16")
    assert rounded.evaluate(None, None) == whole.evaluate(None, None)
    found, expected = alone(rounded, ROUNDED), alone(whole, WHOLE)
    assert found.losses != expected.losses
    assert found.losses == pytest.approx(expected.losses, rel=0.03)
    assert sum(found.losses[-3:]) < sum(found.losses[:3])
    judged = [engine.evaluate(number, None).nll for engine, number in ((rounded, 1), (whole, 2))]
    assert judged[0] == pytest.approx(judged[1], rel=0.01)


def test_each_trial_has_the_precision_that_it_asked_for(make: Make) -> None:
    """Beside each other, trials over the rounded and over the whole base are to the bit what they are alone."""
    engine = make()
    packs = train_pack(engine, [WHOLE, ROUNDED, replace(ROUNDED, number=3, seed=5)], STEPS)
    equal(packs[1], alone(make(), ROUNDED))
    equal(packs[2], alone(make("bf16"), WHOLE))


def test_a_trial_keeps_its_precision(make: Make, tmp_path: Path) -> None:
    """One that is paused, and goes on in another slot of another engine, is to the bit one that stayed."""
    engine = make()
    engine.admit(ROUNDED, None, None)
    losses = curve(engine, 1, 6)
    engine.checkpoint(1, tmp_path / "paused")
    other = make()
    other.admit(replace(WHOLE, number=9), None, None)
    other.admit(ROUNDED, tmp_path / "paused", None)
    equal(taken(other, 1, losses + curve(other, 1, STEPS - 6)), alone(make(), ROUNDED))


def test_sizes_that_no_gpu_multiplies_stay_whole(make: Make) -> None:
    """A group with a size that is no multiple of 16 is computed as it is, the others in 8 bits."""
    engine = make(mlp=37)
    kinds = {packed.group.kind: packed._rounded is not None for packed in engine._packed}
    assert kinds == {"attention": True, "mlp": False}
    assert far(alone(engine, ROUNDED).adapter, alone(make("bf16", mlp=37), WHOLE).adapter) > 0


def test_a_stream_is_of_one_precision() -> None:
    """Who has trained least leads; the trials of the other precision wait for a stream of theirs."""

    linears = [nn.Linear(16, 16)]
    layout = Layout([Group(0, kind, [kind], linears, [place]) for place, kind in enumerate(("attention", "mlp"))])

    def live(number: int, precision: str, tokens: int) -> Live:
        config = lora_trial(number=number, precision=precision)
        slot = Slot.empty(config, layout, torch.float32, torch.device("cpu"))
        return Live(config=config, index=number, slot=slot, batches=[], health=Health(1), tokens=tokens)

    trials = [live(1, "bf16", 50), live(2, "fp8", 20), live(3, "bf16", 10), live(4, "fp8", 5)]
    assert [one.index for one in turns(trials)] == [4, 2]
    assert [one.index for one in turns(trials[:3])] == [3, 1]


def test_a_base_that_rounding_breaks_is_refused() -> None:
    """A loss that is far off says so in one line; noise of a few tokens does not."""
    float8.compare("m", 40.0, 40.9, 16)
    with pytest.raises(ModelError, match=r"m: its loss is 3.1250 in 8-bit floats, 2.5000 in bf16; use search.pre"):
        float8.compare("m", 40.0, 50.0, 16)
    with pytest.raises(ModelError, match="nan"):
        float8.compare("m", 40.0, float("nan"), 16)
