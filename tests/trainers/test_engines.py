"""Both engines of one slot: against plain loops, over pauses, failures and each other."""

from __future__ import annotations

import errno
import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import adapter, curve, full_trial, logits, lora_trial, peft_initialise, plain_curve, same_bits, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers import training
from trainers.checkpoints import remove_older
from trainers.engine import TrialFailed
from trainers.full import replica
from trainers.full.engine import FullEngine
from trainers.lora import engine as lora_engine
from trainers.messages import TrialConfig
from trainers.models import LoadedEngines
from trainers.splits import batches, load_split

Load = Callable[[], LoadedEngines]
# PEFT 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
BOTH = pytest.mark.parametrize("config", [lora_trial(dropout=0.1), full_trial()], ids=["lora", "full"])


def test_lora_equals_a_plain_peft_loop(load: Load, model_folder: Path, data_folder: Path) -> None:
    """20 steps give the losses of PEFT, torch's AdamW and clipping over the same rows, and the same adapter."""
    config = lora_trial(weight_decay=0.01, clip_norm=0.5, warmup=0.2)
    engine: Any = load().engines["lora"]
    engine.admit(config, None, None)
    ours = curve(engine, 1, 20)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"),
    )
    peft_initialise(plain, config.seed)
    theirs = plain_curve(plain, config, load_split(data_folder, "train"), 20)
    assert ours == pytest.approx(theirs, rel=5e-6)
    assert ours[-1] < ours[0]
    trained = {n.replace(".default.", "."): p.detach() for n, p in plain.named_parameters() if p.requires_grad}
    torch.testing.assert_close(adapter(engine, 1), trained, rtol=1e-4, atol=1e-5)


def test_full_equals_a_plain_loop(load: Load, model_folder: Path, data_folder: Path) -> None:
    """20 steps give the losses of a plain torch loop over all weights, tied embeddings included."""
    engine: Any = load().engines["full"]
    engine.admit(full_trial(), None, None)
    ours = curve(engine, 2, 20)
    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = plain_curve(plain, full_trial(), load_split(data_folder, "train"), 20)
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert ours[-1] < ours[0]


@BOTH
def test_micro_batches_do_not_change_training(load: Load, config: TrialConfig) -> None:
    """Cutting a batch into parts of a few rows gives the same losses as taking it at once."""
    config = TrialConfig(**{**vars(config), "dropout": 0.0})
    results = []
    for budget in (10_000, 20):
        engine: Any = load().engines[config.method]
        engine.micro_tokens = budget
        engine.admit(config, None, None)
        results.append(curve(engine, config.number, 8))
    assert results[0] == pytest.approx(results[1], rel=2e-5)


@BOTH
def test_pause_and_restore_is_invisible(load: Load, config: TrialConfig, tmp_path: Path) -> None:
    """A trial paused at step 9 and restored by a fresh engine repeats the whole one to the bit, dropout included."""
    engine: Any = load().engines[config.method]
    engine.admit(config, None, None)
    whole = curve(engine, config.number)
    judged = engine.evaluate(config.number, None)
    engine.drop(config.number)

    engine.admit(config, None, None)
    first = curve(engine, config.number, 9)
    engine.checkpoint(config.number, tmp_path / "step-9")
    files = {p.name: p.read_bytes() for p in (tmp_path / "step-9").iterdir()}
    engine.drop(config.number)
    torch.manual_seed(12345)
    engine = load().engines[config.method]
    position = engine.admit(config, tmp_path / "step-9", None)
    assert (position.step, position.done) == (9, False)
    assert first + curve(engine, config.number) == whole
    assert engine.evaluate(config.number, None) == judged
    assert {p.name: p.read_bytes() for p in (tmp_path / "step-9").iterdir()} == files, "training wrote into it"


@BOTH
def test_base_is_bit_identical_after_drop(load: Load, config: TrialConfig, tmp_path: Path) -> None:
    """After a drop the base has every bit it had; while a trial lives, the base can still be evaluated as it was."""
    loaded = load()
    engine: Any = loaded.engines[config.method]
    before, names = weights(engine.base.model), [n for n, _ in engine.base.model.named_modules()]
    judged = engine.evaluate(None, None)
    engine.admit(config, None, None)
    curve(engine, config.number, 5)
    own = engine.evaluate(config.number, None)
    assert engine.evaluate(None, None) == judged != own
    assert engine.evaluate(config.number, None) == own
    engine.drop(config.number)
    assert same_bits(weights(engine.base.model), before)
    assert [n for n, _ in engine.base.model.named_modules()] == names
    assert not any(p.requires_grad or p.grad is not None for p in engine.base.model.parameters())
    assert engine.evaluate(None, None) == judged


