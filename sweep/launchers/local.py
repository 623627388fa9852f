"""Starts workers on this machine: one watchdog a worker, in its own session, so it outlives us and our terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import sys
import sysconfig
import time
from pathlib import Path

from sweep import inherited
from sweep.launchers.base import FolderLauncher, LaunchError, write_durably
from trainers import messages
from trainers.messages import MAX_COMMAND_BYTES, Command, WorkerJob, dump_job

START_TIMEOUT_S = 20.0
_LOOK_S = 0.01
_LOG_TAIL_BYTES = 2000


class LocalLauncher(FolderLauncher):
    """Runs workers on this machine."""

    def __init__(self) -> None:
        """Makes a launcher. It knows only its own children, to reap them; everything else it reads from folders."""
        self._children: dict[Path, int] = {}

    def boot(self) -> tuple[str, int]:
        """See Launcher."""
        path = Path("/proc/sys/kernel/random/boot_id")
        now_ns = time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
        return path.read_text().strip() if path.exists() else "", now_ns // 1_000_000

    def worker_command(self, folder: Path) -> list[str]:
        """See Launcher."""
        return [sys.executable, "-P", "-m", "trainers.worker", str(folder.absolute())]

    def start(self, job: WorkerJob, folder: Path) -> None:
        """See Launcher."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(folder / "job.json", dump_job(job))
            fifo = folder / "commands"
            if not fifo.exists():
                os.mkfifo(fifo)
            pid = self._spawn(folder)
        except OSError as error:
            raise LaunchError(f"cannot start a worker in {folder}: {error}") from error
        self._children[folder] = pid
        self._wait_listening(folder, pid)

    def _spawn(self, folder: Path) -> int:
        """Starts the watchdog. Not by Popen, which wants to be waited for: this child outlives us by design."""
        log = os.open(folder / "watchdog.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            return os.posix_spawn(
                sys.executable,
                # -P: the working directory's own modules must not shadow ours.
                [sys.executable, "-P", "-m", "trainers.watchdog", str(folder.absolute())],
                _environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, log, 1),
                    (os.POSIX_SPAWN_DUP2, log, 2),
                ],
                setsid=True,
                setsigmask=[],
                setsigdef=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD],
            )
        finally:
            os.close(log)

    def _wait_listening(self, folder: Path, pid: int) -> None:
        """Waits until the watchdog wrote its pid down, which it does when it listens. Raises LaunchError."""
        give_up = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < give_up:
            with contextlib.suppress(FileNotFoundError):
                if f'"watchdog": {pid},' in (folder / "watchdog.json").read_text():
                    return
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._children[folder]
                code = os.waitstatus_to_exitcode(status)
                tail = (folder / "watchdog.log").read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
                raise LaunchError(f"the watchdog in {folder} ended at once (exit code {code}): {tail}")
            time.sleep(_LOOK_S)
        raise LaunchError(f"the watchdog in {folder} did not start within {START_TIMEOUT_S:.0f} s")

    def send(self, folder: Path, command: Command) -> bool:
        """See Launcher."""
        line = command.line().encode()
        if len(line) > MAX_COMMAND_BYTES:
            raise LaunchError(f"{command.type} is {len(line)} bytes long; {MAX_COMMAND_BYTES} can be sent whole")
        try:
            fifo = os.open(folder / "commands", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise LaunchError(f"cannot send to {folder}: {error}") from error
        try:
            if not stat.S_ISFIFO(os.fstat(fifo).st_mode):
                raise LaunchError(f"{folder / 'commands'} is not a FIFO")
            os.write(fifo, line)
        except BrokenPipeError:
            return False
        except OSError as error:
            raise LaunchError(f"the watchdog in {folder} does not read its commands: {error}") from error
        finally:
            os.close(fifo)
        return True

    def alive(self, folder: Path) -> bool:
        """See Launcher."""
        self._reap()
        return super().alive(folder)

    def _reap(self) -> None:
        """Collects our ended children, so that none stays a zombie while we live."""
        for folder, pid in list(self._children.items()):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            del self._children[folder]


def _environment() -> dict[str, str]:
    """Returns our environment, in which the watchdog finds the very modules that we run."""
    root = str(Path(messages.__file__).absolute().parents[1])
    if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return inherited()
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**inherited(), "PYTHONPATH": os.pathsep.join(paths)}
