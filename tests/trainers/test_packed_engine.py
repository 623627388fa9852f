"""Packs of trials over one base: each as if alone and as PEFT trains it, in float64 and in fp32; lack of memory."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Trained, apart, curve, far, in_double, lora_trial, peft_over, plain_curve, taken, train_pack
from transformers import AutoModelForCausalLM

from trainers.engine import TrialFailed
from trainers.health import Health
from trainers.lora import adapter_files
from trainers.lora import engine as lora_engine
from trainers.lora.bank import padded
from trainers.lora.engine import LoraEngine
from trainers.messages import TrialConfig
from trainers.models import load_base
from trainers.splits import load_split

# PEFT 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
STEPS = 50
MICRO_TOKENS = 60  # an example has 10 to 22 tokens: batches of four and more are cut, those of three some of the time
TRIALS = [
    lora_trial(number=1, rank=3, targets="attention", batch_size=1, examples=50, learning_rate=1e-3, seed=1),
    lora_trial(number=2, rank=4, targets="mlp", batch_size=2, examples=120, weight_decay=0.1, seed=2),
    lora_trial(number=3, rank=8, batch_size=3, examples=149, learning_rate=3e-3, clip_norm=0.1, warmup=0.2, seed=3),
    lora_trial(number=4, rank=20, alpha=5.0, batch_size=5, examples=300, weight_decay=0.01, clip_norm=0.5, seed=4),
    lora_trial(number=5, rank=33, targets="attention", batch_size=6, examples=300, learning_rate=3e-4, seed=4),
    lora_trial(number=6, alpha=16.0, rank=8, examples=230, learning_rate=3e-2, clip_norm=1e3, seed=9),
    lora_trial(number=7, rank=16, targets="mlp", batch_size=4, examples=201, learning_rate=5e-3, warmup=0.0, seed=7),
    lora_trial(number=8, rank=1, alpha=1.0, batch_size=2, examples=100, learning_rate=3e-2, clip_norm=0.01, seed=8),
]
UNSTABLE = TRIALS[5]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(model_folder: Path, data_folder: Path) -> Make:
    """Makes an engine of some slots over a base of its own, in float64 unless told otherwise."""
    train, validation = load_split(data_folder, "train"), load_split(data_folder, "validation")

    def engine(slots: int, double: bool = True, micro_tokens: int = MICRO_TOKENS) -> LoraEngine:
        base = load_base(str(model_folder), "cpu")
        if double:
            in_double(base.model)
        return LoraEngine(base, train, validation, 5, micro_tokens, slots=slots)

    return engine


@pytest.fixture(scope="module")
def by_peft(model_folder: Path, data_folder: Path) -> Callable[[TrialConfig, bool], Trained]:
    """Trains a trial by PEFT, torch's AdamW and clipping, and transformers' own model, an example at a time."""
    train = load_split(data_folder, "train")

    def run(config: TrialConfig, double: bool) -> Trained:
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        plain = peft_over(in_double(model) if double else model, config)
        losses = plain_curve(plain, config, train, STEPS)
        trained = {n.replace(".default.", "."): p.detach() for n, p in plain.named_parameters() if p.requires_grad}
        return Trained(losses, trained, {})

    return run


def test_a_trial_in_a_pack_is_the_trial_alone_and_that_of_peft(make: Make, by_peft: Any) -> None:
    """Over 50 steps in float64, losses and adapters of mixed packs are within 1e-9 of the trial alone and of PEFT.

    It counts as relative for numbers above one, as absolute below. Packs are of 2, 5 and 8. Ranks, targets,
    batch sizes, rates, decay, clipping, seeds and lengths differ; batches are cut unlike; one trial is unstable.
    """
    references = {c.number: [train_pack(make(1), [c], STEPS)[c.number], by_peft(c, True)] for c in TRIALS}
    for chosen in ([UNSTABLE, TRIALS[4]], TRIALS[1:6], TRIALS):
        packs = train_pack(make(len(chosen)), chosen, STEPS)
        for number, found in packs.items():
            assert len(found.losses) == STEPS
            for name, reference in zip(("alone", "PEFT"), references[number], strict=True):
                difference = apart(found.losses, reference.losses), apart(found.adapter, reference.adapter)
                assert max(difference) < 1e-9, (len(chosen), number, name, difference)
        losses = packs[UNSTABLE.number].losses
        assert max(losses) > losses[0] + 0.5, "it rises well above its start"
        assert sum(b > a for a, b in itertools.pairwise(losses)) > 15, "it jumps about"


def test_a_pack_in_fp32_is_as_close_to_peft_as_peft_to_itself(make: Make, by_peft: Any) -> None:
    """In fp32 a trial of a pack of 4 is within 1e-5 of PEFT, or three times what two threads change PEFT itself by.

    Losses step by step, adapters by their norm. The unstable trial is not among them: it makes 1e-7 into 1e-4 within
    50 steps, so how two roundings compare is a draw.
    """
    chosen = [TRIALS[0], TRIALS[1], TRIALS[3], TRIALS[6]]
    packs = train_pack(make(4, double=False), chosen, STEPS)
    for config in chosen:
        found, plain = packs[config.number], by_peft(config, False)
        ours = apart(found.losses, plain.losses), far(found.adapter, plain.adapter)
        if max(ours) <= 1e-5:
            continue
        torch.set_num_threads(2)
        try:
            other = by_peft(config, False)
        finally:
            torch.set_num_threads(1)
        noise = apart(other.losses, plain.losses), far(other.adapter, plain.adapter)
        assert ours[0] <= max(1e-5, 3 * noise[0]), (config.number, ours, noise)
        assert ours[1] <= max(1e-5, 3 * noise[1]), (config.number, ours, noise)


def padding(slot: Any) -> Iterator[torch.Tensor]:
    """The rows past the trial's rank of everything that a slot keeps."""
    for buffer in (slot.weights, slot.gradient, slot.copy, *slot.moments.values()):
        for group in slot.layout.groups:
            if (first := slot.first(buffer, group)) is not None:
                yield first[:, slot.rank :]
            for member in range(len(group.linears)):
                if (second := slot.second(buffer, group, member)) is not None:
                    yield second[slot.rank :]


