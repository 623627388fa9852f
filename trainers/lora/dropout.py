"""Dropout whose masks come from a hash, not from a generator: nothing that runs beside a trial can change them.

A token's key is hashed from (trial seed, step, place of its example in the batch, position); with the number of the
group of linear layers and the feature it decides whether a value is kept. The linears of a group share one mask, since
they share the pass over their input. The hash is the finaliser of MurmurHash3 (Appleby, public domain), 32 bits wide,
on the CPU as in `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trainers.lora.bank import Group
from trainers.lora.stream import Span

GROUP_STEP, FEATURE_STEP = 0x9E3779B9, 0x85EBCA77  # odd constants: neighbours land far apart
_MASK = 0xFFFFFFFF


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def keys(
    seeds: Sequence[int], places: Sequence[int], lengths: NDArray[np.int64], positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The 32-bit keys of examples' tokens, [tokens], which stand at `positions` in theirs.

    Each example has its step's seed, its place in the batch and its length, [examples].
    """
    starts = [
        (seed * 0x9E3779B97F4A7C15 ^ place * 0xD1B54A32D192ED03) & 0xFFFFFFFFFFFFFFFF
        for seed, place in zip(seeds, places, strict=True)
    ]
    values = positions.astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    values += np.repeat(np.array(starts, dtype=np.uint64), lengths)
    values ^= values >> np.uint64(29)
    values *= np.uint64(0x94D049BB133111EB)
    return (values >> np.uint64(32)).astype(np.int64)


def apply(x: torch.Tensor, span: Span, group: Group) -> torch.Tensor:
    """Drops values of x [tokens of the span, inputs] at the trial's rate and scales the others up; its own adjoint."""
    slot = span.slot
    if slot is None or not slot.config.dropout or span.keys is None:
        return x
    features = torch.arange(x.shape[1], dtype=torch.int64) * FEATURE_STEP
    salt = (group.number * GROUP_STEP) & _MASK
    hashed = _mix(((span.keys[:, None] ^ salt) + features) & _MASK)
    kept = hashed >= round(slot.config.dropout * 2**32)
    return torch.where(kept, x / (1 - slot.config.dropout), torch.zeros((), dtype=x.dtype))
