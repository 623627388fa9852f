"""Pieces that several views share: amounts, sparklines, the budget bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from budgets.money import usd

_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_BAR = {"spent": ("█", "#"), "held": ("▓", "+"), "projected": ("░", "-"), "free": ("·", ".")}
_COLOURS = {"spent": "green", "held": "yellow", "projected": "cyan", "free": "dim"}


def unicode_ok(console: Console) -> bool:
    """Whether the terminal's encoding can show block characters."""
    return console.encoding.lower().startswith("utf")


def amount(value: Mapping[str, Any]) -> str:
    """An amount for people."""
    return usd(value["micros"])


def sparkline(console: Console, losses: Sequence[float], width: int = 8) -> str:
    """Losses as a row of blocks; the last `width` of them."""
    shown = list(losses)[-width:]
    if not shown:
        return ""
    blocks = _BLOCKS if unicode_ok(console) else _PLAIN
    low, high = min(shown), max(shown)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((loss - low) * scale)] for loss in shown)


def loss_text(trial: Mapping[str, Any]) -> str:
    """The loss over all validation rows; one over the rung's rows alone is marked with a tilde."""
    if trial["full_loss"] is not None:
        return f"{trial['full_loss']:.4f}"
    return "" if trial["loss"] is None else f"~{trial['loss']:.4f}"


def plain_table(*columns: tuple[str, str]) -> Table:
    """A table without a frame; columns are (name, 'left' | 'right')."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True, overflow="ellipsis")
    return table


def budget_bar(console: Console, status: Mapping[str, Any], width: int | None = None) -> list[Text]:
    """Spent, held, projected and the cap as one bar, and what they are in words."""
    cap = max(status["cap"]["micros"], 1)
    spent, held = status["spent"]["micros"], status["held"]["micros"]
    projected = max(status["projected"]["micros"] - spent - held, 0)
    room = max((width or console.width) - 2, 10)
    cells = {"spent": round(room * spent / cap), "held": round(room * held / cap)}
    cells["projected"] = min(round(room * projected / cap), room - sum(cells.values()))
    cells["free"] = max(room - sum(cells.values()), 0)
    bar = Text("[")
    for name, count in cells.items():
        bar.append(_BAR[name][0 if unicode_ok(console) else 1] * max(count, 0), style=_COLOURS[name])
    bar.append("]")
    words = Text(f"spent {amount(status['spent'])}", style=_COLOURS["spent"])
    words.append("  held ", style=_COLOURS["held"]).append(amount(status["held"]), style=_COLOURS["held"])
    low, high = amount(status["projected_low"]), amount(status["projected_high"])
    words.append(f"  projected {amount(status['projected'])}", style=_COLOURS["projected"])
    words.append(f" ({low} to {high})" if low != high else "").append(f"  of {amount(status['cap'])}", style="bold")
    return [bar, words]
