"""The adapters' products on a GPU, in Triton: one launch serves every slot, whatever its rank and targets.

The stream is cut into tiles of at most TILE (or WIDE) tokens, each of one slot (`Stream.tiles`: start, end, slot). A
slot's row of `Stream.table` holds where its buffers begin for attention and MLP layers, and its padded rank there (0:
not targeted); all of it is read on the device, so a captured graph stays right when trials come and go. Operands are
what x is in (bf16), sums fp32. Rows of a matrix that stand for the rank are at most `padded(rank)` a linear; columns of
s and its gradient past a slot's rank are neither written nor read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from trainers.lora.bank import KINDS, Group
from trainers.lora.dropout import FEATURE_STEP, GROUP_STEP
from trainers.lora.stream import TILE, WIDE, Stream

BLOCK_T = TILE  # the smallest M of Hopper's matrix instructions
PROGRAMS = 264  # that fill an H100: two for each of its 132 multiprocessors
TYPICAL = 2048  # tokens that a slot has in a full stream
_COLUMNS = 6  # of Stream.table: copy and gradient by kind, rank by kind


@triton.jit
def _slot(table, slot, kind: tl.constexpr, gradient: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the slot's buffer begins, and its padded rank, which is a multiple of 16."""
    row = table + slot * COLUMNS
    rank = tl.load(row + 4 + kind).to(tl.int32)
    address = tl.load(row + (2 if gradient else 0) + kind)
    return address, tl.multiple_of(rank, 16)


