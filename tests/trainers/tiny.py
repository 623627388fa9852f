"""A tiny random model with a real tokenizer, configurations for it, and what tests do with engines again and again."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trainers.checkpoints import MOMENTS
from trainers.lora.adapter_files import named
from trainers.lora.stream import Part
from trainers.messages import TrialConfig
from trainers.splits import Split, batches
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
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                # transformers starts biases at zero, where a lost one could not be seen.
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
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


def plain_loss(model: Any, split: Split, rows: Any) -> torch.Tensor:
    """Mean loss over the completion tokens of a batch, one example at a time, by transformers alone."""
    total, count = torch.zeros(()), 0
    for example in (split[int(row)] for row in rows):
        logits = model(input_ids=torch.from_numpy(example.ids).long()[None]).logits[0, :-1]
        wanted = torch.from_numpy(example.ids).long()[1:].masked_fill(torch.from_numpy(example.mask)[1:] == 0, -100)
        total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
        count += int(example.mask.sum())
    return total / count


def plain_curve(model: Any, config: TrialConfig, train: Split, steps: int) -> list[float]:
    """A loop as people write it: AdamW, clip_grad_norm_, LambdaLR."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    plan = batches(config, train.rows)
    warm = math.ceil(config.warmup * len(plan))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: (s + 1) / warm if s < warm else (len(plan) - s) / (len(plan) - warm)
    )
    losses = []
    for rows in plan[:steps]:
        loss = plain_loss(model, train, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


NAMES = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


def peft_over(model: Any, config: TrialConfig) -> Any:
    """PEFT's own model of a trial over a Llama, from the initial values that the engine gives it."""
    names = NAMES.get(config.targets or "") or [*NAMES["attention"], *NAMES["mlp"]]
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names, task_type="CAUSAL_LM")
    plain = get_peft_model(model, settings)
    peft_initialise(plain, config.seed)
    return plain


def in_double(model: Any) -> Any:
    """The Llama in float64 throughout: transformers' own norm computes in fp32, torch's does not."""
    model.double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


@dataclass
class Trained:
    """What became of a trial: the loss of each step, its adapter and AdamW's moments under PEFT's names."""

    losses: list[float]
    adapter: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def taken(engine: Any, trial: int, losses: list[float]) -> Trained:
    """Copies what a live trial is now."""
    slot = engine._trials[trial].slot
    moments = {f"{n}.{m}": t.clone() for m in MOMENTS for n, t in named(slot, slot.moments[m]).items()}
    return Trained(losses, adapter(engine, trial), moments)


def train_pack(engine: Any, configs: Sequence[TrialConfig], steps: int) -> dict[int, Trained]:
    """Trains trials together, each for `steps` steps at most; a trial that has them leaves and the others go on."""
    losses: dict[int, list[float]] = {config.number: [] for config in configs}
    for config in configs:
        engine.admit(config, None, None)
    found: dict[int, Trained] = {}
    while len(found) < len(configs):
        engine.advance(lambda: True)
        for number in losses.keys() - found.keys():
            if engine.position(number).step > len(losses[number]):
                losses[number].append(engine.train_loss(number))
            if len(losses[number]) == steps or engine.position(number).done:
                found[number] = taken(engine, number, losses[number])
                engine.drop(number)
    return found


def apart(left: Any, right: Any) -> float:
    """The largest difference between two lists of numbers or tensors, relative where they are larger than one."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        return max(apart(left[name], right[name]) for name in left)
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (left, right))
    assert a.shape == b.shape
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())


def far(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The distance of two adapters, relative to the second's norm."""
    a, b = (torch.cat([t.flatten().double() for t in tensors.values()]) for tensors in (left, right))
    return float((a - b).norm() / b.norm())


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


def equal(found: Trained, expected: Trained) -> None:
    """Asserts that losses, adapter and moments are the same to the bit."""
    assert found.losses == expected.losses
    assert same_bits(found.adapter, expected.adapter)
    assert same_bits(found.moments, expected.moments)
    assert all(part.abs().sum() > 0 for part in found.adapter.values())
