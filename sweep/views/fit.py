"""What `sweep fit` prints: a class of configurations a line, and what would make a misfit fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from sweep.fit import in_words
from sweep.views.parts import Column, bar, fit, glyphs, pairs, percent, say

GIB = 2**30
BAR = 12  # cells
WIDE = 120  # columns from which there is room for the largest parts


def show_fit(console: Console, values: Mapping[str, Any]) -> None:
    """Prints the classes, remedies of those that do not fit, and what the predictions rest on."""
    room, rows, signs = values["room_bytes"], values["rows"], glyphs(console)
    say(console, f"{values['model']}: {values['parameters']:,} parameters", "bold")
    pairs(
        console,
        [
            ("GPU", f"{values['gpu']}, {_gib(values['memory_bytes'])} GiB ({values['memory_source']})"),
            ("may be filled", f"{_gib(room)} GiB: the rest is for the context, workspaces and fragmentation"),
        ],
    )
    console.print()
    shares = [row["peak_bytes"] / max(room, 1) for row in rows]
    columns = [
        Column("configuration", [row["configuration"] for row in rows], least=24),
        Column("tokens", [f"{row['tokens']:,}" for row in rows], right=True),
        Column("peak GiB", [_gib(row["peak_bytes"]) for row in rows], right=True),
        Column("fits", ["yes" if row["fits"] else "NO" for row in rows], styles=[_style(row) for row in rows]),
        Column("at once", ["-" if row["slots"] is None else str(row["slots"]) for row in rows], right=True),
        Column(
            "filled", [bar([min(share, 1.0)], BAR, signs.bar[0] + signs.bar[-1]) for share in shares], optional=True
        ),
    ]
    if console.width >= WIDE:
        columns.append(Column("most of it, GiB", [_parts(row) for row in rows], least=20, optional=True))
    console.print(fit(columns, console.width, signs))
    say(console, "tokens: through the model at once; at once: such LoRA trials in one pack", "dim")
    _show_lora(console, [row for row in rows if row["method"] == "lora" and not row["fits"]])
    _show_full(console, [row for row in rows if row["method"] == "full"])
    for method, learned in values["corrections"].items():
        text = f"{method}: corrected by {learned['measured']} measured peaks (activations x {learned['factor']:.2f})"
        say(console, f"{text}; still off by {percent(learned['error'])}, {percent(learned['worst'])} at worst", "dim")
    if not values["corrections"]:
        say(console, "from the model's shape alone; studies of this model on this GPU correct it", "dim")


def _show_lora(console: Console, misfits: Sequence[Mapping[str, Any]]) -> None:
    """What would make each LoRA class fit, in a line."""
    if not misfits:
        return
    enough = [next((r for r in row["remedies"] if r["fits"]), None) for row in misfits]
    helped = [(row, remedy) for row, remedy in zip(misfits, enough, strict=True) if remedy is not None]
    console.print()
    if helped:
        columns = [
            Column("what does not fit", [row["configuration"] for row, _ in helped], least=24),
            Column("would, with", [in_words(remedy["changes"]) for _, remedy in helped], least=20),
            Column("GiB", [_gib(remedy["peak_bytes"]) for _, remedy in helped], right=True),
        ]
        console.print(fit(columns, console.width, glyphs(console)))
    if count := len(misfits) - len(helped):
        least = min(row["peak_bytes"] for row, remedy in zip(misfits, enough, strict=True) if remedy is None)
        classes = "1 LoRA class fits" if count == 1 else f"{count} LoRA classes fit"
        say(console, f"{classes} no GPU of this size, whatever the spec says: at least {_gib(least)} GiB are needed")


def _show_full(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """What would make full-parameter training fit, from its lightest change on."""
    if not rows or rows[0]["fits"]:
        return
    console.print()
    if fitting := [row for row in rows if row["fits"]]:
        say(
            console,
            f"{rows[0]['configuration']} does not fit; {fitting[0]['configuration']} does, and a launch takes it",
        )
        return
    say(console, f"{rows[0]['configuration']} does not fit; it would need", "bold")
    remedies = rows[0]["remedies"]
    columns = [
        Column("with", [in_words(remedy["changes"]) for remedy in remedies], least=30),
        Column("GiB a GPU", [_gib(remedy["peak_bytes"]) for remedy in remedies], right=True),
        Column("", ["fits" if remedy["fits"] else "" for remedy in remedies]),
    ]
    console.print(fit(columns, console.width, glyphs(console)))
    if not any(remedy["fits"] for remedy in remedies):
        say(console, "none of it is enough: use a GPU with more memory")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _style(row: Mapping[str, Any]) -> str:
    return "" if row["fits"] else "bold red"


def _parts(row: Mapping[str, Any]) -> str:
    largest = sorted(row["parts"].items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {_gib(size)}" for name, size in largest)
