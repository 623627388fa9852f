"""Progress while a study runs: a live view in a terminal, a line an event elsewhere, NDJSON on request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sweep.views.pieces import budget_bar, loss_text
from sweep.views.tables import running_table

Mode = Literal["live", "lines", "json"]
REDRAW_SECONDS = 0.5
LOOK_SECONDS = 0.2
EVENTS_SHOWN = 6
SCHEMA_VERSION = 1


def pick_mode(as_json: bool) -> Mode:
    """NDJSON if asked for; a live view only where stderr is a terminal that can move its cursor."""
    if as_json:
        return "json"
    interactive = os.environ.get("TTY_INTERACTIVE") != "0" and os.environ.get("TERM") != "dumb"
    return "live" if sys.stderr.isatty() and interactive else "lines"


class View:
    """Shows what is new. `notify` is called often and does nothing most of the time."""

    def __init__(
        self, mode: Mode, status: Callable[[], dict[str, Any]], events_after: Callable[[int], list[dict[str, Any]]]
    ) -> None:
        self.mode = mode
        self.status = status
        self.events_after = events_after
        self.console = Console(stderr=True)
        self.live: Live | None = None
        self._start = time.monotonic()
        self._last_id = 0
        self._due = 0.0
        self._recent: list[str] = []

    def notify(self, *, force: bool = False) -> None:
        """Shows new events; redraws at most twice a second."""
        now = time.monotonic()
        if now < self._due and not force:
            return
        self._due = now + (REDRAW_SECONDS if self.mode == "live" else LOOK_SECONDS)
        for event in self.events_after(self._last_id):
            self._last_id = event["id"]
            self._event(event, now - self._start)
        if self.live is not None:
            self.live.update(self._drawn(), refresh=True)

    def _event(self, event: dict[str, Any], seconds: float) -> None:
        if self.mode == "json":
            sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **event}) + "\n")
            sys.stdout.flush()
        elif self.mode == "lines":
            sys.stderr.write(f"{seconds:7.1f} s  {event['text']}\n")
            sys.stderr.flush()
        else:
            self._recent = [*self._recent, f"{seconds:7.1f} s  {event['text']}"][-EVENTS_SHOWN:]

    def _drawn(self) -> Group:
        status = self.status()
        head = Text(f"{status['study']}  {status['trials']} trials", style="bold")
        worker = status["worker"]
        head.append(f"  worker {worker['state']}" if worker else "  no worker", style="dim")
        room = max(self.console.height - EVENTS_SHOWN - 7, 2)
        running = status["running"]
        parts: list[Any] = [head, *budget_bar(self.console, status, self.console.width)]
        if running:
            parts.append(running_table(self.console, running[:room]))
        if len(running) > room:
            parts.append(Text(f"{len(running) - room} more", style="dim"))
        if status["best"]:
            best = status["best"]
            words = f"best: trial {best['number']}  {best['in_words']}  loss {loss_text(best)}"
            parts.append(Text(words, no_wrap=True, overflow="ellipsis"))
        parts += [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in self._recent]
        return Group(*parts)


@contextlib.contextmanager
def follow(
    mode: Mode, status: Callable[[], dict[str, Any]], events_after: Callable[[int], list[dict[str, Any]]]
) -> Iterator[View]:
    """Follows a study; the last state stays on the screen and the terminal is restored whatever happens."""
    view = View(mode, status, events_after)
    with contextlib.ExitStack() as stack:
        if mode == "live":
            # Drawn by `notify` alone: the loop is the only thread that may read the study.
            view.live = stack.enter_context(Live(console=view.console, auto_refresh=False, transient=False))
        try:
            yield view
        finally:
            view.notify(force=True)