def test_methods_take_turns_over_one_base(load: Load) -> None:
    """A LoRA trial after a full one trains as if it were the first; two at once are refused."""
    fresh: Any = load().engines["lora"]
    fresh.admit(lora_trial(), None, None)
    alone = curve(fresh, 1, 5)
    engines: Any = load().engines
    engines["full"].admit(full_trial(), None, None)
    with pytest.raises(RuntimeError, match="no free slot"):
        engines["lora"].admit(lora_trial(), None, None)
    curve(engines["full"], 2, 3)
    engines["full"].drop(2)
    engines["lora"].admit(lora_trial(), None, None)
    assert curve(engines["lora"], 1, 5) == alone


@BOTH
def test_a_diverging_trial_fails_alone(load: Load, config: TrialConfig) -> None:
    """An absurd learning rate ends as `diverged`; the slot is free, base and next trial are unaffected."""
    engine: Any = load().engines[config.method]
    before = weights(engine.base.model)
    engine.admit(config, None, None)
    expected = curve(engine, config.number, 4)
    engine.drop(config.number)
    engine.admit(TrialConfig(**{**vars(config), "learning_rate": 1e30, "number": 9}), None, None)
    with pytest.raises(TrialFailed) as caught:
        curve(engine, 9)
    assert (caught.value.trial, caught.value.code) == (9, "diverged")
    assert same_bits(weights(engine.base.model), before)
    engine.admit(config, None, None)
    assert curve(engine, config.number, 4) == expected


