"""Scores by example and generated text of trials in a pack: as transformers and PEFT alone give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from tiny import curve, lora_trial, plain_loss, same_bits, save_model, taken
from transformers import AutoModelForCausalLM

from trainers.engine import TrialFailed
from trainers.generation import greedy
from trainers.lora import engine as lora_engine
from trainers.lora.engine import LoraEngine
from trainers.models import load_base
from trainers.splits import load_split

# PEFT 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2, q/k/v biases": ("Qwen2Config", {}),
    "phi3, fused qkv": ("Phi3Config", {"num_key_value_heads": 4}),
}
NEW_TOKENS = 12
OBSERVED = lora_trial(number=1, rank=3, dropout=0.3, batch_size=2)
NEIGHBOUR = lora_trial(number=2, rank=20, targets="mlp", batch_size=5, seed=3)
Make = Callable[..., Any]


@pytest.fixture
def make(data_folder: Path) -> Make:
    """Makes an engine of three slots over a model's folder, in fp32."""

    def engine(folder: Path) -> LoraEngine:
        train, validation = load_split(data_folder, "train"), load_split(data_folder, "validation")
        return LoraEngine(load_base(str(folder), "cpu"), train, validation, 5, 60, slots=3)

    return engine


def prompts_of(split: Any) -> list[Any]:
    """The rows' tokens before their completions."""
    return [split[row].ids[split[row].mask == 0] for row in range(split.rows)]


@torch.no_grad()
def by_hand(model: Any, prompt: Any, eos: int, count: int = NEW_TOKENS) -> list[int]:
    """Greedy decoding without batches, padding, or a cache."""
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    found: list[int] = []
    for _ in range(count):
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        if token == eos:
            break
        found.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_text_are_those_of_the_exported_adapter(make: Make, tmp_path: Path, name: str) -> None:
    """Of trials in a pack and of the base: each row's loss, and the tokens of PEFT's `generate` and of a plain loop."""
    kind, changes = FAMILIES[name]
    folder = save_model(tmp_path / "model", getattr(transformers, kind)(**{**SIZES, **changes}))
    engine = make(folder)
    for config in (OBSERVED, NEIGHBOUR):
        engine.admit(config, None, None)
    for _ in range(8):
        engine.advance(lambda: True)
    rows, eos = [7, 0, 3, 11, 4, 4], engine.base.tokenizer.eos_token_id
    prompts = prompts_of(engine.validation)
    seen = []
    for trial in (None, 1, 2):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        if trial is not None:
            engine.checkpoint(trial, tmp_path / f"adapter-{trial}")
            model = PeftModel.from_pretrained(model, tmp_path / f"adapter-{trial}")
        model.eval()
        with torch.no_grad():
            expected = [
                float(plain_loss(model, engine.validation, [row])) * int(engine.validation[row].mask.sum())
                for row in rows
            ]
        assert engine.score(trial, engine.validation, rows) == pytest.approx(expected, rel=1e-5)
        every = engine.score(trial, engine.validation, range(engine.validation.rows))
        assert every.sum() == pytest.approx(engine.evaluate(trial, None).nll, rel=1e-6)
        texts = engine.generate(trial, prompts, NEW_TOKENS)
        assert texts == [by_hand(model, prompt, eos) for prompt in prompts]
        settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": eos}
        for prompt, text in zip(prompts[:4], texts, strict=False):
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            own = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
            assert [token for token in own.tolist() if token != eos] == text
        seen.append(str(texts))
    assert len(set(seen)) == 3, "training moved them, each its own way"


def test_judging_one_trial_changes_no_bit_of_another(make: Make, model_folder: Path) -> None:
    """A trial with dropout, half-way through a batch, trains on to the bit as if nobody had been judged beside it.

    The base's weights and modules are what they were, and the judged trial's scores do not depend on who is there.
    """
    found = []
    for disturb in (False, True):
        engine = make(model_folder)
        before = {name: (type(m), len(m._forward_hooks)) for name, m in engine.base.model.named_modules()}
        for config in (OBSERVED, NEIGHBOUR):
            engine.admit(config, None, None)
        losses = curve(engine, 1, 4)
        if disturb:
            prompts = prompts_of(engine.validation)
            for trial in (2, None, 1):
                engine.score(trial, engine.validation, [0, 1])
                engine.generate(trial, prompts[:2], 3)
        assert {name: (type(m), len(m._forward_hooks)) for name, m in engine.base.model.named_modules()} == before
        found.append(taken(engine, 1, losses + curve(engine, 1, 6)))
        scores = engine.score(1, engine.validation, range(6))
        engine.drop(2)
        assert engine.score(1, engine.validation, range(6)).tolist() == scores.tolist()
    assert found[0].losses == found[1].losses
    assert same_bits(found[0].adapter, found[1].adapter)
    assert same_bits(found[0].moments, found[1].moments)


