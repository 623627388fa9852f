"""The state of a study as lines: `sweep status` prints them once, the live view again and again."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text

from budgets.money import usd
from sweep.views.parts import (
    STATE_STYLES,
    Column,
    Scale,
    amounts,
    bar,
    figure,
    fit,
    flow,
    glyphs,
    label_of,
    line,
    loss_of,
    percent,
    rate,
    rung_of,
    steps,
)

STATES = ("live", "judging", "waiting", "paused", "completed", "pruned", "failed")
BAR_STYLES = ("green", "yellow", "cyan", "dim")
ROOMY = 12  # lines of a terminal in which the live view can say more than where the money is


def head(console: Console, status: dict[str, Any]) -> Text:
    """Which study, in which state, on what."""
    worker, standing = status["worker"], status["standing"]
    state = status["state"] if standing["kind"] == "running" else standing["kind"]
    if worker is None or standing["kind"] == "broken off":
        doing, device = "no worker runs", ""
    else:
        doing = f"worker {worker['state']}, slice {worker['slice']}"
        device = f", {worker['device']}" if worker["device"] else ""
    price = rate(status["micros_per_hour"], status["unit"])
    return line(console, f"study {status['study']} ({state}): {doing}, {price}{device}", "bold")


def budget(console: Console, status: dict[str, Any]) -> list[Text]:
    """One bar of the whole cap, and what its parts are in words."""
    signs = glyphs(console)
    spent, held, cap = (status[name]["micros"] for name in ("spent", "held", "cap"))
    projected = status["projected"]["micros"]
    ahead = min(max(projected - spent - held, 0), max(cap - spent - held, 0))
    drawn = bar([part / max(cap, 1) for part in (spent, held, ahead)], console.width - 2, signs.bar)
    picture = Text("[", no_wrap=True)
    for sign in drawn:
        picture.append(sign, BAR_STYLES[signs.bar.index(sign)])
    picture.append("]")
    names = ("spent", "held", "projected", "left", "cap", "projected_low", "projected_high")
    told = dict(zip(names, amounts([status[name]["micros"] for name in names]), strict=True))
    low, high = told["projected_low"], told["projected_high"]
    words = [
        f"spent {told['spent']} ({percent(spent / max(cap, 1))})",
        f"held {told['held']}",
        f"projected {told['projected']}" + (f" ({low} to {high})" if low != high else ""),
        f"left {told['left']}"
        + (f", {usd(status['reserve']['micros'])} in reserve" if status["reserve"]["micros"] else ""),
    ]
    parts = [Text(f"{sign} {text}") for sign, text in zip(signs.bar, words, strict=True)]
    legend = flow([*parts, Text(f"cap {told['cap']}", "bold")], console.width)
    if status["forecasts"] is not None and console.height >= ROOMY:
        legend.append(line(console, _held(**status["forecasts"]), "dim"))
    if status["frozen"] or status["overrun"]["micros"]:
        lost = usd(status["overrun"]["micros"])
        warning = f"FROZEN: {lost} were used beyond what was held; see: sweep audit {status['study']}"
        legend.append(line(console, warning, "bold red"))
    return [picture, *legend]


def _held(count: int, inside: int, median_error: float) -> str:
    """How the forecasts of training held so far, each made before it was measured."""
    error = f"median error {100 * median_error:.0f} %"
    return f"forecasts: {inside} of {count} inside their 80 % interval, {error}"


def goals(status: dict[str, Any], known: dict[int, int] | None = None) -> dict[int, int]:
    """Tokens at each rung, as far as a trial was evaluated there; `known` is what was seen before."""
    found = dict(known or {})
    for trial in [*status["running"], *([status["best"]] if status["best"] else [])]:
        found |= {point["rung"]: point["tokens"] for point in trial["curve"]}
    return found


def _progress(trial: dict[str, Any], goal: dict[int, int]) -> float | None:
    """How far it is from its last rung to the next; None while nothing tells how long that is."""
    before = trial["curve"][-1]["tokens"] if trial["curve"] else 0
    after = goal.get(trial["rung"] + 1)
    confirms = trial["source"] is not None  # without any rung before its end
    if (confirms or trial["rung"] + 1 == trial["last_rung"]) and trial["step"]:
        # The end is known before anyone reached it: the run's examples are part of the configuration.
        config = trial["config"]
        after = round(trial["tokens"] * config["examples"] / (trial["step"] * config["batch_size"]))
    if after is None or after <= before:
        return None
    share: float = (trial["tokens"] - before) / (after - before)
    return min(max(share, 0.0), 1.0)


def running(console: Console, status: dict[str, Any], goal: dict[int, int], rows: int) -> list[RenderableType]:
    """Trials that train, are judged or wait for a slot; at most `rows` lines with the heading."""
    trials = sorted(status["running"], key=lambda t: STATES.index(t["state"]))
    if not trials or rows < 2:
        return [line(console, f"{len(trials)} trials run or wait")] if trials and rows else []
    limit = len(trials) if len(trials) < rows else max(rows - 2, 1)
    signs, shown = glyphs(console), trials[:limit]
    shares = [_progress(t, goal) for t in shown]
    doing = [
        t["state"] if s is None or t["state"] != "live" else f"live {s:.0%}" for t, s in zip(shown, shares, strict=True)
    ]
    scale = Scale.of([*trials, *([status["best"]] if status["best"] else [])])
    columns = [
        Column("#", [label_of(t, signs) for t in shown], right=True),
        Column("configuration", [t["in_words"] for t in shown], least=34),
        Column("rung", [rung_of(t) for t in shown], right=True),
        Column("to next", doing, styles=[STATE_STYLES.get(t["state"], "") for t in shown]),
        Column("loss", [loss_of(t).strip() for t in shown], right=True),
        Column("cost", amounts([t["cost"]["micros"] for t in shown]), right=True),
        Column("curve", [scale.draw(t["curve"], signs) for t in shown], optional=True),
    ]
    if console.width >= 100:
        drawn = [
            "" if s is None or t["state"] != "live" else steps(s, 10, signs) for t, s in zip(shown, shares, strict=True)
        ]
        columns.insert(4, Column("progress", drawn, optional=True))
        columns.insert(5, Column("tokens", [f"{t['tokens']:,}" for t in shown], right=True, optional=True))
        train = ["-" if t["train_loss"] is None else figure(t["train_loss"]) for t in shown]
        columns.insert(6, Column("train loss", train, right=True, optional=True))
    more = len(trials) - len(shown)
    return [fit(columns, console.width, signs), *([line(console, f"{more} more", "dim")] if more else [])]


def best(console: Console, status: dict[str, Any]) -> Text:
    """The best trial so far, beside the untrained model."""
    trial = status["best"]
    if trial is None:
        return line(console, "best: no trial was evaluated yet", "dim")
    over = "all rows" if trial["full_loss"] is not None else f"rung {rung_of(trial)}"
    text = f"best: trial {trial['number']}, {trial['in_words']}, loss {loss_of(trial).strip(' *')} ({over})"
    base = status["base_loss"]
    more = "" if base is None or trial["full_loss"] is None else f", untrained {figure(base)}"
    return line(console, text + (more if len(text + more) <= console.width else ""), "bold")


def counts(console: Console, status: dict[str, Any]) -> Text:
    """How many trials are in which state; those that run are listed anyway."""
    found = [f"{len(status['running'])} running"] if status["running"] else []
    found += [f"{status['counts'][state]} {state}" for state in STATES[3:] if status["counts"].get(state)]
    race = status["confirmations"]
    more = f"; {race['done']} of {race['all']} runs under new seeds done" if race["all"] else ""
    return line(console, f"{status['trials']} trials" + (f": {', '.join(found)}" if found else "") + more)


def events(console: Console, status: dict[str, Any], last: int) -> list[Text]:
    """The last events with the time of day."""
    found = status["events"][-last:] if last > 0 else []
    times = [time.strftime("%H:%M:%S", time.localtime(event["unix_ms"] / 1000)) for event in found]
    return [line(console, f"{at} {event['text']}", "dim") for at, event in zip(times, found, strict=True)]
