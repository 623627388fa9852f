"""A trial's weights spread over processes by FSDP2 (torch's `fully_shard`): each keeps a part of every fp32 master.

accelerate's FSDP2 wrapper builds on the same call but is made for a process that trains one model and ends. It shards
the model that it is given in place, here the base that LoRA trials share and must find unchanged; it runs the head as
a module, here the loss reads its weight a chunk at a time; and it puts an optimizer over DTensors. Here a second model
is sharded for the trial's time, and the optimizer steps each process's part as a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from trainers.full.replica import Options
from trainers.full.weights import Pristine
from trainers.models import Base, head_of, layers_of, skeleton


def _within(_: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class Sharded:
    """Implements `trainers.full.weights.Weights` for one of several processes."""

    compiled = True
    kept_bytes = 0

    def __init__(
        self,
        name: str,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        device: torch.device,
        options: Options,
        parameters: Sequence[str],
        first: tuple[Base, Pristine] | None,
    ) -> None:
        """`first`: the base model and its weights, in the first process alone. `dtype` is what the model computes in.

        `parameters` are the base's, by name, which says what is tied: a folder may hold two weights that its
        configuration would tie, and transformers then leaves them apart. The process group is made later, before the
        first `open`.
        """
        self._name, self._config, self._tokenizer = name, config, tokenizer
        self._dtype, self._device = dtype, device
        self._compiling = options.compiled and device.type == "cuda"
        self._gathered = options.gathered
        self._parameters = parameters
        self._first = first
        self._shards: dict[str, DTensor] = {}
        self.masters: dict[str, nn.Parameter] = {}
        self.base = self._empty()

    def _empty(self) -> Base:
        model = skeleton(self._config, self._dtype)
        model.config.use_cache = False
        tied = dict(model.named_parameters(remove_duplicate=False))
        for name in self._parameters:
            if name not in dict(model.named_parameters()):
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner)._parameters[key] = nn.Parameter(tied[name].detach().clone())
        return Base(self._name, model, self._tokenizer, model.get_decoder(), head_of(model), self._device)

    def open(self, saved: Mapping[str, torch.Tensor] | None) -> None:
        """See Weights. A collective; what is not the first process's is sent by it."""
        source: Mapping[str, torch.Tensor] = {}
        if self._first is not None:
            source = saved or self._first[1].keep()
            self._first[1].leave()
        self.base = self._empty()
        model = self.base.model
        self._fill_buffers(model)
        meta = dict(model.named_parameters())
        names = {id(parameter): name for name, parameter in meta.items()}
        made: dict[int, nn.Parameter] = {}
        kept: list[nn.Parameter] = []  # the placeholders, so that their ids stay theirs

        def fill(module: nn.Module) -> None:
            for part in module.modules():
                for key, placeholder in part._parameters.items():
                    if placeholder is None or not placeholder.is_meta:
                        continue
                    if id(placeholder) not in made:
                        kept.append(placeholder)
                        whole = self._send(source.get(names[id(placeholder)]), placeholder.shape)
                        made[id(placeholder)] = nn.Parameter(whole)
                    part._parameters[key] = made[id(placeholder)]

        mesh = init_device_mesh(self._device.type, (distributed.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if self._dtype != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32)
        # Layer by layer, so that no more than one is whole until it is sharded.
        for layer in layers_of(self.base.decoder):
            fill(layer)
            # Backward gives up what forward has gathered either way: what an optimizer steps is never stale.
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not self._gathered)
            if self._compiling:
                # The layer's own code alone: FSDP's hooks around it stay as they are. Of the class that FSDP has just
                # made: that of the class before would recompute nothing with transformers 5.23.
                layer.forward = torch.compile(layer.forward, dynamic=True)
            # The shards are parameters of their own; of the whole ones those are kept that others share.
            shared = {id(placeholder) for placeholder in model.parameters() if placeholder.is_meta}
            made = {key: parameter for key, parameter in made.items() if key in shared}
        fill(model)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        model.within = MethodType(_within, model)
        register_fsdp_forward_method(model, "within")
        self._shards = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
        # The same memory as the shards.
        self.masters = {name: nn.Parameter(shard.detach().to_local()) for name, shard in self._shards.items()}

    def _send(self, whole: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The first process's tensor, in every process, on the device."""
        if self._first is None or whole is None:
            sent = torch.empty(shape, dtype=dtype, device=self._device)
        else:
            sent = whole.detach().to(self._device, dtype, copy=True)
        distributed.broadcast(sent, 0)
        return sent

    def _fill_buffers(self, model: nn.Module) -> None:
        """Buffers (of rotary embeddings, say) are computed as a model is built, for which this one had no memory."""
        mine = {} if self._first is None else dict(self._first[0].model.named_buffers())
        for name, buffer in list(model.named_buffers()):
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[key] = self._send(mine.get(name), buffer.shape, buffer.dtype)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Weights."""
        return self.base.model.within(function, *arguments)

    def gradients(self) -> list[torch.Tensor]:
        """See Weights."""
        for name, shard in self._shards.items():
            if isinstance(shard.grad, DTensor):
                self.masters[name].grad = shard.grad.to_local()
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def stepped(self) -> None:
        """See Weights."""
        for name, shard in self._shards.items():
            shard.grad = None
            self.masters[name].grad = None

    def _shard_of(self, name: str) -> DTensor:
        """The shard that a master, or an optimizer's tensor of it, is laid out as."""
        return self._shards[name] if name in self._shards else self._shards[name.rpartition(".")[0]]

    def gather(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """See Weights. A collective."""
        like = self._shard_of(name)
        part = DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        whole = part.full_tensor()
        return None if self._first is None else whole.to("cpu", copy=True)

    @torch.no_grad()
    def scatter(self, name: str, whole: torch.Tensor | None, into: torch.Tensor) -> None:
        """See Weights. A collective."""
        like = self._shard_of(name)
        sent = self._send(whole, like.shape, into.dtype)
        into.copy_(distribute_tensor(sent, like.device_mesh, like.placements, src_data_rank=None).to_local())

    def without_trial(self) -> AbstractContextManager[None]:
        """Not here: the first process's own model is the base."""
        raise NotImplementedError

    def close(self) -> None:
        """See Weights. No collective: the others may be gone."""
        self._shards, self.masters = {}, {}
        self.base = self._empty()
        if self._first is not None:
            self._first[1].return_()

    def forget(self) -> None:
        """Nothing is kept."""