@triton.jit
def _matrix_at(address, unit, rank, dtype: tl.constexpr):
    """A matrix in a slot's buffer. It is aligned (the buffers are, and ranks), which the compiler can't know."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)) + unit.to(tl.int64) * rank, 16)


@triton.jit
def _columns(components, rank, FIRST: tl.constexpr, RANK: tl.constexpr):
    """Columns of s that hold rank components j * rank + i of joined linears; 16 neighbours stay neighbours."""
    columns = FIRST + components // rank * RANK + components % rank
    return tl.max_contiguous(tl.multiple_of(columns, 16), 16)


@triton.jit
def _down(
    x, tiles, table, scales, s, unit, stride, parts,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """s[t, FIRST + j * RANK + i] = scale * sum_k x[t, k] M[j * rank + i, k] for the tile's slot.

    Program (c, tile, p) does rows [c * N, c * N + N) of M and sums over STEPS blocks of k from p * STEPS on; p counts
    into `parts` elements of s. WHOLE: these blocks end where k does.
    """
    tile, part = tl.program_id(1), tl.program_id(2)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    address, rank = _slot(table, slot, KIND, False, COLUMNS)
    components = tl.program_id(0) * N + tl.arange(0, N)
    if tl.program_id(0) * N < JOINED * rank and end > start:
        weights = _matrix_at(address, unit, rank, x.dtype.element_ty)
        rows = start + tl.arange(0, BLOCK_T)
        inner = tl.arange(0, BLOCK_K)
        # What is read past the end is the last row or component once more, and is not written: no mask is needed.
        left = x + tl.minimum(rows, end - 1)[:, None].to(tl.int64) * SIZE + inner[None, :]
        right = weights + tl.minimum(components, JOINED * rank - 1)[None, :].to(tl.int64) * SIZE + inner[:, None]
        total = tl.zeros((BLOCK_T, N), dtype=tl.float32)
        for step in range(0, STEPS):
            k = (part * STEPS + step) * BLOCK_K
            if WHOLE:
                a = tl.load(left + k)
                b = tl.load(right + k)
            else:
                a = tl.load(left + k, mask=(inner + k < SIZE)[None, :], other=0.0)
                b = tl.load(right + k, mask=(inner + k < SIZE)[:, None], other=0.0)
            total = tl.dot(a, b, total)
        total *= tl.load(scales + slot)
        columns = _columns(components, rank, FIRST, RANK)
        place = s + part.to(tl.int64) * parts + rows[:, None].to(tl.int64) * stride + columns[None, :]
        mask = (rows < end)[:, None] & (components < JOINED * rank)[None, :]
        tl.store(place, total.to(s.dtype.element_ty), mask=mask)


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
def _adapted(
    total, s, weights, rows, outer, rank, stride,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total + s[rows, FIRST + j * RANK + i] M[j * rank + i, outer] for rank components j * rank + i."""
    # Ranks are multiples of 16, so a step lies in one linear's components and is full.
    for c in range(0, JOINED * rank, 16):
        columns = tl.multiple_of(FIRST + c // rank * RANK + c % rank, 16) + tl.arange(0, 16)
        a = tl.load(s + rows[:, None].to(tl.int64) * stride + columns[None, :])
        right = weights + (c + tl.arange(0, 16))[:, None].to(tl.int64) * SIZE + outer[None, :]
        b = tl.load(right) if SIZE % BLOCK_N == 0 else tl.load(right, mask=(outer < SIZE)[None, :], other=0.0)
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _up(
    s, tiles, table, bias, y, unit, stride,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr,
    KIND: tl.constexpr, BIAS: tl.constexpr, ONTO: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[t, n] = bias[n] + sum_ji s[t, FIRST + j * RANK + i] M[j * rank + i, n] for the tile's slot; ONTO: y += that."""
    tile = tl.program_id(1)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if end > start:
        address, rank = _slot(table, slot, KIND, False, COLUMNS)
        rows = start + tl.arange(0, BLOCK_T)
        outer = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        if rank > 0:
            weights = _matrix_at(address, unit, rank, s.dtype.element_ty)
            read = tl.minimum(rows, end - 1)
            total = _adapted(total, s, weights, read, outer, rank, stride, SIZE, FIRST, JOINED, RANK, BLOCK_N)
        if BIAS:
            total += tl.load(bias + outer, mask=outer < SIZE, other=0.0).to(tl.float32)[None, :]
        place = y + rows[:, None].to(tl.int64) * SIZE + outer[None, :]
        mask = (rows < end)[:, None] & (outer < SIZE)[None, :]
        if ONTO:
            total += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        tl.store(place, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _product(
    total, x, weights, row, column,
    TURNED: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + x[row:, :K] M[:, column:], for M as it is [K, SIZE] or turned (stored as [SIZE, K])."""
    for k in range(0, K, BLOCK_K):
        a = x.load([row, k])
        b = weights.load([column, k]).T if TURNED else weights.load([k, column])
        total = tl.dot(a, b, total)
    return total


@triton.jit
def _mixed(
    x0, x1, x2, w0, w1, w2, s, tiles, table, bias, y, unit, stride,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, TURNED: tl.constexpr,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr,
    KIND: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Base and adapters in one: y = bias + sum over up to three of x M + s L, L the tile's slot's rank components.

    Each x and M is a tensor descriptor: Hopper's copy engine reads them, and gives zeros where they end. The rows that
    a tile reads past its end are of other slots, and are not written.
    """
    tile = tl.program_id(1)
    start, end, slot = tl.load(tiles + tile * 3), tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    if end > start:
        address, rank = _slot(table, slot, KIND, False, COLUMNS)
        column = tl.program_id(0) * BLOCK_N
        total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
        total = _product(total, x0, w0, start, column, TURNED, K0, BLOCK_K)
        if K1 > 0:
            total = _product(total, x1, w1, start, column, TURNED, K1, BLOCK_K)
        if K2 > 0:
            total = _product(total, x2, w2, start, column, TURNED, K2, BLOCK_K)
        rows = start + tl.arange(0, BLOCK_T)
        outer = column + tl.arange(0, BLOCK_N)
        if rank > 0:
            weights = _matrix_at(address, unit, rank, s.dtype.element_ty)
            read = tl.minimum(rows, end - 1)
            total = _adapted(total, s, weights, read, outer, rank, stride, SIZE, FIRST, JOINED, RANK, BLOCK_N)
        if BIAS:
            total += tl.load(bias + outer, mask=outer < SIZE, other=0.0).to(tl.float32)[None, :]
        place = y + rows[:, None].to(tl.int64) * SIZE + outer[None, :]
        tl.store(place, total.to(y.dtype.element_ty), mask=(rows < end)[:, None] & (outer < SIZE)[None, :])


@triton.jit
def _outer(
    s, x, bounds, table, unit, stride,
    SIZE: tl.constexpr, FIRST: tl.constexpr, JOINED: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr,
    KIND: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """gradient[j * rank + i, n] += sum_t s[t, FIRST + j * RANK + i] x[t, n] over a part of a slot's tokens.

    Program (n * CHUNKS + c, slot, p) does N rows of the gradient from c * N on, and BLOCK_N columns.
    """
    slot = tl.program_id(1)
    start, end = tl.load(bounds + slot * 2), tl.load(bounds + slot * 2 + 1)
    address, rank = _slot(table, slot, KIND, True, COLUMNS)
    share = tl.cdiv(tl.cdiv(end - start, BLOCK_T), PARTS) * BLOCK_T
    start += tl.program_id(2) * share
    end = tl.minimum(end, start + share)
    chunk = tl.program_id(0) % CHUNKS
    if chunk * N < JOINED * rank and end > start:
        gradient = _matrix_at(address, unit, rank, tl.float32)
        outer = tl.program_id(0) // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N)
        components = chunk * N + tl.arange(0, N)
        used = components < JOINED * rank
        columns = _columns(components, rank, FIRST, RANK)
        total = tl.zeros((N, BLOCK_N), dtype=tl.float32)
        for t in range(start, end, BLOCK_T):
            rows = t + tl.arange(0, BLOCK_T)
            left = s + rows[None, :].to(tl.int64) * stride + columns[:, None]
            a = tl.load(left, mask=used[:, None] & (rows < end)[None, :], other=0.0)
            right = x + tl.minimum(rows, end - 1)[:, None].to(tl.int64) * SIZE + outer[None, :]
            b = tl.load(right) if SIZE % BLOCK_N == 0 else tl.load(right, mask=(outer < SIZE)[None, :], other=0.0)
            total = tl.dot(a, b, total)
        place = gradient + components[:, None].to(tl.int64) * SIZE + outer[None, :]
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


def down(x: torch.Tensor, stream: Stream, group: Group, member: int | None, s: torch.Tensor) -> torch.Tensor:
    """Projects x [T, features] onto the rank components of A (member None) or of one B, scaled, into s; returns s.

    s is [T, J * rank]; a member's columns begin at member * rank.
    """
    unit, size, joined = _matrix(group, member)
    tiles = stream.tiles.shape[0]
    few = tiles <= PROGRAMS
    n = min(64 if few else 32, triton.next_power_of_2(joined * stream.rank))
    block_k = 64
    blocks = triton.cdiv(size, block_k)
    # Few tiles, or long rows, would leave most of the chip idle: several programs share the sum over a tile's features.
    wanted = triton.cdiv(2 * PROGRAMS, tiles) if size >= 2048 else PROGRAMS // tiles
    parts = max(1, min(wanted, blocks // 4, 8))
    steps = triton.cdiv(blocks, parts)
    parts = triton.cdiv(blocks, steps)
    shape = {"JOINED": joined, "RANK": stream.rank, "KIND": KINDS.index(group.kind), "COLUMNS": _COLUMNS}
    first = (member or 0) * stream.rank
    partial = s if parts == 1 else torch.empty((parts, s.shape[0], joined * stream.rank), device=s.device)
    _down[(triton.cdiv(joined * stream.rank, n), tiles, parts)](
        x, stream.tiles, stream.table, stream.scales, partial, unit, partial.shape[-1], partial.stride(0),
        SIZE=size, FIRST=first if parts == 1 else 0, N=n, BLOCK_T=BLOCK_T, BLOCK_K=block_k, STEPS=steps,
        WHOLE=parts * steps * block_k == size, **shape, num_warps=8 if few else 4, num_stages=4,
    )  # fmt: skip
    if parts > 1:
        n = triton.next_power_of_2(joined * stream.rank)
        _gathered[(tiles,)](
            partial, stream.tiles, stream.table, s, s.shape[1], partial.stride(0),
            FIRST=first, N=n, BLOCK_T=BLOCK_T, PARTS=parts, **shape, num_warps=4,
        )  # fmt: skip
    return s


def up(
    s: torch.Tensor,
    stream: Stream,
    group: Group,
    member: int | None,
    bias: torch.Tensor | None,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """Maps rank components back: through B of one linear, with its bias, or through A of the group (member None).

    It is added to `onto`, which is then what is returned, where that is given.
    """
    unit, size, joined = _matrix(group, member)
    y = s.new_empty((s.shape[0], size)) if onto is None else onto
    block = 64
    _up[(triton.cdiv(size, block), stream.wide.shape[0])](
        s, stream.wide, stream.table, y if bias is None else bias, y, unit, s.shape[1],
        SIZE=size, FIRST=(member or 0) * stream.rank, JOINED=joined, RANK=stream.rank,
        KIND=KINDS.index(group.kind), BIAS=bias is not None, ONTO=onto is not None, COLUMNS=_COLUMNS, BLOCK_T=WIDE,
        BLOCK_N=block, num_warps=4, num_stages=2,
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
    block, warps, stages = (256, 8, 4) if max(inner) > 1024 else (128, 4, 3)
    block_k = 64
    left = [TensorDescriptor.from_tensor(x, [WIDE, block_k]) for x in xs]
    box = [block, block_k] if turned else [block_k, block]
    right = [TensorDescriptor.from_tensor(weight, box) for weight in weights]
    _mixed[(triton.cdiv(size, block), stream.wide.shape[0])](
        *left, *left[:1] * spare, *right, *right[:1] * spare,
        s, stream.wide, stream.table, y if bias is None else bias, y, unit, s.shape[1],
        K0=inner[0], K1=inner[1], K2=inner[2], TURNED=turned,
        SIZE=size, FIRST=(member or 0) * stream.rank, JOINED=joined, RANK=stream.rank,
        KIND=KINDS.index(group.kind), BIAS=bias is not None, COLUMNS=_COLUMNS, BLOCK_T=WIDE, BLOCK_N=block,
        BLOCK_K=block_k, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


@functools.cache
def _copies_in_blocks() -> bool:
    """Whether the GPU reads tensor descriptors itself; to others they are reads of single elements."""
    return bool(triton.knobs.runtime.interpret) or triton.runtime.driver.active.get_current_target().arch >= 90


def better_mixed(xs: list[torch.Tensor], weights: list[torch.Tensor], turned: bool) -> bool:
    """Whether `mixed` beats `up` and the library's products for these: measured on an H100 (docs/log.md)."""
    tensors = [*xs, *weights]
    # What the copy engine reads begins at a multiple of 16 bytes, and so does every row.
    aligned = all(t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0 for t in tensors)
    inner, size = sum(x.shape[1] for x in xs), weights[0].shape[0 if turned else 1]
    if len(xs) > 3 or not aligned or not _copies_in_blocks():
        return False
    return inner <= 1024 or (inner <= 2048 and (not turned or 1024 <= size <= 2048))


def outer(s: torch.Tensor, x: torch.Tensor, stream: Stream, group: Group, member: int | None) -> None:
    """Adds s^T x, slot by slot, to the gradient of A of the group (member None) or of B of one linear."""
    unit, size, joined = _matrix(group, member)
    tokens, block = 64, 128
    n = min(64, triton.next_power_of_2(joined * stream.rank))
    chunks = triton.cdiv(joined * stream.rank, n)
    blocks = triton.cdiv(size, block)
    busy = max(1, min(stream.bounds.shape[0], x.shape[0] // TYPICAL))
    parts = max(1, min(2 * PROGRAMS // (blocks * busy), 4))
    _outer[(blocks * chunks, stream.bounds.shape[0], parts)](
        s, x, stream.bounds, stream.table, unit, s.shape[1],
        SIZE=size, FIRST=(member or 0) * stream.rank, JOINED=joined, RANK=stream.rank, N=n,
        KIND=KINDS.index(group.kind), COLUMNS=_COLUMNS, BLOCK_T=tokens, BLOCK_N=block, CHUNKS=chunks, PARTS=parts,
        num_warps=4, num_stages=3,
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
