"""What watchdog and worker need from the operating system: a clock, locks, durable writes and the process tree.

Torch-free and without side effects at import. Linux is the reference; where a call is missing (macOS has neither
prctl nor /proc) the function says what is lost.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path

WATCHDOG_PID = "SWEEP_WATCHDOG_PID"  # the watchdog's pid in the worker's environment
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_DYING_MS_PER_GIB = {"RssShmem": 250.0, "RssAnon": 60.0}
_NUM_THREADS = 17  # place in /proc/<pid>/stat after the name


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


def dying_ms(pids: Iterable[int]) -> int:
    """Returns how long the kernel takes to end these processes beyond a moment, by the memory that they hold.

    A killed process is gone when its pages are given back; pinned memory (shared, as CUDA maps it) is by far the
    slowest. On an H100 machine 16 GiB of it took 2.1 to 3.5 s longer than the 0.2 s without. 0 where there is no /proc.
    """
    milliseconds = 0.0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            held = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            for kind, ms_per_gib in _DYING_MS_PER_GIB.items():
                milliseconds += ms_per_gib * int(held.get(kind, "0").split()[0]) / 2**20
    return round(milliseconds)


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of `data`, in as many pieces as a pipe takes. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


class Dying:
    """`dying_ms` of this process, looked up now and then: a worker asks at each step."""

    _LOOK_S = 0.5

    def __init__(self) -> None:
        self._looked_s, self._found_ms = -math.inf, 0

    def ms(self) -> int:
        """Returns what it was half a second ago at the latest."""
        if (now_s := time.monotonic()) >= self._looked_s + self._LOOK_S:
            self._looked_s, self._found_ms = now_s, dying_ms([os.getpid()])
        return self._found_ms


def descendants(ancestor: int) -> list[int]:
    """Returns the pids of all living descendants of `ancestor`, zombies left out; [] where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc") if Path("/proc/self/stat").exists() else ():
        if not entry.name.isdigit():
            continue
        # It ended while we were looking, or it is another user's that we may not look at (/proc with hidepid).
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            # The name in parentheses may itself hold spaces and parentheses, so the fields count from the last one.
            fields = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()
            # A process whose first thread has ended is a zombie with living threads: it must still be killed.
            living_threads = int(fields[_NUM_THREADS]) > 1
            if fields[0] not in (b"Z", b"X") or living_threads:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    ahead = [ancestor]
    while ahead:
        below = children.get(ahead.pop(), [])
        found += below
        ahead += below
    return found
