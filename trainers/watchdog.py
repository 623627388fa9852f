"""The parent of the worker's process: `python -m trainers.watchdog FOLDER`.

It knows seconds, not dollars. It ends the worker, with everything the worker started, at the paid time, whatever became
of the orchestrator; passes commands down and events up; and records on disk how long the machine was used. One watchdog
lives one life in one folder (layout: trainers/messages.py). Torch-free.

    exit codes   0 it saw its worker out    3 the folder is taken, fenced or used up    4 the machine was restarted
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from trainers import processes
from trainers.deadline import KILL_MARGIN_MS, Deadline
from trainers.journal import Ballast, Journal
from trainers.messages import (
    WORKER_FOLDER,
    Command,
    MessageError,
    Release,
    Slice,
    Stop,
    UsageRecord,
    WorkerJob,
    load_job,
    parse_command,
    parse_event,
)

LINGER_S = 10.0  # how long a watchdog without a worker waits for a Release
STOP_COMMAND_S = 120.0
_PENDING_BYTES_MAX = 1 << 20  # commands that the worker has not read yet
_LINE_BYTES_MAX = 1 << 23  # scores by example take about 20 bytes each
_BALLAST_BYTES = 1 << 18
_READ_BYTES = 1 << 16
_GONE_LOOK_S = 0.01


def log(text: str) -> None:
    """Writes a line for people; the launcher sends stderr to watchdog.log."""
    # A full disk takes the log first of all, and the watchdog is needed most just then: it goes on without.
    with contextlib.suppress(OSError):
        os.write(2, f"watchdog {os.getpid()}: {text}\n".encode())


def take_lines(buffer: bytearray) -> list[bytes]:
    """Removes and returns the complete lines of `buffer`, newlines included; throws away a line beyond all measure."""
    *lines, rest = bytes(buffer).split(b"\n")
    if len(rest) > _LINE_BYTES_MAX:
        log(f"threw away {len(rest)} bytes without a newline")
        rest = b""
    buffer[:] = rest
    return [line + b"\n" for line in lines]


class Watchdog:
    """Runs one worker from start to end. The caller holds watchdog.lock."""

    def __init__(self, folder: Path, job: WorkerJob) -> None:
        """Opens the folder's files. Raises OSError."""
        self._folder = folder
        self._job = job
        self._usage = Journal(folder / "usage.jsonl")
        self._events = Journal(folder / "events.jsonl")
        self._ballast = Ballast(folder / ".ballast", _BALLAST_BYTES)
        # Opened for writing too, so that the last orchestrator's close is no end of file.
        self._commands = os.open(folder / "commands", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._deadline = Deadline(job.origin_boot_ms, job.grace_ms, None if job.timings else job.paid_ms)
        self._selector = selectors.DefaultSelector()
        self._fence = job.fence
        self._worker: subprocess.Popen[bytes] | None = None
        self._command_bytes = bytearray()
        self._event_bytes = bytearray()
        self._pending = bytearray()  # for the worker's stdin
        self._last_at_ms = 0
        self._release: Release | None = None
        self._terminated = False  # by a signal to this process
        self._stopped = False  # by a Stop, or by that signal
        self._disk_full = False

    def run(self) -> None:
        """Starts the worker, sees it out, writes the final record, and waits for a Release."""
        self._listen_to_signals()
        self._selector.register(self._commands, selectors.EVENT_READ, self._read_commands)
        self._write_pids()
        if not self._job.timings and self._deadline.now_ms() >= self._job.paid_ms - KILL_MARGIN_MS:
            log("the paid time was over before the start")
            self._finish(UsageRecord(ms=self._deadline.now_ms(), ended=True, why="paid_until"))
        elif self._start():
            self._watch()
            self._finish(self._last_record())
        else:
            self._finish(UsageRecord(ms=self._now_ms(), ended=True, exit_code=127, why="exit"))
        self._linger()

    def _listen_to_signals(self) -> None:
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC) if sys.platform == "linux" else os.pipe()
        os.set_blocking(wake, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the default would not wake the selector
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_terminated", True))
        self._selector.register(woken, selectors.EVENT_READ, lambda: os.read(woken, _READ_BYTES))

    def _start(self) -> bool:
        """Starts the worker in a group of its own; False if its command cannot be run."""
        processes.adopt_orphans()
        marks = {processes.WATCHDOG_PID: str(os.getpid()), WORKER_FOLDER: str(self._folder)}
        with (self._folder / "worker.log").open("ab") as errors:
            try:
                self._worker = subprocess.Popen(
                    self._job.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,
                    env={**os.environ, **marks},
                    process_group=0,
                )
            except OSError as error:
                log(f"cannot start the worker: {error}")
                return False
        self._deadline.guard(self._worker.pid)
        for pipe in (self._worker_stdin, self._worker_stdout):
            os.set_blocking(pipe.fileno(), False)
        self._selector.register(self._worker_stdout, selectors.EVENT_READ, self._read_events)
        self._write_pids()
        return True

    @property
    def _worker_stdin(self) -> IO[bytes]:
        assert self._worker is not None and self._worker.stdin is not None
        return self._worker.stdin

    @property
    def _worker_stdout(self) -> IO[bytes]:
        assert self._worker is not None and self._worker.stdout is not None
        return self._worker.stdout

    def _write_pids(self) -> None:
        pids = {"watchdog": os.getpid(), "worker": self._worker.pid if self._worker else None}
        processes.write_atomically(self._folder / "watchdog.json", json.dumps(pids) + "\n")

    def _watch(self) -> None:
        """Returns when worker and descendants are gone and everything the worker said is on disk."""
        assert self._worker is not None
        beat_s = self._job.heartbeat_ms / 1000
        next_beat = time.monotonic()
        while not self._deadline.reap():
            if time.monotonic() >= next_beat:
                self._beat()
                next_beat = time.monotonic() + beat_s
            if self._terminated:
                self._stop_within(self._job.grace_ms)
            wait_s = _GONE_LOOK_S if self._deadline.exit_code is not None else next_beat - time.monotonic()
            for key, _ in self._selector.select(max(wait_s, 0)):
                key.data()
        self._deadline.close()
        self._worker.returncode = self._deadline.exit_code  # reaped by the deadline, so that Popen must not wait
        while self._read_events():
            pass
        self._forget_worker_stdin()
        self._worker_stdin.close()
        self._worker_stdout.close()

    def _now_ms(self) -> int:
        return self._last_at_ms if self._job.timings else self._deadline.now_ms()

    def _last_record(self) -> UsageRecord:
        ms = self._now_ms()
        if self._disk_full:
            why = "disk"
        elif self._stopped:
            why = "stop"
        else:
            why = "paid_until" if self._deadline.fired else "exit"
        return UsageRecord(ms=ms, ended=True, exit_code=self._deadline.exit_code, why=why)

    def _beat(self) -> None:
        self._deadline.weigh()
        self._append(self._usage, _line(UsageRecord(ms=self._now_ms())))

    def _append(self, journal: Journal, lines: bytes) -> None:
        """Appends durably; a disk that stays full without the ballast ends the worker: its use can't be recorded."""
        try:
            journal.append(lines)
        except OSError as error:
            self._ballast.free()
            log(f"cannot record ({error}); the ballast is freed")
            try:
                journal.append(b"")
            except OSError:
                if journal is self._usage:
                    journal.forget()  # the next heartbeat says the same and more
                if not self._disk_full:
                    log("still cannot record: ending the worker")
                    self._disk_full = True
                    self._deadline.stop_within(self._job.grace_ms)

    def _read_events(self) -> bool:
        """Moves what the worker said to events.jsonl; False when there is no more for now."""
        data = _read(self._worker_stdout.fileno())
        if data == b"" and self._worker_stdout in self._selector.get_map():
            self._selector.unregister(self._worker_stdout)
        if not data:
            return False
        self._event_bytes += data
        good = []
        for line in take_lines(self._event_bytes):
            try:
                self._last_at_ms = parse_event(line.decode(errors="replace")).at_ms
                good.append(line)
            except MessageError as error:
                log(f"dropped from the worker's stdout: {error}")
        if good:
            self._append(self._events, b"".join(good))
        return True

    def _read_commands(self) -> None:
        self._command_bytes += _read(self._commands) or b""
        for line in take_lines(self._command_bytes):
            try:
                command = parse_command(line.decode(errors="replace"))
            except MessageError as error:
                log(f"ignored a command: {error}")
                continue
            if command.fence < self._fence:
                log(f"ignored {command.type} with fence {command.fence}, the highest seen is {self._fence}")
                continue
            self._fence = command.fence
            self._obey(command, line)

    def _obey(self, command: Command, line: bytes) -> None:
        match command:
            case Slice():
                self._deadline.pay(command.paid_ms)
            case Stop():
                self._stop_within(command.within_ms)
            case Release():
                self._release = command
                return
        if self._worker is None or self._worker.returncode is not None:
            return
        if len(self._pending) + len(line) > _PENDING_BYTES_MAX:
            log(f"the worker reads nothing; dropped {command.type}")
            return
        self._pending += line
        if self._worker_stdin not in self._selector.get_map():
            self._selector.register(self._worker_stdin, selectors.EVENT_WRITE, self._write_commands)

    def _stop_within(self, within_ms: int) -> None:
        self._deadline.stop_within(within_ms)
        self._stopped = True

    def _write_commands(self) -> None:
        try:
            written = os.write(self._worker_stdin.fileno(), self._pending)
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._pending.clear()
            written = 0
        del self._pending[:written]
        if not self._pending:
            self._forget_worker_stdin()

    def _forget_worker_stdin(self) -> None:
        if self._worker_stdin in self._selector.get_map():
            self._selector.unregister(self._worker_stdin)

    def _finish(self, record: UsageRecord) -> None:
        """Writes the last record; the space set aside for it is given back first."""
        self._ballast.free()
        self._append(self._events, b"")
        self._append(self._usage, _line(record))
        log(f"the worker is gone: {dataclasses.asdict(record)}")

    def _linger(self) -> None:
        """Waits for a Release; runs the stop command if it says so, or if nobody is there to say anything."""
        give_up = time.monotonic() + LINGER_S
        while self._release is None and time.monotonic() < give_up:
            for key, _ in self._selector.select(give_up - time.monotonic()):
                key.data()
        if self._release is None:
            log("no release: the orchestrator is gone")
        if self._job.stop_command is not None and (self._release is None or self._release.stop):
            self._run_stop_command(self._job.stop_command)

    def _run_stop_command(self, command: str) -> None:
        log(f"running the stop command: {command}")
        with (self._folder / "watchdog.log").open("ab") as output:
            process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            log(f"the stop command returned {process.wait(STOP_COMMAND_S)}")
        except subprocess.TimeoutExpired:
            log(f"the stop command did not return within {STOP_COMMAND_S:.0f} s")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _line(record: UsageRecord) -> bytes:
    return (json.dumps(dataclasses.asdict(record), separators=(",", ":")) + "\n").encode()


def _read(descriptor: int) -> bytes | None:
    """Returns what is there: b"" at the end, None if nothing is there now."""
    try:
        return os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return None


def main(arguments: list[str]) -> int:
    """Runs a watchdog in the folder named; returns its exit code."""
    folder = Path(arguments[0])
    try:
        processes.hold_lock(folder / "watchdog.lock", wait_s=1.0)
    except BlockingIOError:
        log("another watchdog runs in this folder")
        return 3
    if (folder / "fenced").exists():
        log("fenced: an orchestrator took this worker over before it started")
        return 3
    if (folder / "usage.jsonl").exists():
        log("this folder was used before")
        return 3
    job = load_job((folder / "job.json").read_text())
    if job.boot_id != processes.boot_id():
        log("the machine was restarted since this job was written")
        return 4
    Watchdog(folder, job).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
