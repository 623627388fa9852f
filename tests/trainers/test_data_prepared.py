"""Data: what is read, masked, split, dropped and refused."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tiny import CHATML, lora_trial
from transformers import PreTrainedTokenizerFast

from trainers import data, rows
from trainers.data import prepare
from trainers.splits import DataError, Example, batches, load_split, order

PAIRS = [{"prompt": f"the dog {i} ->", "completion": f" sleeps {i}"} for i in range(10)]
TALK = [
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "runs"},
    {"role": "user", "content": "a cat"},
    {"role": "assistant", "content": "sleeps"},
]


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    """Writes rows as JSONL, CSV or Parquet, by extension."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(v) + "\n" for v in values))
    else:
        table = datasets.Dataset.from_list(values)
        table.to_csv(path) if path.suffix == ".csv" else table.to_parquet(path)
    return path


def run(tokenizer: PreTrainedTokenizerFast, folder: Path, train: Path | str, **changes: Any) -> dict[str, Any]:
    """Prepares with defaults."""
    options = {"validation": 0.2, "test": 0.2, "max_tokens": 64, "seed": 3, "model": "tiny", **changes}
    return prepare(tokenizer, train=str(train), folder=folder, **options)


def all_examples(folder: Path) -> list[Example]:
    """The examples of all splits."""
    splits = [load_split(folder, name) for name in data.SPLITS]
    return [split[row] for split in splits for row in range(split.rows)]


