"""Reads off a model without weights what memory predictions need (`trainers/memory.py`).

The model's own code runs twice on torch's meta device, where tensors have sizes and no contents: with frozen weights,
to see what linears, norms and attention read, and with trained ones, since more is kept around the layers then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainers.memory import ROUNDED_BYTES, Shape
from trainers.messages import Precision
from trainers.models import layer_linears, layers_of, one_line
from trainers.named import ModelError
from trainers.quantised import bytes_a_weight

_TOKENS = 64  # that run through the model; everything is counted a token
_NAME = "sweep_counted"


class _Attention(torch.autograd.Function):
    """Attention that computes nothing and keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, tokens, width = q.shape[1:]
        out = q.new_empty((tokens, heads, width))
        ctx.save_for_backward(q, k, v, out, q.new_empty((heads, tokens), dtype=torch.float32))
        return out


@dataclass
class _Counts:
    """What one forward pass showed. A tensor is known by its storage; `held` keeps storages alive and so unique."""

    outside: int = 0  # bytes that autograd keeps outside of layers
    inputs: dict[int, int] = field(default_factory=dict)  # elements that linears read, by storage
    norms: list[list[torch.Tensor]] = field(default_factory=list)  # inputs of each layer's norms, in order
    outputs: list[tuple[str, torch.Tensor]] = field(default_factory=list)  # of linears, with their kind
    attention: int = 0
    heads: int = 0
    inside: bool = False
    shared: set[int] = field(default_factory=set)  # what all layers are given, such as the rotation of positions
    held: dict[int, torch.Tensor] = field(default_factory=dict)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Counts a tensor that autograd keeps, once; what layers keep of their own is counted by their inputs."""
        key = _key(tensor)
        if key not in self.held:
            self.held[key] = tensor
            if not self.inside or key in self.shared:
                self.outside += tensor.untyped_storage().nbytes()
        return tensor


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def shape_of(model: PreTrainedModel, precision: Precision = "bf16") -> Shape:
    """The shape of a model on the meta device; the model is used up. Raises ModelError where its code does not run.

    `precision` is that of LoRA's products with the base.
    """
    model.to(torch.bfloat16).eval()
    decoder, embedding = model.get_decoder(), model.get_input_embeddings()
    head = model.get_output_embeddings()
    layers = layers_of(decoder)
    if not layers:
        raise ModelError(f"{model.config.model_type}: has no list of layers; use another model")
    kinds = layer_linears(model)
    linears: dict[str, list[list[int]]] = {}
    for kind in ("attention", "mlp"):
        shapes = Counter((m.in_features, m.out_features) for m, k in kinds.values() if k == kind)
        linears[kind] = [[inputs, outputs, count] for (inputs, outputs), count in shapes.items()]
    frozen, trained = (_run(model, decoder, embedding, layers, trains) for trains in (False, True))
    read, rows = _norms(frozen)
    return Shape(
        parameters=model.num_parameters(),
        embedding=embedding.weight.numel(),
        tied=head.weight is embedding.weight,
        layers=len(layers),
        hidden=head.in_features,
        vocabulary=head.out_features,
        largest_layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        linears=linears,
        group_inputs=sum(frozen.inputs.values()) // _TOKENS,
        norm_inputs=read // _TOKENS,
        norm_rows=rows // _TOKENS,
        attention=frozen.attention // _TOKENS,
        heads=frozen.heads,
        gates=_gates(frozen, head.in_features) // _TOKENS,
        outside=frozen.outside // _TOKENS,
        outside_trained=trained.outside // _TOKENS,
        weight_bytes=bytes_a_weight(model) + (ROUNDED_BYTES if precision == "fp8" else 0),
    )


def _norms(counts: _Counts) -> tuple[int, int]:
    """Elements that norms inside of layers read and that have to be kept, and their rows.

    A sum of the residual stream that follows, inside of a layer, a norm of what is added to it (as in Gemma 2 and 3) is
    computed again from what that norm read, so it is not kept.
    """
    made = {_key(tensor) for _, tensor in counts.outputs}
    read, rows = 0, 0
    for layer in counts.norms:
        derived = False
        for given in layer:
            rows += given.numel() // given.shape[-1]
            of_linear = _key(given) in made
            if of_linear or not derived:
                read += given.numel()
            derived = of_linear and given.shape[-1] * _TOKENS == given.numel()
    return read, rows


def _gates(counts: _Counts, hidden: int) -> int:
    """Elements of the MLP's linears that do not write to the residual stream."""
    return sum(t.numel() for kind, t in counts.outputs if kind == "mlp" and t.shape[-1] != hidden)


@contextmanager
def _watched(model: PreTrainedModel, layers: list[nn.Module], counts: _Counts) -> Iterator[None]:
    """Notes what goes through the model while the context lasts."""
    kinds = {id(module): kind for module, kind in layer_linears(model).values()}

    def attend(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        counts.attention += sum(t.untyped_storage().nbytes() // t.element_size() for t in (q, k, v))
        counts.heads += q.shape[1]
        return _Attention.apply(q, k, v)[None], None

    def entered(module: nn.Module, inputs: Any, others: dict[str, Any]) -> None:
        counts.inside = True
        counts.norms.append([])
        given = [t for value in others.values() for t in (value if isinstance(value, tuple | list) else [value])]
        counts.shared |= {_key(t) for t in given if isinstance(t, torch.Tensor)}

    def left(module: nn.Module, inputs: Any, output: Any) -> None:
        counts.inside = False

    def linear(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        counts.inputs.setdefault(_key(inputs[0]), inputs[0].numel())
        counts.outputs.append((kinds[id(module)], output))
        counts.held.setdefault(-id(inputs[0]), inputs[0])  # so that no other tensor takes its place

    def norm(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if counts.inside:
            counts.norms[-1].append(inputs[0])
            counts.held.setdefault(-id(inputs[0]), inputs[0])

    handles = [module.register_forward_hook(linear) for module in model.modules() if id(module) in kinds]
    handles += [m.register_forward_hook(norm) for m in model.modules() if "norm" in type(m).__name__.lower()]
    for layer in layers:
        handles += [layer.register_forward_pre_hook(entered, with_kwargs=True), layer.register_forward_hook(left)]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(config, config._attn_implementation) for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        for handle in handles:
            handle.remove()


def _run(
    model: PreTrainedModel,
    decoder: nn.Module,
    embedding: Callable[[torch.Tensor], torch.Tensor],
    layers: list[nn.Module],
    trains: bool,
) -> _Counts:
    counts = _Counts()
    model.requires_grad_(trains)
    for tensor in (*model.parameters(), *model.buffers()):
        counts.held[_key(tensor)] = tensor  # weights are there anyway
    ids = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
    try:
        with (
            _watched(model, layers, counts),
            torch.autograd.graph.saved_tensors_hooks(counts.keep, lambda tensor: tensor),
        ):
            embedded = embedding(ids)
            if not trains:
                embedded.requires_grad_(True)
            decoder(inputs_embeds=embedded, position_ids=ids, use_cache=False)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{model.config.model_type}: its memory cannot be predicted: {one_line(error)}") from error
    return counts
