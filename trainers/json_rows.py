"""Rows of JSON, one object a line or a list of objects, read with Python's own parser.

Arrow's, which `datasets` reads JSON with, guesses types: a column of dates is no text any more.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from trainers.splits import DataError

_HEAD = 4096  # bytes in which a file's first character stands that is no space


def read_json(path: Path, wanted: Collection[str]) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Returns the names of all columns, and each row's number with those of its values whose columns are wanted.

    A number is the line of a file that has an object a line, and counts from 1 in a list. Raises DataError, OSError.
    """
    columns: dict[str, None] = {}
    rows = []
    for number, value in _values(path):
        if not isinstance(value, dict):
            raise DataError(
                f"{path.name}, row {number}: is {type(value).__name__}, expected an object; repair the file"
            )
        columns |= dict.fromkeys(value)
        rows.append((number, {name: value[name] for name in wanted if name in value}))
    return list(columns), rows


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        # Which of the two it is, its content says: both are found under either ending.
        listed = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        file.seek(0)
        if listed:
            yield from enumerate(_parsed(path, file.read(), None), start=1)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(path, line, number)


def _parsed(path: Path, content: bytes, row: int | None) -> Any:
    """What a line, or a whole file where `row` is None, says. Raises DataError."""
    try:
        return json.loads(content.decode("utf-8-sig" if row in (None, 1) else "utf-8"))
    except UnicodeDecodeError as error:
        line = row or content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} in {'line' if row is None else 'row'} {line}"
        raise DataError(f"{path.name}: is no UTF-8 text ({found}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}" if row is None else f"row {row}"
        said = f"{error.msg.removesuffix(' at')} in {where}, column {error.colno}"
        raise _unreadable(path, said) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        where = "" if row is None else f" in row {row}"
        raise _unreadable(path, f"{str(error).splitlines()[0][:200]}{where}") from error


def _unreadable(path: Path, said: str) -> DataError:
    return DataError(f"{path.name}: is not readable {path.suffix[1:].upper()}: {said}; repair the file")
