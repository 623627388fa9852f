"""Metrics of trained trials against plain transformers, a row at a time; choices; functions of the user's own."""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import WORDS, curve, lora_trial, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from trainers import metrics
from trainers.data import prepare
from trainers.engine import TrialFailed
from trainers.examiner import DataExaminer
from trainers.judging import Judge
from trainers.live import LiveTrial
from trainers.lora.engine import LoraEngine
from trainers.messages import WorkerJob
from trainers.meter import Meter
from trainers.models import load_base
from trainers.splits import DataError, load_split

# PEFT 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RUNG_ROWS = 4
LEARNS = {"rank": 8, "alpha": 32.0, "learning_rate": 2e-2, "batch_size": 8, "examples": 400}
FUNCTION = """
def shared(prompt, generated, completion):
    return len(set(generated) & set(completion)) / len(prompt)
def fragile(prompt, generated, completion):
    if generated != completion:
        raise KeyError("score\\nof " + prompt)
    return 1
"""


class Bench:
    """A tiny model on rows that it can learn in part, with an engine and its examiner."""

    def __init__(self, root: Path, model: Path, metric: str, rows_file: Path | None = None, **changes: Any) -> None:
        """Prepares the rows, or those of a file, into `root`; `changes` are of `prepare`."""
        rng = random.Random(5)
        colours = {word: f" {rng.choice(['red', 'blue', 'dog'])}" for word in WORDS}
        rows = [{"prompt": f"{a} {b} ->", "completion": colours[a]} for a in WORDS for b in WORDS]
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (root / "general.jsonl").write_text('{"text": "the river sings"}\n{"text": "a bird runs over"}\n')
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        options = {"validation": 0.1, "test": 0.1, "max_tokens": 64, "seed": 3, "model": "tiny", **changes}
        train = str(rows_file or root / "rows.jsonl")
        prepare(self.tokenizer, train=train, folder=root / "data", metric=metric, **options)
        self.root, self.model = root, model
        times = {"origin_boot_ms": 0, "paid_ms": 0, "work_ms": 0, "checkpoint_ms": 0}
        settings = {"worker": "w", "command": [], "rung_rows": RUNG_ROWS, "boot_id": "", "fence": 0, "device": "cpu"}
        data = {"model": str(model), "data": str(root / "data"), "metric": metric, "max_new_tokens": 5}
        self.examiner = DataExaminer(WorkerJob(**data, **settings, **times))  # type: ignore[arg-type]
        splits = [load_split(root / "data", name) for name in ("train", "validation")]
        self.engine: Any = LoraEngine(load_base(str(model), "cpu"), *splits, RUNG_ROWS, 256, slots=2)

    def trained(self, steps: int | None = None) -> Any:
        """Trains trial 1 and returns it as PEFT loads it."""
        self.engine.admit(lora_trial(**LEARNS), None, None)
        curve(self.engine, 1, steps)
        self.engine.checkpoint(1, self.root / "adapter")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.model), self.root / "adapter").eval()

    def rows(self, split: str) -> list[dict[str, Any]]:
        """The rows of a split in its order, found again by their tokens."""
        known = {}
        for line in (self.root / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            known[self.tokenizer.decode(self.tokenizer(row["prompt"] + row["completion"])["input_ids"])] = row
        found = load_split(self.root / "data", split)
        return [known[self.tokenizer.decode(found[place].ids[:-1])] for place in range(found.rows)]

    @torch.no_grad()
    def answer(self, model: Any, prompt: str) -> str:
        """Greedy decoding of one prompt, without a cache."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        while ids.shape[1] < length + 5 and int(ids[0, -1]) != self.tokenizer.eos_token_id:
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
        return str(self.tokenizer.decode(ids[0, length:], skip_special_tokens=True))

    def right(self, model: Any, row: dict[str, Any]) -> float:
        """Whether the answer to a row is its completion."""
        return float(self.answer(model, row["prompt"]).strip() == row["completion"].strip())

    @torch.no_grad()
    def nll(self, model: Any, prompt: str, choice: str) -> float:
        """Nats of a choice and the end token after a prompt."""
        start = self.tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*start, *self.tokenizer(choice)["input_ids"], self.tokenizer.eos_token_id]])
        logp = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1], dim=-1)
        return -float(logp.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum())


Make = Callable[..., Bench]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that can learn to end: where head and embeddings are one, the end token's row, which pads, is zero."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False)
    return save_model(tmp_path_factory.mktemp("untied") / "untied", config)


@pytest.fixture
def make(tmp_path: Path, untied: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes benches in a working directory that holds a metric of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_metric.py").write_text(FUNCTION)
    return lambda metric, **changes: Bench(tmp_path, untied, metric, **changes)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """By the textbook."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def test_exact_match_is_that_of_plain_generation(make: Make) -> None:
    """Metric, standard error and scores by test example equal a plain loop's."""
    bench = make("exact_match", retention=str(Path.cwd() / "general.jsonl"))
    model = bench.trained(20)
    judgement = bench.examiner.evaluate(bench.engine, 1, None)
    found = bench.engine.evaluate(1, None)
    rung_loss, loss = found.rung_nll / found.rung_tokens, found.nll / found.completion_tokens
    assert (judgement.rung_loss, judgement.loss, judgement.right) == (rung_loss, loss, None)
    measured = bench.examiner.measure(bench.engine, 1, judgement)
    right = [bench.right(model, row) for row in bench.rows("validation")]
    assert (measured.metric, measured.error) == pytest.approx(mean_and_error(right))
    share = statistics.fmean(right)
    assert 0 < share < 1
    assert measured.error == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    scores = bench.examiner.examine(bench.engine, 1).scores
    rows = bench.rows("test")
    assert scores["test"].metric == [bench.right(model, row) for row in rows]
    assert scores["test"].nll == pytest.approx([bench.nll(model, r["prompt"], r["completion"]) for r in rows], abs=1e-4)
    assert scores["test"].tokens == [len(bench.tokenizer(r["completion"])["input_ids"]) + 1 for r in rows]
    assert (scores["retention"].metric, len(scores["retention"].nll)) == (None, 2)
    assert scores["retention"].tokens == (load_split(bench.root / "data", "retention").lengths - 1).tolist()
    most = statistics.mode(row["completion"] for row in bench.rows("train"))
    assert bench.examiner.majority() == {"test": statistics.fmean(row["completion"] == most for row in rows)}


def test_conversations_whose_turns_end_with_another_token(untied: Path, tmp_path: Path) -> None:
    """A trial that has learnt the answers has them right, whichever token the tokenizer names as its end.

    Base models name <|endoftext|> beside a template that ends turns with another token.
    """
    answer = {"role": "assistant", "content": "dog"}
    talks = [{"messages": [{"role": "user", "content": f"{a} {b}"}, answer]} for a in WORDS for b in WORDS]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    found = {}
    for end in ("<|im_end|>", "<|endoftext|>"):
        model = tmp_path / end.strip("<|>")
        shutil.copytree(untied, model)
        tokenizer: Any = AutoTokenizer.from_pretrained(model, eos_token=end, pad_token=end)
        tokenizer.save_pretrained(model)
        config = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": tokenizer.eos_token_id}))
        bench = Bench(model, model, "exact_match", tmp_path / "talks.jsonl")
        bench.trained()
        judgement = bench.examiner.evaluate(bench.engine, 1, None)
        found[end] = (judgement.loss, bench.examiner.measure(bench.engine, 1, judgement).metric)
    assert found["<|im_end|>"] == found["<|endoftext|>"]
    assert found["<|im_end|>"][1] == 1.0


def test_exact_match_leaves_out_spaces_around_alone() -> None:
    """What stands around either text does not count; what stands in it does."""
    assert metrics.exact_match("", "dog\n", " dog") == metrics.exact_match("", " a  dog", "a  dog ") == 1.0
    assert metrics.exact_match("", "a dog", "a  dog") == metrics.exact_match("", "Dog", "dog") == 0.0


def test_accuracy_and_its_loss_are_those_of_the_choices_one_by_one(make: Make) -> None:
    """The likeliest of all choices is the answer; the loss is the cross-entropy among them, the rung rows first.

    Each choice's tokens count, its end token too, as a plain model gives them; of the base model as well.
    """
    bench = make("accuracy", choices=[" red", " the house", " blue", " dog"])
    model: Any = AutoModelForCausalLM.from_pretrained(bench.model)
    for trial in (None, 1):
        if trial is not None:
            model = bench.trained(20)
        rows = bench.rows("validation")
        choices = [" red", " the house", " blue", " dog"]
        nll = torch.tensor([[bench.nll(model, row["prompt"], c) for c in choices] for row in rows])
        true = torch.tensor([choices.index(row["completion"]) for row in rows])
        each = torch.nn.functional.cross_entropy(-nll, true, reduction="none")
        judgement = bench.examiner.evaluate(bench.engine, trial, None)
        assert judgement.loss == pytest.approx(float(each.mean()), rel=1e-4)
        assert judgement.rung_loss == pytest.approx(float(each[:RUNG_ROWS].mean()), rel=1e-4)
        rung = bench.examiner.evaluate(bench.engine, trial, RUNG_ROWS)
        assert rung.rung_loss == rung.loss == judgement.rung_loss
        each_tokens = [[len(bench.tokenizer(r["prompt"] + c)["input_ids"]) + 1 for c in choices] for r in rows]
        assert (rung.input_tokens, judgement.input_tokens) == (
            sum(map(sum, each_tokens[:RUNG_ROWS])),
            sum(map(sum, each_tokens)),
        )
        right = (nll.argmin(dim=1) == true).double().tolist()
        assert judgement.right == right
    measured = bench.examiner.measure(bench.engine, 1, judgement)
    assert (measured.metric, measured.error, measured.tokens) == (*mean_and_error(right), 0)
    assert 0 < measured.metric < 1
    test = bench.rows("test")
    found = bench.examiner.examine(bench.engine, 1).scores["test"]
    expected = [min(choices, key=lambda c: bench.nll(model, row["prompt"], c)) == row["completion"] for row in test]
    assert found.metric == [float(right) for right in expected]
    assert found.nll == pytest.approx([bench.nll(model, r["prompt"], r["completion"]) for r in test], abs=1e-4)


def live(trial: int, *, done: bool, examine: bool, bench: Bench) -> LiveTrial:
    """A live trial as the worker holds it."""
    at = bench.engine.position(trial)
    assert at.done == done
    return LiveTrial(lora_trial(number=trial, **LEARNS), "a", bench.root, at, None, examine)


def test_a_function_of_the_users_own_chooses_by_three_texts(make: Make) -> None:
    """It gets prompt, generated text and completion, and may give any number; a baseline comes of it too."""
    bench = make("users_metric:shared")
    model = bench.trained(20)

    def shared(row: dict[str, Any], text: str) -> float:
        return len(set(text) & set(row["completion"])) / len(row["prompt"])

    rows, test = bench.rows("validation"), bench.rows("test")
    measured = bench.examiner.measure(bench.engine, 1, bench.examiner.evaluate(bench.engine, 1, None))
    expected = [shared(row, bench.answer(model, row["prompt"])) for row in rows]
    assert (measured.metric, measured.error) == pytest.approx(mean_and_error(expected))
    found = bench.examiner.examine(bench.engine, 1).scores["test"].metric
    assert found == pytest.approx([shared(row, bench.answer(model, row["prompt"])) for row in test])
    most = statistics.mode(row["completion"] for row in bench.rows("train"))
    assert bench.examiner.majority() == {"test": pytest.approx(statistics.fmean(shared(row, most) for row in test))}


def test_a_function_that_fails_fails_its_trial_alone(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line that names the function and the prompt; of the base model the metric is left out, and said so."""
    bench = make("users_metric:fragile")
    bench.engine.admit(lora_trial(number=1, **{**LEARNS, "learning_rate": 0.0, "examples": 8}), None, None)
    bench.engine.admit(lora_trial(number=2, **LEARNS), None, None)
    while not bench.engine.position(1).done:
        bench.engine.advance(lambda: True)
    judge = Judge(bench.examiner, Meter(lambda: 0), RUNG_ROWS)
    with pytest.raises(
        TrialFailed, match=r"metric users_metric:fragile failed on the prompt '\w+ \w+ ->': KeyError"
    ) as e:
        judge.trial(bench.engine, live(1, done=True, examine=False, bench=bench))
    assert (e.value.trial, e.value.code, "\n" in str(e.value)) == (1, "error", False)
    assert list(bench.engine._trials) == [2]
    said = judge.base_scores(bench.engine, "lora")
    assert (said["scores"]["test"].metric, len(said["scores"]["test"].nll), said["majority"]) == (None, 20, {})
    assert capsys.readouterr().err.count("users_metric:fragile failed on the prompt") == 2


def test_the_test_rows_are_opened_by_examinations_alone(make: Make) -> None:
    """Without its files a trial is judged at its rungs and its end; an examination says that they are missing."""
    bench = make("accuracy")
    for name in ("test.safetensors", "test-texts.jsonl"):
        (bench.root / "data" / name).rename(bench.root / name)
    bench.trained()
    judge = Judge(bench.examiner, Meter(lambda: 0), RUNG_ROWS)
    assert judge.base(bench.engine, "lora")["loss"] > 0
    end = judge.trial(bench.engine, live(1, done=True, examine=False, bench=bench))
    assert (end["final"], end["scores"]) == (True, {}) and end["metric"] > 0.5
    with pytest.raises(DataError, match=r"test\.safetensors: no such file"):
        judge.trial(bench.engine, live(1, done=True, examine=True, bench=bench))
    for name in ("test.safetensors", "test-texts.jsonl"):
        (bench.root / name).rename(bench.root / "data" / name)
    end = judge.trial(bench.engine, live(1, done=True, examine=True, bench=bench))
    base = judge.base_scores(bench.engine, "lora")["scores"]
    assert sum(end["scores"]["test"].nll) < sum(base["test"].nll)
    assert sum(end["scores"]["test"].metric) > sum(base["test"].metric)
    assert judge.known(live(1, done=True, examine=True, bench=bench))
    # A job whose data was prepared for another metric is refused.
    (bench.root / "data" / "data.json").write_text("{}")
    with pytest.raises(DataError, match="holds no objective; prepare the data again"):
        DataExaminer(bench.examiner._job)
