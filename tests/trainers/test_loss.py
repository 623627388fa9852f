"""The loss over packed examples, and the check that refuses models it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from trainers import loss
from trainers.loss import chunked_nll, compare_with_own, compared_rows, completion_nll, flat_batch, verify_loss
from trainers.models import Base, load_base
from trainers.named import ModelError
from trainers.splits import Example, Split, load_split

CPU = torch.device("cpu")


@pytest.fixture
def base(model_folder: Path) -> Base:
    """The tiny base model."""
    return load_base(str(model_folder), "cpu")


@pytest.fixture
def examples(data_folder: Path) -> list[Example]:
    """Eight rows."""
    split = load_split(data_folder, "train")
    return [split[row] for row in range(8)]


@pytest.mark.parametrize("chunk", [2**26, 1000])
@pytest.mark.parametrize("head_trained", [False, True])
def test_chunked_loss_and_gradients_equal_torch(
    monkeypatch: pytest.MonkeyPatch, chunk: int, head_trained: bool
) -> None:
    """Loss and both gradients equal torch's cross_entropy, in one chunk and in many, also when scaled later."""
    monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk)
    torch.manual_seed(0)
    results = []
    hidden, weight, targets = torch.randn(37, 16), torch.randn(211, 16), torch.randint(211, (37,))
    for function in (
        chunked_nll,
        lambda h, w, t: nn.functional.cross_entropy(h @ w.T, t, reduction="sum"),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(head_trained)
        value = function(h, w, targets)
        (value / 37).backward()
        results.append((value.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_packing_equals_separate_examples(base: Base, examples: list[Example]) -> None:
    """Eight examples end to end have the loss that transformers gives them one by one, to 1e-6 relative."""
    with torch.no_grad():
        packed = completion_nll(base.decoder, base.head, flat_batch(examples, CPU)).item()
        separate = 0.0
        for example in examples:
            ids = torch.from_numpy(example.ids).long()[None]
            labels = ids.masked_fill(torch.from_numpy(example.mask)[None] == 0, -100)
            separate += base.model(input_ids=ids, labels=labels).loss.item() * int(example.mask.sum())
    assert packed == pytest.approx(separate, rel=1e-6)


class _Leaky(nn.Module):
    """A decoder that switches packing off by passing an attention mask."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        """As the decoder, with a mask of ones."""
        return self.decoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **options)


def test_attention_leak_is_noticed(base: Base, examples: list[Example]) -> None:
    """Attention across examples changes the loss by far more than the tolerance, and the check refuses it."""
    verify_loss(base, examples[:2])
    base.decoder = _Leaky(base.decoder)
    with pytest.raises(ModelError, match="packed examples"):
        verify_loss(base, examples[:2])


def test_changed_logits_are_noticed(base: Base, examples: list[Example]) -> None:
    """A function between head and loss is noticed by the figures, whatever a config calls it."""
    base.model.lm_head.register_forward_hook(lambda _m, _i, logits: 2.0 * torch.tanh(logits / 2.0))
    with pytest.raises(ModelError, match="the model's own"):
        verify_loss(base, examples[:2])


def test_soft_capped_gemma_is_refused(tmp_path: Path) -> None:
    """Gemma 2 caps its logits: random weights are too small to show it, so its config decides."""
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_implementation="eager",
    )
    folder = save_model(tmp_path / "gemma", config)
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        load_base(str(folder), "cpu")


def test_logits_are_made_for_completion_tokens_alone(
    base: Base, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head meets as many hidden states as there are completion tokens, not one a token."""
    seen = []
    monkeypatch.setattr(loss, "chunked_nll", lambda h, *_: seen.append(h.shape[0]) or h.sum())
    batch = flat_batch(examples, CPU)
    completion_nll(base.decoder, base.head, batch)
    assert seen == [sum(int(e.mask.sum()) for e in examples)] == [batch.completion_tokens]
    assert batch.completion_tokens < batch.tokens


def test_base_is_frozen_and_plain(base: Base, load: Callable[[], Any]) -> None:
    """The loaded base is in fp32 on the CPU, wholly frozen; `load_engines` tells its size."""
    assert not any(p.requires_grad for p in base.model.parameters())
    assert base.model.dtype == torch.float32
    loaded = load()
    plain = AutoModelForCausalLM.from_pretrained(base.name)
    assert loaded.parameters == plain.num_parameters()
    assert loaded.device == "cpu"
    assert sorted(loaded.linear_shapes) == [[32, 16, 4], [32, 32, 4], [32, 48, 4], [48, 32, 2]]


@pytest.mark.smollm
def test_a_few_certain_tokens_are_no_mismatch() -> None:
    """Labels of a token or two, and completions that a model is sure of: bf16's rounding is more than 1 % of those."""
    folder = Path(__file__).parents[2] / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("models/smollm2-135m is not converted")
    base = load_base(str(folder), "cpu")
    base.model.to(torch.bfloat16)

    def row(prompt: str, completion: str) -> Example:
        ids = [base.tokenizer(text)["input_ids"] for text in (prompt, completion)]
        mask = [0] * len(ids[0]) + [1] * len(ids[1])
        return Example(np.array(ids[0] + ids[1], dtype=np.int32), np.array(mask, dtype=np.uint8))

    sure = [row("a b c d e f g h i j k l m n o p q", f" {x}") for x in "rr"]
    verify_loss(base, sure)
    nll = completion_nll(base.decoder, base.head, flat_batch(sure, CPU)).item()
    # What rounds a logit of 16 by 0.06 may change one of the two by so much; what changes both by 0.2 is no rounding.
    compare_with_own(base, sure, nll + 0.06)
    with pytest.raises(ModelError, match="the model's own"):
        compare_with_own(base, sure, nll + 0.4)


def test_losses_are_compared_over_enough_tokens() -> None:
    """As many rows as have 16 tokens, from two, so that they could see each other, to eight."""
    lengths = np.full(20, 5)

    def split(rows: int, completion: int) -> Split:
        mask = np.array([[0] * (5 - completion) + [1] * completion] * rows, dtype=np.uint8)
        return Split(np.zeros(5 * rows, dtype=np.int32), np.append(0, np.cumsum(lengths[:rows])), mask.ravel())

    assert compared_rows(split(20, 4)) == [0, 1, 2, 3]
    assert compared_rows(split(20, 1)) == list(range(8))
    assert compared_rows(split(3, 1)) == [0, 1, 2]
    assert compared_rows(split(1, 1)) == [0, 0]
