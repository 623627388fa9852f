"""Base models that were saved in fewer bits a weight: LoRA trains over them as QLoRA does (Dettmers et al., arXiv
2305.14314), full-parameter training does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from trainers.models import LOAD_ERRORS, ModelError, one_line

BF16 = 2.0  # bytes a weight


def settings_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """How the weights were quantised, as the model's folder says; None where they were not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    return dict(settings) if isinstance(settings, Mapping) else dict(settings.to_dict())


def check_quantised(name: str, config: PretrainedConfig, methods: Sequence[str]) -> None:
    """Raises ModelError where what reads the weights is not installed, or where a method can't train over them."""
    settings = settings_of(config)
    if settings is None:
        return
    kind = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method", "unknown")))
    try:
        quantizer = AutoHfQuantizer.from_config(dict(settings), pre_quantized=True)
        quantizer.validate_environment()
    except LOAD_ERRORS as error:
        raise ModelError(f"{name}: its weights are quantised ({kind}) and can't be read: {one_line(error)}") from error
    if not quantizer.is_trainable:
        raise ModelError(f"{name}: its weights are quantised ({kind}), and nothing trains over them; use another model")
    if settings.get("load_in_8bit"):
        # LLM.int8 picks columns that are computed in half precision by the largest input of all rows.
        raise ModelError(
            f"{name}: its weights are quantised to 8 bits ({kind}), whose layers compute one trial's rows by its "
            "neighbours'; use a base of 4 bits"
        )
    if "full" in methods:
        raise ModelError(
            f"{name}: its weights are quantised ({kind}), and full training steps whole ones; "
            "use search.method: [lora], or the model that it was made from"
        )


def bytes_a_weight(config: PretrainedConfig) -> float:
    """Bytes that a weight of the layers' linears takes, with its share of the scales; bf16 where it is not known."""
    settings = settings_of(config) or {}
    if settings.get("load_in_4bit"):
        # A scale for 64 weights: fp32, or in 8 bits with an fp32 one for 256 of them.
        return 0.5 + (1 / 64 + 4 / (64 * 256) if settings.get("bnb_4bit_use_double_quant") else 4 / 64)
    bits = settings.get("bits")
    return min(bits / 8 + 1 / 16, BF16) if isinstance(bits, int) else BF16
