"""The examiner of prepared data: losses, scores by example and metrics of models that engines hold."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainers import metrics
from trainers.engine import Engine
from trainers.judging import Examination, Judgement, Measured
from trainers.messages import Scores, WorkerJob
from trainers.metrics import Answered, MetricError
from trainers.splits import Split, load_split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEST, RETENTION, VALIDATION = "test", "retention", "validation"
_DECIMALS = 6  # of a nat: scores travel as text


class DataExaminer:
    """Implements `trainers.judging.Examiner` on a job's prepared data."""

    def __init__(self, job: WorkerJob) -> None:
        """Opens no rows. Raises DataError; MetricError for a function that can't be imported."""
        self._job = job
        self._folder = Path(job.data)
        self._metric = job.metric
        self._objective = None if job.metric == metrics.LOSS else metrics.read_objective(self._folder)
        self._function: metrics.Metric = metrics.exact_match
        if self._objective is not None:
            self._function = metrics.find(job.metric, self._objective.folder)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._splits: dict[str, Split] = {}
        self._texts: dict[str, list[Answered]] = {}
        self._scored: dict[str, Split] = {}

    def evaluate(self, engine: Engine, trial: int | None, rows: int | None) -> Judgement:
        """See Examiner."""
        if self._metric != metrics.ACCURACY:
            found = engine.evaluate(trial, rows)
            rung_loss = found.rung_nll / found.rung_tokens
            return Judgement(rung_loss, found.nll / found.completion_tokens, found.input_tokens)
        every = len(self._answered(VALIDATION))
        count = every if rows is None else min(rows, every)
        rung = min(self._job.rung_rows, count)
        # The rung rows are scored apart, so that their loss is the same to the bit whether or not more follow.
        parts = [self._choice_nll(engine, trial, VALIDATION, part) for part in (range(rung), range(rung, count))]
        nll = np.concatenate(parts)
        true = self._true(VALIDATION)[:count]
        loss = np.logaddexp.reduce(-nll, axis=1) + nll[np.arange(count), true]
        tokens = int(self._choices(VALIDATION).offsets[nll.size])
        right = (nll.argmin(axis=1) == true).astype(float).tolist()
        return Judgement(float(loss[:rung].mean()), float(loss.mean()), tokens, right)

    def measure(self, engine: Engine, trial: int, judgement: Judgement) -> Measured:
        """See Examiner."""
        if self._metric == metrics.LOSS:
            return Measured()
        values, tokens = judgement.right, 0
        if values is None:
            values, tokens = self._of_text(engine, trial, VALIDATION)
        return Measured(*metrics.mean_and_error(values), tokens)

    def examine(self, engine: Engine, trial: int | None) -> Examination:
        """See Examiner. A metric that fails on the base model is left out of its scores, and worker.log says why."""
        scores, tokens = {}, 0
        for name in (TEST, RETENTION):
            if name == RETENTION and not (self._folder / f"{RETENTION}.safetensors").exists():
                continue
            split = self._split(name)
            nll = engine.score(trial, split, range(split.rows))
            tokens += len(split.ids)
            metric = None
            if name == TEST and self._metric != metrics.LOSS:
                try:
                    metric, more = self._of_test(engine, trial)
                    tokens += more
                except MetricError as error:
                    if trial is not None:
                        raise
                    sys.stderr.write(f"the base model: {error}\n")
            scores[name] = Scores(nll=nll.round(_DECIMALS).tolist(), tokens=split.completions.tolist(), metric=metric)
        return Examination(scores, tokens)

    def majority(self) -> dict[str, float]:
        """See Examiner."""
        if self._objective is None:
            return {}
        rows = self._answered(TEST)
        try:
            values = metrics.apply(self._metric, self._function, rows, [self._objective.majority] * len(rows))
        except MetricError as error:
            sys.stderr.write(f"the majority baseline: {error}\n")
            return {}
        return {TEST: metrics.mean_and_error(values)[0]}

    def _of_test(self, engine: Engine, trial: int | None) -> tuple[list[float], int]:
        """The metric of each test row, and the tokens that took."""
        if self._metric != metrics.ACCURACY:
            return self._of_text(engine, trial, TEST)
        nll = self._choice_nll(engine, trial, TEST, range(len(self._answered(TEST))))
        right = nll.argmin(axis=1) == self._true(TEST)
        return right.astype(float).tolist(), len(self._choices(TEST).ids)

    def _of_text(self, engine: Engine, trial: int | None, name: str) -> tuple[list[float], int]:
        """The metric of the text that the model generates for each row, and the tokens read and generated."""
        rows = self._answered(name)
        prompts = [np.array(row.ids, dtype=np.int32) for row in rows]
        ends = [] if self._objective is None else self._objective.ends
        generated = engine.generate(trial, prompts, self._job.max_new_tokens, ends)
        if self._tokenizer is None:
            from trainers.models import load_tokenizer, resolve

            self._tokenizer = load_tokenizer(resolve(self._job.model))
        texts = [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
        tokens = sum(len(ids) for ids in prompts) + sum(len(ids) for ids in generated)
        return metrics.apply(self._metric, self._function, rows, texts), tokens

    def _choice_nll(self, engine: Engine, trial: int | None, name: str, rows: range) -> NDArray[np.float64]:
        """Nats of each choice after each row's prompt, [rows, choices]."""
        assert self._objective is not None
        count = len(self._objective.choices)
        scored = engine.score(trial, self._choices(name), range(rows.start * count, rows.stop * count))
        return scored.reshape(len(rows), count)

    def _true(self, name: str) -> NDArray[np.int64]:
        """The place of each row's completion among the choices, [rows]."""
        assert self._objective is not None
        places = {choice: place for place, choice in enumerate(self._objective.choices)}
        return np.array([places[row.completion] for row in self._answered(name)], dtype=np.int64)

    def _split(self, name: str) -> Split:
        if name not in self._splits:
            self._splits[name] = load_split(self._folder, name)
        return self._splits[name]

    def _answered(self, name: str) -> list[Answered]:
        if name not in self._texts:
            self._texts[name] = metrics.read_answered(self._folder, name)
        return self._texts[name]

    def _choices(self, name: str) -> Split:
        """Every choice after every row's prompt: row r with choice c is example r * choices + c."""
        if name not in self._scored:
            assert self._objective is not None
            self._scored[name] = choices_after(self._answered(name), self._objective.choice_ids)
        return self._scored[name]


def choices_after(rows: Sequence[Answered], choices: Sequence[Sequence[int]]) -> Split:
    """Examples of every choice's tokens after every row's prompt; the choice alone is a target of the loss."""
    pairs = [(row.ids, choice) for row in rows for choice in choices]
    ids = [np.array([*prompt, *choice], dtype=np.int32) for prompt, choice in pairs]
    mask = [np.repeat(np.array([0, 1], dtype=np.uint8), [len(prompt), len(choice)]) for prompt, choice in pairs]
    return Split(np.concatenate(ids), np.cumsum([0, *map(len, ids)], dtype=np.int64), np.concatenate(mask))
