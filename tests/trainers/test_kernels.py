"""The Triton kernels, run by Triton's interpreter on the CPU, against plain products slot by slot."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import lora_trial
from torch import nn

triton = pytest.importorskip("triton")

from trainers.lora.bank import Group, Layout, Slot, padded  # noqa: E402
from trainers.lora.stream import Stream, slot_row, tiles_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="on a GPU machine the interpreter must be asked for: TRITON_INTERPRET=1"
)


def layout() -> Layout:
    """An attention group of three linears of unequal sizes, and an MLP group of one."""
    shapes = [("attention", 48, [48, 20, 20]), ("mlp", 520, [72])]
    groups = []
    for number, (kind, inputs, outputs) in enumerate(shapes):
        linears = [nn.Linear(inputs, size) for size in outputs]
        names = [f"{kind}.{j}" for j in range(len(outputs))]
        groups.append(Group(number, kind, names, linears, list(range(len(outputs)))))
    return Layout(groups)


def stream_of(slots: list[Slot], bounds: list[tuple[int, int]], tokens: int) -> Stream:
    """A stream over slots of which the last index, of nobody, owns the tail."""
    spare = len(slots)
    spans = [(start, end, k) for k, (start, end) in enumerate(bounds)] + [(bounds[-1][1], tokens, spare)]
    return Stream(
        rank=max(padded(slot.rank) for slot in slots),
        tokens=bounds[-1][1],
        ids=torch.zeros(1, tokens),
        positions=torch.zeros(1, tokens),
        lengths=torch.zeros(1),
        longest=tokens,
        tiles=torch.from_numpy(tiles_of(spans, tokens // 64 + 6)),
        wide=torch.from_numpy(tiles_of(spans, tokens // 128 + 6, 128)),
        bounds=torch.tensor([*bounds, (0, 0)], dtype=torch.int32),
        table=torch.tensor([*(slot_row(slot) for slot in slots), [0] * 6]),
        scales=torch.tensor([*(slot.scale for slot in slots), 0.0]),
        drops=torch.tensor([*(slot.config.dropout for slot in slots), 0.0]),
        keys=torch.randint(-(2**31), 2**31 - 1, (tokens,), dtype=torch.int32),
    )


@pytest.fixture
def work() -> tuple[Layout, list[Slot], Stream]:
    """Three slots of ranks 4, 20 and 16 and different targets, with tokens that do not fill tiles."""
    torch.manual_seed(0)
    made = layout()
    slots = []
    for rank, targets in ((4, "all-linear"), (20, "attention"), (16, "mlp")):
        config = lora_trial(rank=rank, targets=targets, alpha=2.0 * rank, dropout=0.3 if rank == 4 else 0.0)
        slot = Slot.fresh(config, made, torch.float32, torch.device("cpu"))
        for _, first, second in slot.pairs(slot.weights):
            first.copy_(torch.randn(first.shape) * 0.1)
            second.copy_(torch.randn(second.shape) * 0.1)
        slot.put(slot.weights.clone())
        slots.append(slot)
    return made, slots, stream_of(slots, [(0, 70), (70, 100), (100, 233)], 256)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within what the order of fp32 sums explains."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [0, 1])
def test_products_are_those_of_each_slot_alone(work: tuple[Layout, list[Slot], Stream], number: int) -> None:
    """down, up, mixed and outer are x A^T, s B, with the base, and s^T x for each slot's own tokens, and no others."""
    from trainers.lora import kernels

    made, slots, stream = work
    group = made.groups[number]
    x = torch.randn(256, group.inputs)
    joined = len(group.linears)
    s = kernels.down(x, stream, group, None, torch.zeros(256, joined * stream.rank))
    for slot in slots:
        slot.gradient.zero_()
    kernels.outer(s, x, stream, group, None)
    mapped = kernels.up(s, stream, group, None, None)
    grads, weights = [torch.randn(256, n) for n in group.outputs], [linear.weight.data for linear in group.linears]
    fused = kernels.mixed(grads, weights, False, s, stream, group, None, None)
    close(fused, mapped + sum(grad @ weight for grad, weight in zip(grads, weights, strict=True)))
    for slot, (start, end) in zip(slots, stream.bounds.tolist(), strict=False):
        first = slot.first(slot.copy, group)
        if first is None:
            assert not mapped[start:end].any()
            continue
        part = x[start:end].float()
        expected = torch.einsum("ti,jri->tjr", part, first.float()) * slot.scale
        found = s[start:end].view(-1, joined, stream.rank)[..., : padded(slot.rank)].float()
        close(found, expected)
        assert not s[start:end].view(-1, joined, stream.rank)[..., slot.rank :].any()
        gathered: Any = slot.first(slot.gradient, group)
        close(gathered, torch.einsum("tjr,ti->jri", found, part))
        close(mapped[start:end], torch.einsum("tjr,jri->ti", found, first.float()))
    for member, linear in enumerate(group.linears):
        y = kernels.up(s, stream, group, member, linear.bias.data)
        close(kernels.up(s, stream, group, member, linear.bias.data, onto=torch.ones_like(y)), y + 1)
        assert torch.equal(y[240:], linear.bias.data.expand(16, -1))
        fused = kernels.mixed([x], [linear.weight.data], True, s, stream, group, member, linear.bias.data)
        close(fused, y + x @ linear.weight.data.T)
        slope = kernels.down(y, stream, group, member, torch.zeros_like(s))
        kernels.outer(s, y, stream, group, member)
        for slot, (start, end) in zip(slots, stream.bounds.tolist(), strict=False):
            second: Any = slot.second(slot.copy, group, member)
            if second is None:
                continue
            columns = slice(member * stream.rank, member * stream.rank + padded(slot.rank))
            close(y[start:end], s[start:end, columns].float() @ second.float() + linear.bias)
            close(slope[start:end, columns], y[start:end].float() @ second.float().T * slot.scale)
            close(slot.second(slot.gradient, group, member), s[start:end, columns].float().T @ y[start:end].float())


