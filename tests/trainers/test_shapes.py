"""What is read off a model without weights, against the model with its weights and against torch's own partitioner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainers.lora import adamw
from trainers.lora.attention import NAME, packed, packed_attention
from trainers.lora.bank import Layout, Slot
from trainers.lora.linear import PackedGroup, pack, unpack
from trainers.lora.models import find_groups
from trainers.lora.runner import CpuRunner
from trainers.lora.stream import Part
from trainers.memory import Shape, layer_token, slot_bytes
from trainers.messages import Targets, TrialConfig
from trainers.models import Base
from trainers.shapes import layers_of, shape_of
from trainers.splits import Split

TOKENS = 128
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 24},
    "Mistral": {},
    "Gemma": {"head_dim": 24},
    "Gemma3Text": {"head_dim": 24},
    "Phi3": {},
    "Cohere": {"logit_scale": 1.0},
    "Olmo2": {},
}


def config_of(family: str, layers: int) -> Any:
    """A tiny configuration of a family."""
    return getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], num_hidden_layers=layers)


def shape(family: str, layers: int) -> Shape:
    """Its shape, from the meta device."""
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config_of(family, layers)))


@torch.library.custom_op("sweeptest::attention", mutates_args=())
def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The shapes of trainers/lora/attention_kernels.py's operator, and zeros."""
    heads, tokens, width = q.shape
    return q.new_zeros((tokens, heads, width)), q.new_zeros((heads, tokens), dtype=torch.float32)


@attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, width = q.shape
    return q.new_empty((tokens, heads, width)), q.new_empty((heads, tokens), dtype=torch.float32)


