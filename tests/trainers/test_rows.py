"""Rows: the file that was named is the one that is read, text stays text, and what is wrong is told by its line."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import pytest

from trainers import rows
from trainers.splits import DataError

PAIR = {"prompt": "a", "completion": "b"}


def lines(path: Path, values: list[Any]) -> Path:
    """Writes an object a line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def write(path: Path, values: list[dict[str, Any]]) -> Path:
    """Writes rows as the ending says."""
    if path.suffix == ".jsonl":
        return lines(path, values)
    if path.suffix == ".json":
        path.write_text(json.dumps(values))
        return path
    table = datasets.Dataset.from_list(values)
    with path.open("wb") as file:  # a path would be taken for a pattern here too
        table.to_csv(file) if path.suffix == ".csv" else table.to_parquet(file)
    return path


def read(path: Path) -> rows.Source:
    """Reads a file."""
    return rows.read(str(path))


def refused(path: Path) -> str:
    """What reading is refused with: one line."""
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_path_is_no_pattern(tmp_path: Path, suffix: str) -> None:
    """Brackets, stars and colons are characters of a name, in the name of a folder too."""
    folder = tmp_path / "runs [v1]::x"
    folder.mkdir()
    for name in ("dataa", "datab", "data1"):
        write(folder / f"{name}{suffix}", [{"prompt": "wrong", "completion": "wrong"}])
    for name in ("data[ab]", "data[!a]", "data[v2]", "data?", "data*", "x::y"):
        path = write(folder / f"{name}{suffix}", [{"prompt": "a", "completion": name}])
        assert [row.values for row in read(path).rows] == [{"prompt": "a", "completion": name}]


@pytest.mark.parametrize("suffix", [".JSONL", ".Json", ".CSV", ".PARQUET"])
def test_an_ending_in_capitals_is_known(tmp_path: Path, suffix: str) -> None:
    """What wrote the file may shout."""
    path = write(tmp_path / f"rows{suffix.lower()}", [PAIR]).rename(tmp_path / f"shouted{suffix}")
    assert [row.values for row in read(path).rows] == [PAIR]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_text_that_looks_like_a_date_is_text(tmp_path: Path, suffix: str) -> None:
    """A completion is what the file says, whether every row has a date or none of the first ten megabytes has another.

    A column that is ignored may come late, and have any type in any row.
    """
    dated = {"prompt": "When? ", "completion": "2020-01-05"}
    assert read(write(tmp_path / f"few{suffix}", [dated] * 3)).rows[2].values == dated
    long = {"prompt": "When? " + "x" * 2000, "completion": "2020-01-05", "number": 1}
    late = {"prompt": "When?", "completion": "unknown", "number": "one", "note": {"by": ["me"]}}
    found = read(write(tmp_path / f"many{suffix}", [long] * 6000 + [late])).rows
    assert (len(found), found[0].values["completion"]) == (6001, "2020-01-05")
    assert found[-1].values == {"prompt": "When?", "completion": "unknown"}


def test_an_ignored_column_of_a_csv_may_change_its_type(tmp_path: Path) -> None:
    """A column of numbers that ends with a word spoils no file."""
    path = tmp_path / "rows.csv"
    path.write_text("id,prompt,completion\n" + "7,a,b\n" * 20_001 + "none,c,d\n")
    assert read(path).rows[-1].values == {"prompt": "c", "completion": "d"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_utf8_may_begin_with_its_mark_and_other_encodings_are_told(tmp_path: Path, suffix: str) -> None:
    """A byte order mark is no part of a name; bytes that are no UTF-8 are told with file and place, in one line."""
    path = write(tmp_path / f"rows{suffix}", [PAIR, {"prompt": "a", "completion": "cafe"}])
    plain = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + plain)
    assert [row.values for row in read(path).rows] == [PAIR, {"prompt": "a", "completion": "cafe"}]
    path.write_bytes(plain.replace(b"cafe", "café".encode("latin-1")))
    said = refused(path)
    assert f"rows{suffix}" in said and "0xe9" in said
    if suffix != ".csv":
        assert said.endswith("save the file as UTF-8")
        assert ("in row 2" if suffix == ".jsonl" else "in line 1") in said


