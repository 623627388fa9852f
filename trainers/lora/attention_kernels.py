"""Causal attention over examples laid end to end, in Triton: flash attention's algorithm, made for short examples.

Programs take blocks of BLOCK tokens that never cross an example (`blocks`: int32 [n, 3], the example's start and end,
and the block's first token), so work is in proportion to what examples really hold, whatever room the stream has. Key
heads are read in place by the query heads that share them. The backward sums nothing across programs: its bits do not
depend on the order in which they ran. Algorithm: Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from trainers.lora.stream import BLOCK

LOG2_E = 1.4426950408889634


@triton.jit
def _tile(base, rows, dims, step, limit, D: tl.constexpr):
    place = base + rows[:, None].to(tl.int64) * step + dims[None, :]
    return tl.load(place, mask=(rows < limit)[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def _forward(
    q, k, v, out, lse, blocks, scale, tokens, q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h,
    SHARED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out and lse (base 2) of BLOCK queries of one head; SHARED query heads read one key head."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, last = tl.load(blocks + block * 3), tl.load(blocks + block * 3 + 1)
    begin = tl.load(blocks + block * 3 + 2)
    if last > begin:
        k += (head // SHARED) * k_h
        v += (head // SHARED) * v_h
        rows, dims = begin + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
        query = _tile(q + head * q_h, rows, dims, q_t, last, D)
        top = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        sums = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for at in range(first, tl.minimum(begin + BLOCK, last), INNER):
            columns = at + tl.arange(0, INNER)
            score = tl.dot(query, tl.trans(_tile(k, columns, dims, k_t, last, D))) * scale
            score = tl.where((rows[:, None] >= columns[None, :]) & (columns < last)[None, :], score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, axis=1))
            weight = tl.exp2(score - higher[:, None])
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weight, axis=1)
            sums = tl.dot(weight.to(v.dtype.element_ty), _tile(v, columns, dims, v_t, last, D), sums * fade[:, None])
            top = higher
        place = out + head * o_h + rows[:, None].to(tl.int64) * o_t + dims[None, :]
        mask = (rows < last)[:, None] & (dims < D)[None, :]
        tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)
        tl.store(lse + head * tokens + rows, top + tl.log2(total), mask=rows < last)


@triton.jit
def _backward_query(
    q, k, v, out, lse, slope, delta, dq, blocks, scale, natural, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, o_t, o_h, s_t, s_h, d_t, d_h,
    SHARED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK queries of one head, and delta = sum(slope * out) for the other kernel."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, last = tl.load(blocks + block * 3), tl.load(blocks + block * 3 + 1)
    begin = tl.load(blocks + block * 3 + 2)
    if last > begin:
        k += (head // SHARED) * k_h
        v += (head // SHARED) * v_h
        rows, dims = begin + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
        query = _tile(q + head * q_h, rows, dims, q_t, last, D)
        given = _tile(slope + head * s_h, rows, dims, s_t, last, D)
        made = _tile(out + head * o_h, rows, dims, o_t, last, D)
        both = tl.sum(given.to(tl.float32) * made.to(tl.float32), axis=1)
        tl.store(delta + head * tokens + rows, both, mask=rows < last)
        level = tl.load(lse + head * tokens + rows, mask=rows < last, other=0.0)
        sums = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for at in range(first, tl.minimum(begin + BLOCK, last), INNER):
            columns = at + tl.arange(0, INNER)
            key = _tile(k, columns, dims, k_t, last, D)
            score = tl.dot(query, tl.trans(key)) * scale
            seen = (rows[:, None] >= columns[None, :]) & (columns < last)[None, :]
            weight = tl.where(seen, tl.exp2(score - level[:, None]), 0.0)
            change = tl.dot(given, tl.trans(_tile(v, columns, dims, v_t, last, D)))
            change = weight * (change - both[:, None])
            sums = tl.dot(change.to(k.dtype.element_ty), key, sums)
        place = dq + head * d_h + rows[:, None].to(tl.int64) * d_t + dims[None, :]
        tl.store(place, (sums * natural).to(dq.dtype.element_ty), mask=(rows < last)[:, None] & (dims < D)[None, :])


@triton.jit
def _backward_key(
    q, k, v, lse, slope, delta, dk, dv, blocks, scale, natural, tokens,
    q_t, q_h, k_t, k_h, v_t, v_h, s_t, s_h, d_t, d_h,
    SHARED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCK keys and values of one key head, over the query heads that share it."""
    block, shared = tl.program_id(0), tl.program_id(1).to(tl.int64)
    last, begin = tl.load(blocks + block * 3 + 1), tl.load(blocks + block * 3 + 2)
    if last > begin:
        columns, dims = begin + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
        key = _tile(k + shared * k_h, columns, dims, k_t, last, D)
        value = _tile(v + shared * v_h, columns, dims, v_t, last, D)
        for_key = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for_value = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for member in range(0, SHARED):
            head = shared * SHARED + member
            for at in range(begin, last, INNER):
                rows = at + tl.arange(0, INNER)
                query = _tile(q + head * q_h, rows, dims, q_t, last, D)
                given = _tile(slope + head * s_h, rows, dims, s_t, last, D)
                level = tl.load(lse + head * tokens + rows, mask=rows < last, other=0.0)
                both = tl.load(delta + head * tokens + rows, mask=rows < last, other=0.0)
                score = tl.dot(key, tl.trans(query)) * scale
                seen = (rows[None, :] >= columns[:, None]) & (rows < last)[None, :]
                weight = tl.where(seen, tl.exp2(score - level[None, :]), 0.0)
                for_value = tl.dot(weight.to(v.dtype.element_ty), given, for_value)
                change = tl.dot(value, tl.trans(given))
                change = weight * (change - both[None, :])
                for_key = tl.dot(change.to(q.dtype.element_ty), query, for_key)
        place = shared * d_h + columns[:, None].to(tl.int64) * d_t + dims[None, :]
        mask = (columns < last)[:, None] & (dims < D)[None, :]
        tl.store(dk + place, (for_key * natural).to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + place, for_value.to(dv.dtype.element_ty), mask=mask)