@torch.library.custom_op("sweeptest::attention_backward", mutates_args=())
def attention_backward(
    slope: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeros."""
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@attention_backward.register_fake
def _(slope: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: Any, lse: Any) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention.register_autograd(
    lambda ctx, slope, _: torch.ops.sweeptest.attention_backward(slope, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


@pytest.fixture
def like_the_gpu() -> Iterator[None]:
    """Attention that keeps what the GPU's keeps."""

    def run(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, **___: Any) -> Any:
        return torch.ops.sweeptest.attention(q[0], k[0], v[0])[0][None], None

    ALL_ATTENTION_FUNCTIONS.register(NAME, run)
    torch._dynamo.reset()
    yield
    ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
    torch._dynamo.reset()


def kept_bytes(model: Any, run: Callable[[], Any]) -> float:
    """Bytes a token that autograd keeps of a forward pass, weights and buffers left out."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in weights:
            kept[at] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / TOKENS


def compiled(family: str, layers: int, rank: int, checkpointing: bool = False) -> float:
    """Bytes a token that a family's compiled layers keep, with packed adapters of a rank, or plain ones for 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, layers), dtype=torch.bfloat16)
    model.requires_grad_(not rank).train(not rank)
    base = Base(family, model, None, model.get_decoder(), model.lm_head, torch.device("cpu"))  # type: ignore[arg-type]
    groups = find_groups(base) if rank else []
    at_work = [PackedGroup(group) for group in groups]
    runner = CpuRunner(base, at_work, 1)
    slot = Slot.fresh(trial(rank), Layout(groups), torch.bfloat16, torch.device("cpu")) if rank else None
    ids = (np.arange(TOKENS) % 50).astype(np.int32)
    split = Split(ids, np.array([0, TOKENS // 2, TOKENS]), np.ones(TOKENS, dtype=np.uint8))
    stream, _ = runner.load(split, [Part(0 if rank else 1, slot, [0, 1], [0, 1], 0, 1.0)])
    for group in at_work:
        pack(group)
        group.stream = stream
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for layer in layers_of(base.decoder):
        layer.compile(dynamic=True, backend="aot_eager_decomp_partition")

    def run() -> Any:
        # As a leaf, since torch's compiler warns of the gradient of others.
        embedded = model.get_input_embeddings()(stream.ids).detach().requires_grad_(True)
        with packed(model):
            return base.decoder(
                inputs_embeds=embedded,
                position_ids=stream.positions,
                use_cache=False,
                cu_seq_lens_q=stream.lengths,
            )

    found = kept_bytes(model, run)
    for group in at_work:
        unpack(group)
    return found


def trial(rank: int, targets: Targets = "all-linear") -> TrialConfig:
    """A LoRA configuration."""
    values: dict[str, Any] = {"learning_rate": 1e-4, "batch_size": 2, "examples": 8, "seed": 0, "alpha": 8.0}
    return TrialConfig(number=0, method="lora", targets=targets, rank=rank, **values)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, as its compiler is imported
@pytest.mark.parametrize(
    ("family", "rank"),
    [("Llama", 16), ("Qwen3", 16), ("Gemma3Text", 16), ("Phi3", 16), ("Cohere", 16), ("Llama", 0), ("Gemma3Text", 0)],
)
def test_layers_keep_what_is_predicted(family: str, rank: int, like_the_gpu: None) -> None:
    """Proves, for compiled layers with packed adapters and for trained ones, that what a token leaves for backward is
    what torch's partitioner keeps, to 0.3 %: the statistics of norms that take a mean are not counted."""
    two, three = (compiled(family, layers, rank) for layers in (2, 3))
    seen = shape(family, 3)
    assert layer_token(seen, rank) / 3 == pytest.approx(three - two, rel=3e-3)
    outside = seen.outside if rank else seen.outside_trained
    assert outside == pytest.approx(3 * two - 2 * three, rel=0.02, abs=8)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_checkpointed_layers_keep_their_input(like_the_gpu: None) -> None:
    """Proves that a checkpointed layer keeps one hidden state a token, in bf16."""
    two, three = (compiled("Llama", layers, 0, checkpointing=True) for layers in (2, 3))
    assert three - two == pytest.approx(2 * 64, abs=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family: str) -> None:
    """Proves parameters, embedding, tying, layers and linears against the model with its weights."""
    model = AutoModelForCausalLM.from_config(config_of(family, 3))
    seen = shape(family, 3)
    assert seen.parameters == sum(p.numel() for p in model.parameters())
    assert seen.embedding == seen.vocabulary * seen.hidden == model.get_input_embeddings().weight.numel()
    assert seen.tied == (model.lm_head.weight is model.get_input_embeddings().weight)
    assert (seen.layers, seen.hidden, seen.vocabulary, seen.heads) == (3, 64, 512, 3 * 4)
    inside = [m.weight.numel() for m in layers_of(model.get_decoder())[0].modules() if isinstance(m, torch.nn.Linear)]
    assert sum(i * o * count for shapes in seen.linears.values() for i, o, count in shapes) == 3 * sum(inside)


@pytest.mark.parametrize("targets", ["attention", "mlp", "all-linear"])
def test_adapters_are_counted(targets: Targets) -> None:
    """Proves a slot's bytes against the buffers that the engine allocates: bf16 copies are 2 of the 18 a parameter."""
    model = AutoModelForCausalLM.from_config(config_of("Qwen3", 2), dtype=torch.bfloat16)
    base = Base("x", model, None, model.get_decoder(), model.lm_head, torch.device("cpu"))  # type: ignore[arg-type]
    slot = Slot.fresh(trial(20, targets), Layout(find_groups(base)), torch.bfloat16, torch.device("cpu"))
    adamw.step(slot, 1e-3)
    buffers = [slot.weights, slot.gradient, slot.copy, *slot.moments.values()]
    assert slot_bytes(shape("Qwen3", 2), targets, 20) == sum(t.untyped_storage().nbytes() for t in buffers)


def test_constants_are_the_engines() -> None:
    """Proves that the torch-free planner counts with what the engines compute with."""
    from trainers import memory, training
    from trainers.lora import bank, head, probe

    assert training.MICRO_TOKENS["cuda"] == memory.MICRO_TOKENS
    assert (memory.SHORTEST_STREAM, memory.ADAPTER_BYTES) == (probe.SHORTEST, probe.BYTES)
    assert [memory.padded(rank) for rank in range(1, 300)] == [bank.padded(rank) for rank in range(1, 300)]
    for vocabulary in (512, 32_000, 49_152, 128_256, 152_064, 262_144, 600_000):
        assert memory.head_rows(vocabulary) == head.chunk_of(vocabulary, "cuda")
