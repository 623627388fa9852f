"""LoRA through PEFT, one trial at a time. Checkpoints are standard PEFT adapter folders."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from trainers.checkpoints import CheckpointError, load_tensors, save_tensors
from trainers.messages import TrialConfig
from trainers.models import target_modules
from trainers.training import INITIALISATION, SlotEngine, derive_seed

ADAPTER = "adapter_model.safetensors"
NAME = "default"


def lora_config(config: TrialConfig, endings: list[str]) -> LoraConfig:
    """PEFT's configuration of a trial, for modules with these name endings. Raises ValueError without rank or alpha."""
    if config.rank is None or config.alpha is None:
        raise ValueError(f"trial {config.number}: LoRA needs rank and alpha")
    # PEFT types alpha as an integer but takes any number; whole ones are written as the integers that readers expect.
    alpha: Any = int(config.alpha) if config.alpha == int(config.alpha) else config.alpha
    return LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        target_modules=endings,
        lora_dropout=config.dropout,
        bias="none",
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Gives every adapter of a model the initial values of a trial seed.

    The distribution is PEFT's own: A is Kaiming-uniform with a = sqrt(5), B is zero. The numbers come from one fp32
    CPU generator over the layers in the model's order, so they depend on nothing that ran before, on no device, and
    another engine can make the same ones.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, INITIALISATION))
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        first, second = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        values = torch.empty(first.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        first.copy_(values)
        second.zero_()


class LoraEngine(SlotEngine):
    """One LoRA trial over the frozen base; adapters are kept in fp32 whatever the base is in."""

    method = "lora"
    _peft: PeftModel | None = None

    def _open(self, config: TrialConfig, checkpoint: Path | None) -> dict[str, nn.Parameter]:
        if config.targets is None:
            raise ValueError(f"trial {config.number}: LoRA needs targets")
        endings = target_modules(self.base.model, config.targets)
        # PEFT draws initial values from the global generator, which nothing else must notice.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            self._peft = get_peft_model(self.base.model, lora_config(config, endings), NAME)
        initialise(self._peft, config.seed)
        parameters = self._parameters()
        if checkpoint is not None:
            tensors = load_tensors(checkpoint / ADAPTER)
            shapes = {name: p.shape for name, p in parameters.items()}
            if {name: t.shape for name, t in tensors.items()} != shapes:
                raise CheckpointError(f"{checkpoint / ADAPTER}: is an adapter of other modules or rank")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name])
        return parameters

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters under the names that PEFT's files use: without the adapter's name."""
        assert self._peft is not None
        named = {n.replace(f".{NAME}.", "."): p for n, p in self._peft.named_parameters() if p.requires_grad}
        assert named.keys() == get_peft_model_state_dict(self._peft, save_embedding_layers=False).keys()
        return named

    def _stepped(self) -> None:
        """The optimizer steps the adapter's own weights: there is nothing to bring up to date."""

    def _close(self) -> None:
        peft, self._peft = self._peft, None
        if peft is not None:
            peft.unload()
        # An injection that failed half-way leaves no PeftModel to unload, but its layers.
        for name, module in list(self.base.model.named_modules()):
            if isinstance(module, LoraLayer):
                self.base.model.set_submodule(name, module.get_base_layer())
        self.base.model.requires_grad_(False)
        self.base.model.eval()

    def _write(self, folder: Path) -> None:
        assert self._peft is not None
        # PEFT's `save_pretrained` asks the hub about embeddings and adds a model card; these two files are the adapter.
        save_tensors(folder / ADAPTER, self._parameters())
        config = copy.copy(self._peft.peft_config[NAME])
        config.inference_mode = True
        config.base_model_name_or_path = self.base.name
        config.save_pretrained(str(folder))

    @contextmanager
    def _base_weights(self) -> Iterator[None]:
        assert self._peft is not None
        with self._peft.disable_adapter():
            yield
