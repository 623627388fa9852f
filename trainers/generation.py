"""Greedy generation with a causal model as transformers has it: left padding, an attention mask, a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    max_new_tokens: int,
    micro_tokens: int,
    ends: Sequence[int] = (),
) -> list[list[int]]:
    """The most likely continuation, token by token, of each prompt (token ids), in their order.

    Each ends before an end token or after `max_new_tokens`. End tokens are the ids in `ends`, the tokenizer's
    end-of-sequence token and those of the model's generation config. Prompts of like length form batches of at most
    `micro_tokens` tokens, continuations and padding included, but at least one prompt. The model is in eval mode
    afterwards.
    """
    model.eval()
    found: list[list[int]] = [[] for _ in prompts]
    stops = _stops(model, tokenizer, ends)
    with torch.no_grad(), _plainly(model, tokenizer, max_new_tokens, stops):
        for batch in _batches([len(prompt) for prompt in prompts], max_new_tokens, micro_tokens):
            given = [prompts[place] for place in batch]
            for place, new in zip(batch, _continue(model, tokenizer, given, stops), strict=True):
                found[place] = new
    return found


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> set[int]:
    # A base model's tokenizer often names <|endoftext|>, while its chat template ends a turn with another token.
    own = model.generation_config.eos_token_id
    named = own if isinstance(own, list) else [own]
    return {int(end) for end in (*ends, tokenizer.eos_token_id, *named) if end is not None}


def _batches(lengths: Sequence[int], max_new_tokens: int, micro_tokens: int) -> Iterator[list[int]]:
    """Places of prompts, the shortest first, in batches."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * (lengths[place] + max_new_tokens) > micro_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@contextmanager
def _plainly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stops: Set[int]
) -> Iterator[None]:
    """Nothing but the most likely token: what a model's folder says of sampling or penalties is out of force."""
    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stops),
        pad_token_id=_padding(tokenizer),
    )
    try:
        yield
    finally:
        model.generation_config = before


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    # Whichever it is: the attention mask hides it.
    chosen = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert isinstance(chosen, int)
    return chosen


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NDArray[np.int32]],
    stops: Set[int],
) -> list[list[int]]:
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), _padding(tokenizer), dtype=np.int64)
    mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    device = model.get_input_embeddings().weight.device
    given = torch.from_numpy(ids).to(device)
    out = model.generate(given, attention_mask=torch.from_numpy(mask).to(device))
    assert isinstance(out, torch.Tensor)
    return [_until(new, stops) for new in out[:, longest:].tolist()]


def _until(tokens: list[int], stops: Set[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in stops), len(tokens))]
