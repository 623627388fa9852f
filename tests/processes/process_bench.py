"""Folders, jobs and waiting for the process tests: everything here starts real processes."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sweep.launchers.local import LocalLauncher
from trainers.messages import (
    Admit,
    Event,
    Release,
    Stop,
    TrialConfig,
    UsageRecord,
    WorkerJob,
    parse_usage,
)

SCRIPT = {
    "slots": {"lora": 2, "full": 1},
    "parameters": 1000,
    "tokens_per_example": 10,
    "validation_rows": 8,
    "validation_tokens": 80,
    "base_loss": 4.0,
    "default": {"floor": 1.0, "scale": 1000, "best_learning_rate": 1e-3, "curvature": 0.3, "diverges_above": 0.1},
}
TIMINGS = {
    "load": 2.0,
    "evaluate": 0.0007,
    "checkpoint": 0.1003,
    "restore": 0.2,
    "train": {"lora": 0.00113, "full": 0.003},
}
WORDS = ["red", "blue", "dog", "cat", "bird", "runs", "sleeps", "sings", "slowly", "over", "the", "a", "house", "river"]


def config(number: int = 0, **changes: Any) -> TrialConfig:
    """A small LoRA configuration: 100 examples, 1,000 tokens."""
    values = {"method": "lora", "learning_rate": 1e-3, "batch_size": 2, "examples": 100, "seed": 1, "rank": 8}
    return TrialConfig(number=number, **{**values, **changes})


class Bench:
    """One worker's folder, with a launcher, a fence and an offset of its own."""

    def __init__(self, root: Path, **script: Any) -> None:
        """Makes the folder's surroundings; `script` changes the replay file."""
        self.root = root
        self.folder = root / "a worker"
        self.launcher = LocalLauncher()
        self.offset = 0
        self.events: list[Event] = []
        (root / "replay.json").write_text(json.dumps(SCRIPT | script))
        (root / "timings.json").write_text(json.dumps(TIMINGS))

    def job(self, **changes: Any) -> WorkerJob:
        """A job whose meter starts now."""
        boot_id, now_ms = self.launcher.boot()
        values: dict[str, Any] = {
            "worker": "w1",
            "command": self.launcher.worker_command(self.folder),
            "model": f"replay:{self.root / 'replay.json'}",
            "data": "",
            "rung_rows": 4,
            "origin_boot_ms": now_ms,
            "boot_id": boot_id,
            "fence": 1,
            "paid_ms": 60_000,
            "work_ms": 50_000,
            "checkpoint_ms": 60_000,
            "grace_ms": 500,
            "heartbeat_ms": 100,
        }
        return WorkerJob(**(values | changes))

    def start(self, **changes: Any) -> WorkerJob:
        """Launches a job."""
        job = self.job(**changes)
        self.launcher.start(job, self.folder)
        return job

    def start_python(self, code: str, **changes: Any) -> WorkerJob:
        """Launches a stand-in worker, whose every process leaves a line in pids.txt if it calls `note()`."""
        note = f"import os, signal, sys, time\ndef note():\n    open({str(self.root / 'pids.txt')!r}, 'a').write("
        code = note + "f'{os.getpid()}\\n')\nnote()\n" + code
        return self.start(command=[sys.executable, "-c", code], **changes)

    def pids(self) -> list[int]:
        """Returns the pids that were noted."""
        path = self.root / "pids.txt"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def admit(
        self, number: int = 0, until: int | None = None, fence: int = 1, resume: str | None = None, **c: Any
    ) -> None:
        """Sends an Admit."""
        command = Admit(
            fence=fence,
            config=config(number, **c),
            attempt=f"a{number}",
            folder=str(self.root / f"trial {number}"),
            until_tokens=until,
            resume=resume,
        )
        assert self.launcher.send(self.folder, command)

    def poll(self) -> list[Event]:
        """Reads on, and returns all events so far."""
        for offset, event in self.launcher.read_events(self.folder, self.offset):
            self.offset = offset
            self.events.append(event)
            assert sum(event.usage.values()) == event.at_ms
        return self.events

    def wait_event(self, kind: str, count: int = 1, timeout_s: float = 15.0) -> Any:
        """Waits for the count-th event of a kind and returns it."""

        def found() -> list[Event]:
            events = [event for event in self.poll() if event.type == kind]
            return events[count - 1 : count]

        return wait_until(found, f"{kind} number {count}; have {[e.type for e in self.events]}", timeout_s)[0]

    def wait_ended(self, timeout_s: float = 15.0) -> UsageRecord:
        """Waits for the final usage record."""

        def ended() -> UsageRecord | None:
            record = self.launcher.read_usage(self.folder)
            return record if record is not None and record.ended else None

        return wait_until(ended, "the final record", timeout_s)

    def usage(self) -> list[UsageRecord]:
        """Returns every usage record."""
        return [parse_usage(line) for line in (self.folder / "usage.jsonl").read_text().splitlines()]

    def close(self) -> None:
        """Ends what still runs."""
        if self.launcher.alive(self.folder):
            self.launcher.send(self.folder, Stop(fence=1000, within_ms=0))
            self.launcher.send(self.folder, Release(fence=1000, stop=False))
            if not self.launcher.wait_dead(self.folder, 5):
                self.launcher.stop(self.folder)
                assert self.launcher.wait_dead(self.folder, 5)


def wait_until(ask: Callable[[], Any], what: str, timeout_s: float = 15.0) -> Any:
    """Asks until the answer is true, and returns it."""
    give_up = time.monotonic() + timeout_s
    while not (answer := ask()):
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.01)
    return answer


def gone(pid: int) -> bool:
    """Says whether a process is dead (a zombie is)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return True


def write_rows(path: Path) -> None:
    """Writes rows of differing lengths, the same every time."""
    rng = random.Random(1)

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))

    rows = [{"prompt": words() + " ->", "completion": " " + words()} for _ in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
