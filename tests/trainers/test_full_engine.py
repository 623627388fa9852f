"""The full-parameter engine: against torch and transformers alone, without activations, in bf16, in 8 bits, judging."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import curve, full_trial, plain_curve, plain_loss, same_bits, save_model, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from trainers import models
from trainers.checkpoints import OPTIMIZER
from trainers.engine import TrialFailed
from trainers.full import distributed, optimizers
from trainers.full import engine as full_engine
from trainers.full.engine import FullEngine
from trainers.full.replica import deal
from trainers.full.weights import MASTERS
from trainers.generation import greedy
from trainers.messages import WorkerJob
from trainers.models import LoadedEngines, load_base, load_engines
from trainers.named import ModelError
from trainers.splits import Split, load_split

Load = Callable[[], LoadedEngines]


@pytest.fixture
def job(model_folder: Path, data_folder: Path) -> WorkerJob:
    """A job of full-parameter training alone."""
    return WorkerJob(
        worker="w",
        command=[],
        model=str(model_folder),
        data=str(data_folder),
        rung_rows=5,
        origin_boot_ms=0,
        boot_id="",
        fence=0,
        paid_ms=0,
        work_ms=0,
        checkpoint_ms=0,
        device="cpu",
        methods=["full"],
    )


def make(job: WorkerJob, **changes: Any) -> Any:
    """The full engine of a job."""
    return load_engines(dataclasses.replace(job, **changes)).engines["full"]


def in_bf16(job: WorkerJob, **changes: Any) -> FullEngine:
    """The full engine over a bf16 model, which has fp32 masters, as on a GPU."""
    job = dataclasses.replace(job, **changes)
    base = load_base(job.model, "cpu")
    base.model.to(torch.bfloat16)
    train, validation = (load_split(Path(job.data), name) for name in ("train", "validation"))
    return FullEngine(base, train, validation, job.rung_rows, job=job)


def test_fifty_steps_equal_torch_and_transformers(job: WorkerJob) -> None:
    """50 steps give the losses and the weights of a plain loop: AdamW, clip_grad_norm_, a LambdaLR, row by row."""
    config = full_trial(examples=200, warmup=0.1, clip_norm=0.5)
    engine = make(job)
    engine.admit(config, None, None)
    ours = curve(engine, 2)
    plain = AutoModelForCausalLM.from_pretrained(job.model)
    theirs = plain_curve(plain, config, engine.train, 50)
    assert len(ours) == 50
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert sum(ours[-10:]) < sum(ours[:10])
    for name, weight in plain.named_parameters():
        distance = (weight - engine.base.model.get_parameter(name)).norm() / weight.norm()
        assert distance < 1e-4, name


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_changes_no_loss(job: WorkerJob, bf16: bool, tmp_path: Path) -> None:
    """Layers that are run again for their gradients give the same losses to the bit, and are plain again after.

    That they are run again is counted; a checkpoint of one kind goes on in the other.
    """
    runs: dict[bool, list[float]] = {}
    passes: dict[bool, int] = {}
    for checkpointing in (False, True):
        engine: Any = (in_bf16 if bf16 else make)(job, checkpointing=checkpointing)
        seen: list[int] = []
        layer = engine.base.model.model.layers[0].self_attn
        hook = layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        engine.admit(full_trial(), None, None)
        runs[checkpointing] = curve(engine, 2, 6)
        passes[checkpointing] = len(seen)
        hook.remove()
        engine.checkpoint(2, tmp_path / str(checkpointing))
        runs[checkpointing] += curve(engine, 2)
        engine.drop(2)
        assert not any(getattr(m, "gradient_checkpointing", False) for m in engine.base.model.modules())
    assert runs[True] == runs[False]
    assert passes[True] == 2 * passes[False]
    engine = (in_bf16 if bf16 else make)(job, checkpointing=True)
    engine.admit(full_trial(), tmp_path / "False", None)
    assert curve(engine, 2) == runs[False][6:]


def test_a_rate_that_destroys_the_model_is_given_up_early(job: WorkerJob) -> None:
    """A loss that is finite, far above its start and not falling ends the trial long before a rung would; its slot is
    free, and a usual rate goes on."""
    engine = make(job)
    engine.admit(full_trial(examples=2000, learning_rate=30.0, warmup=0.0), None, None)
    with pytest.raises(TrialFailed, match=r"above the|not falling|gradient norm") as failure:
        curve(engine, 2)
    assert failure.value.code == "diverged"
    step = int(str(failure.value).split()[1].rstrip(":"))
    assert step <= 0.05 * 2000 / full_trial().batch_size
    engine.admit(full_trial(), None, None)
    assert len(curve(engine, 2)) > 5


def test_rows_are_scored_one_by_one(job: WorkerJob) -> None:
    """Scores are the losses that transformers gives the rows alone, for trial and base; they sum to the evaluation."""
    engine = make(job)
    split: Split = engine.validation
    rows = [4, 0, 7]
    base = engine.score(None, split, rows)
    engine.admit(full_trial(), None, None)
    curve(engine, 2, 5)
    for scores, trial in ((engine.score(2, split, rows), 2), (engine.score(None, split, rows), None)):
        assert scores.dtype == np.float64 and scores.shape == (3,)
        model = engine.base.model if trial else AutoModelForCausalLM.from_pretrained(job.model)
        with torch.no_grad():
            alone = [float(plain_loss(model, split, [row])) * int(split[row].mask.sum()) for row in rows]
        assert scores == pytest.approx(alone, rel=1e-5)
    assert engine.score(None, split, rows).tolist() == base.tolist()
    assert sum(engine.score(2, split, range(split.rows))) == pytest.approx(engine.evaluate(2, None).nll, rel=1e-6)
    longer = Split(np.tile(split[0].ids, 12), np.array([0, 12 * len(split[0].ids)]), np.tile(split[0].mask, 12))
    assert np.isfinite(engine.score(2, longer, [0])).all()
    assert engine.score(2, split, []).shape == (0,)


def by_hand(model: Any, prompt: np.ndarray, end: int, most: int) -> list[int]:
    """The most likely continuation, without a cache, a token at a time."""
    ids = [int(token) for token in prompt]
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("micro_tokens", [10_000, 30])
def test_generation_equals_one_prompt_after_the_other(job: WorkerJob, micro_tokens: int) -> None:
    """Prompts of many lengths in one batch, or in several, give what each gives alone without padding or cache.

    For trial and base; some end at the end-of-sequence token, which is left out. What the folder's generation config
    says of penalties is out of force, and is there again after.
    """
    engine = make(job)
    engine.micro_tokens = micro_tokens
    prompts = [example.ids[: 3 + 2 * i] for i, example in enumerate(engine.validation[row] for row in range(6))]
    end = engine.base.tokenizer.eos_token_id
    engine.base.model.generation_config.repetition_penalty = 5.0
    plain = AutoModelForCausalLM.from_pretrained(job.model)
    assert engine.generate(None, prompts, 6) == [by_hand(plain, prompt, end, 6) for prompt in prompts]
    engine.admit(full_trial(examples=400, batch_size=8, learning_rate=1e-2), None, None)
    curve(engine, 2)
    found = engine.generate(2, prompts, 12)
    assert found == [by_hand(engine.base.model, prompt, end, 12) for prompt in prompts]
    assert any(len(tokens) < 12 for tokens in found), "none of them ended"
    assert engine.base.model.generation_config.repetition_penalty == 5.0
    assert engine.generate(2, [], 5) == []


def test_generation_stops_at_the_end_token(job: WorkerJob) -> None:
    """A model whose most likely token is always the end says nothing; what other rows of the batch say is untouched."""
    base = load_base(job.model, "cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(job.model)
    prompts = [np.arange(5, 9, dtype=np.int32), np.arange(9, 20, dtype=np.int32)]
    open_end = greedy(base.model, tokenizer, prompts, 4, 1000)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(open_end[0][0])
    closed = greedy(base.model, tokenizer, prompts, 4, 1000)
    assert closed[0] == []
    stop = open_end[0][0]
    assert closed[1] == (open_end[1][: open_end[1].index(stop)] if stop in open_end[1] else open_end[1])


def test_bf16_trains_scores_and_saves_as_fp32_masters_round(job: WorkerJob, tmp_path: Path) -> None:
    """Over bf16 weights the loss falls as in fp32 within bf16's noise; base weights can be judged meanwhile, to the bit
    of before, and what is saved loads with transformers alone as the bf16 rounding of the masters."""
    single, half = make(job), in_bf16(job)
    curves = []
    for engine in (single, half):
        before = engine.evaluate(None, None)
        engine.admit(full_trial(), None, None)
        curves.append(curve(engine, 2))
        own = engine.evaluate(2, None)
        assert engine.evaluate(None, None) == before
        assert engine.evaluate(2, None) == own != before
    assert curves[1] == pytest.approx(curves[0], rel=0.03)
    half.checkpoint(2, tmp_path / "model")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert alone.dtype == torch.bfloat16
    assert same_bits(weights(alone), weights(half.base.model))


def test_what_is_written_at_the_end_is_the_model_alone_and_is_judged_again(job: WorkerJob, tmp_path: Path) -> None:
    """A trial at its end leaves no optimizer state and no masters, and is judged again, by a worker that comes after
    one that died, as it was judged before, to the bit; one on its way leaves all."""
    engine = in_bf16(job)
    engine.admit(full_trial(), None, 1)
    engine.advance(lambda: False)
    engine.checkpoint(2, tmp_path / "on its way")
    engine.target(2, None)
    assert engine.advance(lambda: False) == [2]
    before = engine.evaluate(2, None)
    engine.checkpoint(2, tmp_path / "end")
    engine.drop(2)
    written, kept = ({path.name for path in (tmp_path / name).iterdir()} for name in ("on its way", "end"))
    assert written - kept == {MASTERS, OPTIMIZER} and "model.safetensors" in kept
    assert engine.admit(full_trial(), tmp_path / "end", None).done
    assert engine.advance(lambda: False) == [2] and engine.evaluate(2, None) == before


def test_warming_up_leaves_nothing(job: WorkerJob) -> None:
    """What is run before the first trial, so that it need not pay for compilation, changes neither base nor trial."""
    fresh, warm = make(job), make(job)
    before = weights(warm.base.model)
    warm.warm_up()
    assert same_bits(weights(warm.base.model), before) and warm._run is None
    curves = []
    for engine in (fresh, warm):
        engine.admit(full_trial(), None, None)
        curves.append(curve(engine, 2))
    assert curves[0] == curves[1]


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Makes a package one that is not installed."""
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(params=["bitsandbytes", "torchao"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The one library with 8-bit states that is found; torchao's step, which it compiles, runs as it is written."""
    for name in {"bitsandbytes", "torchao"} - {request.param}:
        hide(monkeypatch, name)
    with torch.compiler.set_stance("force_eager"):
        yield str(request.param)


def test_eight_bit_states_are_resumed_to_the_bit(job: WorkerJob, library: str, tmp_path: Path) -> None:
    """Trained, paused and resumed in 8 bits, nothing is rounded anew; the losses stay close to those of fp32 moments.

    A checkpoint of one optimizer is refused by the other.
    """
    wide = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )  # in blocks of 256
    job = dataclasses.replace(job, model=str(save_model(tmp_path / "wide", wide)))
    engine = make(job, optimizer="adamw-8bit")
    assert optimizers.find("adamw-8bit").__module__.split(".")[0] == library
    engine.admit(full_trial(), None, None)
    whole = curve(engine, 2)
    engine.drop(2)
    engine.admit(full_trial(), None, None)
    first = curve(engine, 2, 7)
    states = optimizers.tensors(engine._alone._optimizer, dict(engine.base.model.named_parameters()))
    assert any(state.dtype == torch.uint8 for state in states.values())
    engine.checkpoint(2, tmp_path / "step-7")
    engine = make(job, optimizer="adamw-8bit")
    engine.admit(full_trial(), tmp_path / "step-7", None)
    assert first + curve(engine, 2) == whole
    plain = make(job)
    plain.admit(full_trial(), None, None)
    assert whole == pytest.approx(curve(plain, 2), rel=0.02)
    plain.drop(2)
    with pytest.raises(TrialFailed, match="another optimizer") as caught:
        plain.admit(full_trial(), tmp_path / "step-7", None)
    assert caught.value.code == "error"
    assert same_bits(weights(plain.base.model), weights(load_base(job.model, "cpu").model))
    plain.admit(full_trial(), None, None)


def test_eight_bits_in_two_processes_are_refused(job: WorkerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit states can't be taken apart and put together to the bit: refused as the worker loads, nobody is started."""
    monkeypatch.setattr(distributed, "COMMAND", ["false"])
    with pytest.raises(ModelError, match="adamw-8bit: trains in one process; use adamw, or processes: 1"):
        make(job, optimizer="adamw-8bit", processes=2)


def test_a_process_that_cannot_start_is_an_error(job: WorkerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process ends before it is ready, loading fails with its exit code instead of waiting for it."""
    monkeypatch.setattr(distributed, "COMMAND", ["false"])
    with pytest.raises(ModelError, match="process 1 of 2 ended: exit code 1"):
        make(job, processes=2)


def test_eight_bits_without_a_library_are_refused(job: WorkerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither library is installed, loading says so in one line, and what to do; where one is broken, why."""
    for name in ("bitsandbytes", "torchao"):
        hide(monkeypatch, name)
    with pytest.raises(ModelError, match=r"needs bitsandbytes or torchao.*use optimizer: adamw") as caught:
        make(job, optimizer="adamw-8bit")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", ModuleType("bitsandbytes.optim"))
    with pytest.raises(ModelError, match="AdamW8bit"):
        make(job, optimizer="adamw-8bit")


# --- which engines, which models --------------------------------------------------------------------------------------


def test_only_the_jobs_methods_get_an_engine(job: WorkerJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that is not searched costs no memory and no check: its engine is not built."""
    assert set(load_engines(job).engines) == {"full"}
    monkeypatch.setattr(FullEngine, "__init__", lambda *_, **__: 1 / 0)
    assert set(load_engines(dataclasses.replace(job, methods=["lora"])).engines) == {"lora"}


def with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has engines take the way of graphs, which the CPU runs kernel by kernel."""
    options = full_engine._options
    monkeypatch.setattr(full_engine, "_options", lambda *a: dataclasses.replace(options(*a), graphs=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_way_of_graphs_computes_the_same(job: WorkerJob, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """With passes split at the hidden states and gradients at a fixed place, steps of several parts have the same
    losses; a trial that left in the middle of its steps leaves nothing to the next one."""
    load = make if dtype == "fp32" else in_bf16
    trial = full_trial(learning_rate=1e-3, batch_size=4)
    plain: Any = load(job)
    plain.micro_tokens = 24
    plain.admit(trial, None, None)
    expected = curve(plain, trial.number, 4)
    with_graphs(monkeypatch)
    engine: Any = load(job)
    engine.micro_tokens = 24
    assert engine._alone.graphs
    engine.admit(dataclasses.replace(trial, seed=9), None, None)
    curve(engine, trial.number, 1)
    engine.drop(trial.number)
    kept = engine.kept().allocated
    assert kept >= 4 * engine.base.model.num_parameters()
    engine.admit(trial, None, None)
    assert curve(engine, trial.number, 4) == pytest.approx(expected, rel=1e-6 if dtype == "fp32" else 2e-2)
    engine.drop(trial.number)
    engine.rest()
    assert engine.kept().allocated == 0


@pytest.mark.parametrize("graphs", [False, True])
def test_models_of_another_attention_train_through_their_own(
    job: WorkerJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    """A model with soft-capped attention scores, which streams do not know, trains through transformers' attention, and
    without graphs."""
    if graphs:
        with_graphs(monkeypatch)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=None,
        attn_logit_softcapping=2.0,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    folder = save_model(tmp_path / "gemma", config)
    real = models.AutoModelForCausalLM.from_pretrained
    # Soft caps are what transformers' eager attention knows and its sdpa does not.
    monkeypatch.setattr(
        models.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: real(*a, **k, attn_implementation="eager"),
    )
    engine = make(job, model=str(folder))
    assert not engine._alone.padding_free
    engine.admit(full_trial(learning_rate=1e-3), None, None)
    ours = curve(engine, 2, 5)
    plain = real(folder, attn_implementation="eager")
    assert ours == pytest.approx(plain_curve(plain, full_trial(learning_rate=1e-3), engine.train, 5), rel=1e-4)
    assert make(job)._alone.padding_free


def test_rows_are_dealt_out_evenly() -> None:
    """Every place goes to one hand, in order, and no hand has more than a longest row above another."""
    lengths = np.array([300, 20, 20, 280, 150, 90, 500])
    for hands in (1, 2, 3, 8):
        dealt = deal(lengths, hands)
        assert sorted(place for hand in dealt for place in hand) == list(range(7))
        assert all(hand == sorted(hand) for hand in dealt)
        tokens = [int(lengths[hand].sum()) for hand in dealt]
        assert max(tokens) - min(tokens) <= 500
