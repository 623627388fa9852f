"""The loss of a stream and its gradient, a chunk of scored tokens at a time; the head is frozen.

Only hidden states that predict a completion token meet the head, and each chunk's gradient is computed while its logits
are there, so the logits of a stream never exist at once and nothing is computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

LOGITS = {"cpu": 2**25, "cuda": 2**28}  # computed at once: 128 MiB in fp32, 512 MiB in bf16
SMALLEST = 512  # tokens of a chunk, however large the vocabulary


@dataclass
class Targets:
    """`trainers.lora.stream.Scored` on the device; `owners` are slots, `weights` multiply each token's loss."""

    predict: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    weights: torch.Tensor


def _eager(
    logits: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weighted losses [n] of logits [n, V], and the gradient of their sum for the logits."""
    # In fp32 as in transformers' own loss; float64 stays what it is.
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    losses = -logp.gather(1, tokens[:, None])[:, 0] * weights
    if not differentiate:
        return losses, None
    slope = logp.exp_().scatter_add_(1, tokens[:, None], logp.new_full((len(tokens), 1), -1.0))
    return losses, slope.mul_(weights[:, None]).to(logits.dtype)


def _fused(
    logits: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same in a form that compiles into two passes over the logits; rows of weight 0 are padding."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    wanted = torch.arange(logits.shape[1], device=logits.device) == tokens[:, None]
    losses = -torch.where(wanted, logp, 0.0).sum(dim=-1) * weights
    if not differentiate:
        return losses, None
    return losses, ((logp.exp() - wanted.float()) * weights[:, None]).to(logits.dtype)


def _spans(owners: torch.Tensor, rows: int) -> Iterator[slice]:
    """Chunks that never mix slots: on the CPU a slot's bits must not depend on how many tokens its neighbours have."""
    _, counts = torch.unique_consecutive(owners, return_counts=True)
    start = 0
    for count in counts.tolist():
        for at in range(start, start + count, rows):
            yield slice(at, min(at + rows, start + count))
        start += count


def chunk_of(vocabulary: int, device: str) -> int:
    """Tokens that meet the head at once: a power of two. On a GPU every chunk is full, so one shape is compiled."""
    return max(SMALLEST, 1 << ((LOGITS[device] // vocabulary).bit_length() - 1))


@functools.cache
def chunk_loss(compiled: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """What computes one chunk: logits [n, V], targets [n], weights [n] and whether to differentiate, to the weighted
    losses [n] and the gradient of their sum for the logits. Compiled for chunks that all have one shape."""
    return torch.compile(_fused, dynamic=False) if compiled else _eager


@torch.no_grad()
def score(
    hidden: torch.Tensor, head: torch.Tensor, targets: Targets, slots: int, differentiate: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns each slot's weighted loss, fp64 [slots], and the gradient of their sum for hidden [T, d].

    `slots` counts the base model's, which is the last. Scored tokens stand slot after slot.
    """
    sums = torch.zeros(slots, dtype=torch.float64, device=hidden.device)
    gradient = torch.zeros_like(hidden) if differentiate else None
    rows = chunk_of(head.shape[0], hidden.device.type)
    if hidden.is_cuda:
        count = targets.predict.shape[0]
        spans: Iterator[slice] = (slice(at, min(at + rows, count)) for at in range(0, count, rows))
        run = chunk_loss(compiled=True)
    else:
        spans, run = _spans(targets.owners, rows), chunk_loss(compiled=False)
    for span in spans:
        logits = hidden[targets.predict[span]] @ head.T
        losses, slope = run(logits, targets.tokens[span], targets.weights[span], differentiate)
        sums.index_add_(0, targets.owners[span], losses.double())
        if gradient is not None and slope is not None:
            gradient.index_add_(0, targets.predict[span], slope @ head)
    return sums, gradient
