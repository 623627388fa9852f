"""The token stream of one micro-step: whole examples of several slots, end to end, and which slot owns what.

On the CPU a stream is as long as its tokens. On a GPU its tensors have fixed shapes: tokens are padded to one of a few
lengths, and the tail belongs to no slot. Its examples are as if alone: attention stays inside each by the cumulative
lengths, positions restart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.lora.bank import KINDS, Slot, padded
from trainers.splits import Split

TILE, WIDE = 64, 128  # tokens of a tile, for the two kinds of kernels
BLOCK = 64  # tokens of a block of attention


@dataclass
class Part:
    """What one slot puts into a stream: rows of a split, their places in the trial's batch, the step's dropout seed.

    `weight` multiplies each completion token's loss: one over the completion tokens of the whole batch in training.
    `slot` None is the base model alone.
    """

    index: int
    slot: Slot | None
    rows: list[int]
    places: list[int]
    seed: int
    weight: float


@dataclass
class Span:
    """Tokens [start, end) of one slot, on the CPU."""

    slot: Slot | None
    start: int
    end: int
    keys: torch.Tensor | None = None  # int64 [tokens], with dropout alone


@dataclass
class Scored:
    """What the loss is over: places in the stream that predict a completion token, [P] each, slot after slot."""

    predict: NDArray[np.int64]
    targets: NDArray[np.int64]
    owners: NDArray[np.int64]
    weights: NDArray[np.floating]


@dataclass
class Stream:
    """One micro-step's tokens. `tokens` are real ones; `examples` counts, slot after slot, for attention on the CPU.

    On a GPU: `tiles` and `wide` int32 [n, 3] (start, end, slot), `blocks` of attention_kernels.py, `bounds` int32
    [slots + 1, 2], `table` int64 [slots + 1, 6] (addresses of the copy by kind, of the gradient by kind, padded rank by
    kind), `scales` and `drops` fp32 [slots + 1]; the last row is of the tail and of the base model.
    """

    rank: int
    tokens: int
    ids: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor  # cumulative, int32 [examples + 1]
    longest: int
    spans: list[Span] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    dropout: bool = False
    rounded: bool = False  # the base in 8 bits
    tiles: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    wide: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    blocks: torch.Tensor | None = None
    bounds: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    scales: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    drops: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class Laid:
    """Parts laid end to end, on the host; what is scored; which tokens are whose."""

    ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    lengths: NDArray[np.int32]
    bounds: list[tuple[int, int]]  # of each part
    counts: list[int]  # examples of each part
    keys: NDArray[np.int64] | None
    scored: Scored


def lay(split: Split, parts: Sequence[Part], spare: int, weights_in: type[np.floating] = np.float32) -> Laid:
    """Lays the parts' examples end to end. `spare` is the slot index that the base model's loss is booked on.

    `weights_in` is the precision of the loss weights: float64 over a float64 model alone.
    """
    from trainers.lora.dropout import keys

    # By arrays over the whole stream: a pack of short examples has hundreds of them in each, thirty times a second.
    rows = np.concatenate([part.rows for part in parts])
    lengths = split.lengths[rows]
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    source = positions + np.repeat(split.offsets[rows], lengths)
    ids = split.ids[source]
    trained = np.flatnonzero(split.mask[source])

    counts = [len(part.rows) for part in parts]
    bounds = np.concatenate(([0], ends[np.cumsum(counts) - 1]))
    tokens = np.diff(bounds)
    owners = np.repeat([spare if part.slot is None else part.index for part in parts], tokens)[trained]
    weights = np.repeat(np.array([part.weight for part in parts], dtype=weights_in), tokens)[trained]
    hashed = None
    if any(part.slot is not None and part.slot.config.dropout for part in parts):
        seeds = [part.seed for part in parts for _ in part.rows]
        hashed = keys(seeds, [place for part in parts for place in part.places], lengths, positions)
    return Laid(
        ids.astype(np.int32),
        positions.astype(np.int32),
        np.concatenate(([0], ends)).astype(np.int32),
        list(itertools.pairwise(bounds.tolist())),
        counts,
        hashed,
        Scored(trained - 1, ids[trained].astype(np.int64), owners, weights),
    )


def on_cpu(laid: Laid, parts: Sequence[Part], rank: int) -> Stream:
    """The stream as the CPU takes it: no tail."""
    spans = []
    for part, (start, end) in zip(parts, laid.bounds, strict=True):
        hashed = None if laid.keys is None else torch.from_numpy(laid.keys[start:end])
        spans.append(Span(part.slot, start, end, hashed))
    return Stream(
        rank=rank,
        tokens=len(laid.ids),
        ids=torch.from_numpy(laid.ids.astype(np.int64))[None],
        positions=torch.from_numpy(laid.positions.astype(np.int64))[None],
        lengths=torch.from_numpy(laid.lengths),
        longest=int(np.diff(laid.lengths).max()),
        spans=spans,
        examples=laid.counts,
        dropout=laid.keys is not None,
        rounded=any(part.slot is not None and part.slot.rounds for part in parts),
    )


def slot_row(slot: Slot) -> list[int]:
    """A slot's row of `Stream.table`."""
    assert slot.config.targets is not None
    rank = padded(slot.rank)
    starts = [slot.layout.start(slot.config.targets, kind) for kind in KINDS]
    row = [0 if at is None else slot.copy.data_ptr() + at * rank * slot.copy.element_size() for at in starts]
    row += [0 if at is None else slot.gradient.data_ptr() + at * rank * slot.gradient.element_size() for at in starts]
    return row + [0 if at is None else rank for at in starts]


def tiles_of(bounds: Sequence[tuple[int, int, int]], count: int, size: int = TILE) -> NDArray[np.int32]:
    """Cuts (start, end, slot) spans into `count` tiles of at most `size` tokens; what is over is empty."""
    pieces = [(t, min(t + size, end), slot) for start, end, slot in bounds for t in range(start, end, size)]
    tiles = np.zeros((count, 3), dtype=np.int32)
    tiles[: len(pieces)] = pieces
    return tiles


def blocks_of(lengths: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """Cuts examples, by their cumulative lengths, into `count` blocks of attention; what is over is empty."""
    pieces = [
        (start, end, at)
        for start, end in zip(lengths[:-1].tolist(), lengths[1:].tolist(), strict=True)
        for at in range(start, end, BLOCK)
    ]
    blocks = np.zeros((count, 3), dtype=np.int32)
    blocks[: len(pieces)] = pieces
    return blocks
