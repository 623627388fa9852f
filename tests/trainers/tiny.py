"""A tiny random model with a real tokenizer, configurations for it, and what tests do with engines again and again."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trainers.lora.adapter_files import named
from trainers.lora.stream import Part
from trainers.messages import TrialConfig
from trainers.splits import Split
from trainers.training import INITIALISATION, derive_seed

WORDS = ["red", "blue", "dog", "cat", "bird", "runs", "sleeps", "sings", "slowly", "over", "the", "a", "house", "river"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sentence(rng: random.Random, low: int, high: int) -> str:
    """A few random words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def save_model(folder: Path, config: Any = None) -> Path:
    """Saves a tiny model (Llama unless a config is given) with its tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([sentence(rng, 5, 10) for _ in range(200)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    config = config or LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def lora_trial(**changes: Any) -> TrialConfig:
    """A LoRA configuration of 21 steps."""
    values = {"learning_rate": 1e-2, "batch_size": 4, "examples": 82, "seed": 7, "rank": 4, "alpha": 8.0}
    return TrialConfig(**{"number": 1, "method": "lora", "targets": "all-linear", **values, **changes})


def full_trial(**changes: Any) -> TrialConfig:
    """A full-parameter configuration of 21 steps."""
    values = {"learning_rate": 3e-3, "batch_size": 4, "examples": 82, "seed": 7, "weight_decay": 0.1}
    return TrialConfig(**{"number": 2, "method": "full", **values, **changes})


def curve(engine: Any, trial: int, steps: int | None = None) -> list[float]:
    """Trains step by step, at most `steps`, and returns the training loss of each."""
    losses: list[float] = []
    while not engine.position(trial).done and (steps is None or len(losses) < steps):
        before = engine.position(trial).step
        while engine.position(trial).step == before:
            engine.advance(lambda: True)
        losses.append(engine.train_loss(trial))
    return losses


@torch.no_grad()
def peft_initialise(model: torch.nn.Module, seed: int) -> None:
    """Gives a PEFT model the initial values that our engine gives a trial of this seed."""
    generator = torch.Generator().manual_seed(derive_seed(seed, INITIALISATION))
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        first = layer.lora_A["default"].weight
        values = torch.empty(first.shape, dtype=torch.float32)
        torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        first.copy_(values)


def adapter(engine: Any, trial: int) -> dict[str, torch.Tensor]:
    """A live trial's adapter under PEFT's names, copied."""
    slot = engine._trials[trial].slot
    return {name: part.detach().clone() for name, part in named(slot, slot.weights).items()}


@torch.no_grad()
def logits(engine: Any, trial: int, ids: torch.Tensor) -> torch.Tensor:
    """The engine's own logits of one example [tokens] with a live trial's adapter."""
    live = engine._trials[trial]
    mask = np.ones(len(ids), dtype=np.uint8)
    mask[0] = 0
    split = Split(ids.numpy().astype(np.int32), np.array([0, len(ids)]), mask)
    with engine._at_work():
        stream, _ = engine._runner.load(split, [Part(live.index, live.slot, [0], [0], 0, 1.0)])
        stream.dropout = False
        return engine._runner.forward(stream, training=False) @ engine.base.head.weight.T


def weights(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of a model's weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, types and bits."""
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )
