"""Prepared data as training reads it: token files, and the order in which a trial visits them.

    folder of prepared data
      train.safetensors       ids int32 [tokens], offsets int64 [rows + 1], mask uint8 [tokens]
      validation.safetensors  the same, shuffled: the first k rows are a fair subset
      test.safetensors        the same; a worker opens it when it is told to examine, and not before
      retention.safetensors   the same, where data.retention is asked for: all of its rows
      data.json               counts, and the sources with their sha256

`mask` is 1 where a token is a target of the loss. Labels are masked by position and never by pad id, since many
tokenizers pad with the end-of-sequence token, which is trained here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trainers.messages import TrialConfig

ORDER, SPLIT = 1, 2  # what a permutation is for: two uses of one seed must not share a stream


class DataError(Exception):
    """Data that cannot be trained on. One line: which file and row, what is wrong, what to do."""


@dataclass(frozen=True)
class Example:
    """One tokenised row: `ids` int32 [tokens], `mask` uint8 [tokens]."""

    ids: NDArray[np.int32]
    mask: NDArray[np.uint8]


@dataclass(frozen=True)
class Split:
    """Examples end to end: `ids` int32 [tokens], `offsets` int64 [rows + 1], `mask` uint8 [tokens]."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    mask: NDArray[np.uint8]

    @property
    def rows(self) -> int:
        """Number of examples."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, int64 [rows]."""
        return np.diff(self.offsets)

    @cached_property
    def completions(self) -> NDArray[np.int64]:
        """Tokens of each example that are targets of the loss, int64 [rows]."""
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.mask, dtype=np.int64)])
        return np.diff(before[self.offsets])

    def __getitem__(self, row: int) -> Example:
        span = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return Example(self.ids[span], self.mask[span])


def permutation(rows: int, *key: int) -> NDArray[np.int64]:
    # Bit streams of numpy's PCG64 are guaranteed not to change between versions (NEP 19); its shuffles are not.
    draws = np.random.PCG64(np.random.SeedSequence(key)).random_raw(rows)
    return np.argsort(draws, kind="stable").astype(np.int64)


def order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the rows: a permutation, int64 [rows], the same on every machine."""
    return permutation(rows, seed, epoch, ORDER)


def batches(config: TrialConfig, rows: int) -> list[NDArray[np.int64]]:
    """The example indices of each optimizer step, `ceil(examples / batch_size)` arrays.

    They depend on seed, batch size and examples alone. Epochs follow each other in one stream, each with its own
    permutation, so only the last step can be smaller than the batch size.
    """
    epochs = -(-config.examples // rows)
    stream = np.concatenate([order(rows, config.seed, epoch) for epoch in range(epochs)])[: config.examples]
    return [stream[start : start + config.batch_size] for start in range(0, config.examples, config.batch_size)]


def cut(rows: Sequence[int], lengths: NDArray[np.int64], budget: int) -> list[list[int]]:
    """Cuts rows, in their order, into parts of at most `budget` tokens, but at least one row."""
    parts: list[list[int]] = []
    tokens = budget + 1
    for row in rows:
        length = int(lengths[row])
        if tokens + length > budget:
            parts.append([])
            tokens = 0
        parts[-1].append(int(row))
        tokens += length
    return parts


def load_split(folder: Path, name: str) -> Split:
    """Reads a prepared split. Raises DataError where it is missing or damaged."""
    with _prepared(folder, name) as path:
        tensors = safetensors.numpy.load_file(path)
        return Split(tensors["ids"], tensors["offsets"], tensors["mask"])


def longest(folder: Path, name: str) -> int:
    """Tokens of the longest example of a prepared split. Its tokens are not read. Raises DataError as `load_split`."""
    with _prepared(folder, name) as path, safe_open(path, "numpy") as file:
        return int(np.diff(file.get_tensor("offsets")).max(initial=0))


@contextmanager
def _prepared(folder: Path, name: str) -> Iterator[Path]:
    """The file of a split; what reading it raises becomes DataError."""
    path = folder / f"{name}.safetensors"
    try:
        yield path
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; prepare the data first") from error
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: is damaged; prepare the data again") from error
