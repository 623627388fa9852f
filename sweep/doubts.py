"""What a plan warns of: what money or data do not reach for, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sweep.spec import Spec

FEW_ROWS = 30  # for validation: fewer, and a configuration wins by which rows were drawn
LONG_SHARE = 0.02  # of the rows: more that are cut change what is learned


@dataclass(frozen=True)
class Shortfall:
    """Something that money or data do not reach for, and what would make it fit; the sentences of a warning."""

    what: str
    remedy: str


def of_data(spec: Spec, data: Mapping[str, Any]) -> Iterator[Shortfall]:
    """What of the prepared data (`facts["data"]`) may make a study worth less. Older studies counted less of it."""
    rows = data["splits"]["validation"]["rows"]
    if rows < FEW_ROWS:
        what = f"{rows} validation row{'s' if rows > 1 else ''} can hardly tell configurations apart"
        yield Shortfall(what, f"set more apart with data.validation, {FEW_ROWS} or more")
    long, cut = data.get("truncated", 0), data.get("dropped", {}).get("cut", 0)
    if long > LONG_SHARE * data.get("rows_read", 0):
        what = f"{long:,} of {data['rows_read']:,} rows are longer than data.max_tokens, {spec.data.max_tokens}"
        what += f": {cut:,} have nothing to learn before it and are left out, {long - cut:,} lose their end"
        yield Shortfall(what, "raise data.max_tokens, or shorten the rows: an end that is cut off is not learned")
    if longer := data.get("objective", {}).get("longer_answers", 0):
        what = f"{longer:,} of {rows:,} validation answers are longer than objective.max_new_tokens,"
        what += f" {spec.objective.max_new_tokens}, and can't be generated whole"
        yield Shortfall(what, "raise objective.max_new_tokens")
