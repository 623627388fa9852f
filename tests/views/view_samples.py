"""Plain values as sweep/summary.py makes them, of any size."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from sweep import pricing
from sweep.plan import drawn, lengths
from sweep.spec import validate

FOLDER = "/srv/studies/a folder with a rather long name/runs/words/trials/{:04d}/ckpt-000032"
RUNGS = (320, 640, 1120, 2080, 5000)
TARGETS = ("attention", "mlp", "all-linear")


def money(micros: int) -> dict[str, Any]:
    """An amount as summary.py writes it."""
    return {"micros": micros, "usd": f"{micros / 1_000_000:.6f}"}


def a_trial(number: int, state: str = "completed", *, cost: int = 2_518, diverged: bool = False) -> dict[str, Any]:
    """A trial in a state, with the longest description that the default space has where `number` is even."""
    rng = random.Random(number)
    full = number % 10 == 7
    reached = {"completed": 4, "waiting": 1, "live": 0, "judging": 1, "failed": -1}.get(state, number % 4)
    reached = -1 if diverged else reached
    curve: list[dict[str, Any]] = [
        {"rung": r, "tokens": RUNGS[r], "loss": 4.4 - 0.35 * r + rng.random() / 10, "full_loss": None}
        for r in range(reached + 1)
    ]
    if state == "completed":
        curve[-1]["full_loss"] = curve[-1]["loss"] + 0.01
    tokens = RUNGS[reached] if reached >= 0 else 0
    tokens += 200 if state == "live" else 0
    rank, alpha, targets = (64, 128.0, "all-linear") if number % 2 == 0 else (4, 8.0, TARGETS[number % 3])
    config: dict[str, Any] = {"method": "full" if full else "lora", "learning_rate": 2.1354976e-3, "batch_size": 16}
    config |= {"examples": 250, "seed": 0, "warmup": 0.05, "weight_decay": 0.0, "clip_norm": 1.0, "dropout": 0.0}
    config["precision"] = "bf16"
    if not full:
        config |= {"rank": rank, "alpha": alpha, "targets": targets}
    reasons = {"completed": "trained to its end", "live": "", "waiting": "promoted: ranked 2 of 11 at 640 tokens"}
    parked = "ranked 28 of 38 at 320 tokens; parking its full state costs more than repeating its work"
    return {
        "number": number,
        "label": str(number),
        "source": None,
        "finale": False,
        "metric": None,
        "metric_error": None,
        "state": state,
        "in_words": "full lr 2.1e-3 b16" if full else f"lora r{rank} a{alpha:g} {targets} lr 2.1e-3 b16",
        "config": config,
        "rung": reached,
        "last_rung": 4,
        "step": tokens // 320,
        "tokens": tokens,
        "loss": curve[-1]["loss"] if curve else None,
        "full_loss": curve[-1]["full_loss"] if curve else None,
        "train_loss": 3.9 if tokens else None,
        "cost": money(cost),
        "reason": "diverged: the loss is nan at step 1" if diverged else reasons.get(state, parked),
        "folder": FOLDER.format(number) if tokens else None,
        "curve": curve,
    }


def some_trials(count: int) -> list[dict[str, Any]]:
    """Trials as a finished study has them, those without a loss last."""
    states = ["completed" if n < count // 5 else "pruned" if n % 2 else "paused" for n in range(count)]
    found = [a_trial(n, state, cost=100 + 37 * n) for n, state in enumerate(states)]
    if count > 2:
        found[-1] = a_trial(count - 1, "pruned", cost=0, diverged=True)
        found[-2] = a_trial(count - 2, "failed", cost=161)
    return found


def a_best(trial: dict[str, Any], base: float | None = 4.8) -> dict[str, Any]:
    """The best trial beside the untrained model."""
    finished = trial["full_loss"] is not None
    loss = trial["full_loss"] if finished else trial["loss"]
    return {
        "study": "words",
        "trial": trial,
        "loss": loss,
        "base_loss": base,
        "gain": None if base is None else 1 - loss / base,
        "trained_to_its_end": finished,
        "rows": "all validation rows" if finished else "the rung's validation rows",
        "metric": "exact_match",
        "confirmed": False,
        "confirmation": None,
        "deliverable": None,
    }


def a_confirmed_best(number: int) -> dict[str, Any]:
    """A winner that was confirmed, and trained in full after that."""
    confirmation = a_confirmation(number)
    finale = a_trial(number, cost=29_000) | {"label": f"{number}·0", "source": number, "finale": True}
    words = "the finale of 3 epochs, 2.65 against 2.701 on the validation rows of run 4·2"
    given = {"trial": finale, "words": words, "test": {"loss": 2.6543, "metric": None, "majority": None}}
    return a_best(a_trial(number)) | {"confirmed": True, "confirmation": confirmation, "deliverable": given}


def a_confirmation(number: int) -> dict[str, Any]:
    """What the runs of a trial under new seeds came to."""
    runs = [a_trial(number, cost=9_876) | {"label": f"{number}·{n}", "source": number} for n in (1, 2, 3)]
    metric = {"mean": 0.6412, "sd": 0.0123, "untrained": 0.0312, "majority": 0.25}
    loss = {"mean": 2.7011, "sd": 0.0101, "untrained": 4.7812, "majority": None}
    test = {"metric": metric, "loss": loss}
    return {"seeds": 3, "runs": runs, "validation": {}, "test": test, "cost": money(29_628), "export": runs[1]}


def a_statement(costs: Sequence[int], *, cap: int, rate: int = 3_600_000, overrun: int = 0) -> dict[str, Any]:
    """A statement whose lines add up; with the rate of 3.6 dollars an hour a millisecond is a micro-dollar."""
    overhead = {"load": 275, "compile": 0, "checkpoint": 1_116, "teardown": 40}
    spent = sum(costs) + sum(overhead.values()) + 13_996
    held = (cap - spent) // 3
    trials = [a_trial(n, "paused") for n in range(len(costs))]
    return {
        "study": "words",
        "unit": "hour",
        "machine": {"spans": [{"micros_per_hour": rate, "ms": spent + overrun}], "cost": money(spent + overrun)},
        "occupancy": 0.9731,
        "trials": [
            {
                "number": t["number"],
                "label": t["label"],
                "in_words": t["in_words"],
                "state": t["state"],
                **money(micros),
            }
            for t, micros in zip(trials, costs, strict=True)
        ],
        "confirmation": money(sum(costs) // 3),
        "finale": money(sum(costs) // 5),
        "overhead": {name: money(micros) for name, micros in overhead.items()},
        "idle": money(13_996),
        "spent": money(spent),
        "held": money(held),
        "left": money(cap - spent - held),
        "reserve": money(0),
        "cap": money(cap),
        "overrun": money(overrun),
    }


def a_status(
    trials: list[dict[str, Any]], *, cap: int = 60_000, frozen: bool = False, stopped: str | None = None
) -> dict[str, Any]:
    """The state of a study with these trials: half of the cap spent, a tenth held."""
    running = [t for t in trials if t["state"] in {"waiting", "live", "judging"}]
    evaluated = [t for t in trials if t["loss"] is not None]
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial["state"]] = counts.get(trial["state"], 0) + 1
    texts = [f"trial {n} paused: ranked {n} of 40 at 1,120 tokens, loss 3.5874, and more words" for n in range(8)]
    return {
        "study": "words",
        "state": "open",
        "standing": {"kind": "running", "words": ""}
        if running
        else {"kind": "broken off", "words": "nobody drives it, and its worker is gone; next: sweep resume words"},
        "worker": {"state": "ready", "device": "NVIDIA H100 80GB HBM3", "slice": 12} if running else None,
        "cap": money(cap),
        "spent": money(cap // 2),
        "held": money(cap // 10),
        "left": money(cap - cap // 2 - cap // 10),
        "projected": money(cap * 8 // 10),
        "projected_low": money(cap * 7 // 10),
        "projected_high": money(cap * 11 // 10),
        "forecasts": {"count": 38, "inside": 31, "median_error": 0.0612} if running else None,
        "stopped": stopped,
        "frozen": frozen,
        "overrun": money(1_234 if frozen else 0),
        "micros_per_hour": 3_600_000,
        "unit": "hour",
        "phase": "search",
        "reserve": money(0),
        "base_loss": 4.8,
        "trials": len(trials),
        "counts": counts,
        "confirmations": {"done": 3, "all": 9},
        "running": running,
        "best": evaluated[0] if evaluated else None,
        "events": [{"unix_ms": 1_795_480_952_000 + n, "kind": "paused", "text": t} for n, t in enumerate(texts)],
    }


def a_plan(cap: int, **endgame: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A plan as JSON, and the facts it was drawn from."""
    splits = {"train": {"rows": 2_000, "tokens": 40_000}, "validation": {"rows": 64, "tokens": 1_300}}
    splits["test"] = {"rows": 64, "tokens": 1_300}
    facts: dict[str, Any] = {"parameters": 135_000_000, "device": "NVIDIA H100", "cores": 16, "seconds": 2.4}
    facts |= {"data": {"splits": splits}, "notes": ["a note"]}
    values = {
        "study": "words",
        "model": "m",
        "data": {"train": "t"},
        "search": {"method": ["lora", "full"], "epochs": 10},
    }
    values |= {"machine": {"price": "$3.60/hour"}, "budget": {"cap": f"${cap / 1e6:.6f}"}, "endgame": endgame}
    spec = validate(values, "here")
    facts["plan"] = lengths(spec.search, splits).__dict__
    return drawn(spec, facts, pricing.quote(spec)).as_json(), facts
