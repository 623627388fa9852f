"""AdamW on a GPU for all trials whose batches a stream completes, in two launches, in Triton.

Weights, moments and the rounded copy of each adapter are read and written once, whatever rates and ranks the trials
have; torch's kernels take one rate a launch and go over the gradient three times more. Sums are taken in one order, so
a trial's step is the same to the bit whoever steps beside it.

The arithmetic is torch.optim.AdamW's (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019) and that of
torch's clip_grad_norm_.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from trainers.checkpoints import MOMENTS
from trainers.lora.adamw import BETAS, EPSILON, NORM_EPSILON
from trainers.lora.bank import Slot

ADDRESSES, NUMBERS = 6, 4  # of a slot: see `fields`
_PROGRAMS = 128  # that share a slot's elements
_BLOCK = 1024  # elements at a time


def fields(slots: Sequence[Slot], rates: Sequence[float]) -> NDArray[np.int32]:
    """What the kernels are told of slots that are about to take a step, `steps` counted already.

    As int32 words, first the addresses of weights, gradient, both moments and copy and the number of elements (int64),
    then, in fp32, the rate over the first moment's bias, what of a weight decays, the clip norm, and the root of the
    second moment's bias.
    """
    addresses, numbers = [], []
    for slot, rate in zip(slots, rates, strict=True):
        buffers = (slot.weights, slot.gradient, *(slot.moments[name] for name in MOMENTS), slot.copy)
        addresses.append([*(buffer.data_ptr() for buffer in buffers), slot.weights.numel()])
        first, second = (1 - beta**slot.steps for beta in BETAS)
        numbers.append([rate / first, rate * slot.config.weight_decay, slot.config.clip_norm, second**0.5])
    words = [np.array(addresses, dtype=np.int64).ravel(), np.array(numbers, dtype=np.float32).ravel()]
    return np.concatenate([part.view(np.int32) for part in words])


@triton.jit
def _buffer(row, place: tl.constexpr, dtype: tl.constexpr):
    """A buffer by its place in the row; buffers are aligned, which the compiler can't know."""
    return tl.multiple_of(tl.load(row + place).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _count(row):
    """The number of elements, which can pass 32 bits; ranks are padded, so it is a multiple of 16."""
    return tl.multiple_of(tl.load(row + 5), 16)


@triton.jit
def _squares(rows, partial, COLUMNS: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """partial[slot, program]: the sum of the squares of every PROGRAMS-th block of the slot's gradient."""
    slot, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gradient = _buffer(rows + slot * COLUMNS, 1, tl.float32)
    count = _count(rows + slot * COLUMNS)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(program, tl.cdiv(count, BLOCK), PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < count, other=0.0)
        total += value * value
    tl.store(partial + slot * PROGRAMS + program, tl.sum(total, axis=0))


@triton.jit
def _stepped(
    rows, numbers, partial, norms,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, COPY: tl.constexpr,
    BETA: tl.constexpr, BETA_SQUARES: tl.constexpr, EPSILON: tl.constexpr, NORM_EPSILON: tl.constexpr,
):  # fmt: skip
    """Clips the slot's gradient, steps its weights, rounds them into the copy (of type COPY), zeroes the gradient."""
    slot, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, told = rows + slot * COLUMNS, numbers + slot * WIDTH
    weights, gradient = _buffer(row, 0, tl.float32), _buffer(row, 1, tl.float32)
    moment, square = _buffer(row, 2, tl.float32), _buffer(row, 3, tl.float32)
    copy = _buffer(row, 4, COPY)
    count = _count(row)
    pace, decay, clip, correction = tl.load(told), tl.load(told + 1), tl.load(told + 2), tl.load(told + 3)
    norm = tl.sqrt(tl.sum(tl.load(partial + slot * PROGRAMS + tl.arange(0, PROGRAMS)), axis=0))
    if program == 0:
        tl.store(norms + slot, norm)
    share = clip / (norm + NORM_EPSILON)
    share = tl.where(share > 1.0, 1.0, share)  # one that is NaN stays so
    for block in range(program, tl.cdiv(count, BLOCK), PROGRAMS):
        at = block * BLOCK + tl.arange(0, BLOCK)
        there = at < count
        g = tl.load(gradient + at, mask=there) * share
        m, v, w = tl.load(moment + at, mask=there), tl.load(square + at, mask=there), tl.load(weights + at, mask=there)
        m += (1 - BETA) * (g - m)
        v = BETA_SQUARES * v + (1 - BETA_SQUARES) * g * g
        w = w - decay * w - pace * m / (tl.sqrt(v) / correction + EPSILON)
        tl.store(moment + at, m, mask=there)
        tl.store(square + at, v, mask=there)
        tl.store(weights + at, w, mask=there)
        tl.store(copy + at, w.to(COPY), mask=there)
        tl.store(gradient + at, tl.zeros((BLOCK,), dtype=tl.float32), mask=there)


def step(words: torch.Tensor, count: int, copy: torch.dtype) -> torch.Tensor:
    """Takes the steps of `count` slots, whose `fields` are `words`; returns the norms before clipping, fp32 [count].

    `copy` is the type of the rounded copies.
    """
    split = 2 * count * ADDRESSES
    rows, numbers = words[:split].view(torch.int64), words[split:].view(torch.float32)
    partial = torch.empty((count, _PROGRAMS), dtype=torch.float32, device=words.device)
    norms = torch.empty(count, dtype=torch.float32, device=words.device)
    grid = (count, _PROGRAMS)
    _squares[grid](rows, partial, ADDRESSES, _PROGRAMS, _BLOCK)
    kind = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[copy]
    _stepped[grid](
        rows, numbers, partial, norms, ADDRESSES, NUMBERS, _PROGRAMS, _BLOCK, kind, *BETAS, EPSILON, NORM_EPSILON
    )
    return norms
