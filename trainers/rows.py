"""Rows of text from files and hub data sets, read through `datasets` and checked one by one.

Three formats, told apart by their columns: `prompt` and `completion`; `messages` (a list of role and content);
`text`. Other columns are ignored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from trainers.named import BUILDERS, EXPECTED, HUB_ID, data_file
from trainers.splits import DataError

COLUMNS = {"prompt": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
ROLES = ("system", "developer", "user", "assistant", "tool")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Row:
    """One row; `number` counts from 1 (the line of a JSONL file without blank lines, headers not counted)."""

    number: int
    values: dict[str, Any]

    @property
    def key(self) -> str:
        """What makes two rows exact duplicates."""
        return json.dumps(self.values, sort_keys=True, ensure_ascii=False)


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


def _load_file(path: Path, scratch: Path) -> datasets.Dataset:
    # A CSV cell is text as it stands: "007" is no number and "NA" no gap.
    as_text = {"converters": dict.fromkeys(("prompt", "completion", "text"), str), "keep_default_na": False}
    options = as_text if BUILDERS[path.suffix] == "csv" else {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".tmp-rows-") as cache:
        table = datasets.load_dataset(
            BUILDERS[path.suffix],
            data_files=str(path),
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
            verification_mode="no_checks",
            **options,
        )
    if table.num_rows == 0:
        raise DataError(f"{path.name}: is empty; it needs rows of {EXPECTED}")
    return table


def _read_file(path: Path, scratch: Path) -> tuple[datasets.Dataset, str, int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _load_file(path, scratch), sha256, size
    except DataError:
        raise
    except Exception as error:  # every builder has its own parser, and each of them its own errors
        root = _root(error)
        if "corresponds to no data" in str(root):
            raise DataError(f"{path.name}: has no rows; it needs rows of {EXPECTED}") from error
        # Arrow's JSON reader counts from 0; people count from 1.
        said = re.sub(r"in row (\d+)", lambda m: f"in row {int(m[1]) + 1}", _first_line(root))
        raise DataError(f"{path.name}: is not readable {path.suffix[1:].upper()}: {said}; repair the file") from error


def _read_hub(name: str, split: str) -> datasets.Dataset:
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises a dozen kinds, most of them undocumented
        said = _first_line(_root(error))
        raise DataError(f"{name}: is no local file and cannot be had from the hub: {said}") from error
    if table.num_rows == 0:
        raise DataError(f"{name}:{split}: has no rows")
    return table


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


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise DataError(f"{where}: messages is not a list of {{role, content}}")
    cleaned = []
    for turn, message in enumerate(value, start=1):
        if message.get("role") not in ROLES:
            raise DataError(f"{where}: message {turn} has role {message.get('role')!r}, expected {', '.join(ROLES)}")
        _text(message.get("content"), f"content of message {turn}", where)
        # `datasets` fills keys that other rows have with None, which templates would take for values.
        cleaned.append({k: v for k, v in message.items() if v is not None})
    roles = [m["role"] for m in cleaned]
    if "assistant" not in roles:
        raise DataError(f"{where}: no message is by the assistant, so there is nothing to train on")
    if roles[0] == "assistant":
        raise DataError(f"{where}: the first message is by the assistant; put what it answers before it")
    return cleaned


def _checked(table: datasets.Dataset, name: str, form: str) -> Iterator[Row]:
    for number, raw in enumerate(table.select_columns(list(COLUMNS[form])), start=1):
        where = f"{name}, row {number}"
        if form == "messages":
            yield Row(number, {"messages": _messages(raw["messages"], where)})
        elif form == "text":
            yield Row(number, {"text": _text(raw["text"], "text", where)})
        else:
            prompt = _text(raw["prompt"], "prompt", where, empty=True)
            yield Row(number, {"prompt": prompt, "completion": _text(raw["completion"], "completion", where)})


def read(source: str, scratch: Path) -> Source:
    """Reads a local file (.jsonl, .json, .csv, .parquet) or a hub data set (`owner/name` or `owner/name:split`).

    `scratch` is a folder for what `datasets` builds meanwhile; nothing is left in it. Raises DataError, and OSError
    where the disk is full.
    """
    if (path := data_file(source)) is not None:
        name = path.name
        table, sha256, size = _read_file(path, scratch)
    else:
        hub = HUB_ID.match(source)
        assert hub is not None
        name = source
        table = _read_hub(hub["id"], hub["split"] or "train")
        sha256, size = "", 0
    form = next((f for f, columns in COLUMNS.items() if set(columns) <= set(table.column_names)), None)
    if form is None:
        found = ", ".join(table.column_names) or "none"
        raise DataError(f"{name}: has columns {found}; expected {EXPECTED}: rename them")
    rows = list(_checked(table, name, form))
    if not sha256:  # a hub data set has no one file: what was read stands for it
        content = "\n".join(row.key for row in rows).encode()
        sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    return Source(name, form, rows, sha256, size)
