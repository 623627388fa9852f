"""Rounds activations and gradients to 8-bit floats on a GPU, in Triton: see trainers/lora/float8.py.

A program does one row, which it reads twice: the second time out of a cache. That takes what reading and writing the
row once takes at the speed of memory (docs/log.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trainers.lora import float8
from trainers.lora.float8 import Rounded

_MOST = 3  # matrices that are put end to end in one launch
_WIDEST = 4096  # elements of a row at a time


@triton.jit
def _largest(most, x, row, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The larger of `most` and |x[row]|, block by block."""
    columns = tl.arange(0, BLOCK)
    for k in range(0, SIZE, BLOCK):
        values = tl.load(x + row * SIZE + k + columns, mask=columns + k < SIZE, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(values))
    return most


@triton.jit
def _codes(x, codes, row, scale, SIZE: tl.constexpr, FIRST: tl.constexpr, ALL: tl.constexpr, BLOCK: tl.constexpr):
    """codes[row, FIRST:] = x[row] / scale. NaN stays NaN, which makes all that is computed from the row NaN."""
    columns = tl.arange(0, BLOCK)
    for k in range(0, SIZE, BLOCK):
        values = tl.load(x + row * SIZE + k + columns, mask=columns + k < SIZE, other=0.0).to(tl.float32)
        place = codes + row * ALL + FIRST + k + columns
        tl.store(place, (values / scale).to(codes.dtype.element_ty), mask=columns + k < SIZE)


@triton.jit
def _rounded(
    x0, x1, x2, codes, scales,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, TINY: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """codes[row] = the rows of up to three x, end to end, over the row's scale."""
    row = tl.program_id(0).to(tl.int64)
    most = _largest(tl.zeros((BLOCK,), dtype=tl.float32), x0, row, K0, BLOCK)
    if K1 > 0:
        most = _largest(most, x1, row, K1, BLOCK)
    if K2 > 0:
        most = _largest(most, x2, row, K2, BLOCK)
    scale = tl.maximum(tl.max(most), TINY) / LARGEST
    tl.store(scales + row, scale)
    _codes(x0, codes, row, scale, K0, 0, K0 + K1 + K2, BLOCK)
    if K1 > 0:
        _codes(x1, codes, row, scale, K1, K0, K0 + K1 + K2, BLOCK)
    if K2 > 0:
        _codes(x2, codes, row, scale, K2, K0 + K1, K0 + K1 + K2, BLOCK)


def rounded(xs: list[torch.Tensor]) -> Rounded:
    """Rounds the rows of matrices [T, features] that are put end to end, as float8.rounded does with one."""
    if len(xs) > _MOST:
        xs = [torch.cat(xs, dim=1)]
    sizes = [x.shape[1] for x in xs] + [0] * (_MOST - len(xs))
    rows, device = xs[0].shape[0], xs[0].device
    codes = torch.empty((rows, sum(sizes)), dtype=float8.FORMAT, device=device)
    scales = torch.empty((rows, 1), device=device)
    block = min(_WIDEST, triton.next_power_of_2(max(sizes)))
    _rounded[(rows,)](
        *xs, *xs[:1] * (_MOST - len(xs)), codes, scales,
        K0=sizes[0], K1=sizes[1], K2=sizes[2], TINY=float8.TINY, LARGEST=float8.LARGEST, BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )  # fmt: skip
    return Rounded(codes, scales)
