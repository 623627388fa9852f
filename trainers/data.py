"""Prepares data: rows become token files (trainers/splits.py), split once for the whole study.

Where the study's metric is not validation_loss, the texts that it is taken of are written too (trainers/metrics.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trainers import calls, metrics
from trainers.metrics import Answered, MetricError, Objective
from trainers.rows import Row, Source, read
from trainers.splits import SPLIT, DataError, Example, Split, permutation

SPLITS = ("train", "validation", "test")
RETENTION = "retention"  # a split of its own, where it is asked for
_SHOWN = 60  # characters of a text in an error


@dataclass(frozen=True)
class _Kept(Example):
    """An example with the row that it is of."""

    source: Source
    row: Row

    @property
    def where(self) -> str:
        """Names the row."""
        return f"{self.source.name}, row {self.row.number}"

    @property
    def completion(self) -> str:
        """What a metric compares with: the completion, or what the assistant said last."""
        values = self.row.values
        if "messages" not in values:
            return str(values["completion"])
        return str(values["messages"][_last_turn(values["messages"])]["content"])


def _last_turn(messages: list[dict[str, Any]]) -> int:
    return max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")


class _Encoder:
    """Turns rows into examples with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(token for token, about in added if about.special)}
        self.ends = {self.eos}  # of all rows so far: token ids that end what was trained
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

    def _render(self, values: dict[str, Any], turns: int, where: str, *, prompt: bool = False) -> list[int]:
        """Ids of a conversation's first turns."""
        refusal: Exception | None = None
        for form, wrong in calls.forms(values["messages"][:turns]):
            given = {"tools": values.get("tools"), "add_generation_prompt": prompt}
            try:
                # What a template wrote as Python does it was to be given as text.
                text = self.tokenizer.apply_chat_template(form, **given, tokenize=False) if wrong else ""
                if not any(python in text for python in wrong):
                    return self.tokenizer.apply_chat_template(form, **given, tokenize=True, return_dict=False)
            except (TemplateError, ValueError, TypeError, KeyError) as error:
                refusal = refusal or error
        said = str(refusal).strip().splitlines()[0] if str(refusal).strip() else type(refusal).__name__
        raise DataError(f"{where}: the tokenizer's chat template refuses it: {said}") from refusal

    def _conversation(self, row: Row, where: str) -> tuple[list[int], list[int]]:
        """Assistant turns are found by rendering the conversation turn by turn: each must extend the one before."""
        messages = row.values["messages"]
        ids = self._render(row.values, len(messages), where)
        mask = [0] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or turn < row.values.get("trained_from", 0):
                continue
            before, said, after = self._turn(row.values, turn, where)
            if ids[: len(after)] != after:
                raise _rewritten(where)
            mask[len(before) : len(before) + len(said)] = [1] * len(said)
        mask[0] = 0
        return ids, mask

    def _turn(self, values: dict[str, Any], turn: int, where: str) -> tuple[list[int], list[int], list[int]]:
        """What stands before an assistant turn, what of it is trained, and the conversation up to its end."""
        before = self._render(values, turn, where, prompt=True)
        after = self._render(values, turn + 1, where)
        if after[: len(before)] != before:
            raise _rewritten(where)
        said = after[len(before) :]
        # What a template puts behind the end token (ChatML: a newline) is never generated, so it is not trained.
        if (end := self._end(said)) is not None:
            said = said[: end + 1]
            self.ends.add(said[-1])
        return before, said, after

    def _end(self, said: list[int]) -> int | None:
        """The place of the token that ends a turn: its last special one, which need not be the tokenizer's own end.

        None where text follows it, so that it ends nothing.
        """
        places = [place for place, token in enumerate(said) if token in self.special]
        if not places or (said[places[-1]] != self.eos and self.tokenizer.decode(said[places[-1] + 1 :]).strip()):
            return None
        return places[-1]

    def answer(self, kept: _Kept, completion: str) -> tuple[list[int], list[int]]:
        """Ids of a row's prompt, and of this completion after it with its end token, as they would be trained."""
        values = kept.row.values
        if "messages" not in values:
            prompt, said = self._tokens([values["prompt"], completion])
            return self.start + prompt, [*said, self.eos]
        turn = _last_turn(values["messages"])
        messages = [*values["messages"][:turn], {**values["messages"][turn], "content": completion}]
        before, said, _ = self._turn({**values, "messages": messages}, turn, kept.where)
        return before, said


def _rewritten(where: str) -> DataError:
    return DataError(
        f"{where}: the chat template rewrites earlier turns, so assistant turns cannot be found; "
        "give the row as prompt and completion"
    )


def _flatten(examples: Sequence[Example]) -> Split:
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


def _is_new(content: bytes, seen: set[bytes]) -> bool:
    """Whether it was not seen before; it is from now on. Digests of long rows take little memory."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    new = digest not in seen
    seen.add(digest)
    return new


class _Preparation:
    """One run of `prepare`: what was read and dropped is counted over all sources."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int) -> None:
        self.encoder = _Encoder(tokenizer)
        self.max_tokens = max_tokens
        self.seed = seed
        self.dropped = {"duplicates": 0, "cut": 0}
        self.truncated = 0
        self.seen: set[bytes] = set()
        self.sources: dict[str, dict[str, Any]] = {}

    def examples(self, name: str, source: str | Source) -> list[_Kept]:
        """Reads, de-duplicates and tokenises one source. That of retention is de-duplicated on its own.

        Rows are duplicates too where they differ in nothing that is trained or read: in keys that the chat template
        leaves out, or beyond max_tokens.
        """
        read_source = read(source) if isinstance(source, str) else source
        self.sources[name] = {
            "name": read_source.name,
            "format": read_source.format,
            "sha256": read_source.sha256,
            "bytes": read_source.bytes,
            "rows": len(read_source.rows),
        }
        seen = set() if name == RETENTION else self.seen
        fresh = [row for row in read_source.rows if _is_new(row.key.encode(), seen)]
        kept, cut = [], 0
        for row, (ids, mask) in zip(fresh, self.encoder.encode(read_source, fresh), strict=True):
            example = _Kept(
                np.asarray(ids[: self.max_tokens], dtype=np.int32),
                np.asarray(mask[: self.max_tokens], dtype=np.uint8),
                read_source,
                row,
            )
            trained = bool(example.mask.any())
            if trained and not _is_new(example.ids.tobytes() + example.mask.tobytes(), seen):
                continue
            self.truncated += len(ids) > self.max_tokens
            if trained:
                kept.append(example)
            else:
                cut += 1
        duplicates = len(read_source.rows) - len(kept) - cut
        self.dropped["duplicates"] += duplicates
        self.dropped["cut"] += cut
        if not kept:
            raise DataError(
                f"{read_source.name}: no row of {len(read_source.rows)} is left for {name} "
                f"({duplicates} are duplicates, also of rows in the other files; of "
                f"{cut} the completion is beyond {self.max_tokens} tokens): raise max_tokens or give other rows"
            )
        shuffled = permutation(len(kept), self.seed, 0, SPLIT)
        return [kept[i] for i in shuffled]

    def take(self, pool: list[_Kept], share: float, total: int, name: str) -> list[_Kept]:
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


class _Answers:
    """What a metric is taken of: texts of the validation and test rows, and the choices where there are some."""

    def __init__(self, encoder: _Encoder, metric: str, parts: dict[str, list[_Kept]]) -> None:
        self.encoder = encoder
        self.metric = metric
        self.parts = parts

    def check(self) -> None:
        """Raises DataError where a row has nothing to answer, or no completion to compare with."""
        for kept in (kept for name in SPLITS for kept in self.parts[name]):
            if kept.source.format == "text":
                raise DataError(
                    f"{kept.source.name}: has rows of text, which have no completion to compare with; metric "
                    f"{self.metric} needs prompt and completion, or messages"
                )
            if kept.row.values.get("prompt") == "" and not self.encoder.start:
                raise DataError(f"{kept.where}: prompt is empty; metric {self.metric} needs one: fill it in")

    def objective(
        self, choices: Sequence[str] | None, max_new_tokens: int | None
    ) -> tuple[Objective, dict[str, list[Answered]]]:
        """The objective, and the texts by split.

        Raises DataError, and MetricError where a function does not work or no answer can be generated whole.
        """
        self.check()
        counts = Counter(kept.completion for kept in self.parts["train"])
        majority = min(counts, key=lambda text: (-counts[text], text))
        chosen = self._choices(choices, sorted(counts)) if self.metric == metrics.ACCURACY else []
        first = self.parts["validation"][0]
        ids = [self.encoder.answer(first, choice)[1] for choice in chosen]
        known = dict(zip(chosen, ids, strict=True))
        answers = {name: [self._answered(kept, known) for kept in self.parts[name]] for name in ("validation", "test")}
        texts = {name: [row for row, _ in rows] for name, rows in answers.items()}
        longer = self._longer([length for _, length in answers["validation"]], max_new_tokens)
        folder = str(Path.cwd())
        if self.metric != metrics.ACCURACY:
            row = texts["validation"][0]
            metrics.apply(self.metric, metrics.find(self.metric, folder), [row], [row.completion])
        rows, each = len(texts["validation"]), sum(len(choice) for choice in ids)
        tokens = sum(len(row.ids) for row in texts["validation"]) * len(ids) + rows * each
        return Objective(self.metric, folder, majority, chosen, ids, tokens, sorted(self.encoder.ends), longer), texts

    def _longer(self, lengths: Sequence[int], max_new_tokens: int | None) -> int:
        """How many answers, of so many tokens each, are never generated whole. Raises MetricError."""
        if self.metric == metrics.ACCURACY or max_new_tokens is None:
            return 0
        longer = sum(length > max_new_tokens for length in lengths)
        if longer == len(lengths) and self.metric == metrics.EXACT_MATCH:
            raise MetricError(
                f"none of the {longer} validation answers fits into max_new_tokens {max_new_tokens}; the shortest has "
                f"{min(lengths)} tokens: raise objective.max_new_tokens"
            )
        return longer

    def _choices(self, named: Sequence[str] | None, found: list[str]) -> list[str]:
        most = metrics.MAX_CHOICES
        if named is None:
            if not 2 <= len(found) <= most:
                raise DataError(
                    f"{self.parts['train'][0].source.name}: different completions in its rows: {len(found)}; metric "
                    f"accuracy chooses among 2 to {most}: name them as objective.choices, or use exact_match"
                )
            return found
        if len(set(named)) != len(named) or len(named) > most:
            raise DataError(f"objective.choices: {len(named)} are named; name 2 to {most} different ones")
        return list(named)

    def _answered(self, kept: _Kept, known: dict[str, list[int]]) -> tuple[Answered, int]:
        """The row's texts, and the tokens of its completion without the end token."""
        completion = kept.completion
        if not completion:
            raise DataError(
                f"{kept.where}: the assistant's last message calls tools and has no content to compare with; metric "
                f"{self.metric} needs some: use validation_loss, or leave the row out"
            )
        if known and completion not in known:
            listed = ", ".join(repr(choice[:_SHOWN]) for choice in list(known)[:8])
            raise DataError(
                f"{kept.where}: completion {completion[:_SHOWN]!r} is none of the choices ({listed}"
                f"{', ...' if len(known) > 8 else ''}): add it to objective.choices, or correct the row"
            )
        ids, said = self.encoder.answer(kept, completion)
        if known and known[completion] != said:
            raise DataError(
                f"{kept.where}: the chat template writes {completion[:_SHOWN]!r} in another way than in other rows; "
                "give the rows as prompt and completion"
            )
        values = kept.row.values
        prompt = values["prompt"] if "prompt" in values else str(self.encoder.tokenizer.decode(ids))
        return Answered(prompt, completion, ids), len(said) - sum(token in self.encoder.ends for token in said[-1:])


