"""What the read verbs print: plain values in, tables out. Nothing is said by colour alone; 80 columns are enough."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.padding import Padding

from budgets.money import usd
from budgets.prices import STALE_DAYS, Price
from sweep.views import status as state
from sweep.views.parts import (
    STATE_STYLES,
    Column,
    Scale,
    amounts,
    duration,
    exact,
    figure,
    fit,
    glyphs,
    label_of,
    loss_of,
    pairs,
    percent,
    rate,
    rung_of,
    say,
    used,
    whole,
)

WIDE = 120  # columns from which there is room for reasons
LINES = 15  # trials that a statement lists one by one
SEARCHED = ("method", "rank", "alpha", "targets", "learning_rate", "batch_size")


def show_trials(console: Console, study: str, trials: list[dict[str, Any]], limit: int | None = None) -> None:
    """Prints the trials as they are ordered, at most `limit` of them."""
    if not trials:
        say(console, f"study {study} has no trials yet")
        return
    shown, signs = trials[:limit], glyphs(console)
    scale = Scale.of(trials)
    columns = [
        Column("#", [label_of(t, signs) for t in shown], right=True),
        Column("configuration", [t["in_words"] for t in shown], least=34),
        Column("state", [t["state"] for t in shown], styles=[STATE_STYLES.get(t["state"], "") for t in shown]),
        Column("rung", [rung_of(t) for t in shown], right=True),
        Column("loss ", [loss_of(t) for t in shown], right=True),
        Column("cost", amounts([t["cost"]["micros"] for t in shown]), right=True),
        Column("curve", [scale.draw(t["curve"], signs) for t in shown], optional=True),
    ]
    if any(t["metric"] is not None for t in shown):
        measured = ["-" if t["metric"] is None else figure(t["metric"]) for t in shown]
        columns.insert(5, Column("metric", measured, right=True))
    if console.width >= WIDE:
        columns.append(Column("reason", [t["reason"] for t in shown], least=20, optional=True))
    console.print(fit(columns, console.width, signs))
    if len(trials) > len(shown):
        whole(console, f"{len(trials) - len(shown)} more: sweep trials {study}", "dim")
    if any(t["full_loss"] is not None for t in shown):
        say(console, "* loss over all validation rows; without a star over the rung's rows alone", "dim")
    dot = "." if signs.ascii_only else "·"
    if any(t["source"] is not None for t in shown):
        say(console, f"12{dot}2 is trial 12 once more, under the second of the new seeds that confirm it", "dim")
    if any(t["finale"] for t in shown):
        say(console, f"12{dot}0 is its finale: trained in full", "dim")
    if any(t["loss"] is None for t in shown):
        say(console, f"- no loss: not evaluated yet, or diverged; why: sweep show {study} NUMBER", "dim")


def show_best(console: Console, best: dict[str, Any], next_command: str) -> None:
    """Prints the best trial, what it gains, what it cost and how its weights are loaded."""
    trial, confirmation = best["trial"], best["confirmation"]
    reached = "trained to its end" if best["trained_to_its_end"] else f"{trial['state']} at rung {rung_of(trial)}"
    if confirmation is None:
        say(console, f"study {best['study']}: the best is trial {trial['number']}, {reached}; not confirmed", "bold")
    else:
        confirmed = f"confirmed over {confirmation['seeds']} other seeds"
        say(console, f"study {best['study']}: the best is trial {trial['number']}, {confirmed}", "bold")
    base, gain = best["base_loss"], best["gain"]
    rows = [] if confirmation is None else _tested(confirmation, best["metric"])
    if confirmation is None and trial["metric"] is not None:
        rows.append(("metric", f"{best['metric']} {_measured(trial)}, over all validation rows"))
    rows.append(("loss", f"{figure(best['loss'])} over {best['rows']}"))
    if base is not None and gain is not None:
        words = f"{percent(gain)} below" if gain >= 0 else f"{percent(-gain)} ABOVE"
        rows.append(("untrained", f"{figure(base)} over the same rows; the trial is {words}"))
    else:
        rows.append(("untrained", "not evaluated yet"))
    rows.append(("cost", usd(trial["cost"]["micros"])))
    if confirmation is not None:
        rows[-1] = ("cost", f"{rows[-1][1]} in the search, {usd(confirmation['cost']['micros'])} to confirm it")
    rows.append(("trained", f"{trial['tokens']:,} tokens in {trial['step']:,} steps"))
    pairs(console, [*rows, *_parameters(trial)])
    if best["deliverable"] is not None:
        searched, trial = trial["config"]["precision"], best["deliverable"]["trial"]
        words = f"what follows is run {label_of(trial, glyphs(console))}, {best['deliverable']['words']}"
        if (trained := trial["config"]["precision"]) != searched:
            words += f"; it was trained in {trained}, as all that confirm"
        say(console, words, "dim")
        if trial["finale"] and best["deliverable"]["test"] is not None:
            say(console, f"its own loss on the test rows: {figure(best['deliverable']['test']['loss'])}", "dim")
    _folder(console, trial)
    if trial["folder"] is not None:
        lora = trial["config"]["method"] == "lora"
        package, name = ("peft", "AutoPeftModelForCausalLM") if lora else ("transformers", "AutoModelForCausalLM")
        say(console, "load it in Python:", "bold")
        whole(console, f"from {package} import {name}")
        # A JSON text is a Python text, whatever the folder is called.
        whole(console, f"model = {name}.from_pretrained({json.dumps(trial['folder'], ensure_ascii=_ascii(console))})")
    whole(console, f"next: {next_command}", "dim")


def _tested(confirmation: dict[str, Any], metric: str) -> list[tuple[str, str]]:
    """Means over seeds on the test rows, with the standard deviation over seeds, beside the untrained model's."""
    if confirmation["test"] is None:
        return [("test", "not scored")]
    rows = []
    for what, name in (("metric", metric), ("loss", "loss")):
        if what not in confirmation["test"]:
            continue
        found = confirmation["test"][what]
        words = f"{name} {figure(found['mean'])}, sd {figure(found['sd'])} over {confirmation['seeds']} seeds"
        if found["untrained"] is not None:
            words += f"; untrained {figure(found['untrained'])}"
        if what == "metric" and found["majority"] is not None:
            words += f"; the most frequent answer alone {figure(found['majority'])}"
        rows.append(("test", words))
    return rows


