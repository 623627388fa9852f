"""Following a sweep while it runs: a picture in a terminal, lines in a log, JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from sweep.views import status as state
from sweep.views.parts import line

Mode = Literal["live", "lines", "json"]
Status = Callable[[], dict[str, Any]]
EventsAfter = Callable[[int], list[dict[str, Any]]]

SECONDS = 0.5  # between two looks at the database
SHARE = 0.1  # of the loop's time that looking and drawing may take at most
EVENTS = 5


class View(Protocol):
    """What the loop gets to call."""

    def notify(self) -> None:
        """Shows what is new; cheap enough to be called on every step. Never raises."""


def pick_mode(as_json: bool) -> Mode:
    """A picture only where somebody can see it change: a terminal that can move its cursor."""
    if as_json:
        return "json"
    dumb = os.environ.get("TERM", "").lower() in {"dumb", "unknown"} or os.environ.get("TTY_INTERACTIVE") == "0"
    return "live" if sys.stderr.isatty() and not dumb else "lines"


@contextlib.contextmanager
def follow(mode: Mode, status: Status, events_after: EventsAfter) -> Iterator[View]:
    """Shows a sweep for as long as the context lasts; the last state stays on the screen."""
    view: _Looks = _Picture(status) if mode == "live" else _Lines(events_after, as_json=mode == "json")
    with view:
        yield view


class _Looks:
    """Looks twice a second at most, and less often where looking takes long."""

    def __init__(self) -> None:
        self._due = 0.0
        self._trouble: str | None = None
        self._over = False  # the last look: nothing runs any more

    def notify(self) -> None:
        """Looks if it is time to. A view that fails must not end a sweep that is paid for."""
        begun = time.monotonic()
        if begun < self._due:
            return
        self._try()
        took = time.monotonic() - begun
        self._due = begun + max(SECONDS, took / SHARE)

    def __enter__(self) -> _Looks:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        try:
            self._try()
        finally:
            self._stop()
        if self._trouble is not None:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"the view could not be drawn ({self._trouble}); the sweep is not affected\n")

    def _try(self) -> None:
        try:
            self._look()
            self._trouble = None
        except Exception as error:
            self._trouble = f"{type(error).__name__}: {error}"

    def _start(self) -> None:
        """Prepares the terminal."""

    def _look(self) -> None:
        """Reads and shows."""
        raise NotImplementedError

    def _stop(self) -> None:
        """Restores the terminal."""


class _Picture(_Looks):
    """A few lines that are drawn over."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status
        self._console = Console(stderr=True)
        # The thread that rich would draw from is not wanted: the database is read in the loop's thread alone.
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._goal: dict[int, int] = {}

    def _start(self) -> None:
        self._live.start()
        # A cursor that was never hidden needs no restoring after a second Ctrl-C or a kill, where nobody cleans up.
        self._console.show_cursor(True)

    def _look(self) -> None:
        seen = self._status()
        self._goal = state.goals(seen, self._goal)
        self._live.update(picture(self._console, seen, self._goal, over=self._over), refresh=True)

    def _stop(self) -> None:
        self._live.stop()


def picture(console: Console, status: dict[str, Any], goal: dict[int, int], *, over: bool) -> Group:
    """Everything, in fewer lines than the console is high: what runs is shortened first, then the events."""
    top: list[RenderableType] = [state.head(console, status), *state.budget(console, status)]
    middle: list[RenderableType] = [state.best(console, status), state.counts(console, status)]
    hint = line(console, "Ctrl-C checkpoints, settles and stops; what was paid for is not lost", "dim")
    room = console.height - 2 - len(top) - len(middle)  # the hint, and the line on which the cursor stands
    airy = room >= 10
    room -= 3 if airy else 0
    wanted = len(status["running"]) + 1 if status["running"] else 0
    recent = state.events(console, status, min(EVENTS, max(room - min(wanted, 5), 1 if room > 3 else 0)))
    rows = state.running(console, status, goal, max(room - len(recent), 0))
    blank: list[RenderableType] = [Text("")] if airy else []
    end: list[RenderableType] = [*blank, *recent, *([] if over else [hint])]
    return Group(*top, *blank, *rows, *(blank if rows else []), *middle, *end)


class _Lines(_Looks):
    """Every event once, on a line of its own."""

    def __init__(self, events_after: EventsAfter, *, as_json: bool) -> None:
        super().__init__()
        self._events_after = events_after
        self._as_json = as_json
        self._last = 0
        self._began_ms = round(time.time() * 1000)
        self._closed = False

    def _look(self) -> None:
        for event in self._events_after(self._last):
            self._last = event["id"]
            self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        stream = sys.stdout if self._as_json else sys.stderr
        if self._closed:
            return
        try:
            stream.write(self._text(event) + "\n")
            stream.flush()
        except OSError:
            # Nobody reads on. The sweep goes on; what is still buffered must not fail again when Python exits.
            self._closed = True
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def _text(self, event: dict[str, Any]) -> str:
        if self._as_json:
            from sweep.summary import SCHEMA_VERSION

            return json.dumps({"schema_version": SCHEMA_VERSION, **event})
        seconds = max(event["unix_ms"] - self._began_ms, 0) / 1000
        return f"{seconds:8.1f} s  {' '.join(event['text'].split())}"