def test_rows_past_the_rank_stay_zero(make: Make) -> None:
    """With weight decay and mixed ranks, the padding of weights, gradient, copy and moments is exactly zero."""
    engine = make(5, double=False)
    configs = [TrialConfig(**{**vars(c), "weight_decay": 0.3}) for c in TRIALS[:5]]
    for config in configs:
        engine.admit(config, None, None)
    for _ in range(24):
        engine.advance(lambda: True)
    for config in configs:
        slot = engine._trials[config.number].slot
        parts = list(padding(slot))
        assert sum(part.numel() for part in parts) == 5 * (padded(slot.rank) - slot.rank) * (
            slot.weights.numel() // padded(slot.rank)
        )
        assert all((part == 0).all() for part in parts), config.number
        assert slot.weights.abs().sum() > 0
        assert engine.position(config.number).step > 5


@pytest.mark.parametrize("call", [1, 6], ids=["in the first stream", "within a batch"])
def test_a_lack_of_memory_is_invisible(make: Make, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """A stream that runs out of memory halves the streams and repeats its batches whole: curves and adapters stay.

    Within 1e-9 in float64, since sums are cut in other places.
    """
    chosen = TRIALS[2:5]
    expected = train_pack(make(3), chosen, 8)
    engine, real, calls = make(3), lora_engine.score, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(lora_engine, "score", failing)
    found = train_pack(engine, chosen, 8)
    assert engine.micro_tokens == MICRO_TOKENS // 2
    for number, trained in found.items():
        assert apart(trained.losses, expected[number].losses) < 1e-9
        assert apart(trained.adapter, expected[number].adapter) < 1e-9
        assert apart(trained.moments, expected[number].moments) < 1e-9


def test_what_failed_in_the_last_steps_is_said_when_they_are_asked_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that a verdict which was still on its way when training paused is not lost with who is put aside then."""
    engine = make(3)
    monkeypatch.setattr(Health, "watch", lambda health, loss, norm: "its loss is too high")
    for config in TRIALS[1:3]:
        engine.admit(config, None, None)
    assert engine.advance(lambda: True) == []
    failed = set()
    for _ in range(2):
        with pytest.raises(TrialFailed, match="step 1: its loss is too high") as caught:
            engine.finish()
        failed.add(caught.value.trial)
    engine.finish()
    assert failed == {config.number for config in TRIALS[1:3]} and not engine._trials


def test_memory_that_never_suffices_fails_one_trial_after_the_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that cannot be smaller end as `out_of_memory`, a trial at a time; what is left trains as if alone."""
    expected = train_pack(make(1), [TRIALS[1]], 5)[2]
    engine, real = make(3), lora_engine.score

    def failing(hidden: torch.Tensor, *arguments: Any) -> Any:
        if len(engine._trials) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(hidden, *arguments)

    monkeypatch.setattr(lora_engine, "score", failing)
    failed = []
    for config in TRIALS[1:4]:
        engine.admit(config, None, None)
    for _ in range(2):
        with pytest.raises(TrialFailed, match="Tried to allocate") as caught:
            engine.advance(lambda: False)
        assert caught.value.code == "out_of_memory"
        failed.append(caught.value.trial)
    (left,) = {2, 3, 4} - set(failed)
    if left != 2:
        engine.drop(left)
        engine.admit(TRIALS[1], None, None)
    found = taken(engine, 2, curve(engine, 2, 5))
    assert apart(found.losses, expected.losses) < 1e-9
    assert apart(found.adapter, expected.adapter) < 1e-9


def test_a_snapshot_is_of_its_moment(make: Make, tmp_path: Path) -> None:
    """What is written after a trial trained on is what it was; of one that stood still, also when it left."""
    engine = make(2)
    for number in (1, 2):
        engine.admit(dataclasses.replace(TRIALS[3], number=number), None, None)
    for _ in range(4):
        engine.advance(lambda: True)
    engine.checkpoint(1, tmp_path / "then")
    moving, still = engine.snapshot(1, still=False), engine.snapshot(2, still=True)
    engine.drop(2)
    engine.admit(dataclasses.replace(TRIALS[3], number=3, seed=1), None, None)
    for _ in range(3):
        engine.advance(lambda: True)
    moving(tmp_path / "moving")
    still(tmp_path / "still")
    engine.checkpoint(1, tmp_path / "now")
    files = [file.name for file in (tmp_path / "then").iterdir() if file.suffix == ".safetensors"]
    assert len(files) == 2
    for name in files:
        then, moved, stood, now = (load_file(tmp_path / folder / name) for folder in ("then", "moving", "still", "now"))
        assert all(torch.equal(then[key], moved[key]) and torch.equal(then[key], stood[key]) for key in then)
        assert any(not torch.equal(then[key], now[key]) for key in then)


@pytest.mark.parametrize("size", [1, adapter_files.PIECE // 4, adapter_files.PIECE // 2 + 3])
def test_what_is_copied_in_pieces_is_the_whole(size: int) -> None:
    """Proves that a copy has all of a buffer, its last piece too, and shares nothing with it."""
    buffer = torch.arange(size, dtype=torch.float32)
    copied = adapter_files.piecewise(buffer)
    assert torch.equal(copied, buffer) and copied.data_ptr() != buffer.data_ptr()


def test_a_trial_made_ready_by_a_thread_is_the_same(make: Make, tmp_path: Path) -> None:
    """Fresh and from its checkpoint: what a thread prepared beside training, and what nobody did, are equal to the bit.

    What can't be read is no error of the thread's: admission says it, as it does when nothing was prepared.
    """
    found = []
    for threads in (False, True):
        engine, folder = make(3), tmp_path / f"{threads}"

        def come(config: TrialConfig, checkpoint: Path | None, engine: Any = engine, threads: bool = threads) -> None:
            if threads:
                worker = threading.Thread(target=engine.prepare(config, checkpoint))
                worker.start()
                engine.advance(lambda: True)
                worker.join()
                assert (config, checkpoint) in engine._ready
            engine.admit(config, checkpoint, None)
            assert not engine._ready

        engine.admit(TRIALS[0], None, None)
        come(TRIALS[3], None)
        for _ in range(3):
            engine.advance(lambda: True)
        engine.checkpoint(TRIALS[3].number, folder / "ckpt")
        engine.drop(TRIALS[3].number)
        come(TRIALS[3], folder / "ckpt")
        curve(engine, TRIALS[3].number, 5)
        engine.checkpoint(TRIALS[3].number, folder / "end")
        found.append({file.name: load_file(file) for file in sorted((folder / "end").glob("*.safetensors"))})
        if threads:
            (folder / "ckpt" / "optimizer.safetensors").write_bytes(b"no")
            other = dataclasses.replace(TRIALS[3], number=TRIALS[3].number)
            engine.drop(other.number)
            engine.prepare(other, folder / "ckpt")()
            with pytest.raises(TrialFailed, match="cannot be read"):
                engine.admit(other, folder / "ckpt", None)
    usual, prepared = found
    assert usual.keys() == prepared.keys() and len(usual) == 2
    for name, tensors in usual.items():
        assert all(torch.equal(tensor, prepared[name][key]) for key, tensor in tensors.items())


def test_memory_that_lacks_for_a_trials_buffers_fails_it_as_it_comes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a trial's slot needs is allocated when it is admitted: there a lack of it is this trial's own failure,
    in its first optimizer step it would be the whole pack's."""
    expected = train_pack(make(1), [TRIALS[0]], 5)[1]
    engine, real = make(2), torch.zeros_like
    engine.admit(TRIALS[0], None, None)

    def failing(like: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if like.ndim == 1 and like.numel() > 500:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(like, *arguments, **options)

    monkeypatch.setattr(torch, "zeros_like", failing)
    with pytest.raises(TrialFailed, match="Tried to allocate") as caught:
        engine.admit(TRIALS[1], None, None)
    assert (caught.value.trial, caught.value.code) == (2, "out_of_memory")
    found = taken(engine, 1, curve(engine, 1, 5))
    assert apart(found.losses, expected.losses) < 1e-9 and apart(found.moments, expected.moments) < 1e-9
