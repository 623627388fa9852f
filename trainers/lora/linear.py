"""Linear layers of the frozen base that add every trial's adapter to that trial's own tokens.

A layer of the model becomes a packed one by a change of its class, so that names, parameters and the code around it
stay as they are, and becomes plain again the same way. Layers that read one input form a group, and one operator
computes the whole group: for token t of slot k and linear j,

    y_j[t] = W_j x[t] + b_j + B_kj (alpha_k / rank_k * A_kj dropout_k(x[t]))

The operator is opaque to torch.compile, and its backward adds the adapters' gradients to the slots' own buffers: there
are no parameters for autograd to gather, and what slots hold can change without anything being compiled again.

Trials may be trained with W_j rounded to 8 bits (float8.py); all are judged with the weights themselves.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trainers.lora import dropout, float8
from trainers.lora.bank import Group
from trainers.lora.stream import Span, Stream
from trainers.messages import Precision

_groups: weakref.WeakValueDictionary[int, PackedGroup] = weakref.WeakValueDictionary()


class PackedGroup:
    """A group at work: its linears, the stream that runs through them, and what was computed ahead for siblings.

    `handle` names the group to the operator. It is a tensor since a number would be compiled in, once a layer.
    """

    def __init__(self, group: Group, precision: Precision = "bf16") -> None:
        self.group = group
        self.plain = all(type(linear) in (nn.Linear, *_packed.values()) for linear in group.linears)
        self._rounded = float8.Weights.of(group.linears) if precision == "fp8" and self.plain else None
        number = max(_groups.keys(), default=-1) + 1
        self.handle = torch.tensor(number)
        self.outputs = group.outputs
        self.columns = len(group.linears)
        self.pending: list[torch.Tensor] = []
        self.stream: Stream | None = None
        _groups[number] = self

    @property
    def rounded(self) -> float8.Weights | None:
        """The weights in 8 bits, where the stream is to be computed with them."""
        assert self.stream is not None
        return self._rounded if self.stream.rounded else None

    @property
    def span(self) -> Span:
        """The one slot's tokens that run through on the CPU."""
        assert self.stream is not None
        (span,) = self.stream.spans
        return span


class _Packed:
    """What a packed layer does in the place of its class's forward; `base_class` is that class."""

    base_class: type[nn.Module]
    packed: PackedGroup
    member: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.packed
        if self.member == 0:
            stream = packed.stream
            assert stream is not None
            packed.pending = torch.ops.sweep.packed_linears(x, packed.handle, packed.outputs, stream.rank)[:-1]
        y = packed.pending[self.member]
        if self.member == packed.columns - 1:
            packed.pending = []
        return y if packed.plain else self.base_class.forward(self, x) + y


_packed: dict[type[nn.Module], type[nn.Module]] = {}


def pack(packed: PackedGroup) -> None:
    """Turns a group's linears into packed ones."""
    for member, linear in enumerate(packed.group.linears):
        base = type(linear)
        if base not in _packed:
            _packed[base] = type(f"Packed{base.__name__}", (_Packed, base), {"base_class": base})
        # Past nn.Module's own __setattr__, which looks for parameters: hundreds of layers change at every judgement.
        vars(linear).update(packed=packed, member=member)
        object.__setattr__(linear, "__class__", _packed[base])


def unpack(packed: PackedGroup) -> None:
    """Makes a group's linears what they were."""
    for linear in packed.group.linears:
        if isinstance(linear, _Packed):
            object.__setattr__(linear, "__class__", linear.base_class)
            del vars(linear)["packed"], vars(linear)["member"]


@torch.library.custom_op("sweep::packed_linears", mutates_args=())
def packed_linears(x: torch.Tensor, handle: torch.Tensor, outputs: list[int], rank: int) -> list[torch.Tensor]:
    """Computes a group: y of each linear, [..., outputs[j]], and the scaled projections s [T, J * rank].

    Where the base is not plain (a quantised layer), y is the adapters' part alone.
    """
    packed = _groups[int(handle)]
    flat = x.reshape(-1, x.shape[-1])
    run = _forward_cuda if x.is_cuda else _forward_cpu
    ys, s = run(packed, flat, rank)
    return [*(y.view(*x.shape[:-1], y.shape[-1]) for y in ys), s]


