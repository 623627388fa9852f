"""The adapters' products on a GPU, in Triton: one launch serves every slot, whatever its rank and targets.

The stream is cut into tiles of at most TILE (or WIDE) tokens, each of one slot (`Stream.tiles`: start, end, slot). A
slot's row of `Stream.table` holds where its buffers begin for attention and MLP layers, and its padded rank there (0:
not targeted); all of it is read on the device, so a captured graph stays right when trials come and go. Operands are
what x is in (bf16), sums fp32. Rows of a matrix that stand for the rank are at most `padded(rank)` a linear; columns of
s and its gradient past a slot's rank are neither written nor read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trainers.lora.bank import KINDS, Group
from trainers.lora.dropout import FEATURE_STEP, GROUP_STEP
from trainers.lora.stream import TILE, WIDE, Stream

BLOCK_T = TILE  # the smallest M of Hopper's matrix instructions
PROGRAMS = 264  # that fill an H100: two for each of its 132 multiprocessors
TYPICAL = 2048  # tokens that a slot has in a full stream
_COLUMNS = 6  # of Stream.table: copy and gradient by kind, rank by kind


@triton.jit
def _slot(table, slot, kind: tl.constexpr, gradient: tl.constexpr, COLUMNS: tl.constexpr):
    row = table + slot * COLUMNS
    rank = tl.load(row + 4 + kind).to(tl.int32)
    address = tl.load(row + (2 if gradient else 0) + kind)
    return address, rank


@triton.jit
def _down(
    x, tiles, table, scales, s, unit, stride, parts,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """s[t, FIRST + j * RANK + i] = scale * sum_k x[t, k] M[j * rank + i, k] for the tile's slot.

    Program (tile, p) sums over STEPS blocks of k from p * STEPS on; p counts into `parts` elements of s.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    address, rank = _slot(table, slot, KIND, False, COLUMNS)
    if rank > 0 and end > start:
        weights = address.to(tl.pointer_type(x.dtype.element_ty)) + unit.to(tl.int64) * rank
        rows = start + tl.arange(0, BLOCK_T)
        columns = tl.arange(0, N)
        j, i = columns // RANK, columns % RANK
        used = (j < JOINED) & (i < rank)
        inner = tl.arange(0, BLOCK_K)
        left = x + rows[:, None].to(tl.int64) * SIZE + inner[None, :]
        right = weights + (j * rank + i)[None, :].to(tl.int64) * SIZE + inner[:, None]
        total = tl.zeros((BLOCK_T, N), dtype=tl.float32)
        for step in range(0, STEPS):
            k = (part * STEPS + step) * BLOCK_K
            a = tl.load(left + k, mask=(rows < end)[:, None] & (inner + k < SIZE)[None, :], other=0.0)
            b = tl.load(right + k, mask=used[None, :] & (inner + k < SIZE)[:, None], other=0.0)
            total = tl.dot(a, b, total)
        total *= tl.load(scales + slot)
        place = s + part.to(tl.int64) * parts + rows[:, None].to(tl.int64) * stride + FIRST + columns[None, :]
        tl.store(place, total.to(s.dtype.element_ty), mask=(rows < end)[:, None] & used[None, :])


