"""Greedy decoding with transformers' own generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    micro_tokens: int,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, token by token, up to the end-of-sequence token, which is left out.

    Prompts of like length go together, in batches of at most `micro_tokens`, padding and room for what is generated
    included, but at least one.
    """
    found: list[list[int]] = [[] for _ in prompts]
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=eos, pad_token_id=pad
    )
    with _settings_of_its_own_left_out(model):
        for places in _batches([len(prompt) for prompt in prompts], max_new_tokens, micro_tokens):
            longest = max(len(prompts[place]) for place in places)
            ids = torch.full((len(places), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                length = len(prompts[place])
                ids[row, longest - length :] = torch.from_numpy(prompts[place].astype(np.int64))
                mask[row, longest - length :] = 1
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
            for place, tokens in zip(places, out[:, longest:].tolist(), strict=True):
                found[place] = tokens[: tokens.index(eos)] if eos in tokens else tokens
    return found


@contextmanager
def _settings_of_its_own_left_out(model: PreTrainedModel) -> Iterator[None]:
    """A model's own generation settings fill what is not set: temperatures, and penalties on repetition."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _batches(lengths: Sequence[int], more: int, budget: int) -> list[list[int]]:
    """Places of the prompts, in batches, the longest first."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if not batches or (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + more) > budget:
            batches.append([])
        batches[-1].append(place)
    return batches
