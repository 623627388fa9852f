"""Small pieces that the tables and the live view share: glyphs, amounts, sparklines, a table that fits its width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from budgets.money import MICROS, usd

# States are always written out; the colours only help to find them.
STATE_STYLES = {
    "completed": "green",
    "live": "cyan",
    "judging": "cyan",
    "waiting": "yellow",
    "paused": "yellow",
    "failed": "bold red",
}


@dataclass(frozen=True)
class Glyphs:
    """The characters that a terminal can show."""

    ascii_only: bool
    blocks: str  # a sparkline's levels, low to high
    bar: str  # spent, held, projected, free
    steps: str  # done, to do
    dots: str  # what stands for a text's missing end
    rule: str

    def plain(self, text: str) -> str:
        """Returns a text from elsewhere as one line without control characters, in what the terminal can encode."""
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line.encode("ascii", "backslashreplace").decode() if self.ascii_only else line

    def clip(self, text: str, width: int) -> str:
        """Returns a text cut to `width` cells; its end shows whether something is missing."""
        text = self.plain(text)
        if cell_len(text) <= width:
            return text
        return (set_cell_size(text, max(width - len(self.dots), 0)).rstrip() + self.dots)[: max(width, 0)]


UNICODE = Glyphs(False, "▁▂▃▄▅▆▇█", "█▓░·", "━─", "…", "─")
ASCII = Glyphs(True, "_.-:=+*#", "#=-.", "=.", "...", "-")


def glyphs(console: Console) -> Glyphs:
    """The glyphs for this console's encoding."""
    return ASCII if console.options.ascii_only else UNICODE


def number(trial: dict[str, Any]) -> str:
    """A loss: over all validation rows with a star, over the rung's rows without; a dash when there is none."""
    if trial["full_loss"] is not None:
        return f"{figure(trial['full_loss'])}*"
    return "- " if trial["loss"] is None else f"{figure(trial['loss'])} "


def figure(loss: float) -> str:
    """Four decimals, or three digits for a loss so large that they say nothing."""
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.3g}"


def rung(trial: dict[str, Any]) -> str:
    """Rungs reached, out of all with the end."""
    return f"{trial['rung'] + 1}/{trial['last_rung'] + 1}"


def amounts(micros: Sequence[int]) -> list[str]:
    """Amounts for one column: as many decimals as the largest needs, so that the points stand in line."""
    largest = max((abs(m) for m in micros), default=0)
    places = 2 if largest >= 100 * MICROS else 4 if largest >= MICROS // 100 else 6
    return [usd(m, places) for m in micros]


def exact(micros: int) -> str:
    """An amount with all its decimals, without the sign of the currency."""
    return usd(micros, 6).replace("$", "")


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A length of time in its two largest units."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


@dataclass(frozen=True)
class Scale:
    """What the lowest and the highest block of a sparkline mean; one scale for all trials makes them comparable."""

    low: float
    high: float

    @classmethod
    def of(cls, trials: Iterable[dict[str, Any]]) -> Scale:
        """From the lowest loss to the 90th percentile: one trial that blew up must not flatten the others."""
        losses = sorted(point["loss"] for trial in trials for point in trial["curve"])
        if not losses:
            return cls(0.0, 1.0)
        return cls(losses[0], losses[int(0.9 * (len(losses) - 1))])

    def draw(self, curve: Sequence[dict[str, Any]], glyphs: Glyphs, cells: int = 12) -> str:
        """One block a rung, the last `cells` ones."""
        top = len(glyphs.blocks) - 1
        spread = self.high - self.low
        shares = [(point["loss"] - self.low) / spread if spread > 0 else 0.0 for point in curve[-cells:]]
        return "".join(glyphs.blocks[round(top * min(max(share, 0.0), 1.0))] for share in shares)


def bar(shares: Sequence[float], width: int, glyphs: str) -> str:
    """Draws shares of a whole as runs of `glyphs`; the last glyph is what is left. What is not zero is seen."""
    cells = [max(round(share * width), 1) if share > 0 else 0 for share in shares]
    while sum(cells) > width:
        cells[cells.index(max(cells))] -= 1
    drawn = "".join(glyph * count for glyph, count in zip(glyphs, cells, strict=False))
    return drawn + glyphs[-1] * (width - len(drawn))


def flow(parts: Iterable[Text], width: int, gap: str = "   ") -> list[Text]:
    """Puts parts side by side; those that do not fit go on the next line."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(gap) + part.cell_len <= width:
            lines[-1].append(gap).append_text(part)
        else:
            lines.append(part.copy())
    return lines


@dataclass
class Column:
    """One column; `least` lets it be clipped down to so many cells, `optional` lets it be left out instead."""

    title: str
    cells: list[str]
    right: bool = False
    least: int | None = None
    optional: bool = False
    styles: list[str] | None = None

    @property
    def width(self) -> int:
        """Its natural width."""
        return max([cell_len(self.title), *map(cell_len, self.cells)])


def fit(columns: Sequence[Column], width: int, glyphs: Glyphs, *, indent: int = 0) -> Table:
    """Lays columns out in `width` cells: optional ones go first, from the right, then long texts are clipped."""
    shown = list(columns)

    def gap() -> int:
        return 2 if sum(c.width for c in shown) + 2 * (len(shown) - 1) + indent <= width else 1

    def needed() -> int:
        # A text that may be clipped to a few cells costs no other column its place.
        return sum(c.width if c.least is None else min(c.least, c.width) for c in shown) + len(shown) - 1 + indent

    while needed() > width and any(c.optional for c in shown):
        shown.remove([c for c in shown if c.optional][-1])
    space = gap()
    over = sum(c.width for c in shown) + space * (len(shown) - 1) + indent - width
    table = Table(box=None, pad_edge=False, padding=(0, space, 0, 0), header_style="bold", show_edge=False)
    widths = {}
    for column in reversed(shown):
        room = 0 if column.least is None else max(column.width - column.least, 0)
        widths[column.title] = column.width - min(max(over, 0), room)
        over -= column.width - widths[column.title]
    if indent:
        table.add_column("", width=max(indent - space, 0))
    for column in shown:
        justify = "right" if column.right else "left"
        table.add_column(Text(column.title), justify=justify, width=widths[column.title], no_wrap=True, overflow="crop")
    for row in range(len(shown[0].cells) if shown else 0):
        cells = [
            Text(glyphs.clip(c.cells[row], widths[c.title]) if not c.right else c.cells[row], _style(c, row))
            for c in shown
        ]
        table.add_row(*([Text("")] if indent else []), *cells)
    return table


def _style(column: Column, row: int) -> str:
    return column.styles[row] if column.styles else ""


def pairs(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Prints names and values in two columns; long values go on under themselves."""
    kept = list(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    signs = glyphs(console)
    for name, value in kept:
        table.add_row(Text(name, "bold"), Text(signs.plain(value)))
    console.print(table)


def whole(console: Console, text: str, style: str = "") -> None:
    """Prints a line that people copy: it is never wrapped, clipped or padded."""
    console.print(Text(text, style), soft_wrap=True)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a sentence, wrapped at words."""
    console.print(Text(glyphs(console).plain(text), style))
