"""Prepares data: rows become token files (trainers/splits.py), split once for the whole study."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainers.rows import Row, Source, read
from trainers.splits import SPLIT, DataError, Example, Split, permutation

SPLITS = ("train", "validation", "test")


class _Encoder:
    """Turns rows into examples with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        first = tokenizer("x")["input_ids"][:1]
        # A beginning-of-sequence token is put only where the tokenizer puts it by itself.
        self.start: list[int] = first if first == [tokenizer.bos_token_id] else []

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode(self, source: Source, rows: list[Row]) -> Iterable[tuple[list[int], list[int]]]:
        """Yields ids and mask of each row, untruncated. Raises DataError for a template that does not fit."""
        if source.format == "messages":
            return (self._conversation(row, f"{source.name}, row {row.number}") for row in rows)
        if source.format == "text":
            texts = self._tokens([row.values["text"] for row in rows])
            return ((self.start + t + [self.eos], self._mask([], self.start + t)) for t in texts)
        prompts = self._tokens([row.values["prompt"] for row in rows])
        completions = self._tokens([row.values["completion"] for row in rows])
        return (
            (self.start + p + c + [self.eos], self._mask(self.start + p, c))
            for p, c in zip(prompts, completions, strict=True)
        )

    @staticmethod
    def _mask(prompt: list[int], completion: list[int]) -> list[int]:
        mask = [0] * len(prompt) + [1] * (len(completion) + 1)
        mask[0] = 0  # nothing comes before the first token that could predict it
        return mask

    def _render(self, messages: list[dict[str, Any]], where: str, *, prompt: bool = False) -> list[int]:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=False, add_generation_prompt=prompt
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(f"{where}: the tokenizer's chat template refuses it: {said}") from error

    def _conversation(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        """Assistant turns are found by rendering the conversation turn by turn: each must extend the one before."""
        messages = row.values["messages"]
        ids = self._render(messages, where)
        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:turn], where, prompt=True)
            after = self._render(messages[: turn + 1], where)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise DataError(
                    f"{where}: the chat template rewrites earlier turns, so assistant turns cannot be found; "
                    "give the row as prompt and completion"
                )
            end = len(after)
            # What a template puts behind the end token (ChatML: a newline) is never generated, so it is not trained.
            if self.eos in after[len(before) :]:
                end -= after[::-1].index(self.eos)
            mask[len(before) : end] = [1] * (end - len(before))
        mask[0] = 0
        return ids, mask


def _flatten(examples: list[Example]) -> Split:
    lengths = [len(e.ids) for e in examples]
    empty: list[Any] = [np.zeros(0)]
    return Split(
        np.concatenate([e.ids for e in examples] or empty).astype(np.int32),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate([e.mask for e in examples] or empty).astype(np.uint8),
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _counts(split: Split) -> dict[str, int]:
    return {
        "rows": split.rows,
        "tokens": len(split.ids),
        "completion_tokens": int(split.mask.sum()),
        "longest": int(split.lengths.max(initial=0)),
    }


class _Preparation:
    """One run of `prepare`: what was dropped is counted over all sources."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int, folder: Path) -> None:
        self.encoder = _Encoder(tokenizer)
        self.max_tokens = max_tokens
        self.seed = seed
        self.folder = folder
        self.dropped = {"duplicates": 0, "cut": 0}
        self.truncated = 0
        self.seen: set[str] = set()
        self.sources: dict[str, dict[str, Any]] = {}

    def examples(self, name: str, source: str) -> list[Example]:
        """Reads, de-duplicates and tokenises one source."""
        read_source = read(source, self.folder)
        self.sources[name] = {
            "name": read_source.name,
            "format": read_source.format,
            "sha256": read_source.sha256,
            "bytes": read_source.bytes,
            "rows": len(read_source.rows),
        }
        fresh = []
        for row in read_source.rows:
            if row.key not in self.seen:
                self.seen.add(row.key)
                fresh.append(row)
        self.dropped["duplicates"] += len(read_source.rows) - len(fresh)
        kept = []
        for ids, mask in self.encoder.encode(read_source, fresh):
            self.truncated += len(ids) > self.max_tokens
            example = Example(
                np.asarray(ids[: self.max_tokens], dtype=np.int32), np.asarray(mask[: self.max_tokens], dtype=np.uint8)
            )
            if example.mask.any():
                kept.append(example)
        self.dropped["cut"] += len(fresh) - len(kept)
        if not kept:
            raise DataError(
                f"{read_source.name}: no row of {len(read_source.rows)} is left for {name} "
                f"({len(read_source.rows) - len(fresh)} are duplicates, also of rows in the other files; of "
                f"{len(fresh)} the completion is beyond {self.max_tokens} tokens): raise max_tokens or give other rows"
            )
        shuffled = permutation(len(kept), self.seed, 0, SPLIT)
        return [kept[i] for i in shuffled]

    def take(self, pool: list[Example], share: float, total: int, name: str) -> list[Example]:
        """Takes a share of `total` rows off the end of the pool: at least one."""
        count = max(1, round(share * total))
        if count >= len(pool):
            raise DataError(
                f"{self.sources['train']['name']}: {total} usable rows are too few to set {share:g} apart for {name} "
                "and keep some for training: give more rows or a smaller share"
            )
        taken = pool[-count:]
        del pool[-count:]
        return taken


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: str,
    validation: float | str,
    test: float | str | None,
    max_tokens: int,
    seed: int,
    folder: Path,
    model: str,
) -> dict[str, Any]:
    """Tokenises and splits the data into `folder` and returns the content of its data.json.

    `validation` and `test` are shares of the training file (0 to 1) or sources of their own; `test` may be None. Rows
    of the test source are dropped from validation and training, and those of validation from training, as duplicates.
    Raises DataError, and OSError where writing fails (then the file being written is not left behind).
    """
    for name, share in (("validation", validation), ("test", test)):
        if isinstance(share, int | float) and not 0 < share < 1:
            raise DataError(f"{name}: {share:g} is no share; give a number between 0 and 1, or a file")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Preparation(tokenizer, max_tokens, seed, folder)
    parts: dict[str, list[Example]] = {"test": []}
    for name, source in (("test", test), ("validation", validation), ("train", train)):
        if isinstance(source, str):
            parts[name] = run.examples(name, source)
    total = len(parts["train"])
    for name, share in (("test", test), ("validation", validation)):
        if isinstance(share, float):
            parts[name] = run.take(parts["train"], share, total, name)
    splits = {name: _flatten(parts[name]) for name in SPLITS}
    summary = {
        "tokenizer": model,
        "max_tokens": max_tokens,
        "seed": seed,
        "splits": {name: _counts(split) for name, split in splits.items()},
        "dropped": run.dropped,
        "truncated": run.truncated,
        "sources": run.sources,
    }
    for name, split in splits.items():
        tensors = {"ids": split.ids, "offsets": split.offsets, "mask": split.mask}
        _write(folder / f"{name}.safetensors", safetensors.numpy.save(tensors))
    _write(folder / "data.json", json.dumps(summary, indent=1).encode())
    return summary
