"""Attention over a stream of examples laid end to end: each token sees its own example alone.

Registered with transformers as an attention of its own, for which the model's code builds no mask. The cumulative
lengths come as the keywords that transformers' flash attention takes. On a GPU it is the flash kernel inside torch
(Dao, "FlashAttention-2", 2023); elsewhere each slot's examples are padded to its longest, which the causal mask hides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "sweep_packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    examples: list[int] | None = None,
    blocks: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, d], key and value [1, key heads, T, d]; returns [1, T, heads, d].

    Raises ValueError for what it does not know: soft-capped scores, sinks, bidirectional layers.
    """
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if softcap is not None or others.get("s_aux") is not None or not causal:
        raise ValueError("its attention is not plain causal attention (soft-capped scores, sinks or no mask)")
    if cu_seq_lens_q is None:
        raise ValueError("its layers do not tell their attention where examples end")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if q.is_cuda:
        assert max_length_q is not None
        if blocks is not None and (sliding_window is None or sliding_window >= max_length_q):
            return torch.ops.sweep.attention(query[0], key[0], value[0], blocks, scale)[0][None], None
        out = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            0.0,
            True,
            False,
            scale=scale,
            window_size_left=None if sliding_window is None else sliding_window - 1,
            window_size_right=None if sliding_window is None else 0,
        )[0]
        return out[None], None
    parts, first = [], 0
    for count in examples or [len(cu_seq_lens_q) - 1]:
        bounds = cu_seq_lens_q[first : first + count + 1]
        rows = slice(int(bounds[0]), int(bounds[-1]))
        parts.append(_padded(q[rows], k[rows], v[rows], bounds - bounds[0], scale, sliding_window))
        first += count
    return torch.cat(parts)[None], None


def _padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    lengths = bounds.diff()
    longest = int(lengths.max())
    within = torch.arange(q.shape[0]) - torch.repeat_interleave(bounds[:-1].long(), lengths)
    places = torch.repeat_interleave(torch.arange(len(lengths)), lengths) * longest + within

    def pad(t: torch.Tensor) -> torch.Tensor:
        flat = t.new_zeros((len(lengths) * longest, *t.shape[1:])).index_copy(0, places, t)
        return flat.view(len(lengths), longest, *t.shape[1:]).transpose(1, 2)

    mask = None
    if window is not None and window < longest:
        back = torch.arange(longest)[:, None] - torch.arange(longest)
        mask = (back >= 0) & (back < window)
    out = functional.scaled_dot_product_attention(
        pad(q), pad(k), pad(v), attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, places)


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """The model with this attention, for the time of the context."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config, _ in before:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
