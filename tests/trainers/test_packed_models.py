"""Families of models in the packed engine: right or refused in one line; quantised layers are trained through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from tiny import far, logits, lora_trial, peft_over, plain_curve, plain_loss, save_model, train_pack
from torch import nn
from transformers import AutoModelForCausalLM

from trainers.lora.engine import LoraEngine
from trainers.messages import WorkerJob
from trainers.models import ModelError, load_base, load_config, load_engines
from trainers.splits import Split, load_split

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
WINDOW = {"sliding_window": 6}  # the shortest example has 10 tokens
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2, q/k/v biases": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma3, windows": ("Gemma3TextConfig", {"head_dim": 8, "num_hidden_layers": 6, **WINDOW}),
    "mistral, window": ("MistralConfig", {**WINDOW}),
    "phi3, fused qkv": ("Phi3Config", {"num_key_value_heads": 4}),
    "cohere, parallel": ("CohereConfig", {"logit_scale": 1.0, "attention_bias": True}),
}
Make = Callable[[Path], LoraEngine]


def family(folder: Path, name: str, **changes: Any) -> Path:
    """Saves a tiny random model of a class of configurations."""
    return save_model(folder, getattr(transformers, name)(**{**SIZES, **changes}))


@pytest.fixture
def make(data_folder: Path) -> Make:
    """Makes an engine of three slots over a model's folder, in fp32."""

    def engine(folder: Path) -> LoraEngine:
        train, validation = load_split(data_folder, "train"), load_split(data_folder, "validation")
        return LoraEngine(load_base(str(folder), "cpu"), train, validation, 5, 60, slots=3)

    return engine


def own_loss(model: Any, split: Split) -> float:
    """A model's own loss over a split (nats), an example at a time."""
    with torch.no_grad():
        return float(plain_loss(model, split, range(split.rows))) * int(split.mask.sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_trained_as_peft_runs_them(make: Make, tmp_path: Path, name: str) -> None:
    """The engine's loss is the model's own before and after training in a pack; PEFT alone gives the same logits."""
    kind, changes = FAMILIES[name]
    folder = family(tmp_path / "model", kind, **changes)
    engine: Any = make(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = own_loss(model, engine.validation)
    assert engine.evaluate(None, None).nll == pytest.approx(before, rel=1e-5)
    targets = ("attention", "all-linear", "mlp")
    for number, kind in enumerate(targets, start=1):
        engine.admit(lora_trial(number=number, targets=kind, rank=3 * number, batch_size=number + 1), None, None)
    for _ in range(8):
        engine.advance(lambda: True)
    ids = torch.arange(5, 25)
    for number in range(1, 4):
        engine.checkpoint(number, tmp_path / f"adapter-{number}")
        alone = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder), tmp_path / f"adapter-{number}"
        ).eval()
        with torch.no_grad():
            theirs = alone(input_ids=ids[None]).logits[0]
        ours = logits(engine, number, ids)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        after = own_loss(alone, engine.validation)
        assert engine.evaluate(number, None).nll == pytest.approx(after, rel=1e-5)
        assert abs(after - before) > 1e-3 * before, "training moved it"


def job(model: Path, data: Path) -> WorkerJob:
    """A worker's job over a model."""
    times = {"origin_boot_ms": 0, "paid_ms": 0, "work_ms": 0, "checkpoint_ms": 0}
    settings = {"rung_rows": 5, "boot_id": "", "fence": 0, "device": "cpu"}
    return WorkerJob(worker="w", command=[], model=str(model), data=str(data), **settings, **times)


def test_soft_capped_logits_are_refused(tmp_path: Path) -> None:
    """A model whose head is followed by soft-capping is refused from its configuration, in one line."""
    folder = family(tmp_path / "gemma2", "Gemma2Config", head_dim=8, final_logit_softcapping=30.0)
    with pytest.raises(ModelError, match="final_logit_softcapping") as caught:
        load_config(folder)
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft-capped scores": (
        "Gemma2Config",
        {"head_dim": 8, "final_logit_softcapping": None, "attn_logit_softcapping": 5.0},
        "cannot be packed: its attention is not plain causal attention",
    ),
    "layers that keep keywords from attention": ("StableLmConfig", {}, "cannot be packed: its layers do not tell"),
    "an attention of its own": ("FalconConfig", {"new_decoder_architecture": False}, "packed"),
    "a head with a bias": ("PhiConfig", {"num_key_value_heads": 4}, "its head is not a linear layer without bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_packed_are_refused_at_load(tmp_path: Path, data_folder: Path, name: str) -> None:
    """What the packed forward does not know ends the load with one line that names the model, and trains nothing."""
    kind, changes, said = REFUSED[name]
    folder = family(tmp_path / "refused", kind, **changes)
    with pytest.raises(ModelError, match=said) as caught:
        load_engines(job(folder, data_folder))
    assert "\n" not in str(caught.value)


def test_dropout_is_for_training_alone(make: Make, model_folder: Path, tmp_path: Path) -> None:
    """A trial with dropout is judged without it: the loss that PEFT alone gives its adapter."""
    engine: Any = make(model_folder)
    engine.admit(lora_trial(dropout=0.5), None, None)
    for _ in range(6):
        engine.advance(lambda: True)
    engine.checkpoint(1, tmp_path / "adapter")
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter").eval()
    assert engine.evaluate(1, None).nll == pytest.approx(own_loss(alone, engine.validation), rel=1e-5)


class Int8Linear(nn.Linear):
    """A linear layer that keeps int8 weights and one scale, and computes with what they mean, as bitsandbytes does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Dequantises and multiplies."""
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.unit, self.bias)


def quantised(model: Any) -> Any:
    """The model with the linear layers of its decoder's layers made int8, in place."""
    for layer in model.model.layers:
        for module in list(layer.modules()):
            if type(module) is nn.Linear:
                unit = module.weight.detach().abs().max() / 127
                module.weight = nn.Parameter((module.weight.detach() / unit).round().to(torch.int8), False)
                module.unit, module.__class__ = unit, Int8Linear
    return model


def test_quantised_layers_are_trained_through(model_folder: Path, data_folder: Path) -> None:
    """Over layers whose class computes in a way of its own a pack trains as PEFT does, and leaves them as they were."""
    train, validation = load_split(data_folder, "train"), load_split(data_folder, "validation")
    base = load_base(str(model_folder), "cpu")
    quantised(base.model)
    engine: Any = LoraEngine(base, train, validation, 5, 60, slots=2)
    assert not any(packed.plain for packed in engine._packed)
    configs = [lora_trial(number=1, rank=20, weight_decay=0.1), lora_trial(number=2, targets="mlp", batch_size=6)]
    packs = train_pack(engine, configs, 14)
    for config in configs:
        plain = peft_over(quantised(AutoModelForCausalLM.from_pretrained(model_folder)), config)
        losses = plain_curve(plain, config, train, 14)
        trained = {n.replace(".default.", "."): p.detach() for n, p in plain.named_parameters() if p.requires_grad}
        found = packs[config.number]
        assert found.losses == pytest.approx(losses, rel=1e-5)
        assert far(found.adapter, trained) < 1e-5
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
    kinds = [type(module) for module in base.model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert set(kinds) == {Int8Linear}
