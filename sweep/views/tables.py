"""The read verbs as tables, from 80 columns up. Meaning is never in colour alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from budgets.money import usd
from sweep.views.pieces import amount, budget_bar, loss_text, plain_table, sparkline

WIDE = 120  # columns from which there is room for reasons
MANY = 15  # trials that a statement shows one by one
Values = Mapping[str, Any]


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=False)


def _verbatim(console: Console, text: str) -> None:
    """Prints what people copy: never wrapped, never cut."""
    console.print(Text(text, no_wrap=True), soft_wrap=True)


def show_trials(console: Console, study: str, trials: Sequence[Values], limit: int | None = None) -> None:
    """Prints the trials in the given order, best first."""
    if not trials:
        _say(console, f"study {study} has no trials yet")
        return
    columns = [("#", "right"), ("configuration", "left"), ("state", "left"), ("rung", "right"), ("loss", "right")]
    columns += [("cost", "right"), ("curve", "left")] + ([("reason", "left")] if console.width >= WIDE else [])
    table = plain_table(*columns)
    for trial in trials[:limit]:
        reached = f"{trial['rung'] + 1}/{trial['last_rung'] + 1}"
        curve = sparkline(console, [point["loss"] for point in trial["curve"]], width=6)
        row = [str(trial["number"]), trial["in_words"], trial["state"], reached, loss_text(trial)]
        row += [amount(trial["cost"]), curve] + ([trial["reason"]] if console.width >= WIDE else [])
        table.add_row(*row)
    console.print(table)
    if limit is not None and len(trials) > limit:
        _say(console, f"{len(trials) - limit} more", "dim")
    if any(t["full_loss"] is None and t["loss"] is not None for t in trials[:limit]):
        _say(console, "~ over the rung's validation rows; without it, trained to its end and over all of them", "dim")


def show_best(console: Console, best: Values, next_command: str) -> None:
    """Prints the best trial, its gain over the untrained model, its cost and where its weights are."""
    trial, config = best["trial"], best["trial"]["config"]
    _say(console, f"Best of {best['study']}: trial {trial['number']} ({trial['state']})", "bold")
    table = plain_table(("", "left"), ("", "left"))
    table.show_header = False
    for name in ("method", "rank", "alpha", "targets", "learning_rate", "batch_size"):
        if name in config:
            value = config[name]
            table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    gain = f", {100 * best['gain']:.1f} % under the untrained {best['base_loss']:.4f}" if best["gain"] else ""
    table.add_row("validation loss", f"{best['loss']:.4f}{gain}")
    table.add_row("", f"over {best['rows']}")
    table.add_row("trained", f"{trial['tokens']:,} tokens in {trial['step']:,} steps")
    table.add_row("cost", amount(trial["cost"]))
    console.print(table)
    if not best["trained_to_its_end"]:
        _say(console, "not trained to its end yet; more money goes on from its checkpoint", "yellow")
    folder = trial["folder"] or ""
    kind = "adapter" if config["method"] == "lora" else "model"
    _say(console, f"{kind} folder:")
    _verbatim(console, f"  {folder}")
    if config["method"] == "lora":
        _verbatim(console, f'  peft.AutoPeftModelForCausalLM.from_pretrained("{folder}")')
    else:
        _verbatim(console, f'  transformers.AutoModelForCausalLM.from_pretrained("{folder}")')
    _say(console, f"Next: {next_command}", "dim")


def show_trial(console: Console, trial: Values) -> None:
    """Prints everything about one trial."""
    _say(console, f"Trial {trial['number']}: {trial['in_words']} ({trial['state']})", "bold")
    table = plain_table(("", "left"), ("", "left"))
    table.show_header = False
    for name, value in trial["config"].items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else str(value))
    table.add_row("trained", f"{trial['tokens']:,} tokens in {trial['step']:,} steps")
    table.add_row("cost", amount(trial["cost"]))
    console.print(table)
    if trial["curve"]:
        curve = plain_table(("rung", "right"), ("tokens", "right"), ("loss", "right"), ("all rows", "right"))
        for point in trial["curve"]:
            whole = "" if point["full_loss"] is None else f"{point['full_loss']:.4f}"
            curve.add_row(str(point["rung"] + 1), f"{point['tokens']:,}", f"{point['loss']:.4f}", whole)
        console.print(curve)
    if trial["reason"]:
        _say(console, f"why: {trial['reason']}")
    if trial["folder"]:
        _say(console, "folder:")
        _verbatim(console, f"  {trial['folder']}")


def show_spec(console: Console, name: str, spec: Values, facts: Values) -> None:
    """Prints the resolved spec, and what was seen before the first hold."""
    _say(console, f"Study {name}, every default filled in:", "bold")
    _verbatim(console, yaml.safe_dump(dict(spec), sort_keys=False, default_flow_style=None, width=72).rstrip())
    splits = facts["data"]["splits"]
    _say(console, "Seen before the first hold:", "bold")
    _say(console, f"  model: {facts['parameters']:,} parameters; machine: {facts['device']}")
    for split, counts in splits.items():
        _say(console, f"  {split}: {counts['rows']:,} rows, {counts['tokens']:,} tokens")
    _say(console, f"  looked at in {facts['seconds']:.1f} s, unpaid")


def show_statement(console: Console, statement: Values, *, everything: bool = False) -> None:
    """Prints where the money went. The lines add up to what was spent, to the micro-dollar."""
    spent = max(statement["spent"]["micros"], 1)
    table = plain_table(("", "left"), ("dollars", "right"), ("share", "right"))

    def line(name: str, micros: int, style: str = "") -> None:
        table.add_row(name, f"{usd(micros, 6)}", f"{100 * micros / spent:.1f} %", style=style)

    trials = sorted(statement["trials"], key=lambda t: -t["micros"])
    shown = trials if everything or len(trials) <= MANY else trials[: MANY - 1]
    for trial in shown:
        line(f"trial {trial['number']}  {trial['in_words']}  {trial['state']}", trial["micros"])
    if len(shown) < len(trials):
        rest = trials[len(shown) :]
        line(f"{len(rest)} other trials", sum(t["micros"] for t in rest))
    for centre, value in statement["overhead"].items():
        if value["micros"]:
            line(f"overhead: {centre}", value["micros"])
    line("idle", statement["idle"]["micros"])
    line("spent", statement["spent"]["micros"], "bold")
    for name in ("held", "left", "cap"):
        table.add_row(name, usd(statement[name]["micros"], 6), "")
    if statement["overrun"]["micros"]:
        table.add_row("overrun", usd(statement["overrun"]["micros"], 6), "", style="bold red")
    console.print(table)
    seconds, rate = statement["machine_ms"] / 1000, usd(statement["micros_per_hour"])
    _say(console, f"{seconds:,.1f} s of machine time at {rate}/hour", "dim")


def show_status(console: Console, status: Values) -> None:
    """Prints the budget, what runs, the best so far and the last events."""
    worker = status["worker"]
    doing = "no worker" if worker is None else f"worker {worker['state']}"
    _say(console, f"Study {status['study']} ({status['state']}, {doing})", "bold")
    for text in budget_bar(console, status):
        console.print(text)
    if status["frozen"]:
        _say(console, f"FROZEN after an overrun of {amount(status['overrun'])}", "bold red")
    counts = ", ".join(f"{n} {state}" for state, n in sorted(status["counts"].items()))
    _say(console, f"{status['trials']} trials: {counts}" if counts else "no trials yet")
    if status["running"]:
        show_running(console, status["running"])
    best = status["best"]
    if best:
        _say(console, f"best: trial {best['number']}  {best['in_words']}  loss {loss_text(best)}")
    for event in status["events"][-5:]:
        console.print(Text(f"  {event['text']}", style="dim", no_wrap=True, overflow="ellipsis"))


def show_running(console: Console, running: Sequence[Values]) -> None:
    """Prints live and waiting trials."""
    console.print(running_table(console, running))


def running_table(console: Console, running: Sequence[Values]) -> Any:
    """Live and waiting trials as a table."""
    table = plain_table(
        ("#", "right"), ("configuration", "left"), ("state", "left"), ("rung", "right"), ("tokens", "right"),
        ("loss", "right"), ("cost", "right"), ("curve", "left"),
    )  # fmt: skip
    for trial in running:
        curve = sparkline(console, [point["loss"] for point in trial["curve"]], width=6)
        reached = f"{trial['rung'] + 1}/{trial['last_rung'] + 1}"
        row = [str(trial["number"]), trial["in_words"], trial["state"], reached, f"{trial['tokens']:,}"]
        table.add_row(*row, loss_text(trial), amount(trial["cost"]), curve)
    return table


def show_list(console: Console, listing: Sequence[Values]) -> None:
    """Prints the studies of a database."""
    if not listing:
        _say(console, "no studies yet; start one: sweep launch SPEC")
        return
    columns = ("study", "left"), ("state", "left"), ("trials", "right"), ("best", "right")
    table = plain_table(*columns, ("spent", "right"), ("cap", "right"), ("model", "left"))
    for study in listing:
        best = "" if study["best"] is None else f"{study['best']:.4f}"
        money = amount(study["spent"]), amount(study["cap"])
        table.add_row(study["study"], study["state"], str(study["trials"]), best, *money, study["model"])
    console.print(table)


def show_outline(console: Console, outline: Values, price_note: str, facts: Values, stop_command: str | None) -> None:
    """Prints what the cap buys, before anything is spent."""
    plan, splits = outline["plan"], facts["data"]["splits"]
    rungs = ", ".join(f"{tokens:,}" for tokens in plan["rungs"])
    _say(console, f"cap      {usd(outline['cap'])}, which is {_duration(outline['seconds'])} of this machine", "bold")
    _say(console, f"price    {usd(outline['micros_per_hour'])}/hour, {price_note}")
    rows = ", ".join(f"{counts['rows']:,} {name}" for name, counts in splits.items())
    _say(console, f"model    {facts['parameters']:,} parameters on {facts['device']}")
    _say(console, f"rows     {rows}; looked at in {facts['seconds']:.1f} s, unpaid")
    _say(console, f"a run    {plan['examples']:,} examples, {plan['run_tokens']:,} tokens; compared at {rungs} tokens")
    for run in outline["runs"]:
        interval = f"{usd(run['low'])} to {usd(run['high'])}"
        many = f"the cap would pay {run['affordable']:,} of them to their end"
        _say(console, f"{run['method']:<8} about {usd(run['cost'])} a run ({interval}); {many}")
    _say(console, "         forecast from priors; the first minutes of training correct it", "dim")
    if stop_command is None and facts["device"] not in {"cpu", "replay"}:
        _say(console, "meter    no machine.stop_command: a rented machine's meter runs on after the sweep", "yellow")


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 36_000 else f"{seconds / 3600:,.1f} h"
