"""What is wrong with a spec, where it stands, and what to do about it: pydantic's errors as one line each."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

NEEDED = "everything has a default but model, data, machine and budget.cap"
MISSING = {  # what a part needs that is there
    "search.learning_rate": "a range has low and high; or list the rates: [1.0e-4, 3.0e-4]",
    "stop.utility": "say what lowering the best loss by one percent is worth: {dollars_per_percent: $1}",
}


def lines_of(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Returns the line of every key of a composed YAML document, by its path."""
    found: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            found[here] = key.start_mark.line + 1
            found |= lines_of(value, here)
    return found


def repeated(node: Any, path: tuple[str, ...] = ()) -> tuple[str, int, int] | None:
    """A key that a YAML document gives twice, as YAML must not: its name and both lines. The last would count."""
    if isinstance(node, yaml.SequenceNode):
        return next((found for part in node.value if (found := repeated(part, path))), None)
    first: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        here, line = (*path, str(key.value)), key.start_mark.line + 1
        if key.value in first:
            return ".".join(here), first[key.value], line
        first[key.value] = line
        if found := repeated(value, here):
            return found
    return None


def foremost(errors: Sequence[ErrorDetails]) -> ErrorDetails:
    """The error to speak of: of a value that may be one of several things, what is wrong with it as what it is."""
    first = errors[0]
    inside = [e for e in errors if e["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]]
    real = [e for e in inside if not e["type"].endswith("_type")]
    return real[0] if first["type"] == "model_type" and real else first


def explain(
    error: ErrorDetails, where: str, lines: Mapping[tuple[str, ...], int | str], root: type[BaseModel]
) -> tuple[str, str]:
    """Returns a validation error of the `root` model as one line, and what to do about it.

    `lines` are those of the file's keys, or the flag that set a key.
    """
    path = tuple(
        str(part)
        for part in error["loc"]
        if not str(part).startswith(("function-", "tuple", "Range", "constrained-", "str"))
    )
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    place = line if isinstance(line, str) else f"{where}, line {line}" if line else where
    name = ".".join(path)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _known(path[:-1], root), n=1, cutoff=0.4)
        known = ", ".join(_known(path[:-1], root))
        return f"{place}: unknown key {name}" + (f"; did you mean {near[0]}?" if near else ""), f"known here: {known}"
    if error["type"] == "missing":
        return f"{place}: {name} is missing", MISSING.get(".".join(path[:-1]), NEEDED)
    if error["type"] in {"model_type", "model_attributes_type"}:
        return (
            f"{place}: {name} is no section",
            f"leave the key out, or write keys under it: {', '.join(_known(path, root))}",
        )
    message = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | list) else ""
    hint = f"a list is written [{given}]" if isinstance(given, str) and "," in given and path[-1:] == ("0",) else ""
    return f"{place}: {name or 'spec'}: {message[0].lower()}{message[1:]}{shown}", hint


def _known(path: tuple[str, ...], root: type[BaseModel]) -> list[str]:
    model: Any = root
    for part in path:
        if part.isdigit():
            continue  # a place in a list
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        model = _model_in(annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model that an annotation such as `tuple[Model, ...] | None` speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