@packed_linears.register_fake
def _(x: torch.Tensor, handle: torch.Tensor, outputs: list[int], rank: int) -> list[torch.Tensor]:
    tokens = x.numel() // x.shape[-1]
    ys = [x.new_empty((*x.shape[:-1], size)) for size in outputs]
    return [*ys, x.new_empty((tokens, len(outputs) * rank))]


@torch.library.custom_op("sweep::packed_linears_backward", mutates_args=())
def packed_linears_backward(
    grads: list[torch.Tensor], x: torch.Tensor, s: torch.Tensor, handle: torch.Tensor
) -> torch.Tensor:
    """The gradient of x; the adapters' gradients are added to the slots' buffers on the way."""
    packed = _groups[int(handle)]
    flat = x.reshape(-1, x.shape[-1])
    run = _backward_cuda if x.is_cuda else _backward_cpu
    return run(packed, [g.reshape(-1, g.shape[-1]) for g in grads], flat, s).view(x.shape)


@packed_linears_backward.register_fake
def _(grads: list[torch.Tensor], x: torch.Tensor, s: torch.Tensor, handle: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, handle, ctx.outputs, _ = inputs
    ctx.save_for_backward(x, output[-1], handle)


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[torch.Tensor, None, None, None]:
    x, s, handle = ctx.saved_tensors
    given = [
        x.new_zeros((*x.shape[:-1], size)) if grad is None else grad
        for grad, size in zip(grads[:-1], ctx.outputs, strict=True)
    ]
    return torch.ops.sweep.packed_linears_backward(given, x, s, handle), None, None, None


packed_linears.register_autograd(_backward, setup_context=_setup_context)


# --- on the CPU: one slot's tokens at a time (runner.slot_by_slot) ----------------------------------------------------


def _forward_cpu(packed: PackedGroup, x: torch.Tensor, rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    group, span = packed.group, packed.span
    ys = _base_cpu(packed, x)
    s = x.new_zeros((x.shape[0], packed.columns * rank))
    slot = span.slot
    first = None if slot is None else slot.first(slot.copy, group)
    if slot is None or first is None:
        return ys, s
    projected = dropout.apply(x, span, group) @ first[:, : slot.rank].reshape(-1, group.inputs).T
    projected = projected.view(-1, packed.columns, slot.rank).mul_(slot.scale)
    s.view(-1, packed.columns, rank)[..., : slot.rank] = projected
    for member, y in enumerate(ys):
        second = slot.second(slot.copy, group, member)
        assert second is not None
        y.addmm_(projected[:, member], second[: slot.rank])
    return ys, s


def _base_cpu(packed: PackedGroup, x: torch.Tensor) -> list[torch.Tensor]:
    """The base's part of each linear's y; zeros where the layer computes it itself."""
    group = packed.group
    if (weights := packed.rounded) is not None:
        given = float8.rounded(x)
        ys = [float8.product(given, weight, x.dtype) for weight in weights.forward]
        return [y if m.bias is None else y.add_(m.bias) for y, m in zip(ys, group.linears, strict=True)]
    return [
        functional.linear(x, linear.weight, linear.bias) if packed.plain else x.new_zeros((x.shape[0], size))
        for linear, size in zip(group.linears, group.outputs, strict=True)
    ]


def _backward_cpu(packed: PackedGroup, grads: list[torch.Tensor], x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    group, span = packed.group, packed.span
    dx = torch.zeros_like(x)
    if (weights := packed.rounded) is not None:
        dx += float8.product(float8.rounded(torch.cat(grads, dim=1)), weights.backward, x.dtype)
    elif packed.plain:
        for grad, linear in zip(grads, group.linears, strict=True):
            dx.addmm_(grad, linear.weight)
    slot = span.slot
    first = None if slot is None else slot.first(slot.copy, group)
    if slot is None or first is None:
        return dx
    projected = s.view(x.shape[0], packed.columns, -1)[..., : slot.rank]
    dropped = dropout.apply(x, span, group)
    gathered_first = slot.first(slot.gradient, group)
    for member, grad in enumerate(grads):
        second = slot.second(slot.copy, group, member)
        gathered_second = slot.second(slot.gradient, group, member)
        assert second is not None and gathered_first is not None and gathered_second is not None
        slope = (grad @ second[: slot.rank].T).mul_(slot.scale)
        gathered_second[: slot.rank].addmm_(projected[:, member].T, grad)
        gathered_first[member, : slot.rank].addmm_(slope.T, dropped)
        dx += dropout.apply(slope @ first[member, : slot.rank], span, group)
    return dx


# --- on a GPU: trainers/lora/kernels.py -------------------------------------------------------------------------------


def _forward_cuda(packed: PackedGroup, x: torch.Tensor, rank: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    from trainers.lora import float8_kernels, kernels

    group, stream = packed.group, packed.stream
    assert stream is not None
    inputs = kernels.dropped(x, stream, group) if stream.dropout else x
    s = kernels.down(inputs, stream, group, None, x.new_empty((x.shape[0], packed.columns * rank)))
    if (rounded := packed.rounded) is not None:
        given = float8_kernels.rounded([x])
        bases = (float8.product(given, weight, x.dtype) for weight in rounded.forward)
        return [
            kernels.up(s, stream, group, member, linear.bias, onto=base)
            for member, (linear, base) in enumerate(zip(group.linears, bases, strict=True))
        ], s
    ys = []
    for member, linear in enumerate(group.linears):
        # The adapters' part first: the big product then adds to it while it computes, where a pass of its own over
        # y would be bound by memory.
        if packed.plain and kernels.better_mixed([x], [linear.weight], True):
            ys.append(kernels.mixed([x], [linear.weight], True, s, stream, group, member, linear.bias))
            continue
        y = kernels.up(s, stream, group, member, linear.bias if packed.plain else None)
        ys.append(y.addmm_(x, linear.weight.T) if packed.plain else y)
    return ys, s


def _backward_cuda(packed: PackedGroup, grads: list[torch.Tensor], x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    from trainers.lora import float8_kernels, kernels

    group, stream = packed.group, packed.stream
    assert stream is not None
    grads = [grad.contiguous() for grad in grads]
    slopes = torch.empty_like(s)
    for member, grad in enumerate(grads):
        kernels.down(grad, stream, group, member, slopes)
        kernels.outer(s, grad, stream, group, member)
    kernels.outer(slopes, kernels.dropped(x, stream, group) if stream.dropout else x, stream, group, None)
    if (rounded := packed.rounded) is not None:
        base = float8.product(float8_kernels.rounded(grads), rounded.backward, x.dtype)
        if not stream.dropout:
            return kernels.up(slopes, stream, group, None, None, onto=base)
        return base.add_(kernels.dropped(kernels.up(slopes, stream, group, None, None), stream, group))
    weights = [linear.weight for linear in group.linears]
    if packed.plain and not stream.dropout and kernels.better_mixed(grads, weights, False):
        return kernels.mixed(grads, weights, False, slopes, stream, group, None, None)
    dx = kernels.up(slopes, stream, group, None, None)
    if stream.dropout:
        dx = kernels.dropped(dx, stream, group)
    if packed.plain:
        for grad, weight in zip(grads, weights, strict=True):
            dx.addmm_(grad, weight)
    return dx


def launch_group(packed: PackedGroup, stream: Stream) -> None:
    """Launches what a group's forward and backward launch over a stream, on tensors without memory (precompile.py)."""
    packed.stream = stream
    x = torch.empty((stream.ids.shape[1], packed.group.inputs), dtype=torch.bfloat16, device="meta")
    ys, s = _forward_cuda(packed, x, stream.rank)
    _backward_cuda(packed, ys, x, s)
