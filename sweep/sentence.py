"""The verdict in one sentence, which says what the evidence allows and no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sweep.verdict import MIN_SEEDS, Estimate, Share

ALIKE = 0.1  # two ratios of cost that differ by less than this share of themselves are told once


@dataclass(frozen=True)
class Side:
    """A method's best confirmed configuration on the test rows, over how many seeds."""

    words: str  # LoRA r=16, or full training
    seeds: int
    test: Estimate


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the sentence is made of; None is what is not known."""

    measure: str  # loss, or the metric's name
    higher_is_better: bool = False
    untrained: float | None = None
    lora: Side | None = None
    full: Side | None = None
    share: Share | None = None
    difference: Estimate | None = None  # LoRA less full training
    charged: float | None = None  # LoRA's cost over full training's: of a confirmation, as it was charged
    alone: float | None = None  # and of a run that has the machine to itself, by forecast
    ranks: Mapping[int, Estimate | None] | None = None  # each less the best; None is the best
    untuned: Collection[int] = ()  # ranks of which no configuration came to its end in the search


def sentence(found: Findings) -> str:
    """Returns the verdict: LoRA against full training first, then the ranks."""
    parts = [_methods(found)]
    if found.ranks and len(found.ranks) > 1:
        parts.append(_ranks(found.ranks, found.untuned))
    text = "; ".join(parts)
    return text[0].upper() + text[1:] if text.startswith(("only", "nothing")) else text


def _methods(found: Findings) -> str:
    lora, full = found.lora, found.full
    if lora is None and full is None:
        return "nothing is claimed: no configuration was confirmed under other seeds"
    if lora is None or full is None:
        return _alone(found, lora or full)
    few = [side for side in (lora, full) if side.seeds < MIN_SEEDS]
    if few:
        counts = f"LoRA ran under {_seeds(lora.seeds)}, full training under {_seeds(full.seeds)}"
        return f"{_uncertain(found, lora)}, but {counts}: too few to claim an interval"
    share = found.share
    if share is None or not share.gained or share.estimate.low is None or share.estimate.high is None:
        return _gap(found, lora)
    return _reached(found, lora, share.estimate.value, share.estimate.low, share.estimate.high)


def _reached(found: Findings, lora: Side, value: float, low: float, high: float) -> str:
    share = f"{percents(value, low, high)} of full training's gain{_in(found)}{cost_words(found)}"
    if low > 1:
        return f"{lora.words} gained more than full training: {share}"
    if high >= 1:
        return f"{lora.words} and full training can't be told apart at this budget: LoRA reached {share}"
    if high <= 0:
        return f"{lora.words} lost where full training gained: {share}"
    if low <= 0:
        return f"{lora.words} has no clear gain of its own: {share}"
    return f"{lora.words} reached {share}"


def _gap(found: Findings, lora: Side) -> str:
    """What is left to say where there is no share: the difference, which is always defined."""
    why = "full training's own gain is too small, or too uncertain, for a share of it"
    if found.untrained is None:
        why = "the untrained model was not scored, so there is no gain to compare with"
    gap = found.difference
    if gap is None or gap.low is None or gap.high is None:
        return why
    if not gap.clear:
        apart = interval(gap.value, gap.low, gap.high)
        tied = f"{lora.words} and full training can't be told apart at this budget"
        return f"{tied}, difference in {found.measure} {apart}: {why}"
    side = "above" if gap.value > 0 else "below"
    ends = sorted((abs(gap.low), abs(gap.high)))
    size = interval(abs(gap.value), *ends)
    return f"{lora.words}'s {found.measure} is {size} {side} full training's{cost_words(found)}: {why}"


def _uncertain(found: Findings, lora: Side) -> str:
    if found.share is not None and found.share.gained:
        value = found.share.estimate.value
        return f"{lora.words} reached {100 * value:.0f} % of full training's gain{_in(found)}{cost_words(found)}"
    gap = 0.0 if found.difference is None else found.difference.value
    side = "above" if gap > 0 else "below"
    return f"{lora.words}'s {found.measure} was {figure(abs(gap))} {side} full training's{cost_words(found)}"


def _alone(found: Findings, side: Side | None) -> str:
    assert side is not None
    other = "full training" if found.full is None else "LoRA"
    only = "LoRA" if found.full is None else "full training"
    before = "" if found.untrained is None else f" from {figure(found.untrained)}"
    test = side.test
    if test.low is None or test.high is None:
        after = f"{figure(test.value)}, under {_seeds(side.seeds)}: too few to claim an interval"
    else:
        after = interval(test.value, test.low, test.high)
    brought = f"{side.words} brought the test {found.measure}{before} to {after}"
    return f"only {only} was confirmed: {brought}; of {other} nothing can be said"


def _ranks(ranks: Mapping[int, Estimate | None], untuned: Collection[int]) -> str:
    gaps = {rank: gap for rank, gap in ranks.items() if gap is not None}
    best = next(rank for rank, gap in ranks.items() if gap is None)
    if any(gap.low is None for gap in gaps.values()):
        return f"ranks {listed(sorted(ranks))} had too few seeds in common to be compared"
    behind = sorted(rank for rank, gap in gaps.items() if gap.clear)
    tied = sorted({best, *gaps} - set(behind))
    worse = [rank for rank in behind if rank not in untuned]
    given_up = [rank for rank in behind if rank in untuned]
    why = ""
    if given_up:
        whose = "them" if len(given_up) > 1 else "it"
        why = f"; of {_named(given_up)} nothing is said: no configuration of {whose} came to its end in the search"
    if len(tied) == 1:
        return (f"rank {best} is better than {_named(worse)}" if worse else f"rank {best} is the best") + why
    apart = f", {_named(worse)} {_be(worse)} worse" if worse else ""
    return f"ranks {listed(tied)} can't be told apart at this budget{apart}{why}"


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"


def _be(ranks: Sequence[int]) -> str:
    return "are" if len(ranks) > 1 else "is"


def listed(values: Sequence[int]) -> str:
    """`4, 16 and 64`."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def cost_words(found: Findings) -> str:
    """` for 7 % of its cost (22 % alone)`: as charged, and alone where that differs; empty if neither is known."""
    if found.charged is None:
        return "" if found.alone is None else f" for {ratio_words(found.alone)} its cost by forecast"
    text = f" for {ratio_words(found.charged)} its cost"
    if found.alone is None or abs(found.alone / found.charged - 1) < ALIKE:
        return text
    return f"{text} ({ratio_words(found.alone)} it if both train alone)"


def ratio_words(ratio: float) -> str:
    """`7 % of`, `0.7 % of`, or `1.3 times`."""
    if ratio > 1.005:
        return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"
    return f"{100 * ratio:.{0 if ratio >= 0.0095 else 1}f} % of"


def percents(value: float, low: float, high: float) -> str:
    """`93 % (88-97)`; with a decimal where the interval is narrow, and with `to` where a minus would confuse."""
    places = 1 if high - low < 0.02 else 0
    between = "-" if round(100 * low, places) >= 0 else " to "
    return f"{100 * value:.{places}f} % ({100 * low:.{places}f}{between}{100 * high:.{places}f})"


def interval(value: float, low: float, high: float) -> str:
    """`0.951 (0.940 to 0.962)`, with as many decimals as the interval's width deserves."""
    places = _places(high - low)
    return f"{value:.{places}f} ({low:.{places}f} to {high:.{places}f})"


def figure(value: float) -> str:
    """A loss or a metric without an interval."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _places(width: float) -> int:
    return next((places for places in (1, 2, 3, 4, 5) if width >= 10 ** (1 - places)), 6)


def _in(found: Findings) -> str:
    return f" in {found.measure}" if found.higher_is_better else ""


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"
