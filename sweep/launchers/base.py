"""What every launcher does, and what needs nothing but the worker's folder (its layout: trainers/messages.py).

A worker is known by its folder alone: an orchestrator that was restarted finds the same events, the same usage and the
same locks, and goes on. Whether a process lives is asked of its lock, never of a pid, which the system may have reused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Protocol

from trainers.messages import WORKER_FOLDER, Command, Event, UsageRecord, WorkerJob, parse_event, parse_usage

WATCHDOG_LOCK = "watchdog.lock"
_USAGE_TAIL_BYTES = 4096
_LOOK_S = 0.02


class LaunchError(Exception):
    """A worker could not be started, or could not be told something."""


class Launcher(Protocol):
    """Starts a worker's watchdog and talks to it through its folder."""

    def boot(self) -> tuple[str, int]:
        """Returns the boot's id and milliseconds since boot (CLOCK_BOOTTIME) of the machine that workers start on."""

    def worker_command(self, folder: Path) -> list[str]:
        """Returns the argv of the worker that belongs to `folder`, for `WorkerJob.command`."""

    def start(self, job: WorkerJob, folder: Path) -> None:
        """Starts the watchdog, which starts the worker; returns when it listens. Raises LaunchError."""

    def send(self, folder: Path, command: Command) -> bool:
        """Sends one command; False if nobody is there to read it. Raises LaunchError if it can't be delivered."""

    def read_events(self, folder: Path, offset: int) -> list[tuple[int, Event]]:
        """Returns the events after byte `offset`, each with the offset after it. Raises MessageError."""

    def read_usage(self, folder: Path) -> UsageRecord | None:
        """Returns the newest usage record. Raises MessageError."""

    def alive(self, folder: Path) -> bool:
        """Says whether the watchdog lives."""

    def worker_alive(self, folder: Path) -> bool:
        """Says whether the worker lives."""

    def fence_off(self, folder: Path) -> bool:
        """Makes sure that no watchdog will ever start in the folder; False if one lives there."""

    def stop(self, folder: Path) -> None:
        """Kills watchdog, worker and all that the worker started: the last resort, when commands are not obeyed.

        Once they are dead, what they left behind (a daemon, whose parent is another by then) is killed.
        """

    def wait_dead(self, folder: Path, timeout_s: float) -> bool:
        """Waits until worker and watchdog are gone; False if they are not by then."""


def write_durably(path: Path, text: str) -> None:
    """Writes `path` whole or not at all, name included, whatever crashes. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked(path: Path) -> bool:
    """Says whether some process holds the flock on `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who ask at once do not take each other for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def left_behind(folder: Path) -> list[int]:
    """Returns the pids of living processes that the worker of `folder` started, wherever they are in the tree.

    They are known by the environment that they inherited, so that a daemon is found whose watchdog was killed; [] where
    there is no /proc.
    """
    mark = f"{WORKER_FOLDER}={folder}".encode()
    found = []
    for entry in os.scandir("/proc") if Path("/proc/self/stat").exists() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


class FolderLauncher:
    """The part of a launcher that works on any folder this machine can see."""

    def read_events(self, folder: Path, offset: int) -> list[tuple[int, Event]]:
        """See Launcher."""
        try:
            with (folder / "events.jsonl").open("rb") as file:
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            return []
        found: list[tuple[int, Event]] = []
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break  # it is being written
            offset += len(line)
            found.append((offset, parse_event(line.decode())))
        return found

    def read_usage(self, folder: Path) -> UsageRecord | None:
        """See Launcher."""
        try:
            with (folder / "usage.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _USAGE_TAIL_BYTES))
                complete = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        return parse_usage(complete[-1].decode()) if complete else None

    def alive(self, folder: Path) -> bool:
        """See Launcher."""
        return locked(folder / WATCHDOG_LOCK)

    def worker_alive(self, folder: Path) -> bool:
        """See Launcher."""
        return locked(folder / "worker.lock")

    def fence_off(self, folder: Path) -> bool:
        """See Launcher. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / WATCHDOG_LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under the lock: a watchdog that starts now waits for it, and then finds the fence.
            write_durably(folder / "fenced", "")
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def stop(self, folder: Path) -> None:
        """See Launcher. Raises OSError."""
        for pid in left_behind(folder.absolute()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not (folder / "watchdog.json").exists():
            return
        # While a lock is held its owner lives, so the pid that the owner wrote down is still its own.
        pids = json.loads((folder / "watchdog.json").read_text())
        with contextlib.suppress(ProcessLookupError):
            if pids["worker"] is not None and self.worker_alive(folder):
                os.killpg(pids["worker"], signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            if self.alive(folder):
                os.kill(pids["watchdog"], signal.SIGKILL)

    def wait_dead(self, folder: Path, timeout_s: float) -> bool:
        """See Launcher."""
        give_up = time.monotonic() + timeout_s
        while self.alive(folder) or self.worker_alive(folder):
            if time.monotonic() >= give_up:
                return False
            time.sleep(_LOOK_S)
        return True
