"""The verdict's sentence: each case says what the evidence allows, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from sweep.sentence import Findings, Side, interval, percents, ratio_words, sentence
from sweep.verdict import Estimate, Share


def estimate(value: float, low: float | None = None, high: float | None = None) -> Estimate:
    return Estimate(value, low, high, 0.01, 0.01, None if low is None else 4.0)


def share(value: float, low: float | None = None, high: float | None = None, *, gained: bool = True) -> Share:
    return Share(estimate(value, low, high), 0.01, 0.01, gained)


def side(words: str, value: float, half: float | None, seeds: int = 3) -> Side:
    return Side(words, seeds, estimate(value, *(() if half is None else (value - half, value + half))))


LORA, FULL = side("LoRA r=16", 0.951, 0.011), side("full training", 0.91, 0.01)
BOTH: dict[str, Any] = {"measure": "loss", "untrained": 1.508, "lora": LORA, "full": FULL, "charged": 0.07}
GAP = estimate(0.041, 0.03, 0.052)
ALONE = "LoRA r=16 brought the test loss from 1.5080 to 0.951 (0.940 to 0.962); of full training nothing can be said"
UNKNOWN = "full training's own gain is too small, or too uncertain, for a share of it"
TIED = "LoRA r=16 and full training can't be told apart at this budget"

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "below": (
        BOTH | {"share": share(0.93, 0.88, 0.97)},
        "LoRA r=16 reached 93 % (88-97) of full training's gain for 7 % of its cost",
    ),
    "two costs": (
        BOTH | {"share": share(0.93, 0.88, 0.97), "alone": 0.3},
        "LoRA r=16 reached 93 % (88-97) of full training's gain for 7 % of its cost (30 % of it if both train alone)",
    ),
    "costs alike": (
        BOTH | {"share": share(0.93, 0.88, 0.97), "alone": 0.072},
        "LoRA r=16 reached 93 % (88-97) of full training's gain for 7 % of its cost",
    ),
    "dearer": (
        BOTH | {"share": share(0.93, 0.88, 0.97), "charged": None, "alone": 1.3},
        "LoRA r=16 reached 93 % (88-97) of full training's gain for 1.3 times its cost by forecast",
    ),
    "above": (
        BOTH | {"share": share(1.06, 1.02, 1.1)},
        "LoRA r=16 gained more than full training: 106 % (102-110) of full training's gain for 7 % of its cost",
    ),
    "spans": (
        BOTH | {"share": share(0.99, 0.95, 1.03)},
        f"{TIED}: LoRA reached 99 % (95-103) of full training's gain for 7 % of its cost",
    ),
    "nothing of LoRA": (
        BOTH | {"share": share(0.02, -0.03, 0.07)},
        "LoRA r=16 has no clear gain of its own: 2 % (-3 to 7) of full training's gain for 7 % of its cost",
    ),
    "LoRA lost": (
        BOTH | {"share": share(-0.1, -0.15, -0.05)},
        "LoRA r=16 lost where full training gained: -10 % (-15 to -5) of full training's gain for 7 % of its cost",
    ),
    "metric": (
        BOTH | {"share": share(0.93, 0.88, 0.97), "measure": "exact_match", "higher_is_better": True},
        "LoRA r=16 reached 93 % (88-97) of full training's gain in exact_match for 7 % of its cost",
    ),
    "no gain, apart": (
        BOTH | {"share": share(0.0, gained=False), "difference": GAP},
        f"LoRA r=16's loss is 0.041 (0.030 to 0.052) above full training's for 7 % of its cost: {UNKNOWN}",
    ),
    "no gain, below": (
        BOTH | {"share": share(0.0, gained=False), "difference": estimate(-0.041, -0.052, -0.03), "charged": None},
        f"LoRA r=16's loss is 0.041 (0.030 to 0.052) below full training's: {UNKNOWN}",
    ),
    "no gain, tied": (
        BOTH | {"share": share(0.0, gained=False), "difference": estimate(0.004, -0.003, 0.011)},
        f"{TIED}, difference in loss 0.004 (-0.003 to 0.011): {UNKNOWN}",
    ),
    "untrained unknown": (
        BOTH | {"difference": GAP, "untrained": None, "charged": None},
        "LoRA r=16's loss is 0.041 (0.030 to 0.052) above full training's: "
        "the untrained model was not scored, so there is no gain to compare with",
    ),
    "few seeds": (
        BOTH | {"share": share(0.93), "difference": estimate(0.04), "lora": side("LoRA r=16", 0.95, None, 2)},
        "LoRA r=16 reached 93 % of full training's gain for 7 % of its cost, but LoRA ran under 2 seeds, "
        "full training under 3 seeds: too few to claim an interval",
    ),
    "few seeds, no gain": (
        BOTH
        | {
            "share": share(0.0, gained=False),
            "difference": estimate(-0.04),
            "full": side("full training", 0.9, None, 1),
        },
        "LoRA r=16's loss was 0.0400 below full training's for 7 % of its cost, but LoRA ran under 3 seeds, "
        "full training under 1 seed: too few to claim an interval",
    ),
    "LoRA only": (BOTH | {"full": None}, f"Only LoRA was confirmed: {ALONE}"),
    "full only": (
        BOTH | {"lora": None, "full": side("full training", 0.91, None, 2)},
        "Only full training was confirmed: full training brought the test loss from 1.5080 to 0.9100, under 2 seeds: "
        "too few to claim an interval; of LoRA nothing can be said",
    ),
    "nothing": ({"measure": "loss"}, "Nothing is claimed: no configuration was confirmed under other seeds"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sentence_says_what_the_evidence_allows(case: str) -> None:
    values, expected = CASES[case]
    assert sentence(Findings(**values)) == expected


APART, NEAR, FEW = estimate(0.05, 0.02, 0.08), estimate(0.01, -0.02, 0.04), estimate(0.05)
RANKS = {
    "tied": ({16: None, 64: NEAR}, "ranks 16 and 64 can't be told apart at this budget"),
    "three": ({4: NEAR, 16: None, 64: NEAR}, "ranks 4, 16 and 64 can't be told apart at this budget"),
    "one worse": (
        {4: APART, 16: None, 64: NEAR},
        "ranks 16 and 64 can't be told apart at this budget, rank 4 is worse",
    ),
    "two worse": ({4: APART, 8: APART, 16: None}, "rank 16 is better than ranks 4 and 8"),
    "better": ({16: None, 64: APART}, "rank 16 is better than rank 64"),
    "few seeds": ({16: None, 64: FEW}, "ranks 16 and 64 had too few seeds in common to be compared"),
}


@pytest.mark.parametrize("case", RANKS)
def test_ranks_follow_the_methods(case: str) -> None:
    ranks, expected = RANKS[case]
    told = sentence(Findings(**BOTH | {"share": share(0.93, 0.88, 0.97), "ranks": ranks}))
    assert told == f"LoRA r=16 reached 93 % (88-97) of full training's gain for 7 % of its cost; {expected}"


def test_a_single_rank_is_compared_with_nothing() -> None:
    assert "rank" not in sentence(Findings(**BOTH | {"share": share(0.93, 0.88, 0.97), "ranks": {16: None}}))


def test_figures_have_the_decimals_that_their_intervals_deserve() -> None:
    assert percents(0.9731, 0.9702, 0.9755) == "97.3 % (97.0-97.5)"
    assert percents(0.5, -0.1, 1.1) == "50 % (-10 to 110)"
    assert interval(0.95123, 0.94, 0.962) == "0.951 (0.940 to 0.962)"
    assert interval(3.2, 1.0, 5.0) == "3.2 (1.0 to 5.0)"
    assert [ratio_words(r) for r in (0.004, 0.07, 1.0, 2.5, 15.2)] == [
        "0.4 % of",
        "7 % of",
        "100 % of",
        "2.5 times",
        "15 times",
    ]
