"""Base models that were saved in 4 bits by bitsandbytes: LoRA trains over them as QLoRA does (Dettmers et al., arXiv
2305.14314). Other quantised bases are refused: none was tried, and layers of 8 bits (LLM.int8) compute one trial's rows
by the largest inputs of its neighbours'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from trainers.memory import BF16_BYTES
from trainers.messages import Precision
from trainers.models import LOAD_ERRORS, layer_linears, one_line
from trainers.named import ModelError


def _settings(config: PretrainedConfig) -> dict[str, Any] | None:
    """How the weights were quantised, as the model's folder says; None where they were not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())


def _whole(model: PreTrainedModel, settings: Mapping[str, Any]) -> list[str]:
    """Patterns of the modules that were left as they are."""
    named = settings.get("llm_int8_skip_modules")
    return list(HfQuantizer.get_modules_to_not_convert(model, named, model._keep_in_fp32_modules))


def check_quantised(name: str, model: PreTrainedModel, methods: Sequence[str], precision: Precision = "bf16") -> None:
    """Raises ModelError where a quantised model, loaded or on the meta device, can't be read or trained over."""
    settings = _settings(model.config)
    if settings is None:
        return
    kind = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method", "unknown")))
    if kind != "bitsandbytes" or not settings.get("load_in_4bit"):
        raise ModelError(
            f"{name}: its weights are quantised ({kind}); use a base of 4 bits by bitsandbytes, or a whole one"
        )
    try:
        AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment()
    except LOAD_ERRORS as error:
        raise ModelError(f"{name}: its weights are quantised ({kind}) and can't be read: {one_line(error)}") from error
    if "full" in methods:
        raise ModelError(
            f"{name}: its weights are quantised ({kind}), and full training steps whole ones; "
            "use search.method: [lora], or the model that it was made from"
        )
    if precision == "fp8":
        raise ModelError(
            f"{name}: its weights are quantised ({kind}), fp8 rounds whole ones; use search.precision: bf16"
        )
    head = next((path for path, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if should_convert_module(head, _whole(model, settings)):
        raise ModelError(f"{name}: its head is quantised, which the loss reads; use a base that left {head} as it was")


def bytes_a_weight(model: PreTrainedModel) -> float:
    """Bytes that a weight of the layers' linears takes on average, with its share of the scales."""
    settings = _settings(model.config)
    if settings is None or not settings.get("load_in_4bit"):
        return BF16_BYTES
    # A scale for 64 weights: fp32, or in 8 bits with an fp32 one for 256 of them.
    scales = 1 / 64 + 4 / (64 * 256) if settings.get("bnb_4bit_use_double_quant") else 4 / 64
    whole, taken, count = _whole(model, settings), 0.0, 0
    for name, (linear, _) in layer_linears(model).items():
        size = linear.in_features * linear.out_features
        taken += size * (0.5 + scales if should_convert_module(name, whole) else BF16_BYTES)
        count += size
    return taken / max(count, 1)