@triton.jit
def _gathered(
    partial, tiles, table, s, stride, parts,
    FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Adds up what PARTS programs of _down found for a tile, in their order."""
    tile = tl.program_id(0)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    _, rank = _slot(table, slot, KIND, False, COLUMNS)
    if rank > 0 and end > start:
        rows = start + tl.arange(0, BLOCK_T)
        columns = tl.arange(0, N)
        used = (columns // RANK < JOINED) & (columns % RANK < rank)
        mask = (rows < end)[:, None] & used[None, :]
        place = rows[:, None].to(tl.int64) * (JOINED * RANK) + columns[None, :]
        total = tl.zeros((BLOCK_T, N), dtype=tl.float32)
        for part in range(0, PARTS):
            total += tl.load(partial + part * parts.to(tl.int64) + place, mask=mask, other=0.0)
        place = s + rows[:, None].to(tl.int64) * stride + FIRST + columns[None, :]
        tl.store(place, total.to(s.dtype.element_ty), mask=mask)


@triton.jit
def _up(
    s, tiles, table, bias, y, unit, stride,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t, n] = bias[n] + sum_ji s[t, FIRST + j * RANK + i] M[j * rank + i, n] for the tile's slot."""
    tile = tl.program_id(1)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if end > start:
        address, rank = _slot(table, slot, KIND, False, COLUMNS)
        rows = start + tl.arange(0, BLOCK_T)
        outer = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        if rank > 0:
            weights = address.to(tl.pointer_type(s.dtype.element_ty)) + unit.to(tl.int64) * rank
            columns = tl.arange(0, N)
            j, i = columns // RANK, columns % RANK
            used = (j < JOINED) & (i < rank)
            left = s + rows[:, None].to(tl.int64) * stride + FIRST + columns[None, :]
            a = tl.load(left, mask=(rows < end)[:, None] & used[None, :], other=0.0)
            right = weights + (j * rank + i)[:, None].to(tl.int64) * SIZE + outer[None, :]
            b = tl.load(right, mask=used[:, None] & (outer < SIZE)[None, :], other=0.0)
            total = tl.dot(a, b, total)
        if BIAS:
            total += tl.load(bias + outer, mask=outer < SIZE, other=0.0).to(tl.float32)[None, :]
        place = y + rows[:, None].to(tl.int64) * SIZE + outer[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=(rows < end)[:, None] & (outer < SIZE)[None, :])


@triton.jit
def _product(
    total, x, weights, rows, outer, end,
    SIZE: tl.constexpr, TURNED: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + x[rows, :K] M, for M [K, SIZE] as it is or turned (stored as [SIZE, K])."""
    inner = tl.arange(0, BLOCK_K)
    left = x + rows[:, None].to(tl.int64) * K + inner[None, :]
    if TURNED:
        right = weights + outer[None, :].to(tl.int64) * K + inner[:, None]
    else:
        right = weights + inner[:, None].to(tl.int64) * SIZE + outer[None, :]
    for k in range(0, K, BLOCK_K):
        a = tl.load(left + k, mask=(rows < end)[:, None] & (inner + k < K)[None, :], other=0.0)
        here = right + (k if TURNED else k * SIZE)
        b = tl.load(here, mask=(outer < SIZE)[None, :] & (inner + k < K)[:, None], other=0.0)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _mixed(
    x0, x1, x2, w0, w1, w2, s, tiles, table, bias, y, unit, stride,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, TURNED: tl.constexpr,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Base and adapters in one: y = bias + sum over up to three of x M + s L, L the tile's slot's rank components."""
    tile = tl.program_id(1)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if end > start:
        address, rank = _slot(table, slot, KIND, False, COLUMNS)
        rows = start + tl.arange(0, BLOCK_T)
        outer = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        total = _product(total, x0, w0, rows, outer, end, SIZE, TURNED, K0, BLOCK_K)
        if K1 > 0:
            total = _product(total, x1, w1, rows, outer, end, SIZE, TURNED, K1, BLOCK_K)
        if K2 > 0:
            total = _product(total, x2, w2, rows, outer, end, SIZE, TURNED, K2, BLOCK_K)
        if rank > 0:
            weights = address.to(tl.pointer_type(s.dtype.element_ty)) + unit.to(tl.int64) * rank
            for c in range(0, N, BLOCK_C):
                columns = c + tl.arange(0, BLOCK_C)
                j, i = columns // RANK, columns % RANK
                used = (j < JOINED) & (i < rank)
                left = s + rows[:, None].to(tl.int64) * stride + FIRST + columns[None, :]
                a = tl.load(left, mask=(rows < end)[:, None] & used[None, :], other=0.0)
                right = weights + (j * rank + i)[:, None].to(tl.int64) * SIZE + outer[None, :]
                b = tl.load(right, mask=used[:, None] & (outer < SIZE)[None, :], other=0.0)
                total = tl.dot(a, b, total)
        if BIAS:
            total += tl.load(bias + outer, mask=outer < SIZE, other=0.0).to(tl.float32)[None, :]
        place = y + rows[:, None].to(tl.int64) * SIZE + outer[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=(rows < end)[:, None] & (outer < SIZE)[None, :])


@triton.jit
def _outer(
    s, x, bounds, table, unit, stride,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """gradient[j * rank + i, n] += sum_t s[t, FIRST + j * RANK + i] x[t, n] over a part of a slot's tokens."""
    slot = tl.program_id(1)
    start, end = tl.load(bounds + slot * 2), tl.load(bounds + slot * 2 + 1)
    address, rank = _slot(table, slot, KIND, True, COLUMNS)
    share = tl.cdiv(tl.cdiv(end - start, BLOCK_T), PARTS) * BLOCK_T
    start += tl.program_id(2) * share
    end = tl.minimum(end, start + share)
    if rank > 0 and end > start:
        gradient = address.to(tl.pointer_type(tl.float32)) + unit.to(tl.int64) * rank
        outer = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        columns = tl.arange(0, N)
        j, i = columns // RANK, columns % RANK
        used = (j < JOINED) & (i < rank)
        total = tl.zeros((N, BLOCK_N), dtype=tl.float32)
        for t in range(start, end, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            left = s + rows[None, :].to(tl.int64) * stride + FIRST + columns[:, None]
            a = tl.load(left, mask=used[:, None] & (rows < end)[None, :], other=0.0)
            right = x + rows[:, None].to(tl.int64) * SIZE + outer[None, :]
            b = tl.load(right, mask=(rows < end)[:, None] & (outer < SIZE)[None, :], other=0.0)
            total = tl.dot(a, b, total)
        place = gradient + (j * rank + i)[:, None].to(tl.int64) * SIZE + outer[None, :]
        mask = used[:, None] & (outer < SIZE)[None, :]
        if PARTS == 1:
            tl.store(place, tl.load(place, mask=mask, other=0.0) + total, mask=mask)
        else:
            # In no fixed order, like the sums of flash attention's backward.
            tl.atomic_add(place, total, mask=mask, sem="relaxed")


@triton.jit
def _dropped(
    x, y, tiles, keys, drops, salt,
    SIZE: tl.constexpr, FEATURE_STEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = dropout(x) by the hash of trainers/lora/dropout.py; `drops` is each slot's rate."""
    tile = tl.program_id(1)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    rate = tl.load(drops + slot)
    rows = start + tl.arange(0, BLOCK_T)
    features = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < end)[:, None] & (features < SIZE)[None, :]
    key = tl.load(keys + rows, mask=rows < end, other=0).to(tl.uint32, bitcast=True)
    value = (key ^ salt.to(tl.uint32))[:, None] + (features.to(tl.uint32) * FEATURE_STEP)[None, :]
    value = (value ^ (value >> 16)) * 0x85EBCA6B
    value = (value ^ (value >> 13)) * 0xC2B2AE35
    value = value ^ (value >> 16)
    kept = value.to(tl.int64) >= (rate.to(tl.float64) * 4294967296.0 + 0.5).to(tl.int64)
    place = rows[:, None].to(tl.int64) * SIZE + features[None, :]
    given = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, tl.where(kept, given / (1 - rate), 0.0).to(y.dtype.element_ty), mask=mask)


def _matrix(group: Group, member: int | None) -> tuple[int, int, int]:
    """Of A of a whole group (None) or B of one linear: elements before it, features, linears joined in it."""
    if member is None:
        return group.first, group.inputs, len(group.linears)
    return group.seconds[member], group.outputs[member], 1


def _width(joined: int, rank: int) -> int:
    return max(16, triton.next_power_of_2(joined * rank))


def down(x: torch.Tensor, stream: Stream, group: Group, member: int | None, s: torch.Tensor) -> torch.Tensor:
    """Projects x [T, features] onto the rank components of A (member None) or of one B, scaled, into s; returns s.

    s is [T, J * rank]; a member's columns begin at member * rank.
    """
    unit, size, joined = _matrix(group, member)
    n = _width(joined, stream.rank)
    tiles = stream.tiles.shape[0]
    block_k, warps, stages = (128, 4, 3) if n <= 64 else (64, 4, 4) if n <= 128 else (64, 8, 4)
    blocks = triton.cdiv(size, block_k)
    # Few tiles, or long rows, would leave most of the chip idle: several programs share the sum over a tile's features.
    wanted = triton.cdiv(2 * PROGRAMS, tiles) if size >= 2048 else PROGRAMS // tiles
    parts = max(1, min(wanted, blocks // 4, 8))
    steps = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, steps)
    shape = {"JOINED": joined, "RANK": stream.rank, "N": n, "KIND": KINDS.index(group.kind), "COLUMNS": _COLUMNS}
    first = (member or 0) * stream.rank
    partial = s if parts == 1 else torch.empty((parts, s.shape[0], joined * stream.rank), device=s.device)
    _down[(tiles, parts)](
        x, stream.tiles, stream.table, stream.scales, partial, unit, partial.shape[-1], partial.stride(0),
        SIZE=size, FIRST=first if parts == 1 else 0, BLOCK_T=BLOCK_T, BLOCK_K=block_k, STEPS=steps, **shape,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        _gathered[(tiles,)](
            partial, stream.tiles, stream.table, s, s.shape[1], partial.stride(0),
            FIRST=first, BLOCK_T=BLOCK_T, PARTS=parts, **shape, num_warps=4,
        )  # fmt: skip
    return s


def up(s: torch.Tensor, stream: Stream, group: Group, member: int | None, bias: torch.Tensor | None) -> torch.Tensor:
    """Maps rank components back: through B of one linear, with its bias, or through A of the group (member None)."""
    unit, size, joined = _matrix(group, member)
    y = s.new_empty((s.shape[0], size))
    n = _width(joined, stream.rank)
    block, warps = (256, 8) if n > 128 else (128, 4)
    _up[(triton.cdiv(size, block), stream.wide.shape[0])](
        s, stream.wide, stream.table, y if bias is None else bias, y, unit, s.shape[1],
        SIZE=size, FIRST=(member or 0) * stream.rank, JOINED=joined, RANK=stream.rank, N=n,
        KIND=KINDS.index(group.kind), BIAS=bias is not None, COLUMNS=_COLUMNS, BLOCK_T=WIDE, BLOCK_N=block,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return y


def mixed(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    turned: bool,
    s: torch.Tensor,
    stream: Stream,
    group: Group,
    member: int | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """`up` with the base's part in the same kernel: the sum over i of xs[i] weights[i] (turned: its transpose).

    Where rows are short, reading and writing y once more costs more than the library's faster product saves.
    """
    unit, size, joined = _matrix(group, member)
    y = s.new_empty((s.shape[0], size))
    spare = 3 - len(xs)
    inner = [x.shape[1] for x in xs] + [0] * spare
    n = _width(joined, stream.rank)
    block, warps = (256, 8) if size > 1024 else (128, 4)
    _mixed[(triton.cdiv(size, block), stream.wide.shape[0])](
        *xs, *xs[:1] * spare, *weights, *weights[:1] * spare,
        s, stream.wide, stream.table, y if bias is None else bias, y, unit, s.shape[1],
        K0=inner[0], K1=inner[1], K2=inner[2], TURNED=turned,
        SIZE=size, FIRST=(member or 0) * stream.rank, JOINED=joined, RANK=stream.rank, N=n,
        KIND=KINDS.index(group.kind), BIAS=bias is not None, COLUMNS=_COLUMNS, BLOCK_T=WIDE, BLOCK_N=block,
        BLOCK_K=64, BLOCK_C=min(n, 64), num_warps=warps, num_stages=3,
    )  # fmt: skip
    return y


def short(sizes: list[int]) -> bool:
    """Whether `mixed` beats the library for rows of these sizes: measured on an H100 (docs/log.md)."""
    return len(sizes) <= 3 and sum(sizes) <= (2048 if len(sizes) == 3 else 1024)


def outer(s: torch.Tensor, x: torch.Tensor, stream: Stream, group: Group, member: int | None) -> None:
    """Adds s^T x, slot by slot, to the gradient of A of the group (member None) or of B of one linear."""
    unit, size, joined = _matrix(group, member)
    n = _width(joined, stream.rank)
    tokens, block, warps = (128, 128, 8) if n > 128 else (64, 128, 4)
    blocks = triton.cdiv(size, block)
    busy = max(1, min(stream.bounds.shape[0], x.shape[0] // TYPICAL))
    parts = max(1, min(2 * PROGRAMS // (blocks * busy), 2 if n > 128 else 4))
    _outer[(blocks, stream.bounds.shape[0], parts)](
        s, x, stream.bounds, stream.table, unit, s.shape[1],
        SIZE=size, FIRST=(member or 0) * stream.rank, JOINED=joined, RANK=stream.rank, N=n,
        KIND=KINDS.index(group.kind), COLUMNS=_COLUMNS, BLOCK_T=tokens, BLOCK_N=block, PARTS=parts,
        num_warps=warps, num_stages=3,
    )  # fmt: skip


def dropped(x: torch.Tensor, stream: Stream, group: Group) -> torch.Tensor:
    """Dropout of x [T, features], each slot at its rate; the same map is its own adjoint."""
    y = torch.empty_like(x)
    salt = (group.number * GROUP_STEP) & 0xFFFFFFFF
    _dropped[(triton.cdiv(x.shape[1], 128), stream.tiles.shape[0])](
        x, y, stream.tiles, stream.keys, stream.drops, salt,
        SIZE=x.shape[1], FEATURE_STEP=FEATURE_STEP, BLOCK_T=BLOCK_T, BLOCK_N=128,
    )  # fmt: skip
    return y
