"""What `sweep plan` prints, and `sweep launch` before it asks: where the cap goes, and what it brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from budgets.money import usd
from sweep.views.parts import Column, amounts, duration, fit, glyphs, pairs, percent, rate, say
from sweep.views.tables import seen


def show_plan(
    console: Console, drawn: Mapping[str, Any], price_note: str, facts: Mapping[str, Any], stop_command: str | None
) -> None:
    """Prints a plan (an Outline as JSON), before anybody is asked and anything is spent."""
    say(console, f"the plan for {usd(drawn['cap'])}; nothing is spent yet", "bold")
    pairs(console, _head(drawn, price_note, facts))
    for columns in (_phases(drawn), _rungs(drawn), _runs(drawn), _others(drawn)):
        if columns:
            console.print()
            console.print(fit(columns, console.width, glyphs(console)))
    console.print()
    for words in _sources(drawn, facts):
        say(console, words, "dim")
    for shortfall in drawn["shortfalls"]:
        say(console, f"WARNING: {shortfall['what']}; {shortfall['remedy']}", "bold")
    if stop_command is None and facts["device"] not in {"cpu", "replay"}:
        words = "no machine.stop_command: a rented machine's meter runs on after the sweep, outside the cap"
        say(console, words, "bold")


def _head(drawn: Mapping[str, Any], price_note: str, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan, first = drawn["plan"], usd(drawn["first_rung"])
    least, quantum = drawn["minimum_seconds"], drawn["quantum_seconds"]
    at_least = f", at least {duration(least)}" if least > quantum else ""
    rows = [
        ("cap", f"{usd(drawn['cap'])}, never more: {_length(drawn['seconds'], drawn['unit'])}"),
        ("price", f"{rate(drawn['micros_per_hour'], drawn['unit'])}, {price_note}"),
    ]
    if quantum >= 1:
        rows.append(("billed", f"in steps of {duration(quantum)}{at_least}; holds and charges are rounded up"))
    *known, _ = seen(facts)
    rows += [(name, words) for name, _, words in (fact.partition(": ") for fact in known)]
    if facts.get("memory"):
        rows.append(("peak memory", facts["memory"]))
    elif facts["device"] == "cpu":
        rows.append(("peak memory", "predicted for a GPU alone"))
    rows += [
        ("longest run", f"{plan['examples']:,} examples, {plan['run_tokens']:,} tokens"),
        (
            "compared",
            f"on {plan['rung_rows']:,} validation rows; {first} for one trial to the first",
        ),
    ]
    return rows


def _length(seconds: float, unit: str) -> str:
    """Of machine time, or of tokens where the meter runs on them (a million to its hour)."""
    return f"{seconds / 3600:,.3f} million tokens" if unit == "Mtok" else f"{duration(seconds)} of machine time"


def _time(seconds: float, unit: str) -> str:
    return f"{seconds / 3600:,.3f} Mtok" if unit == "Mtok" else duration(seconds)


def _count(number: float) -> str:
    """A mean: whole from ten on."""
    return f"{number:,.0f}" if number >= 10 or number == round(number) else f"{number:.1f}"


def _phases(drawn: Mapping[str, Any]) -> list[Column]:
    phases = [phase for phase in drawn["phases"] if phase["cost"] or phase["name"] in {"search", "confirmation"}]
    names = [phase["name"] for phase in phases]
    costs = amounts([*(phase["cost"] for phase in phases), drawn["cap"]])
    shares = [percent(phase["cost"] / drawn["cap"]) for phase in phases]
    time = [_time(phase["seconds"], drawn["unit"]) for phase in phases]
    whole = _time(drawn["seconds"], drawn["unit"])
    bold = [*("" for _ in names), "bold"]
    return [
        Column("phase", [*names, "CAP"], styles=bold),
        Column("dollars", costs, right=True, styles=bold),
        Column("of cap", [*shares, "100.0 %"], right=True),
        Column("time", [*time, whole], right=True),
        Column("what", [*(_what(drawn, phase) for phase in phases), ""], least=20),
    ]


def _what(drawn: Mapping[str, Any], phase: Mapping[str, Any]) -> str:
    match phase["name"]:
        case "search":
            low, high = _count(drawn["trials_low"]), _count(drawn["trials_high"])
            return (
                f"{_count(drawn['trials'])} trials, {_count(drawn['rungs'][-1]['trials'])} to the end ({low} to {high})"
            )
        case "confirmation":
            found = drawn["confirmation"]
            if found is None:
                return "none: endgame.seeds is 0"
            of = f"{found['configurations']} of {found['wanted_configurations']} configurations"
            return f"{of} x {found['seeds']}/{found['wanted_seeds']} seeds"
        case "finale":
            return "the winner in full"
        case "overhead":
            return "start, checkpoints, end"
        case _:
            return "unspent" if drawn["confirmation"] is None else "more seeds, or unspent"


def _rungs(drawn: Mapping[str, Any]) -> list[Column]:
    rungs = drawn["rungs"]
    return [
        Column("rung", [*map(str, range(1, len(rungs))), "end"]),
        Column("tokens", [f"{rung['tokens']:,}" for rung in rungs], right=True),
        Column("of a run", [percent(rung["share"]) for rung in rungs], right=True),
        Column("trials", [_count(rung["trials"]) for rung in rungs], right=True),
        Column("dollars on the way there", amounts([rung["cost"] for rung in rungs]), right=True),
    ]


def _runs(drawn: Mapping[str, Any]) -> list[Column]:
    runs = drawn["runs"]
    return [
        Column("one run to its end", [run["method"] + ("" if run["searched"] else ", not searched") for run in runs]),
        Column("forecast", amounts([run["cost"] for run in runs]), right=True),
        Column("80 % interval", [f"{usd(run['low'])} to {usd(run['high'])}" for run in runs], right=True),
        Column("the cap is", [f"{_count(run['affordable'])} of these" for run in runs], right=True),
    ]


def _others(drawn: Mapping[str, Any]) -> list[Column]:
    if not drawn["others"]:
        return []
    confirmed, phases = drawn["confirmation"], drawn["phases"]
    mine = {
        "factor": 1.0,
        "cap": drawn["cap"],
        "trials": drawn["trials"],
        "completed": drawn["rungs"][-1]["trials"],
        "confirmed": confirmed["configurations"] if confirmed else 0,
        "seeds": confirmed["seeds"] if confirmed else 0,
        "seconds": sum(phase["seconds"] for phase in phases if phase["name"] != "left"),
    }
    rows: Sequence[Mapping[str, Any]] = sorted([mine, *drawn["others"]], key=lambda row: row["cap"])
    names = {0.5: "half the cap", 1.0: "this cap", 2.0: "twice the cap"}
    return [
        Column("with", [names.get(row["factor"], f"{row['factor']:g} x") for row in rows]),
        Column("cap", amounts([row["cap"] for row in rows]), right=True),
        Column("trials", [_count(row["trials"]) for row in rows], right=True),
        Column("to the end", [_count(row["completed"]) for row in rows], right=True),
        Column("confirmed", [_confirmed(row) for row in rows], right=True),
        Column("time", [_time(row["seconds"], drawn["unit"]) for row in rows], right=True),
    ]


def _confirmed(row: Mapping[str, Any]) -> str:
    return f"{row['confirmed']} x {row['seeds']} seeds" if row["confirmed"] else "-"


def _sources(drawn: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What the figures rest on."""
    *_, check = seen(facts)
    if drawn["probe_seconds"] is None and facts.get("flops"):
        lines = ["from priors, and the speed that an earlier study measured on such a machine"]
    elif drawn["probe_seconds"] is None:
        lines = ["from priors: nothing was measured, so the machine may be several times faster or slower"]
    else:
        lines = [f"from a probe of {duration(drawn['probe_seconds'])} on this machine; it is not paid for"]
    return [*lines, *facts.get("probe_notes", []), *facts.get("notes", []), f"{check}; it is not paid for"]