def show_trial(console: Console, trial: dict[str, Any]) -> None:
    """Prints everything about one trial."""
    say(console, f"trial {label_of(trial, glyphs(console))}: {trial['in_words']}", "bold")
    rows = [("state", trial["state"]), ("reason", trial["reason"] or "-")]
    if trial["finale"]:
        rows.append(("finale", f"of trial {trial['source']}: trained in full"))
    elif trial["source"] is not None:
        rows.append(("confirms", f"trial {trial['source']}, under another seed"))
    rows.append(("rung", f"{rung_of(trial)}, {trial['tokens']:,} tokens in {trial['step']:,} steps"))
    if trial["full_loss"] is not None:
        rows.append(("loss", f"{figure(trial['full_loss'])} over all validation rows"))
    elif trial["loss"] is not None:
        rows.append(("loss", f"{figure(trial['loss'])} over the rung's validation rows"))
    else:
        rows.append(("loss", "none: not evaluated yet, or diverged"))
    if trial["metric"] is not None:
        rows.append(("metric", _measured(trial)))
    if trial["train_loss"] is not None:
        rows.append(("train loss", figure(trial["train_loss"])))
    rows.append(("cost", usd(trial["cost"]["micros"])))
    pairs(console, [*rows, *_parameters(trial)])
    curve = trial["curve"]
    if curve:
        scale = Scale(min(p["loss"] for p in curve), max(p["loss"] for p in curve))
        full = ["" if p["full_loss"] is None else figure(p["full_loss"]) for p in curve]
        columns = [
            Column("rung", [f"{p['rung'] + 1}/{trial['last_rung'] + 1}" for p in curve], right=True),
            Column("tokens", [f"{p['tokens']:,}" for p in curve], right=True),
            Column("loss", [figure(p["loss"]) for p in curve], right=True),
            Column("", [scale.draw([p], glyphs(console)) for p in curve]),
        ]
        if any(full):
            columns.append(Column("over all rows", full, right=True))
        console.print(Padding(fit(columns, console.width - 2, glyphs(console)), (0, 0, 0, 2)))
    _folder(console, trial)


def _measured(trial: dict[str, Any]) -> str:
    """The metric at a trial's end."""
    error = "" if trial["metric_error"] is None else f", standard error {figure(trial['metric_error'])}"
    return f"{figure(trial['metric'])}{error}"


def _parameters(trial: dict[str, Any]) -> list[tuple[str, str]]:
    """The searched ones first."""
    config = trial["config"]
    names = [*(name for name in SEARCHED if name in config), *(name for name in config if name not in SEARCHED)]
    shown = [(name, config[name]) for name in names]
    return [(n.replace("_", " "), f"{v:.6g}" if isinstance(v, float) else str(v)) for n, v in shown]


def _folder(console: Console, trial: dict[str, Any]) -> None:
    kind = "adapter" if trial["config"]["method"] == "lora" else "model"
    if trial["folder"] is None:
        say(console, f"{kind}: none is stored", "dim")
    else:
        say(console, f"{kind}:", "bold")
        whole(console, f"  {trial['folder']}")