def trained_text(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """What an example's loss is over."""
    return tokenizer.decode(example.ids[example.mask == 1])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_pairs_train_on_completion_and_end_token(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str
) -> None:
    """Every file format gives the same examples; loss is on completion and end token, which is the pad token too."""
    summary = run(tokenizer, tmp_path / "out", write(tmp_path / f"rows{suffix}", PAIRS))
    examples = all_examples(tmp_path / "out")
    assert {trained_text(tokenizer, e) for e in examples} == {f" sleeps {i}<|im_end|>" for i in range(10)}
    assert {tokenizer.decode(e.ids) for e in examples} == {f"the dog {i} -> sleeps {i}<|im_end|>" for i in range(10)}
    counts = summary["splits"]
    assert [counts[name]["rows"] for name in data.SPLITS] == [6, 2, 2]
    assert counts["train"]["completion_tokens"] == int(load_split(tmp_path / "out", "train").mask.sum())
    assert summary["sources"]["train"]["bytes"] == (tmp_path / f"rows{suffix}").stat().st_size
    assert not list((tmp_path / "out").glob(".tmp*"))
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == summary


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    """A CSV cell that looks like a number or a gap is text as it stands."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n1,007\nb,NA\n")
    assert [row.values["completion"] for row in rows.read(str(path)).rows] == ["007", "NA"]


def test_conversations_train_on_assistant_turns(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Of a conversation, what each assistant turn says and its end token is trained, and nothing the template adds."""
    talks = [{"messages": [*TALK, {"role": "user", "content": str(i)}, TALK[1]]} for i in range(6)]
    run(tokenizer, tmp_path / "out", write(tmp_path / "rows.jsonl", talks), max_tokens=200)
    for example in all_examples(tmp_path / "out"):
        assert trained_text(tokenizer, example) == "runs<|im_end|>sleeps<|im_end|>runs<|im_end|>"


def test_a_turn_ends_where_the_template_ends_it(model_folder: Path, tmp_path: Path) -> None:
    """Not at the tokenizer's own end, which is another token in base models; no newline behind it is trained.

    A special token within a turn ends nothing, and a template without any has a turn trained whole.
    """
    other = PreTrainedTokenizerFast.from_pretrained(model_folder, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    talks = write(tmp_path / "rows.jsonl", [{"messages": [{**TALK[0], "content": str(i)}, TALK[1]]} for i in range(6)])
    end = "{{ m['content'] }}<|im_end|>\n"
    for name, written, trained in (
        ("chatml", end, "runs<|im_end|>"),
        ("within", "<|im_start|> {{ m['content'] }}\n", "<|im_start|> runs\n"),
        ("plain", "{{ m['content'] }}\n", "runs\n"),
        ("own", "{{ m['content'] }}<|endoftext|>\n", "runs<|endoftext|>"),
    ):
        other.chat_template = CHATML.replace(end, written)
        assert (other.chat_template == CHATML) == (name == "chatml")
        run(other, tmp_path / name, talks)
        assert {trained_text(other, example) for example in all_examples(tmp_path / name)} == {trained}


def test_of_a_spoken_prompt_and_completion_the_completion_is_trained(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Assistant turns of a prompt that is a list of messages are read and not trained; all of the completion's are."""
    pairs = [{"prompt": [*TALK, {"role": "user", "content": str(i)}], "completion": [*TALK[1:]]} for i in range(6)]
    summary = run(tokenizer, tmp_path / "out", write(tmp_path / "rows.jsonl", pairs), max_tokens=200)
    assert summary["sources"]["train"]["format"] == "messages"
    for example in all_examples(tmp_path / "out"):
        assert tokenizer.decode(example.ids).count("<|im_start|>assistant") == 4
        assert trained_text(tokenizer, example) == "runs<|im_end|>sleeps<|im_end|>"


TOOLED = (
    "{% for t in tools or [] %}<|im_start|>tool {{ t | tojson }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] + '' }}"
    "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_and_their_calls_are_rendered(model_folder: Path, tmp_path: Path, suffix: str) -> None:
    """A template is given the tools of a row, and of a call what the row says and no key of others.

    Rows that differ in their tools alone are no duplicates.
    """
    calling = PreTrainedTokenizerFast.from_pretrained(model_folder)
    calling.chat_template = TOOLED
    calls = [{"name": f"t{i}", "arguments": {f"k{i}": i}} for i in range(6)]
    rows_ = [
        {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [c]}, *TALK[2:]], "tools": [c]}
        for c in calls
    ]
    twice = {"messages": rows_[0]["messages"], "tools": json.dumps([{"name": "another"}])}
    path = write(tmp_path / f"rows{suffix}", [*rows_, *([twice] if suffix == ".jsonl" else [])])
    summary = run(calling, tmp_path / "out", path, max_tokens=300)
    assert summary["dropped"] == {"duplicates": 0, "cut": 0}
    found = {calling.decode(example.ids): trained_text(calling, example) for example in all_examples(tmp_path / "out")}
    for call in calls:
        said = json.dumps(call)
        text = next(text for text in found if text.startswith(f"<|im_start|>tool {said}<|im_end|>\n"))
        assert found[text] == f"{said}<|im_end|>sleeps<|im_end|>"
    assert len(found) == 6 + (suffix == ".jsonl")


@pytest.mark.parametrize("given", [{"k": 1}, '{"k": 1}', '{"k":1}'])
@pytest.mark.parametrize(
    "written", ["{{ c.arguments | tojson }}", "{{ c.arguments }}", "{{ '' ~ c.arguments }}", "{{ '' + c.arguments }}"]
)
def test_arguments_of_calls_are_json_however_a_template_writes_them(
    model_folder: Path, tmp_path: Path, given: Any, written: str
) -> None:
    """Proves that objects and JSON text come out as JSON where a template expects the one or the other (Llama's and
    Qwen's an object, DeepSeek's text): not as Python writes an object, nor as JSON of JSON. Text stays as it was."""
    calling = PreTrainedTokenizerFast.from_pretrained(model_folder)
    calling.chat_template = TOOLED.replace("{{ c | tojson }}", written)
    calls = [{"name": "weather", "arguments": given}]
    talks = [[{**TALK[0], "content": f"{i}?"}, {"role": "assistant", "tool_calls": calls}] for i in range(6)]
    path = write(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    run(calling, tmp_path / "out", path, max_tokens=300)
    kept = isinstance(given, str) and "tojson" not in written
    for example in all_examples(tmp_path / "out"):
        assert trained_text(calling, example) == (given if kept else '{"k": 1}') + "<|im_end|>"


def test_text_trains_on_all_but_the_first_token(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A text row is trained from its second token to its end token."""
    run(tokenizer, tmp_path / "out", write(tmp_path / "rows.jsonl", [{"text": f"the river {i}"} for i in range(6)]))
    for example in all_examples(tmp_path / "out"):
        assert example.mask.tolist() == [0] + [1] * (len(example.ids) - 1)
        assert example.ids[-1] == tokenizer.eos_token_id


def test_start_token_only_where_the_tokenizer_adds_it(
    tokenizer: PreTrainedTokenizerFast, model_folder: Path, tmp_path: Path
) -> None:
    """A tokenizer that starts every text with a token gets it once, at the start of the prompt."""
    from tokenizers.processors import TemplateProcessing

    starting = PreTrainedTokenizerFast.from_pretrained(model_folder, bos_token="<|endoftext|>")
    path = write(tmp_path / "rows.jsonl", PAIRS)
    run(starting, tmp_path / "plain", path)
    assert starting.bos_token_id not in np.concatenate([e.ids for e in all_examples(tmp_path / "plain")])
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", starting.bos_token_id)]
    )
    run(starting, tmp_path / "started", path)
    for example in all_examples(tmp_path / "started"):
        assert np.flatnonzero(example.ids == starting.bos_token_id).tolist() == [0]


def test_cut_rows_and_duplicates_are_dropped_and_counted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A row whose completion lies wholly beyond max_tokens is dropped, a longer one cut; a duplicate row stays once."""
    long_prompt = {"prompt": "the " * 40, "completion": " dog"}
    long_completion = {"prompt": "the", "completion": " dog" * 40}
    path = write(tmp_path / "rows.jsonl", [*PAIRS, PAIRS[0], PAIRS[3], long_prompt, long_completion])
    summary = run(tokenizer, tmp_path / "out", path, max_tokens=20)
    assert summary["dropped"] == {"duplicates": 2, "cut": 1}
    assert summary["truncated"] == 2
    assert sum(s["rows"] for s in summary["splits"].values()) == 11
    assert max(len(e.ids) for e in all_examples(tmp_path / "out")) == 20


def test_rows_that_are_read_and_trained_alike_are_duplicates(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """What the template leaves out of a message, or lies beyond max_tokens, makes no other row, in no other file."""
    talks = [{"messages": [{**TALK[0], "content": f"the dog {i}"}, TALK[1]]} for i in range(6)]
    again = [{"messages": [{**talk["messages"][0], "ts": 7}, {**TALK[1], "ts": 8}]} for talk in talks]
    path, held = write(tmp_path / "rows.jsonl", [*talks, *again]), write(tmp_path / "held.jsonl", again[:2])
    summary = run(tokenizer, tmp_path / "out", path)
    assert summary["dropped"] == {"duplicates": 6, "cut": 0}
    summary = run(tokenizer, tmp_path / "out", path, validation=str(held), test=None)
    assert summary["dropped"] == {"duplicates": 8, "cut": 0}
    assert [summary["splits"][name]["rows"] for name in ("train", "validation")] == [4, 2]
    long = [{"prompt": f"the dog {i % 4}", "completion": " runs" * 40 + f" {i}"} for i in range(8)]
    summary = run(tokenizer, tmp_path / "out", write(tmp_path / "long.jsonl", long), max_tokens=20)
    assert (summary["dropped"], summary["truncated"]) == ({"duplicates": 4, "cut": 0}, 4)
    assert len({example.ids.tobytes() for example in all_examples(tmp_path / "out")}) == 4


def test_every_row_that_was_read_is_accounted_for(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Rows read are rows kept, duplicates and rows cut, over all sources."""
    cut, long = {"prompt": "the " * 40, "completion": " dog"}, {"prompt": "the", "completion": " dog" * 40}
    path = write(tmp_path / "rows.jsonl", [*PAIRS, PAIRS[0], cut, long])
    held = write(tmp_path / "held.jsonl", [PAIRS[1], PAIRS[1], {**long, "prompt": "a"}])
    summary = run(tokenizer, tmp_path / "out", path, max_tokens=20, test=str(held), retention=str(held))
    assert (summary["rows_read"], summary["truncated"]) == (19, 4)
    assert summary["dropped"] == {"duplicates": 4, "cut": 1}
    assert sum(split["rows"] for split in summary["splits"].values()) == 19 - 4 - 1


def test_rows_of_the_test_file_leave_training(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A row that is in the test file too is dropped from training: nothing is judged on what it was taught."""
    held = write(tmp_path / "test.jsonl", PAIRS[:3])
    summary = run(tokenizer, tmp_path / "out", write(tmp_path / "rows.jsonl", PAIRS), test=str(held))
    assert {name: s["rows"] for name, s in summary["splits"].items()} == {"train": 6, "validation": 1, "test": 3}
    assert summary["dropped"]["duplicates"] == 3


def test_splits_are_disjoint_and_follow_the_seed(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The same seed gives the same bytes, another seed another split, and no row is in two splits."""
    path = write(tmp_path / "rows.jsonl", PAIRS)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tokenizer, tmp_path / name, path, seed=seed)
    test = [(tmp_path / name / "test.safetensors").read_bytes() for name in "abc"]
    assert test[0] == test[1] != test[2]
    examples = [e.ids.tobytes() for e in all_examples(tmp_path / "a")]
    assert len(examples) == len(set(examples)) == 10


def test_order_and_batches_depend_on_the_trial_alone() -> None:
    """Each epoch is another permutation, batches cut one stream, and rank or learning rate do not change it."""
    assert sorted(order(50, 7, 0)) == list(range(50))
    assert order(50, 7, 0).tolist() != order(50, 7, 1).tolist()
    config = lora_trial(examples=120, batch_size=8)
    found = batches(config, 50)
    assert [len(b) for b in found] == [8] * 15
    stream = np.concatenate(found)
    assert sorted(stream[:50]) == sorted(stream[50:100]) == list(range(50))
    other = batches(lora_trial(examples=120, batch_size=8, rank=8, learning_rate=1.0, number=5), 50)
    assert all((a == b).all() for a, b in zip(found, other, strict=True))
    assert order(5, 7, 0).tolist() == [1, 2, 4, 0, 3], "the order of rows must never change between versions"


BAD = {
    "missing": ("absent.jsonl", None, ["absent.jsonl: no such file"]),
    "folder": (".", None, ["is a folder"]),
    "kind": ("rows.xlsx", "x", ["rows.xlsx: unknown kind of file", ".jsonl"]),
    "empty": ("rows.jsonl", "", ["rows.jsonl: is empty"]),
    "no_rows": ("rows.csv", "prompt,completion\n", ["rows.csv: has no rows"]),
    "corrupt_json": ("rows.jsonl", '{"text": "a"}\n{"text": \n', ["rows.jsonl", "not readable JSONL", "row 2"]),
    "corrupt_parquet": ("rows.parquet", "garbage", ["rows.parquet", "not readable PARQUET"]),
    "corrupt_csv": ("rows.csv", "prompt,completion\na,b\nc,d,e,f\n", ["rows.csv", "not readable CSV", "line 3"]),
    "columns": ("rows.jsonl", '{"question": "a", "answer": "b"}\n', ["question, answer", "prompt and completion"]),
    "no_completion": (
        "rows.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": ""}\n',
        ["row 2: completion is empty"],
    ),
    "blank": ("rows.jsonl", '{"text": "a"}\n{"text": "  "}\n', ["row 2: text has no text"]),
    "number": (
        "rows.jsonl",
        '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": 4}\n',
        ["row 2: completion is int"],
    ),
    "role": (
        "rows.jsonl",
        '{"messages": [{"role": "human", "content": "a"}]}\n',
        ["row 1: message 1 has role 'human'", "assistant"],
    ),
    "no_assistant": (
        "rows.jsonl",
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        ["row 1: no message is by the assistant"],
    ),
    "assistant_first": (
        "rows.jsonl",
        '{"messages": [{"role": "assistant", "content": "a"}]}\n',
        ["row 1: the first message is by the assistant"],
    ),
    "no_list": ("rows.jsonl", '{"messages": "hello"}\n', ["row 1: messages is not a list"]),
    "too_few": ("rows.jsonl", '{"text": "the dog"}\n', ["too few"]),
    "all_cut": ("rows.jsonl", json.dumps({"prompt": "the " * 90, "completion": "a"}) + "\n", ["raise max_tokens"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_in_one_line(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, case: str) -> None:
    """Each kind of bad input names the file, the row where there is one, and what is expected, in one line."""
    name, content, words = BAD[case]
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        run(tokenizer, tmp_path / "out", path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unreachable_hub_data_set(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: Any) -> None:
    """A name that is neither a file nor to be had from the hub is refused in one line."""

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"nobody/nothing: is no local file .* Couldn't reach"):
        run(tokenizer, tmp_path / "out", "nobody/nothing")


def test_bad_share_and_template(tokenizer: PreTrainedTokenizerFast, model_folder: Path, tmp_path: Path) -> None:
    """A share that is none, a template that refuses the roles, and one that rewrites earlier turns are refused."""
    talks = write(tmp_path / "rows.jsonl", [{"messages": TALK}] * 2)
    with pytest.raises(DataError, match=r"validation: 1\.5 is no share"):
        run(tokenizer, tmp_path / "out", talks, validation=1.5)
    strange = PreTrainedTokenizerFast.from_pretrained(model_folder)
    strange.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 1: the tokenizer's chat template refuses it: roles must alternate"):
        run(strange, tmp_path / "out", talks)
    strange.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(DataError, match="row 1: the chat template rewrites earlier turns"):
        run(strange, tmp_path / "out", talks)


def test_full_disk_leaves_nothing_half_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that fails is an OSError, not a DataError, and leaves no temporary file."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(tmp_path / "rows.jsonl", PAIRS)
    monkeypatch.setattr("trainers.data.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(tokenizer, tmp_path / "out", path)
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_split_is_refused(tmp_path: Path) -> None:
    """A prepared file that is missing or damaged is refused in one line."""
    with pytest.raises(DataError, match="prepare the data first"):
        load_split(tmp_path, "train")
    (tmp_path / "train.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(DataError, match="is damaged"):
        load_split(tmp_path, "train")
