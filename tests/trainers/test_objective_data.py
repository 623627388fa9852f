"""What a metric needs of the data is prepared beside it, or refused in one line; retention rows are a split apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sweep.errors import UnusableError
from sweep.launch import look
from sweep.spec import validate
from trainers import check, metrics
from trainers.data import prepare
from trainers.metrics import MetricError
from trainers.splits import DataError, load_split

LABELS = [" red", " blue", " red", " green", " red"]
ROWS = [{"prompt": f"the dog {i} ->", "completion": LABELS[i % 5]} for i in range(20)]


def write(path: Path, values: list[dict[str, Any]]) -> str:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def run(tokenizer: PreTrainedTokenizerFast, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Prepares rows with defaults, beside a file of them."""
    train = write(folder / "rows.jsonl", rows)
    options = {"validation": 0.2, "test": 0.2, "max_tokens": 64, "seed": 3, "model": "tiny", **changes}
    return prepare(tokenizer, train=train, folder=folder / "out", **options)


def test_texts_stand_in_the_order_of_their_split(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Each row of validation and test has its prompt, its ids and its completion; the token files stay what they were.

    The test rows lie in a file of their own, which nobody reads who does not open it.
    """
    run(tokenizer, tmp_path, ROWS)
    plain = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    summary = run(tokenizer, tmp_path, ROWS, metric="exact_match")
    assert summary["objective"]["majority"] == " red"
    assert (summary["objective"]["choices"], summary["objective"]["validation_tokens"]) == ([], 0)
    assert {k: v for k, v in summary.items() if k != "objective"} == json.loads(plain.pop("data.json"))
    for name, content in plain.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    for name in ("validation", "test"):
        split, rows = load_split(tmp_path / "out", name), metrics.read_answered(tmp_path / "out", name)
        assert split.rows == len(rows) == 4
        for example, row in zip((split[i] for i in range(4)), rows, strict=True):
            assert example.ids[example.mask == 0].tolist() == row.ids
            assert tokenizer.decode(example.ids[example.mask == 1]) == row.completion + "<|im_end|>"
            assert tokenizer.decode(row.ids) == row.prompt


def test_choices_are_those_of_the_training_rows_or_of_the_spec(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Without choices the distinct completions count; each has the tokens that would be trained, end token included."""
    found = run(tokenizer, tmp_path, ROWS, metric="accuracy")["objective"]
    assert found["choices"] == [" blue", " green", " red"]
    assert [tokenizer.decode(ids) for ids in found["choice_ids"]] == [f"{c}<|im_end|>" for c in found["choices"]]
    rows = metrics.read_answered(tmp_path / "out", "validation")
    expected = sum(len(row.ids) + len(ids) for row in rows for ids in found["choice_ids"])
    assert found["validation_tokens"] == expected
    named = [" red", " green", " blue", " black"]
    assert run(tokenizer, tmp_path, ROWS, metric="accuracy", choices=named)["objective"]["choices"] == named


def test_of_a_conversation_the_last_assistant_turn_is_the_answer(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The prompt is all that the template puts before it, the completion is its content; what follows is left out."""
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"the dog {i}"},
                {"role": "assistant", "content": "runs"},
                {"role": "user", "content": "the cat"},
                {"role": "assistant", "content": "red" if i % 3 else "blue"},
                {"role": "user", "content": "over"},
            ]
        }
        for i in range(12)
    ]
    found = run(tokenizer, tmp_path, talks, metric="accuracy", max_tokens=200)["objective"]
    assert found["choices"] == ["blue", "red"]
    assert [tokenizer.decode(ids) for ids in found["choice_ids"]] == ["blue<|im_end|>", "red<|im_end|>"]
    for row in metrics.read_answered(tmp_path / "out", "test"):
        assert row.prompt.endswith("<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n")
        assert row.prompt.count("<|im_start|>") == 4 and tokenizer.decode(row.ids) == row.prompt
        assert row.completion in ("red", "blue")


def test_retention_is_a_split_of_its_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """All of its distinct rows, in any format, also those that are training rows too; and without it no such file."""
    run(tokenizer, tmp_path, ROWS)
    before = {name: load_split(tmp_path / "out", name) for name in ("train", "validation", "test")}
    assert not (tmp_path / "out" / "retention.safetensors").exists()
    general = write(tmp_path / "general.jsonl", [*ROWS[:3], ROWS[0], {"prompt": "the " * 90, "completion": " dog"}])
    summary = run(tokenizer, tmp_path, ROWS, retention=general)
    kept = load_split(tmp_path / "out", "retention")
    assert summary["splits"]["retention"]["rows"] == kept.rows == 3
    assert summary["splits"]["retention"]["completion_tokens"] == int(kept.mask.sum())
    assert summary["dropped"] == {"duplicates": 1, "cut": 1}
    for name, split in before.items():
        assert np.array_equal(split.ids, load_split(tmp_path / "out", name).ids), "the other splits are untouched"
    text = write(tmp_path / "text.jsonl", [{"text": "the river sings"}, {"text": "a bird"}])
    assert run(tokenizer, tmp_path, ROWS, retention=text, metric="accuracy")["splits"]["retention"]["rows"] == 2
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file"):
        run(tokenizer, tmp_path, ROWS, retention=str(tmp_path / "nothing.jsonl"))


def test_answers_that_are_never_generated_whole_are_counted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where none fits, an exact match is out of reach and refused; an answer needs no room for its end token.

    Where some fit, those that do not are counted among the validation rows; a function may be content with a part.
    """
    rows = [{"prompt": f"the dog {i} ->", "completion": " red" * (i + 1)} for i in range(20)]
    lengths = run(tokenizer, tmp_path, rows, metric="exact_match")
    assert lengths["objective"]["longer_answers"] == 0
    texts = metrics.read_answered(tmp_path / "out", "validation")
    tokens = sorted(len(tokenizer(row.completion)["input_ids"]) for row in texts)
    for most in (tokens[0], tokens[1], tokens[-1]):
        found = run(tokenizer, tmp_path, rows, metric="exact_match", max_new_tokens=most)["objective"]
        assert found["longer_answers"] == sum(length > most for length in tokens)
    said = (
        f"none of the 4 validation answers fits into max_new_tokens {tokens[0] - 1}; the shortest has {tokens[0]} "
        "tokens: raise objective.max_new_tokens"
    )
    with pytest.raises(MetricError) as caught:
        run(tokenizer, tmp_path, rows, metric="exact_match", max_new_tokens=tokens[0] - 1)
    assert str(caught.value) == said
    monkeypatch.chdir(tmp_path)
    (tmp_path / "partly.py").write_text("def score(prompt, generated, completion):\n    return len(generated)\n")
    found = run(tokenizer, tmp_path, rows, metric="partly:score", max_new_tokens=tokens[0] - 1)["objective"]
    assert found["longer_answers"] == 4


def test_a_generated_answer_ends_where_a_trained_one_does(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path, tmp_path: Path
) -> None:
    """The ids at which it ends are kept; data prepared before there were any is read as having none."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end")}
    other = PreTrainedTokenizerFast.from_pretrained(model_folder, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "runs"}]
    talks = [{"messages": [{"role": "user", "content": str(i)}, *said[1:], *said]} for i in range(9)]
    assert run(other, tmp_path, talks, metric="exact_match")["objective"]["ends"] == sorted(ids.values())
    assert run(other, tmp_path, ROWS, metric="exact_match")["objective"]["ends"] == [ids["endoftext"]]
    assert run(tokenizer, tmp_path, talks, metric="exact_match")["objective"]["ends"] == [ids["im_end"]]
    path = tmp_path / "out" / "data.json"
    old = json.loads(path.read_text())
    del old["objective"]["ends"], old["objective"]["longer_answers"]
    path.write_text(json.dumps(old))
    found = metrics.read_objective(tmp_path / "out")
    assert (found.ends, found.longer_answers, found.metric) == ([], 0, "exact_match")


MANY = [{"prompt": f"the dog {i} ->", "completion": f" {i}"} for i in range(150)]
CALLS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "tool_calls": [{"name": "add"}]}]}
    for i in range(9)
]
REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "too many": (MANY, {}, r"rows\.jsonl: different completions in its rows: 90; metric accuracy chooses among 2 to"),
    "one": ([{**row, "completion": " a"} for row in ROWS], {}, "different completions in its rows: 1; metric"),
    "named too many": (ROWS, {"choices": [str(i) for i in range(65)]}, "objective.choices: 65 are named; name 2 to 64"),
    "named twice": (ROWS, {"choices": ["red", "red"]}, "objective.choices: 2 are named; name 2 to 64 different ones"),
    "unknown": (ROWS, {"choices": ["red", "blue"]}, r"row \d+: completion ' red' is none of the choices \('red', "),
    "text": ([{"text": f"the dog {i}"} for i in range(9)], {}, "has rows of text, which have no completion"),
    "text, generated": ([{"text": f"a {i}"} for i in range(9)], {"metric": "exact_match"}, "has rows of text"),
    "no content": (CALLS, {"metric": "exact_match"}, r"row \d+: the assistant's last message calls tools and has no"),
    "no prompt": ([{**row, "prompt": ""} for row in MANY], {"metric": "exact_match"}, r"row \d+: prompt is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_data_that_does_not_fit_the_metric_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, case: str
) -> None:
    """Each is one line that says where and what to do, and nothing was written."""
    rows, changes, said = REFUSED[case]
    with pytest.raises(DataError, match=said) as caught:
        run(tokenizer, tmp_path, rows, **{"metric": "accuracy", **changes})
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


FUNCTIONS = """
number = 4
def score(prompt, generated, completion):
    return len(generated)
def two(prompt, generated):
    return 1.0
def word(prompt, generated, completion):
    return "good"
def endless(prompt, generated, completion):
    return float("nan")
"""
UNUSABLE = {
    "absent:score": "metric absent:score: absent cannot be imported from .*: ModuleNotFoundError: No module named",
    "broken_metric:score": "broken_metric cannot be imported from .*: RuntimeError: not today",
    "own_metric:nothing": "module own_metric has no nothing; correct the name",
    "own_metric:number": "number is int, not a function",
    "own_metric:two": "own_metric:two failed on the prompt 'the dog .*': TypeError: two",
    "own_metric:word": "ValueError: could not convert string to float: 'good'",
    "own_metric:endless": "ValueError: it gave nan, not a finite number",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_function_that_does_not_work_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It is looked for in the working directory and tried on one row; what is wrong is said in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_metric.py").write_text(FUNCTIONS)
    (tmp_path / "broken_metric.py").write_text("raise RuntimeError('not today\\nnor tomorrow')")
    with pytest.raises(MetricError, match=UNUSABLE[name]) as caught:
        run(tokenizer, tmp_path, ROWS, metric=name)
    assert "\n" not in str(caught.value)
    assert run(tokenizer, tmp_path, ROWS, metric="own_metric:score")["objective"]["folder"] == str(tmp_path)


def test_the_check_answers_in_one_line(model_folder: Path, tmp_path: Path) -> None:
    """The check passes retention, metric and choices on, and tells a metric that is wrong from data that is."""
    request = {
        "model": str(model_folder),
        "train": write(tmp_path / "rows.jsonl", ROWS),
        "validation": 0.2,
        "test": 0.2,
        "max_tokens": 64,
        "seed": 3,
        "out_folder": str(tmp_path / "out"),
        "targets": ["attention"],
        "methods": ["lora"],
        "metric": "accuracy",
        "choices": [" red", " blue", " green"],
        "retention": write(tmp_path / "general.jsonl", [{"text": "a bird sings"}]),
    }
    code, answer = check._answer(request)
    assert (code, answer["data"]["splits"]["retention"]["rows"]) == (0, 1)
    assert answer["data"]["objective"]["choices"] == request["choices"]
    code, answer = check._answer({**request, "metric": "absent:score", "choices": None})
    assert (code, answer["kind"]) == (7, "objective")
    long = write(tmp_path / "long.jsonl", [{**row, "completion": " red" * 9} for row in ROWS])
    asked = {**request, "train": long, "metric": "exact_match", "choices": None, "max_new_tokens": 8}
    code, answer = check._answer(asked)
    assert (code, answer["kind"]) == (7, "objective") and "fits into max_new_tokens 8;" in answer["message"]
    assert check._answer({**asked, "max_new_tokens": 9})[0] == 0
    code, answer = check._answer({**request, "choices": [" red", " blue"]})
    assert (code, answer["kind"]) == (7, "data")
    assert "completion ' green' is none of the choices" in answer["message"]


def test_a_launch_is_refused_where_no_answer_can_be_generated(model_folder: Path, tmp_path: Path) -> None:
    """The spec's max_new_tokens is handed to the check, before anything is paid."""
    rows = [{**row, "completion": " red" * 5} for row in ROWS]
    values = {
        "study": "words",
        "model": str(model_folder),
        "data": {"train": write(tmp_path / "rows.jsonl", rows)},
        "machine": {"price": "$1/hour"},
        "budget": {"cap": "$1"},
        "objective": {"metric": "exact_match", "max_new_tokens": 4},
    }
    with pytest.raises(UnusableError, match="fits into max_new_tokens 4; the shortest has 5 tokens: raise"):
        look(validate(values, "spec"), tmp_path / "study")


def test_a_launch_plans_with_what_scoring_the_choices_takes(model_folder: Path, tmp_path: Path) -> None:
    """The facts hold retention and choices, and the plan counts every choice's tokens after every validation prompt."""
    values = {
        "study": "words",
        "model": str(model_folder),
        "data": {"train": write(tmp_path / "rows.jsonl", ROWS), "validation": 0.2, "test": 0.2},
        "machine": {"price": "$1/hour"},
        "budget": {"cap": "$1"},
    }
    values["data"]["retention"] = write(tmp_path / "general.jsonl", [{"text": "a bird sings"}])  # type: ignore[index]
    facts = {}
    for metric in ("validation_loss", "accuracy"):
        facts[metric] = look(validate({**values, "objective": metric}, "spec"), tmp_path / metric)
        assert facts[metric]["data"]["splits"]["retention"]["rows"] == 1
    plain, scored = facts["validation_loss"], facts["accuracy"]
    assert scored["data"]["splits"] == plain["data"]["splits"]
    assert scored["data"]["objective"]["choices"] == [" blue", " green", " red"]
    assert plain["plan"]["validation_tokens"] == plain["data"]["splits"]["validation"]["tokens"]
    evaluated = scored["data"]["objective"]["validation_tokens"]
    assert scored["plan"]["validation_tokens"] == evaluated > 2 * plain["plan"]["validation_tokens"]
    assert scored["plan"]["rung_tokens"] == round(scored["plan"]["rung_rows"] * evaluated / 4)
