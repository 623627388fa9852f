"""Ends a process tree in time, whatever else happens.

The thread of a `Deadline` reads a clock, sends signals and touches no file: a disk that hangs in fsync holds the
watchdog's main thread up, never the kill. It knows milliseconds on the worker's meter, nothing of money.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass, field

from trainers import processes

KILL_MARGIN_MS = 250  # SIGKILL is sent this long before the deadline, so that the tree is gone when it comes
_LOOK_S = 0.2  # waits are cut to this, because they stand still in suspend while the meter goes on
_KILL_AGAIN_S = 0.005


@dataclass
class Deadline:
    """SIGTERM to the worker's group `grace_ms` before the deadline, SIGKILL to all our descendants just before.

    The deadline is the sooner of the paid time and a stop; `paid_ms` None means that only a stop sets one.
    Descendants that left the group or lost their parent are found too, because this process adopts orphans.
    """

    origin_ms: int
    grace_ms: int
    paid_ms: int | None
    extra_ms: int = 0  # everything is done so much earlier: the tree holds memory that takes long to give back
    fired: bool = False  # a SIGTERM or SIGKILL was sent because the deadline came
    exit_code: int | None = None  # the worker's, once it is reaped; negative: killed by that signal
    _leader: int = 0
    _stop_ms: int | None = None
    _asked_ms: int | None = None  # the deadline for which SIGTERM was sent
    _over: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None

    def now_ms(self) -> int:
        """Returns milliseconds since the meter's origin."""
        return processes.boot_ms() - self.origin_ms

    def guard(self, leader: int) -> None:
        """Starts to guard the tree whose first process, and group leader, is `leader`."""
        self._leader = leader
        self._thread = threading.Thread(target=self._run, name="deadline", daemon=True)
        self._thread.start()

    def pay(self, paid_ms: int) -> None:
        """Moves the paid time, later or earlier; without effect where no clock deadline applies."""
        with self._changed:
            if self.paid_ms is not None:
                self.paid_ms = paid_ms
            self._changed.notify()

    def weigh(self) -> None:
        """Looks how much memory the tree holds, and so how long before the deadline it must be killed."""
        extra_ms = processes.dying_ms(processes.descendants(os.getpid()))
        with self._changed:
            self.extra_ms = extra_ms
            self._changed.notify()

    def stop_within(self, within_ms: int) -> None:
        """Bounds the remaining life; a later call can only shorten it."""
        with self._changed:
            stop_ms = self.now_ms() + within_ms
            self._stop_ms = stop_ms if self._stop_ms is None else min(stop_ms, self._stop_ms)
            self._changed.notify()

    def reap(self) -> bool:
        """Collects ended children, adopted ones included; returns True when worker and descendants are all gone.

        Once the worker itself has ended, what it left behind is killed at once.
        """
        with self._changed:
            # Under the lock, so that the thread never signals a pid that was just given back to the system.
            with contextlib.suppress(ChildProcessError):
                while True:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if pid == 0:
                        break
                    if pid == self._leader:
                        self.exit_code = os.waitstatus_to_exitcode(status)
                        self._changed.notify()
            return self.exit_code is not None and not processes.descendants(os.getpid())

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _due_ms(self) -> int | None:
        moments = [moment for moment in (self.paid_ms, self._stop_ms) if moment is not None]
        return min(moments, default=None)

    def _run(self) -> None:
        with self._changed:
            while not self._over:
                try:
                    wait_s = self._act()
                except OSError as error:  # whatever the system refuses for a moment, the guard stands
                    os.write(2, f"deadline: {error}\n".encode())
                    wait_s = _KILL_AGAIN_S
                self._changed.wait(wait_s)

    def _act(self) -> float:
        """Sends what is due and returns the seconds until the next look."""
        due_ms = self._due_ms()
        if self.exit_code is not None:
            self._kill()
            return _KILL_AGAIN_S
        if due_ms is None:
            return _LOOK_S
        left_ms = due_ms - self.extra_ms - self.now_ms()
        if left_ms <= KILL_MARGIN_MS:
            self.fired = True
            self._kill()
            return _KILL_AGAIN_S
        if left_ms <= self.grace_ms and self._asked_ms != due_ms:
            self.fired = True
            self._asked_ms = due_ms
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._leader, signal.SIGTERM)
        ahead_ms = left_ms - (KILL_MARGIN_MS if left_ms <= self.grace_ms else max(self.grace_ms, KILL_MARGIN_MS))
        return min(max(ahead_ms, 1) / 1000, _LOOK_S)

    def _kill(self) -> None:
        if self.exit_code is None:  # an unreaped leader keeps the group's number from being used again
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._leader, signal.SIGKILL)
        for pid in processes.descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