def test_rows_are_told_by_their_line(tmp_path: Path) -> None:
    """Blank lines are left out and counted, in a file of an object a line."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(PAIR)}\n  \n\r\n{json.dumps({**PAIR, 'completion': 4})}\n")
    assert "rows.jsonl, row 5: completion is int, expected text" in refused(path)
    path.write_text(f"\n{json.dumps(PAIR)}\n\n[1]\n")
    assert refused(path) == "rows.jsonl, row 4: is list, expected an object; repair the file"
    path.write_text("\n \n")
    assert "rows.jsonl: has no rows" in refused(path)


def test_both_forms_of_json_are_read_under_either_ending(tmp_path: Path) -> None:
    """A list of objects, and an object a line: the content says which it is."""
    for name in ("rows.json", "rows.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps([PAIR, PAIR], indent=2))
        assert [(row.number, row.values) for row in read(path).rows] == [(1, PAIR), (2, PAIR)]
        lines(path, [PAIR, PAIR])
        assert [(row.number, row.values) for row in read(path).rows] == [(1, PAIR), (2, PAIR)]


BROKEN = {
    "cut": (
        '[{"prompt": "a",\n "completion": }]',
        "is not readable JSON: Expecting value in line 2, column 16; repair",
    ),
    "number": ('{"prompt": ' + "1" * 5000 + "}", "is not readable JSON: Exceeds the limit"),
    "deep": ("[" * 100_000, "is not readable JSON: maximum recursion depth"),
    "half": (json.dumps([PAIR, {**PAIR, "completion": "\ud83d"}]), "row 2: has \\ud83d, which is half a character"),
    "nothing": ("[]", "has no rows"),
    "spread": ('{\n "data": []\n}', "is not readable JSON: Expecting property name enclosed in double quotes in row 1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_json_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    """Whatever is wrong with it, and where that is."""
    content, said = BROKEN[case]
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert said in refused(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_prompt_that_is_not_there_is_no_empty_prompt(tmp_path: Path, suffix: str) -> None:
    """An empty text is what somebody wrote; null, or no key where other rows have one, is a mistake in the data."""
    empty = {"prompt": "", "completion": "b"}
    assert read(write(tmp_path / f"rows{suffix}", [PAIR, empty])).rows[1].values == empty
    for third in ({"prompt": None, "completion": "b"}, {"completion": "b"}):
        said = refused(write(tmp_path / f"rows{suffix}", [PAIR, empty, third]))
        assert "row 3: prompt is null or missing" in said and '""' in said


def test_columns_that_are_none_of_ours(tmp_path: Path) -> None:
    """Three columns of instructions are joined into two, which no new names do; a list of names has an end."""
    three = {"instruction": "Add.", "input": "2 3", "output": "5"}
    said = refused(lines(tmp_path / "rows.jsonl", [{"instruction": "Hello.", "output": "Hi."}, three]))
    assert "columns instruction, output, input;" in said
    assert said.endswith("text: join instruction and input into prompt, and name output completion")
    said = refused(lines(tmp_path / "rows.jsonl", [{"instruction": "Hello.", "output": "Hi."}]))
    assert said.endswith("text: name instruction prompt, and name output completion")
    assert len(refused(lines(tmp_path / "rows.jsonl", [{f"column {i}": i} for i in range(5000)]))) < 500
    for suffix in (".json", ".csv", ".parquet"):
        assert "has columns id; expected" in refused(write(tmp_path / f"rows{suffix}", [{"id": 3}]))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
ASK = {"role": "user", "content": "Is it hot in Rome?"}


def test_a_call_of_a_tool_needs_no_content(tmp_path: Path) -> None:
    """Beside tool_calls null, nothing and an empty text are the same: no content. Without them a message has one."""
    for content in ({"content": None}, {"content": ""}, {}):
        talk = [ASK, {"role": "assistant", "tool_calls": [CALL], **content}]
        found = read(lines(tmp_path / "rows.jsonl", [{"messages": talk}])).rows[0].values["messages"]
        assert found == [ASK, {"role": "assistant", "tool_calls": [CALL], "content": ""}]
    for other in ({"role": "assistant", "tool_calls": []}, {"role": "user", "tool_calls": [CALL]}):
        path = lines(tmp_path / "rows.jsonl", [{"messages": [ASK, {**other, "content": None}]}])
        assert "row 1: content of message 2 is empty" in refused(path)


def test_parquet_gives_no_row_the_keys_of_others(tmp_path: Path) -> None:
    """Arguments of one tool stay out of the calls of another, at any depth; what JSON says is null stays null."""
    other = {"type": "function", "function": {"name": "add", "arguments": {"of": [{"left": 2}, {"right": 3}]}}}
    talks = [{"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [c]}]} for c in (CALL, other)]
    for name in ("rows.parquet", "rows.jsonl"):
        found = read(write(tmp_path / name, talks)).rows
        assert [row.values["messages"][1]["tool_calls"] for row in found] == [[CALL], [other]]
    null = {"type": "function", "function": {"name": "weather", "arguments": {"city": None}}}
    talk = [ASK, {"role": "assistant", "content": "", "tool_calls": [null]}]
    assert read(lines(tmp_path / "rows.jsonl", [{"messages": talk}])).rows[0].values == {"messages": talk}


def test_a_message_may_have_a_time(tmp_path: Path) -> None:
    """Keys that no template reads may be of any type that Parquet has."""
    talk = [{**ASK, "at": datetime(2020, 1, 5, tzinfo=UTC)}, {"role": "assistant", "content": "Yes."}]
    assert [row.key for row in read(write(tmp_path / "rows.parquet", [{"messages": talk}])).rows]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tools_are_a_list_or_its_text(tmp_path: Path, suffix: str) -> None:
    """Either is the same list; no tools are none; what is no list of objects is refused with its row."""
    tools = [{"type": "function", "function": {"name": "weather"}}]
    talk = [ASK, {"role": "assistant", "content": "Yes."}]
    path = write(tmp_path / f"rows{suffix}", [{"messages": talk, "tools": tools}, {"messages": talk, "tools": None}])
    assert [row.values.get("tools") for row in read(path).rows] == [tools, None]
    texts = [json.dumps(tools), "", "[]", "null"]
    path = write(tmp_path / f"rows{suffix}", [{"messages": talk, "tools": text} for text in texts])
    assert [row.values.get("tools") for row in read(path).rows] == [tools, None, None, None]
    for bad in ("weather", '{"name": "weather"}', '["weather"]'):
        path = write(tmp_path / f"rows{suffix}", [{"messages": talk, "tools": bad}])
        assert "row 1: tools is neither a list of objects nor the JSON text of one" in refused(path)


def test_prompt_and_completion_of_messages_are_a_conversation(tmp_path: Path) -> None:
    """They are put together, and where the completion begins is kept; each part is looked at."""
    said = {"role": "assistant", "content": "Yes."}
    source = read(lines(tmp_path / "rows.jsonl", [{"prompt": [ASK, said, ASK], "completion": [said]}]))
    assert source.format == "messages"
    assert source.rows[0].values == {"messages": [ASK, said, ASK, said], "trained_from": 3}
    wrong = {
        "row 2: prompt is not a list of {role, content}": {"prompt": "Hot?", "completion": [said]},
        "row 2: completion is not a list of {role, content}": {"prompt": [ASK], "completion": "Yes."},
        "row 2: no message of the completion is by the assistant": {"prompt": [ASK, said], "completion": [ASK]},
        "row 2: the first message is by the assistant": {"prompt": [said], "completion": [said]},
    }
    for words, row in wrong.items():
        assert words in refused(lines(tmp_path / "rows.jsonl", [{"prompt": [ASK], "completion": [said]}, row]))