@BOTH
def test_out_of_memory_fails_the_trial(load: Load, config: TrialConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lack of memory in a step ends as `out_of_memory` with gradients freed; other errors are not mistaken for it."""
    engine: Any = load().engines[config.method]
    place, name = (lora_engine, "score") if config.method == "lora" else (replica, "chunked_nll")
    real: Any = getattr(place, name)
    calls = []

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(*arguments)

    monkeypatch.setattr(place, name, failing)
    engine.admit(config, None, None)
    with pytest.raises(TrialFailed, match="Tried to allocate") as caught:
        curve(engine, config.number)
    assert caught.value.code == "out_of_memory"
    assert not any(p.grad is not None for p in engine.base.model.parameters())
    monkeypatch.setattr(place, name, real)
    engine.admit(config, None, None)
    monkeypatch.setattr(place, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.advance(lambda: True)


def test_targets_positions_and_rungs(load: Load, data_folder: Path) -> None:
    """A trial stands still at the first step with enough tokens, goes on in place, and ends with its run."""
    engine: Any = load().engines["lora"]
    train = load_split(data_folder, "train")
    plan = batches(lora_trial(), train.rows)
    sums = [int(train.lengths[rows].sum()) for rows in plan]
    engine.admit(lora_trial(), None, sum(sums[:2]) + 1)
    assert engine.advance(lambda: False) == [1]
    assert (engine.position(1).step, engine.position(1).tokens) == (3, sum(sums[:3]))
    assert engine.advance(lambda: False) == [1], "it stands at its target"
    assert engine.position(1).step == 3
    engine.target(1, None)
    assert engine.advance(lambda: True) == []
    assert engine.position(1).step == 4
    assert engine.train_loss(1) > 0
    assert math.isnan(engine.train_loss(1))
    assert engine.advance(lambda: False) == [1]
    assert engine.position(1) == training.Position(len(plan), sum(sums), True)
    part, whole = engine.evaluate(1, 5), engine.evaluate(1, None)
    assert (part.rung_nll, part.rung_tokens) == (whole.rung_nll, whole.rung_tokens)
    assert (part.nll, part.completion_tokens) == (part.rung_nll, part.rung_tokens)
    validation = load_split(data_folder, "validation")
    assert (whole.completion_tokens, whole.input_tokens) == (int(validation.mask.sum()), len(validation.ids))


def test_initial_adapter_depends_on_the_seed_alone(load: Load) -> None:
    """What ran before, or the state of torch's generator, does not reach an adapter's initial values."""
    engine: Any = load().engines["lora"]
    found = []
    for config, noise in ((lora_trial(), 1), (lora_trial(number=5), 2), (lora_trial(seed=8), 1)):
        torch.manual_seed(noise)
        engine.admit(config, None, None)
        found.append(adapter(engine, config.number))
        engine.drop(config.number)
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])


def test_exported_adapter_loads_with_peft_alone(load: Load, model_folder: Path, tmp_path: Path) -> None:
    """A checkpoint is a standard PEFT folder: PEFT alone gives the same logits; nothing in it is a pickle."""
    engine: Any = load().engines["lora"]
    engine.admit(lora_trial(targets="mlp"), None, None)
    curve(engine, 1, 5)
    engine.checkpoint(1, tmp_path / "adapter")
    ids = torch.arange(5, 25)
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
    torch.testing.assert_close(alone(input_ids=ids[None]).logits[0], logits(engine, 1, ids), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["inference_mode"] is True
    assert config["base_model_name_or_path"] == str(model_folder)
    assert sorted(config["target_modules"]) == ["down_proj", "gate_proj", "up_proj"]
    assert {p.suffix for p in (tmp_path / "adapter").iterdir()} == {".safetensors", ".json"}


def test_full_folder_loads_with_transformers_alone(load: Load, tmp_path: Path) -> None:
    """A full checkpoint is a model folder: transformers alone gives the same logits, and the tokenizer is in it."""
    engine: Any = load().engines["full"]
    engine.admit(full_trial(), None, None)
    curve(engine, 2, 5)
    engine.checkpoint(2, tmp_path / "model")
    ids = torch.arange(5, 25)[None]
    engine.base.model.eval()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(alone(input_ids=ids).logits, engine.base.model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<|im_end|>"


def test_bf16_full_training_steps_fp32_masters(load: Load, tmp_path: Path) -> None:
    """Over bf16 weights the masters move by less than bf16 can show, survive a pause to the bit, and leave no trace."""
    curves = []
    for pause in (False, True):
        source: Any = load().engines["full"]
        source.base.model.to(torch.bfloat16)
        engine = FullEngine(source.base, source.train, source.validation, 5)
        before = weights(engine.base.model)
        config = full_trial(learning_rate=1e-5)
        engine.admit(config, None, None)
        losses = curve(engine, 2, 6)
        if pause:
            engine.checkpoint(2, tmp_path / "step-6")
            engine.drop(2)
            engine.admit(config, tmp_path / "step-6", None)
        masters = engine._own.masters
        assert all(m.dtype == torch.float32 for m in masters.values())
        assert all(torch.equal(w, masters[n].bfloat16()) for n, w in engine.base.model.named_parameters())
        name = "model.layers.0.mlp.up_proj.weight"
        moved = (masters[name] - before[name].float()).abs()
        assert 0 < moved.max() < 1e-4
        curves.append(losses + curve(engine, 2))
        engine.drop(2)
        assert same_bits(weights(engine.base.model), before)
    assert curves[0] == curves[1]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "step-6").dtype == torch.bfloat16


@BOTH
def test_failed_checkpoint_leaves_nothing(load: Load, config: TrialConfig, tmp_path: Path) -> None:
    """A write that the system refuses is an OSError with its number, leaves no file, and the trial can go on."""
    engine: Any = load().engines[config.method]
    engine.admit(config, None, None)
    curve(engine, config.number, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            engine.checkpoint(config.number, tmp_path / "trial" / "step-2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert list((tmp_path / "trial").iterdir()) == []
    engine.checkpoint(config.number, tmp_path / "trial" / "step-2")
    assert curve(engine, config.number, 2)


def test_checkpoints_of_something_else_are_refused(load: Load, tmp_path: Path) -> None:
    """A checkpoint of another configuration, a damaged one and none fail the trial; the slot stays usable."""
    engine: Any = load().engines["lora"]
    before = weights(engine.base.model)
    engine.admit(lora_trial(), None, None)
    curve(engine, 1, 2)
    for name in ("whole", "damaged", "other"):
        engine.checkpoint(1, tmp_path / name)
    engine.drop(1)
    (tmp_path / "damaged" / "optimizer.safetensors").write_bytes(b"x" * 50)
    wide = lora_trial(rank=8)
    state = json.loads((tmp_path / "other" / "state.json").read_text())
    state["config"]["rank"] = 8
    (tmp_path / "other" / "state.json").write_text(json.dumps(state))
    for config, name, said in (
        (lora_trial(learning_rate=0.5), "whole", r"another configuration \(learning_rate differ\)"),
        (lora_trial(), "absent", "is no checkpoint"),
        (lora_trial(), "damaged", "cannot be read"),
        (wide, "other", "other modules or rank"),
        (lora_trial(rank=None), None, "needs rank and alpha"),
    ):
        with pytest.raises(TrialFailed, match=said) as caught:
            engine.admit(config, None if name is None else tmp_path / name, None)
        assert caught.value.code == "error"
        assert "\n" not in str(caught.value)
        assert same_bits(weights(engine.base.model), before)
    assert engine.admit(lora_trial(), tmp_path / "whole", None).step == 2


def test_old_checkpoints_and_torn_ones_are_removed(load: Load, tmp_path: Path) -> None:
    """The newest checkpoints stay, by step and not by name; what a killed write left goes; a repeated one is kept."""
    engine: Any = load().engines["lora"]
    engine.admit(lora_trial(), None, None)
    for step in (8, 9, 10):
        curve(engine, 1, 8 if step == 8 else 1)
        engine.checkpoint(1, tmp_path / f"step-{step}")
    (tmp_path / ".tmp-step-11").mkdir()
    kept = (tmp_path / "step-10" / "state.json").stat().st_ino
    engine.checkpoint(1, tmp_path / "step-10")
    assert (tmp_path / "step-10" / "state.json").stat().st_ino == kept
    remove_older(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-9"]
