"""What watchdog and worker need from the operating system: a clock, locks, durable writes and the process tree.

Torch-free and without side effects at import. Linux is the reference; where a call is missing (macOS has neither
prctl nor /proc) the function says what is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

WATCHDOG_PID = "SWEEP_WATCHDOG_PID"  # the watchdog's pid in the worker's environment
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def boot_ns() -> int:
    """Returns nanoseconds since boot, suspended time included (CLOCK_MONOTONIC where CLOCK_BOOTTIME is missing)."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def boot_ms() -> int:
    """Returns whole milliseconds since boot, on the clock of `boot_ns`."""
    return boot_ns() // 1_000_000


def boot_id() -> str:
    """Returns the kernel's name for this boot, or "" where it has none; an origin means nothing in another boot."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def hold_lock(path: Path, wait_s: float) -> int:
    """Takes the exclusive flock on `path` and returns its descriptor; the lock lives as long as that stays open.

    Waits up to `wait_s` seconds, since whoever asks "is it alive?" holds it for a moment. Raises BlockingIOError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= give_up:
                os.close(descriptor)
                raise
            time.sleep(0.01)


def sync_folder(folder: Path) -> None:
    """Makes names created in or renamed into `folder` durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes `path` so that readers, also after a crash, see the old text or the new, never a part. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def die_with_parent() -> None:
    """Makes the kernel kill this process when the thread that started it dies; the worker calls it first of all.

    The parent may have died before the call: then the parent is not the one named in the environment, and this
    process ends itself. Elsewhere than on Linux only the end of stdin tells the worker. Raises OSError.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(WATCHDOG_PID)
    if expected is not None and os.getppid() != int(expected):
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process (on Linux) the parent of each descendant whose parent dies: none gets lost. Raises OSError."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(ancestor: int) -> list[int]:
    """Returns the pids of all living descendants of `ancestor`, zombies left out; [] where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc") if Path("/proc/self/stat").exists() else ():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended while we were looking
            # The name in parentheses may itself hold spaces and parentheses, so the fields count from the last one.
            state, parent = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()[:2]
            if state not in (b"Z", b"X"):
                children.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    ahead = [ancestor]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found
