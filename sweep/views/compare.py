"""What `sweep compare` prints: the sentence first, then what it rests on. Plain values in, tables out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from budgets.money import usd
from sweep.sentence import figure, interval, percents
from sweep.views.parts import Column, amounts, duration, fit, glyphs, pairs, say, whole

NAMES = {"lora": "LoRA", "full": "full"}
STANDINGS = {
    "best": "best",
    "worse": "worse",
    "tied": "can't be told apart",
    "unknown": "too few seeds",
    "untuned": "not tuned",
}
GIB = 2**30


def show_compare(console: Console, values: Mapping[str, Any], *, with_claims: bool = False) -> None:
    """Prints the verdict; where nothing was confirmed, what the search alone knows."""
    confirmed = bool(values["confirmed"])
    if confirmed:
        say(console, f"study {values['study']}: {values['sentence']}", "bold")
        _methods(console, values)
        _share(console, values)
        _ranks(console, values["ranks"])
    else:
        say(
            console, f"study {values['study']}: nothing is confirmed; below is what the search found, once each", "bold"
        )
    _costs(console, values["costs"])
    _tried(console, values)
    _retention(console, values["retention"])
    _overfitting(console, values["overfitting"])
    if with_claims:
        show_claims(console, values["claims"])
    for note in values["notes"]:
        say(console, f"! {note}", "bold")
    for missing in values["missing"] if confirmed else []:
        say(console, f"! {missing}", "bold")
    if confirmed and not with_claims:
        whole(console, f"next: sweep compare {values['study']} --claims", "dim")


def _table(console: Console, title: str, columns: Sequence[Column]) -> None:
    console.print()
    say(console, title, "bold")
    console.print(fit(columns, console.width, glyphs(console)))


def _bounded(estimate: Mapping[str, Any] | None) -> str:
    """A figure with its interval, or alone where none is claimed."""
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return figure(estimate["value"])
    return interval(estimate["value"], estimate["low"], estimate["high"])


def _methods(console: Console, values: Mapping[str, Any]) -> None:
    measure = values["measure"]
    sides = [(NAMES[method], values[method]) for method in NAMES if values[method] is not None]
    before = [] if values["untrained"] is None else [("untrained", figure(values["untrained"]))]
    if values["majority"] is not None:
        before.append(("majority", figure(values["majority"])))
    blank = [""] * len(before)
    unit = f" in {measure['unit']}" if measure["unit"] else ", higher is better"
    columns = [
        Column("", [*(name for name, _ in before), *(name for name, _ in sides)]),
        Column("best configuration", [*blank, *(side["in_words"] for _, side in sides)], least=24),
        Column("seeds", [*blank, *(str(side["seeds"]) for _, side in sides)], right=True),
        Column(measure["name"], [*(text for _, text in before), *(_bounded(side["test"]) for _, side in sides)]),
    ]
    if console.width >= 100:
        columns.append(Column("gain", [*blank, *(_bounded(side["gain"]) for _, side in sides)], optional=True))
        columns.append(Column("trial", [*blank, *(str(side["trial"]) for _, side in sides)], right=True))
    level = f"{100 * measure['level']:.0f} % intervals"
    _table(console, f"on {measure['rows']:,} test examples, {measure['name']}{unit}, {level}", columns)


def _share(console: Console, values: Mapping[str, Any]) -> None:
    share, gap = values["share"], values["difference"]
    rows = []
    if share is not None and share["claimed"]:
        points = [f"{100 * share[name]:.1f}" for name in ("examples_error", "lora_seeds_error", "full_seeds_error")]
        rows = [
            ("of full's gain", percents(share["value"], share["low"], share["high"])),
            ("standard errors", "{} points from the examples, {} from LoRA's seeds, {} from full's".format(*points)),
        ]
    elif share is not None:
        told = f"{100 * share['value']:.0f} %, no interval claimed" if share["gained"] else "not claimed"
        rows = [("of full's gain", told)]
    if gap is not None:
        rows.append(("LoRA less full", f"{_bounded(gap)} {values['measure']['unit']}".rstrip()))
    if rows:
        console.print()
        pairs(console, rows)


def _ranks(console: Console, ranks: Mapping[str, Any] | None) -> None:
    if ranks is None:
        return
    rows = ranks["rows"]
    columns = [
        Column("rank", [str(row["rank"]) for row in rows], right=True),
        Column("learning rate", [f"{row['learning_rate']:.1e}".replace("e-0", "e-") for row in rows], right=True),
        Column("test", [figure(row["test"]) for row in rows], right=True),
        Column("behind the best", ["-" if row["behind"] is None else _bounded(row["behind"]) for row in rows]),
        Column("", [STANDINGS[row["standing"]] for row in rows]),
    ]
    if console.width >= 100:
        columns.append(Column("to the end", [f"{row['to_the_end']} of {row['tried']}" for row in rows], right=True))
        columns.append(Column("configuration", [row["in_words"] for row in rows], least=20, optional=True))
    seeds = f"{ranks['seeds']} seed{'' if ranks['seeds'] == 1 else 's'}"
    _table(console, f"ranks under the same {seeds}, each with its own learning rate", columns)


def _costs(console: Console, costs: Mapping[str, Any]) -> None:
    """One whole run of each: alone by forecast, and as the confirmations were charged."""
    known = {method: costs[method] for method in NAMES if costs[method] is not None}
    if not known:
        return
    ratio = costs["ratio"]
    rows = [
        ("alone", "forecast", _dollars(known, "alone"), ratio["alone"]),
        ("  its time", "forecast", {m: duration(c["alone"]["seconds"]) for m, c in known.items()}, ratio["alone"]),
    ]
    charged = {method: cost for method, cost in known.items() if cost["charged"] is not None}
    if charged:
        rows.append(("as charged", "measured", _dollars(charged, "charged"), ratio["charged"]))
        times = {method: duration(cost["elapsed"]) for method, cost in charged.items()}
        rows.append(("  its time", "measured", times, ratio["elapsed"]))
    for words, how, name in (("peak memory", "measured", "peak"), ("  predicted", "formulas", "peak_predicted")):
        peaks = {method: f"{cost[name] / GIB:.2f} GiB" for method, cost in known.items() if cost[name] is not None}
        if peaks:
            rows.append((words, how, peaks, ratio[name]))
    columns = [
        Column("", [name for name, *_ in rows]),
        *(Column(NAMES[m], [found.get(m, "-") for _, _, found, _ in rows], right=True) for m in NAMES),
        Column("LoRA/full", ["-" if share is None else _ratio(share) for *_, share in rows], right=True),
        Column("known by", [how for _, how, _, _ in rows]),
    ]
    _table(console, "one whole run of the best configuration", columns)
    ends = [f"{NAMES[m]} {usd(c['alone']['low'])} to {usd(c['alone']['high'])}" for m, c in known.items()]
    say(console, f"alone: it has the machine to itself; 80 % intervals {', '.join(ends)}", "dim")
    widths = [f"{NAMES[m]} with {c['width']:.1f} at once" for m, c in charged.items() if c["width"]]
    if widths:
        told = f"the mean of {', '.join(_confirmations(c['charged']['runs'], m) for m, c in charged.items())}"
        say(console, f"as charged: {told}; {', '.join(widths)}; load and idle time are apart", "dim")


def _confirmations(count: int, method: str) -> str:
    return f"{count} {NAMES[method]} confirmation{'' if count == 1 else 's'}"


def _dollars(costs: Mapping[str, Any], name: str) -> dict[str, str]:
    return dict(zip(costs, amounts([cost[name]["micros"] for cost in costs.values()]), strict=True))


def _ratio(ratio: float) -> str:
    return f"{100 * ratio:.1f} %" if ratio < 10 else f"{ratio:.0f} x"


def _tried(console: Console, values: Mapping[str, Any]) -> None:
    tried = values["tried"]
    sides = [(NAMES[method], tried[method]) for method in NAMES if tried[method]["configurations"]]
    if not sides:
        say(console, "no configuration was evaluated yet")
        return
    best = ["-" if side["best"] is None else figure(side["best"]["value"]) for _, side in sides]
    columns = [
        Column("", [name for name, _ in sides]),
        Column("tried", [f"{side['configurations']:,}" for _, side in sides], right=True),
        Column("to the end", [f"{side['completed']:,}" for _, side in sides], right=True),
        Column("diverged", [f"{side['diverged']:,}" for _, side in sides], right=True, optional=True),
        Column("search", amounts([side["search_micros"] for _, side in sides]), right=True),
        Column("confirmed for", amounts([side["confirmations_micros"] for _, side in sides]), right=True),
        Column("best once", best, right=True),
        Column("configuration", [side["best_in_words"] or "-" for _, side in sides], least=16, optional=True),
    ]
    _table(console, "what the search tried, and the best single run on the validation rows", columns)
    _equal(console, tried["equal"])
    _exchange(console, values["exchange"])


def _equal(console: Console, equal: Sequence[Mapping[str, Any]]) -> None:
    if not equal:
        return
    shares = ["-" if row["share"] is None else f"{100 * row['share']:.0f} %" for row in equal]
    columns = [
        Column("configurations of each", [str(row["configurations"]) for row in equal], right=True),
        Column("LoRA", [figure(row["lora"]) for row in equal], right=True),
        Column("full", [figure(row["full"]) for row in equal], right=True),
        Column("of full's gain", shares, right=True),
    ]
    _table(console, "expected best at equal number tried; a single run each, unconfirmed", columns)


def _exchange(console: Console, exchange: Mapping[str, Any]) -> None:
    rows = []
    if exchange["lora_buys_full"] is not None:
        spent = usd(exchange["lora_micros"])
        rows.append((f"LoRA's {spent}", f"would have bought {_runs(exchange['lora_buys_full'])} of full training"))
    if exchange["full_buys_lora"] is not None:
        alone = exchange["full_buys_lora_alone"]
        text = f"would have bought {_runs(exchange['full_buys_lora'])} of LoRA, or {_count(alone)} alone"
        rows.append((f"full's {usd(exchange['full_micros'])}", text))
    if rows:
        console.print()
        pairs(console, rows)


def _runs(count: float) -> str:
    return f"{_count(count)} whole runs"


def _count(count: float) -> str:
    return f"{count:.1f}" if count < 10 else f"{count:,.0f}"


def _retention(console: Console, retention: Mapping[str, Any] | None) -> None:
    if retention is None:
        return
    rows = retention["methods"]
    columns = [
        Column("", [_name(row) for row in rows]),
        Column("before", [figure(retention["before"])] * len(rows), right=True),
        Column("after", [figure(row["after"]["value"]) for row in rows], right=True),
        Column("change", [_bounded(row["change"]) for row in rows]),
        Column("configuration", [row["in_words"] for row in rows], least=16, optional=True),
    ]
    _table(console, f"forgetting: loss on {retention['rows']:,} retention examples", columns)


def _overfitting(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    columns = [
        Column("", [_name(row) for row in rows]),
        Column("runs", [str(row["runs"]) for row in rows], right=True),
        Column("training loss", [figure(row["train_loss"]) for row in rows], right=True),
        Column("validation loss", [figure(row["validation_loss"]) for row in rows], right=True),
        Column("gap", [f"{row['gap']:+.4f}" for row in rows], right=True),
    ]
    _table(console, "overfitting: the last stretch of training against all validation rows", columns)


def _name(row: Mapping[str, Any]) -> str:
    return f"LoRA r={row['rank']}" if row["method"] == "lora" else "full training"


def show_claims(console: Console, rows: Sequence[Mapping[str, str]]) -> None:
    """Prints what is often said beside what this study measured; both in full at any width."""
    console.print()
    say(console, "what is often said, and what this study measured", "bold")
    if console.width >= 140:
        columns = [
            Column("claim", [row["claim"] for row in rows]),
            Column("holds", [row["holds"] for row in rows]),
            Column("measured", [row["measured"] for row in rows], least=40),
        ]
        console.print(fit(columns, console.width, glyphs(console)))
        return
    for row in rows:
        say(console, f"{row['claim']}: {row['holds']}")
        pairs(console, [("  ", row["measured"])])
