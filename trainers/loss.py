"""Loss of a padding-free batch: the sum of negative log-likelihoods over completion tokens.

Examples stand end to end in one row [1, T] whose position ids restart at each. transformers keeps attention inside
each example by these alone, provided that there is neither an attention mask nor a cache. Only hidden states that
predict a completion token meet the head, a chunk at a time, so the logits of a batch never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trainers.lora.head import chunk_loss, chunk_of
from trainers.models import Base
from trainers.named import ModelError
from trainers.splits import Example, Split

CHUNK_LOGITS = 2**26  # logits computed at once: 256 MiB in fp32
# How far our loss may be from the model's own: a share of it, and so many nats for each completion token, which add up
# as noise does. bf16 rounds differently in every kernel shape: logits of 16 and more by 0.06, however small the loss.
TOLERANCE = {torch.float64: (1e-4, 1e-6), torch.float32: (1e-4, 1e-4), torch.bfloat16: (1e-2, 0.1)}
COMPARED_TOKENS, COMPARED_ROWS = 16, 8  # completion tokens that losses are compared over, in no more than so many rows
COMPARED_LENGTH = 2048  # and tokens, unless two rows are longer: the model's own attention may take the square of that


@dataclass(frozen=True)
class FlatBatch:
    """Examples end to end: `ids` and `positions` int64 [1, T]; hidden state `predict[i]` predicts `targets[i]`, [P]."""

    ids: torch.Tensor
    positions: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor

    @property
    def tokens(self) -> int:
        """Input tokens, T."""
        return self.ids.shape[1]

    @property
    def completion_tokens(self) -> int:
        """Tokens the loss is over, P."""
        return self.targets.shape[0]


def flat_batch(examples: Sequence[Example], device: torch.device) -> FlatBatch:
    """Puts examples end to end on a device."""
    ids = np.concatenate([e.ids for e in examples]).astype(np.int64)
    mask = np.concatenate([e.mask for e in examples])
    positions = np.concatenate([np.arange(len(e.ids)) for e in examples])
    trained = np.flatnonzero(mask)

    def move(array: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return FlatBatch(move(ids)[None], move(positions)[None], move(trained - 1), move(ids[trained]))


def _chunks(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[list[slice], bool]:
    """Spans of tokens that meet the head at once, and whether all are of the one shape that is compiled for a GPU."""
    count = hidden.shape[0]
    rows = chunk_of(weight.shape[0], "cuda") if hidden.is_cuda else max(1, CHUNK_LOGITS // weight.shape[0])
    compiled = hidden.is_cuda and count % rows == 0
    return [slice(at, min(at + rows, count)) for at in range(0, count, rows)], compiled


class _ChunkedNll(torch.autograd.Function):
    """Linear layer and cross-entropy in one; gradients are computed along with the loss, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over chunks in fp32, whatever the weight is in.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        spans, compiled = _chunks(hidden, weight)
        run = chunk_loss(compiled)
        for span in spans:
            part = hidden[span]
            losses, slope = run(part @ weight.T, targets[span], weights[span], any(ctx.needs_input_grad[:2]))
            total += losses.sum()
            if for_hidden is not None:
                for_hidden[span] = slope @ weight
            if for_weight is not None:
                for_weight += slope.T @ part
        ctx.save_for_backward(for_hidden, None if for_weight is None else for_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        for_hidden, for_weight = ctx.saved_tensors
        scale = outer[0]
        return (
            None if for_hidden is None else for_hidden * scale.to(for_hidden.dtype),
            None if for_weight is None else for_weight * scale.to(for_weight.dtype),
            None,
            None,
        )


def chunked_nll(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of cross-entropies (nats, fp32 scalar) of `hidden` [P, d] through `weight` [V, d] against `targets` [P].

    Each token's is multiplied by its `weights` [P], where given.
    """
    if weights is None:
        weights = torch.ones(targets.shape, dtype=torch.float32, device=hidden.device)
    if not torch.is_grad_enabled():
        return (token_nll(hidden, weight, targets) * weights).sum()
    loss: torch.Tensor = _ChunkedNll.apply(hidden, weight, targets, weights)
    return loss


@torch.no_grad()
def token_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy (nats) of each of `hidden` [P, d] through `weight` [V, d] against `targets` [P], fp32 [P]."""
    spans, compiled = _chunks(hidden, weight)
    run = chunk_loss(compiled)
    ones = torch.ones(targets.shape, dtype=torch.float32, device=hidden.device)
    return torch.cat([run(hidden[span] @ weight.T, targets[span], ones[span], False)[0] for span in spans])


def completion_nll(decoder: nn.Module, head: nn.Linear, batch: FlatBatch) -> torch.Tensor:
    """Sum of negative log-likelihoods (nats, fp32 scalar) over the batch's completion tokens."""
    # A cache or an attention mask would switch the detection of packed examples off, and they would see each other.
    hidden = decoder(input_ids=batch.ids, position_ids=batch.positions, use_cache=False).last_hidden_state
    return chunked_nll(hidden[0, batch.predict], head.weight, batch.targets)


def compared_rows(split: Split) -> list[int]:
    """The rows over which losses are compared: two at least, since packed ones must not see each other."""
    rows = [0, min(1, split.rows - 1)]
    tokens = int(split.completions[rows].sum())
    while tokens < COMPARED_TOKENS and len(rows) < min(COMPARED_ROWS, split.rows):
        if split.lengths[[*rows, len(rows)]].sum() > COMPARED_LENGTH:
            break
        rows.append(len(rows))
        tokens += int(split.completions[rows[-1]])
    return rows


@torch.no_grad()
def verify_loss(base: Base, examples: Sequence[Example]) -> None:
    """Compares the loss of examples in one flat batch with the model's own, one by one.

    Raises ModelError on a mismatch: changed logits, or layers through which packed examples see each other.
    """
    try:
        ours = completion_nll(base.decoder, base.head, flat_batch(examples, base.device)).item()
    except TypeError as error:
        raise ModelError(f"{base.name}: does not take position ids ({error}); use another model") from error
    compare_with_own(base, examples, ours)


@torch.no_grad()
def compare_with_own(base: Base, examples: Sequence[Example], ours: float) -> None:
    """Compares `ours` (nats), the loss of examples packed together, with the model's own. Raises ModelError."""
    theirs, count = 0.0, 0
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64)).to(base.device)[None]
        trained = torch.from_numpy(example.mask).to(base.device)[None].bool()
        loss = base.model(input_ids=ids, labels=ids.masked_fill(~trained, -100), use_cache=False).loss
        completion = int(example.mask.sum())
        theirs, count = theirs + loss.item() * completion, count + completion
    share, nats = TOLERANCE[base.model.dtype]
    if not abs(ours - theirs) <= share * theirs + nats * math.sqrt(count):
        raise ModelError(
            f"{base.name}: the loss over packed examples is {ours / count:.5f} where the model's own is "
            f"{theirs / count:.5f}: its logits or its attention are not as this program takes them; use another model"
        )
