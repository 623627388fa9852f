"""Metrics of what a model answers: exact match, accuracy over choices, or a function of the user's own.

Torch-free. Where a study's metric is not validation_loss, the prepared data also holds what metrics are taken of:

    validation-texts.jsonl  one line for each row of validation.safetensors, in its order: Answered
    test-texts.jsonl        the same for test.safetensors
    data.json               `objective`: Objective
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainers.splits import DataError

LOSS, EXACT_MATCH, ACCURACY = "validation_loss", "exact_match", "accuracy"
MAX_CHOICES = 64

Metric = Callable[[str, str, str], float]  # of prompt, generated text and the row's completion; higher is better


class MetricError(Exception):
    """A metric that cannot be had or that fails. One line: which, on what, what it said."""


@dataclass(frozen=True)
class Answered:
    """One row as a metric sees it: its texts, and the prompt's token ids as the model reads them."""

    prompt: str
    completion: str
    ids: list[int]


@dataclass(frozen=True)
class Objective:
    """What a metric needs besides the rows.

    `folder` is where the user's module is looked for. `majority` is the most frequent completion of the training rows.
    `choices` are of accuracy, `choice_ids` the tokens of each with its end token, as they would be trained, and
    `validation_tokens` the input tokens of scoring all of them after every validation prompt. `ends` are the token ids
    that end a trained answer, at which a generated one ends too. `longer_answers` are the validation rows whose answer
    does not fit into objective.max_new_tokens. Data that were prepared before have neither of the two.
    """

    metric: str
    folder: str
    majority: str
    choices: list[str]
    choice_ids: list[list[int]]
    validation_tokens: int
    ends: list[int] = field(default_factory=list)
    longer_answers: int = 0


def texts_file(split: str) -> str:
    """The name of a split's file of texts."""
    return f"{split}-texts.jsonl"


def read_objective(folder: Path) -> Objective:
    """Reads a prepared folder's objective. Raises DataError where the data was prepared without one."""
    path = folder / "data.json"
    try:
        return Objective(**json.loads(path.read_text(encoding="utf-8"))["objective"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: holds no objective; prepare the data again") from error


def read_answered(folder: Path, split: str) -> list[Answered]:
    """Reads a split's texts. Raises DataError where they are missing or damaged."""
    path = folder / texts_file(split)
    try:
        with path.open(encoding="utf-8") as file:
            return [Answered(**json.loads(line)) for line in file]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; prepare the data first") from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged; prepare the data again") from error


def exact_match(prompt: str, generated: str, completion: str) -> float:
    """1 where the generated text is the completion, spaces around both left out, else 0."""
    return float(generated.strip() == completion.strip())


def find(name: str, folder: str) -> Metric:
    """Returns exact_match, or imports `module:function`, looking into `folder` first. Raises MetricError.

    The folder stays on sys.path, at its end, for what the function imports later.
    """
    if name in (EXACT_MATCH, ACCURACY):
        return exact_match
    module, _, attribute = name.partition(":")
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise MetricError(f"metric {name}: module {module} has no {attribute}; correct the name") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise MetricError(f"metric {name}: {module} cannot be imported from {folder}: {_said(error)}") from error
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)
    if not callable(found):
        raise MetricError(f"metric {name}: {attribute} is {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def apply(name: str, metric: Metric, rows: Sequence[Answered], generated: Sequence[str]) -> list[float]:
    """The metric of each row. Raises MetricError where it fails, or gives what is no finite number."""
    values = []
    for row, text in zip(rows, generated, strict=True):
        try:
            value = float(metric(row.prompt, text, row.completion))
            if not math.isfinite(value):
                raise ValueError(f"it gave {value}, not a finite number")
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            prompt = row.prompt if len(row.prompt) <= 60 else row.prompt[:57] + "..."
            raise MetricError(f"metric {name} failed on the prompt {prompt!r}: {_said(error)}") from error
        values.append(value)
    return values


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error: sample standard deviation over the root of the number; None for a single value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
