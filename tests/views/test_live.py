"""Following a sweep: in a real pseudo-terminal, in a log, as JSON."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from view_samples import a_status, a_trial, some_trials

from sweep.views import live

HERE = Path(__file__).parent


def events(first: int, last: int) -> list[dict[str, Any]]:
    """Log rows with ids from `first` to `last`."""
    now = round(time.time() * 1000)
    return [
        {"id": n, "unix_ms": now, "kind": "asked", "trial": n, "text": f"trial\n{n} é"} for n in range(first, last + 1)
    ]


def nothing() -> dict[str, Any]:
    """A status that must not be asked for."""
    raise AssertionError("a log does not need the status")


@pytest.mark.parametrize(
    ("as_json", "tty", "environment", "mode"),
    [
        (True, True, {}, "json"),
        (False, True, {}, "live"),
        (False, False, {}, "lines"),
        (False, True, {"TERM": "dumb"}, "lines"),
        (False, True, {"TTY_INTERACTIVE": "0"}, "lines"),
        (False, True, {"NO_COLOR": "1"}, "live"),
    ],
)
def test_the_mode_follows_the_terminal(
    as_json: bool, tty: bool, environment: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty)
    assert live.pick_mode(as_json) == mode


def test_lines_go_to_stderr_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    with live.follow("lines", nothing, lambda last: events(last + 1, 3)) as view:
        view.notify()
        view.notify()
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split("s  ")[1] for line in err.splitlines()] == ["trial 1 é", "trial 2 é", "trial 3 é"]
    assert err.startswith("     0.")


def test_json_is_one_document_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with live.follow("json", nothing, lambda last: events(last + 1, 2)) as view:
        view.notify()
    out, err = capsys.readouterr()
    assert err == ""
    documents = [json.loads(line) for line in out.splitlines()]
    assert [d["id"] for d in documents] == [1, 2]
    assert all(d["schema_version"] == 1 and d["text"] == f"trial\n{d['id']} é" for d in documents)


def test_what_happened_last_is_shown_after_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = []
    with live.follow("lines", nothing, lambda last: [e for e in found if e["id"] > last]) as view:
        view.notify()
        found += events(1, 1)
        view.notify()  # too soon to look again
        assert capsys.readouterr().err == ""
    assert "trial 1" in capsys.readouterr().err


def test_looking_takes_a_tenth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(last: int) -> list[dict[str, Any]]:
        looks.append(now[0])
        now[0] += 0.2
        return []

    with live.follow("lines", nothing, slow) as view:
        while now[0] < 120:
            view.notify()
            now[0] += 0.05
    assert len(looks) <= 20 / 2 + 2


def test_a_view_that_fails_does_not_end_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(last: int) -> list[dict[str, Any]]:
        raise OSError("database is locked")

    with live.follow("lines", nothing, broken) as view:
        view.notify()
    assert "the view could not be drawn (OSError: database is locked)" in capsys.readouterr().err


def test_a_reader_that_leaves_does_not_end_the_sweep() -> None:
    program = (
        "import time\nfrom sweep.views import live\n"
        "rows = lambda last: [{'id': last + 1, 'unix_ms': 0, 'kind': 'asked', 'trial': 0, 'text': 'x' * 70000}]\n"
        "with live.follow('json', dict, rows) as view:\n"
        "    for _ in range(3):\n        view._due = 0.0\n        view.notify()\n        time.sleep(0.1)\n"
        "import sys\nsys.stderr.write('the sweep went on')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b"the sweep went on"
    child.stderr.close()
    assert child.wait(10) == 0


@pytest.mark.parametrize("height", [8, 12, 24, 40])
@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("running", [0, 1, 4, 40])
def test_the_picture_fits_the_terminal(running: int, width: int, height: int) -> None:
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=True, color_system=None)
    states = ["live", "judging", "waiting"]
    trials = [*some_trials(30), *(a_trial(100 + n, states[n % 3]) for n in range(running))]
    console.print(live.picture(console, a_status(trials), {}, over=False))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) < height
    assert max(len(line) for line in lines) <= width
    assert lines[1].startswith("[█")
    if running == 40 and height < 40:
        assert (
            any(line.startswith(tuple("123456789")) and line.rstrip().endswith(" more") for line in lines)
            or height < 10
        )


Capture = Callable[[], str]


class Terminal:
    """A pseudo-terminal that a program runs in."""

    def __init__(self, width: int, height: int) -> None:
        self.socket = f"views-{uuid.uuid4().hex[:8]}"
        self.size = ["-x", str(width), "-y", str(height)]

    def tmux(self, *arguments: str) -> str:
        command = ["tmux", "-L", self.socket, "-f", "/dev/null", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout

    def run(self, *arguments: str) -> None:
        command = " ".join([sys.executable, "live_program.py", *arguments])
        # `cat` keeps the terminal open, so that what the program left can be looked at.
        self.tmux("new-session", "-d", *self.size, "-c", str(HERE), f"LC_ALL=C.UTF-8 {command}; cat")

    def until(self, text: str) -> str:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            shown = self.tmux("capture-pane", "-p")
            if text in shown:
                return shown
            time.sleep(0.05)
        raise AssertionError(f"{text!r} did not appear in:\n{shown}")

    def cursor_is_visible(self) -> bool:
        return self.tmux("display-message", "-p", "#{cursor_flag}").strip() == "1"


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A terminal of 80 by 24."""
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    made = Terminal(80, 24)
    try:
        yield made
    finally:
        subprocess.run(["tmux", "-L", made.socket, "kill-server"], capture_output=True, check=False, timeout=10)


def test_the_last_state_stays_on_the_screen(terminal: Terminal) -> None:
    terminal.run("6", "1.2", "well")
    shown = terminal.until("done after")
    lines = shown.splitlines()
    assert sum(line.startswith("study words (open)") for line in lines) == 1  # drawn over, not below
    assert any(line.startswith("[███") and len(line) == 80 for line in lines)
    assert sum("all-linear lr" in line or "attention lr" in line or " mlp lr" in line for line in lines) >= 6
    assert "Ctrl-C" not in shown  # nothing is left to interrupt
    assert terminal.cursor_is_visible()


@pytest.mark.parametrize(
    ("ending", "said"), [("error", "ended by RuntimeError"), ("keys", "ended by KeyboardInterrupt")]
)
def test_the_terminal_is_restored(ending: str, said: str, terminal: Terminal) -> None:
    terminal.run("2", "1" if ending == "error" else "30", ending)
    terminal.until("Ctrl-C checkpoints")
    if ending == "keys":
        terminal.tmux("send-keys", "C-c")
    shown = terminal.until(said)
    assert said in shown.splitlines()  # on a line of its own, below the picture
    assert terminal.cursor_is_visible()
