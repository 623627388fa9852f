"""The attention kernels, run by Triton's interpreter on the CPU, against torch's own attention example by example."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

triton = pytest.importorskip("triton")

from trainers.lora.stream import blocks_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="on a GPU machine the interpreter must be asked for: TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 2, 16), (3, 3, 24), (2, 1, 32)])
def test_attention_is_that_of_each_example_alone(heads: int, shared: int, width: int) -> None:
    """Output and gradients equal scaled_dot_product_attention over each example, for lengths around the block size."""
    from trainers.lora import attention_kernels  # noqa: F401

    torch.manual_seed(0)
    lengths = np.cumsum([0, 5, 64, 130, 1, 65]).astype(np.int32)
    tokens = int(lengths[-1])
    blocks = torch.from_numpy(blocks_of(lengths, 16))
    q = torch.randn(tokens, heads, width).transpose(0, 1).requires_grad_()
    k, v = (torch.randn(heads // shared, tokens, width, requires_grad=True) for _ in range(2))
    slope = torch.randn(tokens, heads, width)
    found, _ = torch.ops.sweep.attention(q, k, v, blocks, 0.3)
    gradients = torch.autograd.grad(found, (q, k, v), slope)
    parts = []
    for start, end in itertools.pairwise(lengths):
        rows = slice(int(start), int(end))
        parts.append(
            functional.scaled_dot_product_attention(
                q[None, :, rows], k[None, :, rows], v[None, :, rows], is_causal=True, scale=0.3, enable_gqa=True
            )[0]
        )
    expected = torch.cat(parts, dim=1).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), slope), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
