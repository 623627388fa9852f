"""Rows of text from files and hub data sets, checked one by one.

Three formats, told apart by their columns: `prompt` and `completion`; `messages` (a list of role and content);
`text`. With messages there may be `tools`. A prompt and a completion that are lists of messages are a conversation of
which the completion is trained. Other columns are ignored.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
from pyarrow import parquet

from trainers.json_rows import read_json
from trainers.named import BUILDERS, EXPECTED, HUB_ID, data_file
from trainers.splits import DataError

COLUMNS = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
WANTED = ("prompt", "completion", "messages", "text", "tools")
ROLES = ("system", "developer", "user", "assistant", "tool")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAMES = 20  # columns that an error lists

Raw = tuple[list[str], list[tuple[int, dict[str, Any]]]]  # all columns; each row's number and what it has of WANTED


@dataclass(frozen=True)
class Row:
    """One row; `number` is its line in a file of a JSON object a line, else it counts from 1 without a header.

    `values` are `text`; or `prompt` and `completion`; or `messages`, with `tools` where there are some, and with
    `trained_from`, the place of the first message that is trained, where earlier ones are not.
    """

    number: int
    values: dict[str, Any]

    @property
    def key(self) -> str:
        """What makes two rows exact duplicates."""
        # Parquet has times and bytes, also where no template looks.
        return json.dumps(self.values, sort_keys=True, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Source:
    """The rows of one file or data set, all of one format (a key of COLUMNS)."""

    name: str
    format: str
    rows: list[Row]
    sha256: str
    bytes: int


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _root(error: BaseException) -> BaseException:
    """The error `datasets` wrapped; a full disk is raised as what it is, since it says nothing about the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise error
    return error


def _load_file(path: Path) -> Raw:
    kind = BUILDERS[path.suffix.lower()]
    if kind == "json":
        return read_json(path, WANTED)
    with path.open("rb") as file:  # by its path it would be taken for a pattern, in which brackets have a meaning
        if kind == "parquet":
            return _from_table(datasets.Dataset(parquet.read_table(file)))
        # A CSV cell is text as it stands: "007" is no number and "NA" no gap.
        frame = pandas.read_csv(file, dtype=str, keep_default_na=False)
    columns = [str(column) for column in frame.columns]
    rows = frame[[column for column in WANTED if column in columns]].to_dict("records")
    return columns, list(enumerate(rows, start=1))


def _read_file(path: Path) -> tuple[Raw, str, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        raw = _load_file(path)
    except DataError:
        raise
    except Exception as error:  # every kind has its own parser, and each of them its own errors
        kind = path.suffix[1:].upper()
        raise DataError(f"{path.name}: is not readable {kind}: {_first_line(_root(error))}; repair the file") from error
    if not raw[1]:
        raise DataError(f"{path.name}: has no rows; it needs rows of {EXPECTED}")
    return raw, sha256, size


def _from_table(table: datasets.Dataset) -> Raw:
    # Arrow fills keys that other rows have with None, at any depth, which templates would take for values.
    wanted = [column for column in WANTED if column in table.column_names]
    rows = table.select_columns(wanted) if wanted else [{}]
    return table.column_names, [(number, _without_none(row)) for number, row in enumerate(rows, start=1)]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _read_hub(name: str, split: str) -> Raw:
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises a dozen kinds, most of them undocumented
        said = _first_line(_root(error))
        raise DataError(f"{name}: is no local file and cannot be had from the hub: {said}") from error
    if table.num_rows == 0:
        raise DataError(f"{name}:{split}: has no rows")
    return _from_table(table)


def _text(value: Any, column: str, where: str, *, empty: bool = False) -> str:
    if value is None or value == "":
        if empty:
            return ""
        raise DataError(f"{where}: {column} is empty; fill it in or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} is {type(value).__name__}, expected text; put it in quotes")
    if not value.strip() and not empty:
        raise DataError(f"{where}: {column} has no text; fill it in or remove the row")
    return value


def _messages(value: Any, where: str, column: str = "messages") -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{where}: {column} is not a list of {{role, content}}")
    cleaned = []
    for turn, message in enumerate(value, start=1):
        if message.get("role") not in ROLES:
            raise DataError(f"{where}: message {turn} has role {message.get('role')!r}, expected {', '.join(ROLES)}")
        calls = message["role"] == "assistant" and bool(message.get("tool_calls"))
        content = _text(message.get("content"), f"content of message {turn}", where, empty=calls)
        # A null stands for a key that is not there. Without its content, which calls of tools need not have, many
        # templates refuse a message.
        cleaned.append({k: v for k, v in message.items() if v is not None} | {"content": content})
    return cleaned


def _conversation(messages: list[dict[str, Any]], raw: dict[str, Any], where: str) -> dict[str, Any]:
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise DataError(f"{where}: no message is by the assistant, so there is nothing to train on")
    if roles[0] == "assistant":
        raise DataError(f"{where}: the first message is by the assistant; put what it answers before it")
    tools = _tools(raw.get("tools"), where)
    return {"messages": messages} | ({"tools": tools} if tools else {})


def _tools(value: Any, where: str) -> list[dict[str, Any]]:
    """Descriptions of tools for the chat template; data sets often have them as JSON text."""
    found = value
    if isinstance(value, str) and value.strip():
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = value
    if not found:
        return []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"{where}: tools is neither a list of objects nor the JSON text of one; correct or remove it")
    return found


