"""Families of models in the packed engine: right or refused in one line; quantised layers are trained through."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from tiny import far, logits, lora_trial, peft_over, plain_curve, plain_loss, save_model, train_pack
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trainers.lora.engine import LoraEngine
from trainers.messages import WorkerJob
from trainers.models import load_base, load_config, load_engines, skeleton
from trainers.named import ModelError
from trainers.quantised import check_quantised
from trainers.shapes import shape_of
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


@pytest.fixture
def quantise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Saves a tiny model as transformers and bitsandbytes save it quantised, and returns its folder."""
    # On some CPUs bitsandbytes rounds the scales to bf16 at the first forward pass without gradients.
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)

    def save(**settings: Any) -> Path:
        folder = tmp_path / "quantised"
        plain = family(tmp_path / "plain", "LlamaConfig", hidden_size=64, intermediate_size=128)
        wanted = BitsAndBytesConfig(**settings)
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=wanted).save_pretrained(folder)
        AutoTokenizer.from_pretrained(plain).save_pretrained(folder)
        return folder

    return save


SKIPS = {"llm_int8_skip_modules": ["up_proj"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def test_packs_train_over_a_quantised_base_as_peft_does(quantise: Callable[..., Path], data_folder: Path) -> None:
    """Over weights that bitsandbytes quantised a pack trains as PEFT does, and leaves the base as it was."""
    folder = quantise(**NF4)
    train, validation = load_split(data_folder, "train"), load_split(data_folder, "validation")
    base = load_base(str(folder), "cpu")
    kinds = [type(module) for module in base.model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert {kind.__module__.split(".")[0] for kind in kinds} == {"bitsandbytes"}
    engine: Any = LoraEngine(base, train, validation, 5, 60, slots=2)
    assert not any(packed.plain for packed in engine._packed)
    configs = [lora_trial(number=1, rank=20, weight_decay=0.1), lora_trial(number=2, targets="mlp", batch_size=6)]
    packs = train_pack(engine, configs, 14)
    for config in configs:
        plain = peft_over(AutoModelForCausalLM.from_pretrained(folder), config)
        losses = plain_curve(plain, config, train, 14)
        trained = {n.replace(".default.", "."): p.detach() for n, p in plain.named_parameters() if p.requires_grad}
        found = packs[config.number]
        assert found.losses == pytest.approx(losses, rel=1e-5)
        assert far(found.adapter, trained) < 1e-5
        assert np.mean(losses[-3:]) < np.mean(losses[:3])
    after = [type(module) for module in base.model.model.layers.modules() if isinstance(module, nn.Linear)]
    assert after == kinds


def test_what_cannot_train_over_a_quantised_base_is_refused(
    quantise: Callable[..., Path], data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full training, layers of 8 bits, a quantised head, a missing library: a line each. LoRA over 4 bits loads."""
    folder = quantise(**NF4)
    full, lora = (dataclasses.replace(job(folder, data_folder), methods=[method]) for method in ("full", "lora"))
    assert load_engines(lora).engines.keys() == {"lora"}
    with pytest.raises(ModelError, match=r"quantised \(bitsandbytes\).*use search.method: \[lora\]") as caught:
        load_engines(full)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(ModelError, match=r"can't be read.*pip install") as caught:
        check_quantised("m", skeleton(load_config(folder)), ["lora"])
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"fp8 rounds whole ones; use search.precision: bf16"):
        check_quantised("m", skeleton(load_config(folder)), ["lora"], "fp8")
    for settings, said in (({"load_in_8bit": True}, "use a base of 4 bits"), (NF4 | SKIPS, "head is quantised")):
        other = skeleton(load_config(quantise(**settings)))
        with pytest.raises(ModelError, match=said):
            check_quantised("m", other, ["lora"])


@pytest.mark.parametrize("storage", ["uint8", "float16"])
def test_a_quantised_base_is_loaded_as_transformers_loads_it(quantise: Callable[..., Path], storage: str) -> None:
    """Loading changes no loss, whatever type the codes are stored as."""
    folder = quantise(**NF4, bnb_4bit_quant_storage=getattr(torch, storage))
    ids = torch.arange(5, 25)[None]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(load_base(str(folder), "cpu").model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("skips", [None, ["lm_head", "model.layers.1", "up_proj"]])
def test_a_quantised_base_is_forecast_as_small_as_it_is(quantise: Callable[..., Path], skips: list[str] | None) -> None:
    """Predicted bytes of the base weights are what the loaded model holds, within 3 %, in bf16 beside its linears."""
    folder = quantise(**NF4, llm_int8_skip_modules=skips)
    predicted = shape_of(skeleton(load_config(folder))).base_bytes
    model = AutoModelForCausalLM.from_pretrained(folder)
    held = sum(p.numel() * (2 if p.is_floating_point() else 1) for p in model.parameters())
    linears = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    held += sum(m.weight.quant_state.absmax.numel() * m.weight.quant_state.absmax.element_size() for m in linears)
    assert predicted == pytest.approx(held, rel=0.03)
