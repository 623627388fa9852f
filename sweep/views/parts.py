"""Small pieces that the tables and the live view share: glyphs, amounts, sparklines, a table that fits its width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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

    def plain(self, text: str) -> str:
        """Returns a text from elsewhere as one line without control characters, in what the terminal can encode."""
        line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return line.encode("ascii", "backslashreplace").decode() if self.ascii_only else line

    def clip(self, text: str, width: int) -> str:
        """Returns a text cut to `width` cells; its end shows whether something is missing."""
        text = self.plain(text)
        if cell_len(text) <= width:
            return text
        return (set_cell_size(text, max(width - len(self.dots), 0)).rstrip() + self.dots)[:width]


UNICODE = Glyphs(False, "▁▂▃▄▅▆▇█", "█▓░·", "━─", "…")
ASCII = Glyphs(True, "_.-:=+*#", "#=-.", "=.", "...")


def glyphs(console: Console) -> Glyphs:
    """The glyphs for this console's encoding."""
    return ASCII if console.options.ascii_only else UNICODE


def label_of(trial: dict[str, Any], signs: Glyphs) -> str:
    """A trial's number; of one that confirms another that one's number and which of the new seeds it has."""
    label: str = trial["label"]
    return label.replace("·", ".") if signs.ascii_only else label


def loss_of(trial: dict[str, Any]) -> str:
    """A loss: over all validation rows with a star, over the rung's rows without; a dash when there is none."""
    if trial["full_loss"] is not None:
        return f"{figure(trial['full_loss'])}*"
    return "- " if trial["loss"] is None else f"{figure(trial['loss'])} "


def figure(loss: float) -> str:
    """Four decimals, or three digits for a loss so large that they say nothing."""
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.3g}"


def rung_of(trial: dict[str, Any]) -> str:
    """Rungs reached, out of all with the end."""
    return f"{trial['rung'] + 1}/{trial['last_rung'] + 1}"


def amounts(micros: Sequence[int]) -> list[str]:
    """Amounts for one column: as many decimals as the largest needs, so that the points stand in line."""
    largest = max((abs(m) for m in micros), default=0)
    places = 2 if largest >= 100 * MICROS else 4 if largest >= MICROS // 100 else 6
    return [usd(m, places) for m in micros]


def rate(micros: int, unit: str = "hour") -> str:
    """A price an hour, or a million tokens: in cents where it is one, with all decimals it has otherwise."""
    cents = micros % (MICROS // 100) == 0
    return f"{usd(micros, 2 if cents else 6)}/{unit}"


def used(ms: int, unit: str = "hour") -> str:
    """Metered use: seconds, or tokens where the meter runs on them (a million to its hour)."""
    return f"{ms / 3.6:,.0f} tokens" if unit == "Mtok" else f"{ms / 1000:,.3f} s"


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

    def draw(self, curve: Sequence[dict[str, Any]], signs: Glyphs, cells: int = 12) -> str:
        """One block a rung, the last `cells` ones."""
        top = len(signs.blocks) - 1
        spread = self.high - self.low
        shares = [(point["loss"] - self.low) / spread if spread > 0 else 0.0 for point in curve[-cells:]]
        return "".join(signs.blocks[round(top * min(max(share, 0.0), 1.0))] for share in shares)


def bar(shares: Sequence[float], width: int, signs: str) -> str:
    """Draws shares of a whole as runs of `signs`; the last sign is what is left. What is not zero is seen."""
    cells = [max(round(share * width), 1) if share > 0 else 0 for share in shares]
    while sum(cells) > width:
        cells[cells.index(max(cells))] -= 1
    drawn = "".join(sign * count for sign, count in zip(signs, cells, strict=False))
    return drawn + signs[-1] * (width - len(drawn))


def flow(parts: Iterable[Text], width: int, gap: str = "   ") -> list[Text]:
    """Puts parts side by side; those that do not fit go on the next line."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(gap) + part.cell_len <= width:
            lines[-1].append(gap).append_text(part)
        else:
            lines.append(part.copy())
    return lines


@dataclass(eq=False)
class Column:
    """One column; `least` lets it be clipped down to so many cells, `optional` lets it be left out instead."""

    title: str
    cells: list[str]
    right: bool = False
    least: int | None = None
    optional: bool = False
    styles: list[str] | None = None
    shown: int = 0  # its width in the table, set by `fit`

    @property
    def width(self) -> int:
        """Its natural width."""
        return max([cell_len(self.title), *map(cell_len, self.cells)])


def fit(columns: Sequence[Column], width: int, signs: Glyphs) -> Table:
    """Lays columns out in `width` cells: optional ones go first, from the right, then long texts are clipped."""
    shown = [c if c.least is None else replace(c, cells=[signs.plain(cell) for cell in c.cells]) for c in columns]

    def total(gap: int, clipped: Sequence[Column]) -> int:
        widths = [min(c.least, c.width) if c.least is not None and c in clipped else c.width for c in shown]
        return sum(widths) + gap * (len(shown) - 1)

    while total(1, shown) > width and any(c.optional for c in shown):
        shown.remove([c for c in shown if c.optional][-1])
    gap = 2 if total(2, shown[-1:]) <= width else 1
    over = max(total(gap, []) - width, 0)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold", show_edge=False)
    for column in reversed(shown):
        cut = 0 if column.least is None else min(over, max(column.width - column.least, 0))
        over -= cut
        column.shown = column.width - cut
    for column in shown:
        title = column.title.rjust(column.shown) if column.right else column.title
        table.add_column(Text(title), width=column.shown, no_wrap=True, overflow="crop")
    for row in range(len(shown[0].cells)):
        table.add_row(*[_cell(column, row, signs) for column in shown])
    return table


def _cell(column: Column, row: int, signs: Glyphs) -> Text:
    text = column.cells[row]
    if column.least is not None:
        text = signs.clip(text, column.shown)
    # Rich would drop the space that stands for a missing star, so numbers are moved to the right here.
    return Text(text.rjust(column.shown) if column.right else text, column.styles[row] if column.styles else "")


def pairs(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    """Prints names and values in two columns; long values go on under themselves."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    signs = glyphs(console)
    for name, value in rows:
        table.add_row(Text(name, "bold"), Text(signs.plain(value)))
    console.print(table)


def whole(console: Console, text: str, style: str = "") -> None:
    """Prints lines that people copy: they are never wrapped, clipped or padded."""
    if glyphs(console).ascii_only:
        text = text.encode("ascii", "backslashreplace").decode()
    console.print(Text(text, style), soft_wrap=True)


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a sentence, wrapped at words."""
    console.print(Text(glyphs(console).plain(text), style))


def steps(share: float, width: int, signs: Glyphs) -> str:
    """A small bar of how much is done."""
    done = min(max(int(share * width), 0), width)
    return signs.steps[0] * done + signs.steps[1] * (width - done)


def line(console: Console, text: str, style: str = "") -> Text:
    """One line of a view, cut at the console's width."""
    return Text(glyphs(console).clip(text, console.width), style, no_wrap=True, overflow="crop")