def _pair(raw: dict[str, Any], where: str) -> dict[str, Any]:
    if raw.get("prompt") is None:
        raise DataError(f'{where}: prompt is null or missing; fill it in, or write "" where there is none')
    prompt = _text(raw["prompt"], "prompt", where, empty=True)
    return {"prompt": prompt, "completion": _text(raw.get("completion"), "completion", where)}


def _spoken_pair(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A prompt and a completion that are lists of messages."""
    prompt, completion = (_messages(raw.get(column), where, column) for column in COLUMNS["prompt"])
    if all(message["role"] != "assistant" for message in completion):
        raise DataError(f"{where}: no message of the completion is by the assistant, so there is nothing to train on")
    return _conversation([*prompt, *completion], raw, where) | {"trained_from": len(prompt)}


def _checked(rows: Sequence[tuple[int, dict[str, Any]]], name: str, form: str, *, spoken: bool) -> Iterator[Row]:
    for number, raw in rows:
        where = f"{name}, row {number}"
        if spoken:
            values = _spoken_pair(raw, where)
        elif form == "messages":
            values = _conversation(_messages(raw.get("messages"), where), raw, where)
        elif form == "text":
            values = {"text": _text(raw.get("text"), "text", where)}
        else:
            values = _pair(raw, where)
        row = Row(number, values)
        try:
            row.key.encode()
        except UnicodeEncodeError as error:  # JSON can write it, and no tokenizer takes it
            half = error.object[error.start].encode("unicode_escape").decode()
            raise DataError(f"{where}: has {half}, which is half a character; correct the escape") from error
        yield row


def _unknown(name: str, columns: Sequence[str]) -> DataError:
    found = ", ".join(columns[:_NAMES]) + (", ..." if len(columns) > _NAMES else "")
    advice = "rename them"
    if {"instruction", "output"} <= set(columns):
        prompt = "join instruction and input into prompt" if "input" in columns else "name instruction prompt"
        advice = f"{prompt}, and name output completion"
    return DataError(f"{name}: has columns {found or 'none'}; expected {EXPECTED}: {advice}")


def read(source: str) -> Source:
    """Reads a local file (.jsonl, .json, .csv, .parquet) or a hub data set (`owner/name` or `owner/name:split`).

    Raises DataError, and OSError where the disk is full.
    """
    if (path := data_file(source)) is not None:
        name = path.name
        (columns, raw), sha256, size = _read_file(path)
    else:
        hub = HUB_ID.match(source)
        assert hub is not None
        name = source
        columns, raw = _read_hub(hub["id"], hub["split"] or "train")
        sha256, size = "", 0
    form = next((form for form, needed in COLUMNS.items() if set(needed) <= set(columns)), None)
    if form is None:
        raise _unknown(name, columns)
    # The first row says whether prompts are conversations: they are no text then, and no text is one.
    spoken = form == "prompt" and isinstance(raw[0][1].get("prompt"), list)
    rows = list(_checked(raw, name, form, spoken=spoken))
    form = "messages" if spoken else form
    if not sha256:  # a hub data set has no one file: what was read stands for it
        content = "\n".join(row.key for row in rows).encode()
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    return Source(name, form, rows, sha256, size)