INNER = 32  # of the other side's tokens that are looked at together: fastest on an H100 (docs/log.md)
# Stages of the loop over them, for heads of at most 64 features and for wider ones.
STAGES = {"forward": (3, 3), "query": (3, 2), "key": (1, 2)}


def _shape(q: torch.Tensor, k: torch.Tensor, kernel: str) -> dict[str, Any]:
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    shape = {"SHARED": q.shape[0] // k.shape[0], "D": q.shape[-1], "WIDTH": width, "BLOCK": BLOCK, "INNER": INNER}
    return {**shape, "num_warps": 4, "num_stages": STAGES[kernel][width > 64]}


def _strides(*tensors: torch.Tensor) -> list[int]:
    """Elements from one token and from one head to the next, of [heads, T, d] tensors; d is contiguous."""
    return [stride for tensor in tensors for stride in (tensor.stride(1), tensor.stride(0))]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [heads, T, d], k and v [key heads, T, d]; returns out [T, heads, d] and the base-2 log-sum-exp [heads, T]."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    heads, tokens, width = q.shape
    out = q.new_empty((tokens, heads, width))
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    strides = _strides(q, k, v, out.transpose(0, 1))
    _forward[(blocks.shape[0], heads)](
        q, k, v, out, lse, blocks, scale * LOG2_E, tokens, *strides, **_shape(q, k, "forward"),
    )  # fmt: skip
    return out, lse


attention = torch.library.custom_op("sweep::attention", _attend, mutates_args=())


@attention.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, tokens, width = q.shape
    return q.new_empty((tokens, heads, width)), torch.empty((heads, tokens), dtype=torch.float32, device=q.device)


def _attend_backward(
    slope: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped as they are and laid out token by token; slope and out are [T, heads, d]."""
    q, k, v, slope = _dense(q), _dense(k), _dense(v), _dense(slope)
    heads, tokens, width = q.shape
    made, given = out.transpose(0, 1), slope.transpose(0, 1)
    delta = torch.empty_like(lse)
    dq = q.new_empty((tokens, heads, width)).transpose(0, 1)
    dk, dv = (k.new_empty((tokens, k.shape[0], width)).transpose(0, 1) for _ in range(2))
    scales = scale * LOG2_E, scale
    _backward_query[(blocks.shape[0], heads)](
        q, k, v, made, lse, given, delta, dq, blocks, *scales, tokens,
        *_strides(q, k, v, made, given, dq), **_shape(q, k, "query"),
    )  # fmt: skip
    _backward_key[(blocks.shape[0], k.shape[0])](
        q, k, v, lse, given, delta, dk, dv, blocks, *scales, tokens,
        *_strides(q, k, v, given, dk), **_shape(q, k, "key"),
    )  # fmt: skip
    return dq, dk, dv


attention_backward = torch.library.custom_op("sweep::attention_backward", _attend_backward, mutates_args=())


@attention_backward.register_fake
def _(
    slope: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    blocks: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty((t.shape[1], t.shape[0], t.shape[2])).transpose(0, 1) for t in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, blocks, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, blocks)


def _backward(ctx: Any, slope: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, blocks = ctx.saved_tensors
    return (*torch.ops.sweep.attention_backward(slope, q, k, v, out, lse, blocks, ctx.scale), None, None)


attention.register_autograd(_backward, setup_context=_setup_context)


def launch(heads: int, key_heads: int, width: int, tokens: int, blocks: torch.Tensor) -> None:
    """Launches what attention of this shape launches, on tensors without memory (precompile.py)."""
    q = torch.empty((heads, tokens, width), dtype=torch.bfloat16, device="meta")
    k = torch.empty((key_heads, tokens, width), dtype=torch.bfloat16, device="meta")
    out, lse = _attend(q, k, k, blocks, 1.0)
    _attend_backward(out, q, k, k, out, lse, blocks, 1.0)
