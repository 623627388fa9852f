"""docs/spec.md cannot drift from sweep/spec.py: every key, its default, its choices and its bounds."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from sweep.spec import PATIENCE, RESERVE_SHARE, Spec, load

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
HEADER = "| key | values | default | what it does |"
TOP = "Top level"  # the heading of the keys that stand in no section
REQUIRED = "required"
OWN = "its own defaults"  # of a section that may be left out
# Defaults that follow from other keys: the words that stand for them. `test_derived_defaults` proves the words.
DERIVED = {
    "study": "the file's name without its ending",
    "budget.reserve": "a quarter of `cap`, or `$0` where the endgame trains nothing",
    "stop.patience.trials": f"`{PATIENCE}` where `dollars` is not given, else `null`",
}
# Keys whose choices stand in a validator, where `named` can't see them; what the document names must be accepted.
CHECKED = ("machine.slots", "search.rungs", "search.sampler", "search.warm_start", "objective.metric")


def canonical(value: Any) -> str:
    """A default as the document writes it: YAML as it may stand in a spec, on one line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            mantissa, exponent, power = repr(value).partition("e")
            mantissa += "" if "." in mantissa else ".0"  # YAML takes 1e-5 for text
            return f"{mantissa}e{int(power)}" if exponent else mantissa
        case tuple():
            return f"[{', '.join(map(canonical, value))}]"
        case BaseModel():
            return f"{{{', '.join(f'{key}: {canonical(one)}' for key, one in value)}}}"
        case _:
            return str(value)


def sections(model: type[BaseModel] = Spec, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every model of the spec with the path of its keys, the spec itself first."""
    yield path, model
    for key, field in model.model_fields.items():
        for inner in models(field.annotation):
            yield from sections(inner, f"{path}.{key}".lstrip("."))


def models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation speaks of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models(part)]


def named(annotation: Any, metadata: typing.Sequence[Any] = ()) -> tuple[set[str], set[float]]:
    """The choices and the bounds that an annotation states, without those of the models in it."""
    words: set[str] = set()
    bounds = {float(getattr(one, end)) for one in metadata for end in ("ge", "gt", "le", "lt") if hasattr(one, end)}
    for one in metadata:
        if isinstance(one, FieldInfo):
            bounds |= named(None, one.metadata)[1]
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return {canonical(part) for part in parts}, bounds
    if typing.get_origin(annotation) is Annotated:
        parts, more = parts[:1], parts[1:]
        bounds |= named(None, more)[1]
    for part in parts:
        inner, limits = named(part)
        words, bounds = words | inner, bounds | limits
    return words, bounds


def adapter(field: FieldInfo) -> TypeAdapter[Any]:
    """What reads a value of a key, with its checks."""
    return TypeAdapter(Annotated[(field.annotation, field, *field.metadata)])


def tables() -> dict[str, dict[str, list[str]]]:
    """The document's tables of keys by the path of their section: the other cells of a row by its key."""
    found: dict[str, dict[str, list[str]]] = {}
    section, inside = "", False
    for line in TEXT.splitlines():
        if heading := re.fullmatch(r"##+ (?:`([\w.]+)`|(.+))", line):
            section = heading[1] or ("" if heading[2] == TOP else heading[2])
        inside = line.startswith("|") and (inside or line == HEADER)
        if not inside or line == HEADER or line.startswith("|---"):
            continue
        key, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 3, f"docs/spec.md, {section}: not four cells: {line}"
        rows = found.setdefault(section, {})
        assert key.strip("`") not in rows, f"docs/spec.md, {section}: {key} stands there twice"
        rows[key.strip("`")] = cells
    return found


SECTIONS = dict(sections())
FIELDS = [(path, key, field) for path, model in SECTIONS.items() for key, field in model.model_fields.items()]
each_field = pytest.mark.parametrize(
    ("section", "key", "field"), FIELDS, ids=[f"{path}.{key}".lstrip(".") for path, key, _ in FIELDS]
)


def test_every_section_has_a_table_of_its_keys() -> None:
    """Proves that the document's sections are the spec's, and that each has the spec's keys in the spec's order."""
    written = {section: list(rows) for section, rows in tables().items()}
    assert written == {section: list(model.model_fields) for section, model in SECTIONS.items()}


@each_field
def test_a_default_is_the_codes(section: str, key: str, field: FieldInfo) -> None:
    """Proves that the default in a key's row is the code's, and that it may stand in a spec as it is written."""
    name = f"{section}.{key}".lstrip(".")
    written = tables()[section][key][1]
    if name in DERIVED:
        assert written == DERIVED[name]
    elif field.is_required():
        assert written == REQUIRED
    elif isinstance(field.default, BaseModel) and canonical(field.default) != written.strip("`"):
        assert written == OWN and field.default == type(field.default)()
    else:
        assert written == f"`{canonical(field.default)}`"
        assert adapter(field).validate_python(yaml.safe_load(written.strip("`"))) == field.default


@each_field
def test_choices_and_bounds_are_the_codes(section: str, key: str, field: FieldInfo) -> None:
    """Proves that a key's row names each choice that there is, and each number that bounds its values."""
    values = tables()[section][key][0]
    words, bounds = named(field.annotation, field.metadata)
    written = re.findall(r"`([^`]+)`", values)
    assert words <= set(written)
    for word in written if f"{section}.{key}" in CHECKED else []:
        adapter(field).validate_python(word)
    assert bounds <= {float(number) for number in re.findall(r"(?<![\w$.])\d+(?:\.\d+)?(?![\w/])", values)}


def test_derived_defaults(tmp_path: Path) -> None:
    """Proves what the document says in words of defaults that follow from other keys, and that its first spec works."""
    path = tmp_path / "words.yaml"
    path.write_text(TEXT.split("```yaml\n")[1].split("```")[0])
    spec = load(path)
    assert spec.study == "words" and RESERVE_SHARE == 1 / 4
    assert (spec.budget.cap, spec.budget.reserve) == (1_000_000, 250_000)
    assert load(path, ["endgame.seeds=0"]).budget.reserve == 0
    assert load(path, ["endgame={seeds: 0, finale_length: 2}"]).budget.reserve == 250_000
    for text, trials in (("{}", PATIENCE), ("{dollars: $1}", None), ("{trials: 3}", 3)):
        patience = load(path, [f"stop.patience={text}"]).stop.patience
        assert patience is not None and patience.trials == trials
