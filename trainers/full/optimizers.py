"""AdamW in fp32, or with 8-bit moments where bitsandbytes or torchao is installed (Dettmers et al., arXiv 2110.02861).

An optimizer's state goes to a checkpoint and comes back by the names that the optimizer itself uses: `exp_avg` and
`exp_avg_sq` of torch; codes and scales of the 8-bit ones, so that resuming rounds nothing anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainers.checkpoints import CheckpointError
from trainers.messages import Optimizer, TrialConfig
from trainers.models import one_line
from trainers.named import ModelError

# Modules that have an AdamW8bit, best first. torchao's moved out of its prototypes in 0.10.
_EIGHT_BIT = ("bitsandbytes.optim", "torchao.optim", "torchao.prototype.low_bit_optim")


def find(name: Optimizer) -> type[torch.optim.Optimizer]:
    """The optimizer's class. Raises ModelError where none is installed."""
    if name == "adamw":
        return torch.optim.AdamW
    broken = ""
    for module in _EIGHT_BIT:
        try:
            found: type[torch.optim.Optimizer] = importlib.import_module(module).AdamW8bit
            return found
        except ModuleNotFoundError as error:
            if error.name is not None and not module.startswith(error.name):
                broken = f" ({module}: {one_line(error)})"
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            broken = f" ({module}: {one_line(error)})"
    raise ModelError(
        f"optimizer adamw-8bit: needs bitsandbytes or torchao, neither can be imported{broken}; "
        "install one, or use optimizer: adamw"
    )


def make(name: Optimizer, config: TrialConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer with torch's defaults; weight decay on matrices alone, as the HF Trainer does."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind: Any = find(name)
    fused = {"fused": all(p.device.type in ("cpu", "cuda") for p in parameters)} if name == "adamw" else {}
    made: torch.optim.Optimizer = kind([g for g in groups if g["params"]], lr=config.learning_rate, **fused)
    return made


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter and its own names, `<parameter>.<name>`; none before the first step."""
    return {
        f"{name}.{key}": tensor
        for name, parameter in parameters.items()
        for key, tensor in _flat(optimizer.state.get(parameter, {})).items()
    }


def _flat(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """One parameter's state as plain tensors, without the step count and without maps from codes to numbers.

    Those are the library's constants, and parameters share them.
    """
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key == "step" or not isinstance(value, torch.Tensor):
            continue
        if hasattr(value, "__tensor_flatten__"):
            inner, _ = value.__tensor_flatten__()
            found |= {f"{key}.{name}": getattr(value, name) for name in inner}
        else:
            found[key] = value
    return {name: tensor for name, tensor in found.items() if "qmap" not in name}


@torch.no_grad()
def begin(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Gives every parameter the empty state of its optimizer, after `step` steps, to be filled through `tensors`."""
    eight_bit: Any = optimizer
    for at, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if hasattr(optimizer, "init_state"):  # bitsandbytes
                eight_bit.init_state(group, parameter, at, index)
                optimizer.state[parameter]["step"] = step
                continue
            new = eight_bit._new_buffer if hasattr(optimizer, "_new_buffer") else _zeros  # torchao has no other way
            # A fused step counts on the device.
            where = parameter.device if group.get("fused") else "cpu"
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=where),
                "exp_avg": new(parameter, True),
                "exp_avg_sq": new(parameter, False),
            }


def _zeros(parameter: torch.Tensor, _: bool) -> torch.Tensor:
    return torch.zeros_like(parameter, memory_format=torch.preserve_format)


def check(into: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises CheckpointError where a saved state does not fit the tensors of a begun optimizer.

    Maps, which older checkpoints hold, are left out as they are now.
    """
    saved = {name: tensor for name, tensor in saved.items() if "qmap" not in name}
    if into.keys() != saved.keys() or any(into[name].shape != saved[name].shape for name in into):
        raise CheckpointError(f"{where}: is of other parameters or another optimizer")