@pytest.mark.parametrize("count", [1, 3, 4])
def test_rows_are_rounded_as_on_the_cpu(count: int) -> None:
    """Scales and codes of matrices put end to end are those of torch; a row of zeros stays zero.

    Of values that need no rounding: where one rounds up to a power of two, the interpreter loses the carry. On an H100
    no code of 12 million differed (docs/log.md).
    """
    from trainers.lora import float8, float8_kernels

    torch.manual_seed(0)
    codes = torch.randint(0, 0x7F, (9, 5101), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    whole = codes * (torch.randint(0, 2, codes.shape) * 2 - 1) * torch.logspace(-40, 40, 9, base=2)[:, None]
    xs = [x.contiguous() for x in whole.split((48, 20, 5000, 33), dim=1)[:count]]
    for row, x in enumerate(xs):  # the largest of a row is in any of them
        x[row::count, 3] = 448 * torch.logspace(-40, 40, 9, base=2)[row::count]
    xs[0][8] = 0
    expected = float8.rounded(torch.cat(xs, dim=1))
    found = float8_kernels.rounded(xs)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.value, expected.value)


def test_dropout_masks_are_the_same_as_on_the_cpu(work: tuple[Layout, list[Slot], Stream]) -> None:
    """The hash decides the same on both devices; trials without dropout pass through."""
    from trainers.lora import dropout, kernels
    from trainers.lora.stream import Span

    made, slots, stream = work
    group = made.groups[1]
    x = torch.randn(256, group.inputs)
    found = kernels.dropped(x, stream, group)
    for slot, (start, end) in zip(slots, stream.bounds.tolist(), strict=False):
        keys = stream.keys[start:end].long() & 0xFFFFFFFF
        expected = dropout.apply(x[start:end], Span(slot, start, end, keys), group)
        close(found[start:end], expected)
        assert torch.equal(found[start:end] == 0, expected == 0)
    assert 0.2 < float((found[:70] == 0).float().mean()) < 0.4


@pytest.mark.parametrize("copy", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_torchs_optimizer(work: tuple[Layout, list[Slot], Stream], copy: torch.dtype) -> None:
    """Three steps of three slots at once, at rates, decays and clips of their own, one of which clips nothing, are
    those of clip_grad_norm_ and torch.optim.AdamW alone; gradients are zero then and the copy is the rounded weights.
    One whose gradient is NaN at the second step is NaN from there on, and nobody else is.
    """
    from trainers.lora import adamw_kernels

    _, slots, _ = work
    known = []
    for number, slot in enumerate(slots):
        slot.config = replace(slot.config, weight_decay=0.1 * number, clip_norm=10.0 ** (3 * number - 3))
        slot.copy = slot.weights if copy == torch.float32 else slot.weights.to(copy)
        weights = nn.Parameter(slot.weights.clone())
        known.append(torch.optim.AdamW([weights], weight_decay=slot.config.weight_decay))
    for taken in range(3):
        for slot, optimizer in zip(slots, known, strict=True):
            (weights,) = optimizer.param_groups[0]["params"]
            slot.gradient.copy_(torch.randn(slot.gradient.shape))
            if taken and slot is slots[1]:
                slot.gradient[3] = math.nan
            weights.grad = slot.gradient.clone()
            slot.steps += 1
        rates = [0.01 * (number + 1) / (taken + 1) for number in range(3)]
        words = torch.from_numpy(adamw_kernels.fields(slots, rates))
        norms = adamw_kernels.step(words, 3, copy)
        for slot, optimizer, rate, norm in zip(slots, known, rates, norms, strict=True):
            (weights,) = optimizer.param_groups[0]["params"]
            expected = nn.utils.clip_grad_norm_([weights], slot.config.clip_norm)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            torch.testing.assert_close(norm, expected, equal_nan=True)
            torch.testing.assert_close(slot.weights, weights.detach(), equal_nan=True)
            assert bool(slot.weights.isnan().all()) == bool(taken and slot is slots[1])
            assert not slot.gradient.any()
            # The interpreter cuts bf16 off, where a GPU rounds.
            torch.testing.assert_close(slot.copy.float(), slot.weights, rtol=2**-7, atol=0, equal_nan=True)