def prepare(
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: str | Source,
    validation: float | str | Source,
    test: float | str | Source | None,
    max_tokens: int,
    seed: int,
    folder: Path,
    model: str,
    retention: str | Source | None = None,
    metric: str = metrics.LOSS,
    choices: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Tokenises and splits the data into `folder` and returns the content of its data.json.

    Sources are named, or were read before (trainers/rows.py). `validation` and `test` are shares of the training file
    (0 to 1) or sources of their own; `test` may be None. Rows
    of the test source are dropped from validation and training, and those of validation from training, as duplicates.
    `retention` is a source of its own, all of whose rows form a split. `choices` are of the metric accuracy; None: the
    distinct completions of the training rows. `max_new_tokens` is what is generated for a metric on text: how many
    answers are longer is counted; None: not. Raises DataError; MetricError for a metric of the user's own that does not
    work, or where every answer is longer; and OSError where writing fails (then the file being written is not left
    behind).

    For all sources together, `rows_read` is the sum of the rows kept, of `dropped.duplicates` and of `dropped.cut`,
    whose completion lies wholly beyond `max_tokens`. `truncated` rows are longer than `max_tokens`, those cut included.
    """
    for name, share in (("validation", validation), ("test", test)):
        if isinstance(share, int | float) and not 0 < share < 1:
            raise DataError(f"{name}: {share:g} is no share; give a number between 0 and 1, or a file")
    folder.mkdir(parents=True, exist_ok=True)
    run = _Preparation(tokenizer, max_tokens, seed)
    parts: dict[str, list[_Kept]] = {"test": []}
    for name, source in (("test", test), ("validation", validation), ("train", train), (RETENTION, retention)):
        if isinstance(source, str | Source):
            parts[name] = run.examples(name, source)
    total = len(parts["train"])
    for name, share in (("test", test), ("validation", validation)):
        if isinstance(share, float):
            parts[name] = run.take(parts["train"], share, total, name)
    splits = {name: _flatten(parts[name]) for name in (*SPLITS, RETENTION) if name in parts}
    summary = {
        "tokenizer": model,
        "max_tokens": max_tokens,
        "seed": seed,
        "splits": {name: _counts(split) for name, split in splits.items()},
        "rows_read": sum(source["rows"] for source in run.sources.values()),
        "dropped": run.dropped,
        "truncated": run.truncated,
        "sources": run.sources,
    }
    texts: dict[str, list[Answered]] = {}
    if metric != metrics.LOSS:
        objective, texts = _Answers(run.encoder, metric, parts).objective(choices, max_new_tokens)
        summary["objective"] = dataclasses.asdict(objective)
    for name, split in splits.items():
        tensors = {"ids": split.ids, "offsets": split.offsets, "mask": split.mask}
        _write(folder / f"{name}.safetensors", safetensors.numpy.save(tensors))
    for name, rows in texts.items():
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        _write(folder / metrics.texts_file(name), lines.encode())
    _write(folder / "data.json", json.dumps(summary, indent=1).encode())
    return summary
