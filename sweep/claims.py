"""What is often said of LoRA and full training, beside what a study measured.

The sayings are those of a widely read article on choosing between the two, taken as hypotheses: each is a figure that a
user can get for a task of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from budgets.money import MICROS
from sweep.sentence import figure, listed, percents

SEVEN_BILLION = 7e9
HALF, SINGLE, TRAINING = 2, 4, 16  # bytes a parameter; training: bf16 weights and gradients, fp32 masters, two moments
GB = 1e9
ARTICLE_CAP = 200 * MICROS
CLAIMED_GB = (80, 120)
RANKS = (16, 64)


def beside(values: Mapping[str, Any], parameters: int) -> list[dict[str, str]]:
    """Returns `claim`, `measured` and `holds` (yes, no, more, open, or corrected) for each; `values` are compare's."""
    share = values["share"]
    rows = [
        _row("LoRA reaches 90-97 % of full training", *_within(share, 0.90, 0.97)),
        _row("85-95 % of it in domain adaptation", *_within(share, 0.85, 0.95)),
        _row("full training costs up to 15 times as much", *_dearer(values["costs"])),
        _row("$200 buys one full run, or 50 and more of LoRA", *_bought(values["costs"])),
        _row("rank 16 sometimes beats rank 64", *_sixteen(values["ranks"])),
        _row("7B needs 28 GB for its weights", *_weights(parameters)),
        _row("80-120 GB to train 7B in full", *_training(values["costs"], parameters)),
    ]
    return rows


def _row(claim: str, measured: str, holds: str) -> dict[str, str]:
    return {"claim": claim, "measured": measured, "holds": holds}


def _within(share: Mapping[str, Any] | None, low: float, high: float) -> tuple[str, str]:
    """Whether the claimed range and the interval agree, exclude each other, or leave it open."""
    if share is None:
        return "no share was measured: it takes both methods, confirmed", "open"
    if not share["claimed"]:
        gained = f"{100 * share['value']:.0f} %, without an interval" if share["gained"] else "no share can be claimed"
        return gained, "open"
    words = percents(share["value"], share["low"], share["high"])
    if low <= share["low"] and share["high"] <= high:
        return words, "yes"
    if share["low"] > high:
        return words, "more"
    return words, "no" if share["high"] < low else "open"


def _dearer(costs: Mapping[str, Any]) -> tuple[str, str]:
    alone, charged = (costs["ratio"][name] for name in ("alone", "charged"))
    told = [f"{1 / ratio:.1f} times {how}" for ratio, how in ((alone, "alone"), (charged, "as charged")) if ratio]
    if not told:
        return "only one method was measured", "open"
    return ", ".join(told), "yes" if max(1 / ratio for ratio in (alone, charged) if ratio) <= 15 else "no"


def _bought(costs: Mapping[str, Any]) -> tuple[str, str]:
    lora, full = costs["lora"], costs["full"]
    if lora is None or full is None:
        return "only one method was measured", "open"
    runs, alone = (ARTICLE_CAP / max(cost["alone"]["micros"], 1) for cost in (full, lora))
    text = f"{runs:,.0f} full, or {alone:,.0f} of LoRA alone"
    most = alone
    if lora["charged"]:
        most = ARTICLE_CAP / max(lora["charged"]["micros"], 1)
        text += f", {most:,.0f} as charged"
    return f"{text}: of this model and data", "yes" if most >= 50 * runs else "no"


def _sixteen(ranks: Mapping[str, Any] | None) -> tuple[str, str]:
    rows = {} if ranks is None else {row["rank"]: row for row in ranks["rows"]}
    if not set(RANKS) <= rows.keys():
        return f"ranks {listed(RANKS)} were not both confirmed", "open"
    one, other = (rows[rank] for rank in RANKS)
    words = ", ".join(f"r={row['rank']} {figure(row['test'])}" for row in (one, other))
    for row in (one, other):
        if row["standing"] == "untuned":
            return f"{words}: none of the {row['tried']} of r={row['rank']} came to its end in the search", "open"
    (low, high), (lower, higher) = _behind(one), _behind(other)
    if high < lower:
        return f"{words}: 16 is better here", "yes"
    if higher < low:
        return f"{words}: 64 is better here", "no"
    return f"{words}: not told apart", "open"


def _behind(row: Mapping[str, Any]) -> tuple[float, float]:
    """The interval of how far a rank is behind the best of all, which may be a third one."""
    if row["standing"] == "best":
        return 0.0, 0.0
    if row["behind"]["low"] is None:
        return 0.0, math.inf
    near, far = sorted(abs(row["behind"][end]) for end in ("low", "high"))
    return near if row["standing"] == "worse" else 0.0, far


def _weights(parameters: int) -> tuple[str, str]:
    half, single = (SEVEN_BILLION * size / GB for size in (HALF, SINGLE))
    mine = parameters * HALF / GB
    return f"{half:.0f} GB in half precision, {single:.0f} GB in single; this model: {mine:.2f} GB in half", "corrected"


def _training(costs: Mapping[str, Any], parameters: int) -> tuple[str, str]:
    state, mine = (count * TRAINING / GB for count in (SEVEN_BILLION, parameters))
    text = f"{state:.0f} GB at {TRAINING} bytes a parameter, before activations; this model {mine:.1f} GB"
    full = costs["full"]
    if full is not None and full["peak"] is not None:
        text += f", measured peak {full['peak'] / GB:.1f} GB"
    return text, "yes" if CLAIMED_GB[0] <= state <= CLAIMED_GB[1] else "no"