def test_a_trial_that_cannot_be_scored_fails_alone(
    make: Make, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite, and a lack of memory while generating, free the trial's slot and no other."""
    engine = make(model_folder)
    for config in (OBSERVED, NEIGHBOUR, lora_trial(number=3)):
        engine.admit(config, None, None)
    with torch.no_grad():
        engine._trials[2].slot.weights.fill_(float("nan"))
    with pytest.raises(TrialFailed, match="scoring: loss nan") as caught:
        engine.score(2, engine.validation, [0])
    assert (caught.value.trial, caught.value.code) == (2, "diverged")

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(lora_engine, "greedy", failing)
    with pytest.raises(TrialFailed, match=r"generation: .* Tried to allocate") as caught:
        engine.generate(3, prompts_of(engine.validation), 2)
    assert (caught.value.trial, caught.value.code) == (3, "out_of_memory")
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(None, prompts_of(engine.validation), 2)
    assert list(engine._trials) == [1]
    assert np.isfinite(engine.score(1, engine.validation, [0])).all()


def test_greedy_decoding_ends_at_every_end_token(model_folder: Path, data_folder: Path) -> None:
    """At the ids that are given, the tokenizer's own and those of the folder's generation config, one or several."""
    base = load_base(str(model_folder), "cpu")
    prompts = prompts_of(load_split(data_folder, "validation"))
    base.model.generation_config.eos_token_id = None
    whole = greedy(base.model, base.tokenizer, prompts, NEW_TOKENS, 60)
    first, second = whole[0][2], whole[1][1]
    assert first != second and base.tokenizer.eos_token_id not in (first, second)

    def until(*ends: int) -> list[list[int]]:
        return [text[: min([text.index(end) for end in ends if end in text], default=len(text))] for text in whole]

    assert greedy(base.model, base.tokenizer, prompts, NEW_TOKENS, 60, [first]) == until(first) != whole
    assert greedy(base.model, base.tokenizer, prompts, NEW_TOKENS, 60, [first, second]) == until(first, second)
    for own in (second, [second, base.tokenizer.eos_token_id]):
        base.model.generation_config.eos_token_id = own
        assert greedy(base.model, base.tokenizer, prompts, NEW_TOKENS, 60) == until(second)
        assert greedy(base.model, base.tokenizer, prompts, NEW_TOKENS, 60, [first]) == until(first, second)


def test_greedy_decoding_leaves_the_models_own_settings_out(model_folder: Path, data_folder: Path) -> None:
    """Temperature and a penalty on repetition, which model folders bring along, change nothing and are kept.

    The order of the prompts and how many go together change nothing either.
    """
    base = load_base(str(model_folder), "cpu")
    prompts = prompts_of(load_split(data_folder, "validation"))
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(by_hand(base.model, prompts[0], -1)[5])
    eos = base.tokenizer.eos_token_id
    expected = [by_hand(base.model, prompt, eos) for prompt in prompts]
    assert len({len(text) for text in expected}) > 1, "some end by themselves"
    own = base.model.generation_config
    own.repetition_penalty, own.temperature, own.top_p, own.max_length = 5.0, 0.6, 0.8, 21
    for budget in (1, 60, 10_000):
        assert greedy(base.model, base.tokenizer, prompts, NEW_TOKENS, budget) == expected
    assert greedy(base.model, base.tokenizer, prompts[::-1], NEW_TOKENS, 60) == expected[::-1]
    assert greedy(base.model, base.tokenizer, prompts[:3], 2, 60) == [text[:2] for text in expected[:3]]
    assert base.model.generation_config is own and own.repetition_penalty == 5.0
