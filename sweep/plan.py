"""The lengths that trials are compared at, derived from data, cap and forecasts; and the plan of a whole study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sweep import rungs, space
from sweep.outline import FACTORS, Outline, Probed, cheapest_run, outline
from sweep.pricing import Quote
from sweep.projection import Plan
from sweep.spec import SearchSpec, Spec

USUAL_RUNGS = (0.05, 0.1, 0.2, 0.4)  # until `settle` has derived others

MIN_RUNG_ROWS = 16
EVALUATION_SHARE = 0.1  # rungs may cost this share of the training that they judge
FORWARD_SHARE = 1 / 3  # an evaluated token costs a forward pass, a trained one about three


def lengths(search: SearchSpec, splits: dict[str, Any], shares: Sequence[float] | None = None) -> Plan:
    """Derives run, rungs and the rungs' validation rows from the prepared data; `shares` win over the spec's rungs."""
    if shares is None:
        shares = USUAL_RUNGS if isinstance(search.rungs, str) else search.rungs
    train, validation = splits["train"], splits["validation"]
    examples = space.run_examples(search, train["rows"])
    run_tokens = round(examples * train["tokens"] / train["rows"])
    row_tokens = validation["tokens"] / validation["rows"]
    affordable = EVALUATION_SHARE * run_tokens / (FORWARD_SHARE * max(len(shares), 1) * row_tokens)
    rows = min(max(math.floor(affordable), MIN_RUNG_ROWS), validation["rows"])
    return Plan(
        examples=examples,
        run_tokens=run_tokens,
        rungs=tuple(max(round(share * run_tokens), 1) for share in shares),
        rung_rows=rows,
        rung_tokens=round(rows * row_tokens),
        validation_tokens=validation["tokens"],
    )


def evaluated(data: dict[str, Any]) -> dict[str, Any]:
    """The splits as evaluations run them: where choices are scored, every one of them goes after every prompt."""
    splits: dict[str, Any] = data["splits"]
    scored = data.get("objective", {}).get("validation_tokens")
    return splits | {"validation": splits["validation"] | {"tokens": scored}} if scored else splits


def settle(spec: Spec, facts: dict[str, Any], quote: Quote) -> tuple[Spec, dict[str, Any]]:
    """Derives the rungs that the spec leaves to a policy, by the cap and the forecast speed, once for all.

    Returns the spec as it is to be stored and the facts with the rungs' lengths. Raises SpecError.
    """
    search = spec.search
    if not isinstance(search.rungs, str):
        return spec, facts
    notes = list(facts.get("notes", []))
    examples, largest = facts["plan"]["examples"], max(search.batch_size)
    steps = max(examples // largest, 1)
    if search.rungs == "auto" and search.promote == "curves":
        shares: Sequence[float] = _before_the_end(rungs.climb(steps, search.warmup), examples, largest)
        where = f"{_percent(shares)} of a run" if shares else "the end alone"
        notes.append(f"auto: evaluated at {where}; the model of the curves says who goes on")
        search = search.model_copy(update={"rungs": shares})
    elif search.rungs in {*rungs.DERIVED, "hyperband"}:
        cheapest = cheapest_run(spec, facts, quote)
        fixed = search.eta if "eta" in search.model_fields_set else None
        derived = rungs.ladder((spec.budget.cap - spec.budget.reserve) / max(cheapest, 1), steps, fixed)
        shares = _before_the_end(derived.shares, examples, largest)
        update = {"eta": derived.eta} | ({"rungs": shares} if search.rungs in rungs.DERIVED else {})
        decides = search.promote == "curves" and search.rungs in rungs.DERIVED
        who = "the model of the curves says who goes on" if decides else f"one in {derived.eta} goes on"
        compared = f"at {_percent(shares)} of a run, {who}" if shares else "at the end alone"
        notes.append(f"{search.rungs}: compared {compared}; about {derived.trials} trials by the forecast")
        search = search.model_copy(update=update)
    else:
        made = rungs.policy(search, ())
        assert made is not None  # it is a class of the user's
        shares = made.shares
    plan = asdict(lengths(search, evaluated(facts["data"]), shares))
    return spec.model_copy(update={"search": search}), facts | {"plan": plan, "notes": notes}


def _before_the_end(shares: Sequence[float], examples: int, batch: int) -> tuple[float, ...]:
    """The rungs that a run of such batches passes before its last step: at the others nothing would be left to save."""
    steps = math.ceil(examples / batch)
    return tuple(share for share in shares if math.ceil(share * examples / batch) < steps)


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:.3g}" for share in shares) + " %"


def drawn(spec: Spec, facts: dict[str, Any], quote: Quote, probed: Probed | None = None) -> Outline:
    """The whole plan of a spec whose rungs may not be derived yet, beside what other caps would buy; see outline."""
    others = []
    for factor in FACTORS:
        parts = {name: round(factor * getattr(spec.budget, name)) for name in ("cap", "reserve")}
        other = spec.model_copy(update={"budget": spec.budget.model_copy(update=parts)})
        others.append(outline(*settle(other, facts, quote), quote, probed))
    return outline(*settle(spec, facts, quote), quote, probed, others)