def _ascii(console: Console) -> bool:
    return console.options.ascii_only


class _Yaml(yaml.SafeDumper):
    """Sections as blocks, choices on one line, as people write specs."""


_Yaml.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def show_spec(console: Console, study_name: str, spec: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Prints the resolved spec as YAML that can be launched again; what else is said stands in comments."""
    whole(console, f"# study {study_name}: every default filled in", "dim")
    text = yaml.dump(dict(spec), Dumper=_Yaml, sort_keys=False, allow_unicode=not _ascii(console), width=1000)
    whole(console, text.rstrip("\n"))
    whole(console, "# seen before the first hold, unpaid:", "dim")
    for fact in seen(facts):
        whole(console, f"#   {fact}", "dim")


def seen(facts: Mapping[str, Any]) -> list[str]:
    """What was seen of model and data before anything was paid, a line each; how long that took comes last."""
    splits = facts["data"]["splits"]
    lines = [f"model: {facts['parameters']:,} parameters, on {facts['device']}"]
    lines += [f"{name}: {split['rows']:,} rows, {split['tokens']:,} tokens" for name, split in splits.items()]
    lines += _left_out(facts["data"])
    return [*lines, f"the check took {duration(facts['seconds'])}"]


def _left_out(data: Mapping[str, Any]) -> list[str]:
    """A line on the rows that are not trained on as they stand; none where all are, or an older study did not count."""
    dropped, long = data.get("dropped", {}), data.get("truncated", 0)
    cut, twice = dropped.get("cut", 0), dropped.get("duplicates", 0)
    parts = [(twice, "left out as duplicates"), (cut, "left out as too long"), (long - cut, "cut at data.max_tokens")]
    said = ", ".join(f"{count:,} {what}" for count, what in parts if count)
    return [f"rows read: {data['rows_read']:,}, {said}"] if said and "rows_read" in data else []


def show_statement(console: Console, statement: dict[str, Any], *, everything: bool = False) -> None:
    """Prints where the money went. The lines of each block add up to the micro-dollar."""
    spent, overrun = statement["spent"]["micros"], statement["overrun"]["micros"]
    trials = sorted(statement["trials"], key=lambda t: (-t["micros"], t["number"]))
    listed = trials if everything or len(trials) <= LINES else trials[:LINES]
    others = trials[len(listed) :]
    signs = glyphs(console)
    rows = [(f"trial {label_of(t, signs)}", t["in_words"], t["state"], t["micros"]) for t in listed]
    if others:
        rows.append(
            (f"{len(others)} others", "the smaller ones: --all lists them", "", sum(t["micros"] for t in others))
        )
    rows += [("overhead", name, "", part["micros"]) for name, part in statement["overhead"].items() if part["micros"]]
    rows.append(("idle", "paid time in which nothing trained", "", statement["idle"]["micros"]))
    balance = [("SPENT", "", "", spent)]
    balance += [(name, "", "", statement[name]["micros"]) for name in ("held", "left")]
    if statement["reserve"]["micros"]:
        balance[-1] = ("left", f"{usd(statement['reserve']['micros'])} of it in reserve", "", balance[-1][3])
    balance.append(("CAP", "spent + held + left", "", statement["cap"]["micros"]))
    if overrun:
        balance.append(("OVERRUN", "used beyond what was held", "", overrun))
    lines = [*rows, *balance]
    # Shares are of what was spent, so they end with it.
    shares = [percent(line[3] / spent) if spent and place <= len(rows) else "" for place, line in enumerate(lines)]
    bold = ["bold" if line[0].isupper() else "" for line in lines]
    columns = [
        Column("account", [line[0] for line in lines], styles=bold),
        Column("what", [line[1] for line in lines], least=16),
        Column("state", [line[2] for line in lines], optional=True),
        Column("dollars", [exact(line[3]) for line in lines], right=True, styles=bold),
        Column("of spent", shares, right=True),
    ]
    say(console, f"study {statement['study']}: where the money went", "bold")
    console.print(fit(columns, console.width, signs))
    if statement["confirmation"]["micros"]:
        confirmed = statement["confirmation"]["micros"]
        say(
            console,
            f"confirmation: {usd(confirmed, 6)} of what was spent ({percent(confirmed / spent)}), under other seeds",
        )
    if statement["finale"]["micros"]:
        last = statement["finale"]["micros"]
        say(console, f"finale: {usd(last, 6)} of what was spent ({percent(last / spent)}), the winner trained in full")
    for words in _machine(statement["machine"], statement["unit"], spent + overrun):
        say(console, words)
    if statement["occupancy"] is not None:
        say(console, f"occupancy: {percent(statement['occupancy'])} of the tokens computed in training were real ones")


def statement_csv(statement: dict[str, Any]) -> str:
    """The statement's lines with exact amounts, one an account."""
    rows = [(f"trial:{t['number']}", t["in_words"], t["state"], t) for t in statement["trials"]]
    rows += [(f"overhead:{name}", "", "", part) for name, part in statement["overhead"].items()]
    rows += [(name, "", "", statement[name]) for name in ("idle", "spent", "held", "left", "reserve", "cap", "overrun")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("account", "what", "state", "micros", "usd"))
    writer.writerows((account, what, state, part["micros"], part["usd"]) for account, what, state, part in rows)
    return text.getvalue()


def _machine(machine: dict[str, Any], unit: str, charged: int) -> list[str]:
    """The same total from the other side: time times price."""
    cost = machine["cost"]["micros"]
    spans = [f"{used(span['ms'], unit)} x {rate(span['micros_per_hour'], unit)}" for span in machine["spans"]]
    lines = [f"machine: {' + '.join(spans) or used(0, unit)} = {usd(cost, 6)}"]
    if charged != cost:
        more, rest = charged > cost, usd(abs(charged - cost), 6)
        lines.append(f"{'beyond' if more else 'less than'} that: {rest}, by bills and for time between two runs")
    return lines


def show_prices(console: Console, prices: Sequence[Price], today: datetime.date) -> None:
    """Prints listed prices; what is old is marked, and said."""
    spot = [p.spot_micros_per_hour for p in prices]
    columns = [
        Column("GPU", [p.gpu for p in prices], least=10),
        Column("n", [str(p.gpu_count) for p in prices], right=True),
        Column("GiB", [str(p.gpu_memory_gib) for p in prices], right=True),
        Column("provider", [p.provider for p in prices], least=8),
        Column("$/hour", [usd(p.micros_per_hour, 2) for p in prices], right=True),
        Column("spot", ["-" if m is None else usd(m, 2) for m in spot], right=True),
        Column("billed by", [_billing(p) for p in prices]),
        Column("as of", [f"{p.as_of}{' !' if p.stale(today) else ''}" for p in prices]),
        Column("instance", [p.instance for p in prices], least=12, optional=True),
    ]
    if console.width >= WIDE:
        columns.append(Column("region", [p.region or "-" for p in prices], least=6, optional=True))
        columns.append(Column("source", [p.source for p in prices], least=20, optional=True))
    console.print(fit(columns, console.width, glyphs(console)))
    old = sum(p.stale(today) for p in prices)
    if old:
        say(
            console,
            f"! {old} of {len(prices)} are over {STALE_DAYS} days old: look them up, give machine.price",
            "bold",
        )
    say(
        console, "on-demand prices without tax, for the whole machine; a spec's machine.price wins over the list", "dim"
    )


def _billing(price: Price) -> str:
    least = "" if price.minimum_seconds <= price.quantum_seconds else f", {price.minimum_seconds} s at least"
    names = {1: "second", 60: "minute", 3600: "hour"}
    return names.get(price.quantum_seconds, f"{price.quantum_seconds} s") + least


def show_status(console: Console, status: dict[str, Any]) -> None:
    """Prints the budget, what runs, the best so far and the last events."""
    console.print(state.head(console, status))
    if status["standing"]["words"]:
        say(console, status["standing"]["words"], "yellow")
    for part in state.budget(console, status):
        console.print(part)
    rows = state.running(console, status, state.goals(status), len(status["running"]) + 1)
    for row in [*([""] if rows else []), *rows, *([""] if rows else [])]:
        console.print(row)
    console.print(state.best(console, status))
    console.print(state.counts(console, status))
    if status["stopped"] is not None:
        kept = usd(status["left"]["micros"])
        say(console, f"the search had enough: {status['stopped']}; {kept} of the cap are left", "bold")
    for event in state.events(console, status, len(status["events"])):
        console.print(event)


def show_list(console: Console, listing: Sequence[dict[str, Any]]) -> None:
    """Prints the studies of a database, oldest first."""
    if not listing:
        say(console, "no study yet; next: sweep launch SPEC")
        return
    columns = [
        Column("study", [s["study"] for s in listing], least=20),
        Column("state", [s["standing"] for s in listing]),
        Column("trials", [f"{s['trials']:,}" for s in listing], right=True),
        Column("best loss", ["-" if s["best"] is None else figure(s["best"]) for s in listing], right=True),
        Column("spent", [usd(s["spent"]["micros"]) for s in listing], right=True),
        Column("cap", [usd(s["cap"]["micros"]) for s in listing], right=True),
        Column("model", [s["model"] for s in listing], least=12, optional=True),
    ]
    console.print(fit(columns, console.width, glyphs(console)))
