"""When the last process of a worker's tree is gone, measured against the paid time.

    python -m benchmarks.watchdog [--repeats 20] [--scenarios NAME ...] [--pinned-gib 16] [--json]

Run it in the root of a checkout, on Linux; it needs nothing but the standard library, and torch with CUDA for the
`cuda` scenarios, which are left out where that is missing. Each repeat launches a worker that cannot end by itself,
through LocalLauncher and the real watchdog, and follows the tree in /proc, asking neither launcher nor watchdog.

Figures are milliseconds from the paid time (negative: before it) to the look that found the last process gone; it looks
every millisecond. Three scenarios count from a kill -9 by the benchmark instead: `watchdog_killed` says how soon the
kernel takes the worker along, `cuda_killed` and `cuda_pinned_killed` how long a process with that much memory takes to
die. The last two are what KILL_MARGIN_MS (trainers/deadline.py) has to cover.

The exit code is 1 if any process outlived its paid time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from sweep.launchers.local import LocalLauncher
from trainers import processes
from trainers.messages import Release, Slice, Stop, WorkerJob, dump_job

ROOT = Path(__file__).absolute().parents[1]
PAID_MS = 2500
GRACE_MS = 1000
_FAR_MS = 600_000  # a paid time that no repeat comes to
_SETTLE_S = 0.5  # between the mark of a hung worker and a kill, so that the call it hangs in was entered
_LOOK_S = 0.001
_OUTLIVED_S = 60.0
_SETUP_S = 300.0  # torch's import and the pinning of host memory are slow
_GPU_SHARE = 0.6
_GIB = 1 << 30
_NS_PER_MS = 1_000_000


class BenchmarkError(Exception):
    """A repeat that did not measure what its scenario says."""


# --- workers that cannot end by themselves --------------------------------------------------------------------------


def _mark_hung(folder: Path) -> None:
    (folder / "hung").touch()


def _sleep_for_ever() -> NoReturn:
    while True:
        time.sleep(60)


def _hang_stopped(folder: Path) -> None:
    _mark_hung(folder)
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang_deaf(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _mark_hung(folder)
    _sleep_for_ever()


def _hang_with_daemon(folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            _mark_hung(folder)
            _sleep_for_ever()
        os._exit(0)
    os.wait()
    _sleep_for_ever()


def _hang_in_c(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    libc = ctypes.PyDLL(None)  # its calls keep the interpreter's lock, so no Python handler and no thread runs
    mutex = ctypes.create_string_buffer(128)  # more than a pthread_mutex_t takes anywhere
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    _mark_hung(folder)
    libc.pthread_mutex_lock(mutex)  # unlike a sleep, it waits on after a signal


def _hang_in_cuda(folder: Path) -> None:
    import torch

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    pinned_gib = int((folder / "pinned_gib").read_text())
    # In pieces, because the pinning allocator rounds each request up to a power of two.
    held = [torch.ones(_GIB, dtype=torch.uint8, pin_memory=True) for _ in range(pinned_gib)]
    _, total_bytes = torch.cuda.mem_get_info()
    held.append(torch.ones(int(total_bytes * _GPU_SHARE), dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 60)  # clock cycles: decades
    _mark_hung(folder)
    torch.cuda.synchronize()


# --- scenarios ------------------------------------------------------------------------------------------------------

Reference = Literal["paid time", "kill -9 of the watchdog", "kill -9 of the worker"]


@dataclass(frozen=True)
class Scenario:
    """One way to hang, and the moment from which the death of the tree is counted."""

    name: str
    hang: Callable[[Path], None]
    reference: Reference = "paid time"
    tree: int = 1  # processes of the hung worker
    orphaned: bool = False  # the orchestrator is killed right after the launch
    cuda: bool = False
    pinned: bool = False

    @property
    def paid_late(self) -> bool:
        """Says whether the launch pays for a long time, because the set-up takes long or the end comes by a kill."""
        return self.cuda or self.reference != "paid time"


SCENARIOS = [
    Scenario("stopped", _hang_stopped),
    Scenario("ignores_sigterm", _hang_deaf),
    Scenario("daemon", _hang_with_daemon, tree=2),
    Scenario("orchestrator_killed", _hang_deaf, orphaned=True),
    Scenario("holds_gil_in_c", _hang_in_c),
    Scenario("watchdog_killed", _hang_deaf, "kill -9 of the watchdog"),
    Scenario("cuda", _hang_in_cuda, cuda=True),
    Scenario("cuda_killed", _hang_in_cuda, "kill -9 of the worker", cuda=True),
    Scenario("cuda_pinned", _hang_in_cuda, cuda=True, pinned=True),
    Scenario("cuda_pinned_killed", _hang_in_cuda, "kill -9 of the worker", cuda=True, pinned=True),
]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


# --- the process table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """One process for all its life; `started` (clock ticks since boot) tells it from a later one with its number."""

    pid: int
    started: int


def _find(pid: int) -> Process | None:
    """Returns the process that has this pid now; None if its last thread is gone.

    The first thread of a process may be a zombie while others live on and keep its memory: that one is not gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, threads, started = fields[0], int(fields[17]), int(fields[19])
    return None if state in (b"Z", b"X") and threads <= 1 else Process(pid, started)


def find_tree(watchdog: int) -> set[Process]:
    """Returns what lives of the worker that the watchdog of this pid started, with everything that came of it.

    It is known by its environment, which no change of parent, group or session takes away.
    """
    mark = f"{processes.WATCHDOG_PID}={watchdog}".encode()
    found = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        # It may end while we look, and other users' processes are none of ours.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                found.add(_find(int(entry.name)))
    return {process for process in found if process is not None}


def wait_gone(tree: set[Process], watchdog: int, give_up_ns: int) -> int:
    """Returns the nanoseconds since boot just after the last process of the tree, new ones included, was gone."""
    while True:
        tree = {process for process in tree if _find(process.pid) == process}
        now_ns = processes.boot_ns()
        if not tree:
            tree = find_tree(watchdog)
            if not tree:
                return now_ns
        if now_ns > give_up_ns:
            raise BenchmarkError(f"still alive: {sorted(process.pid for process in tree)}")
        time.sleep(_LOOK_S)


# --- one repeat -----------------------------------------------------------------------------------------------------

_ORCHESTRATOR = """
import sys, time
from pathlib import Path
from sweep.launchers.local import LocalLauncher
from trainers.messages import load_job
LocalLauncher().start(load_job(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
print("launched", flush=True)
time.sleep(60)
"""


def _start_and_die(job: WorkerJob, folder: Path) -> None:
    """Launches from a process of its own, which is killed as soon as the watchdog listens."""
    path = folder.with_name("job.json")
    path.write_text(dump_job(job))
    command = [sys.executable, "-c", _ORCHESTRATOR, str(path), str(folder)]
    # An interpreter told a program by -c finds modules in its working directory first.
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as orchestrator:
        assert orchestrator.stdout is not None
        answer = orchestrator.stdout.readline()
        os.killpg(orchestrator.pid, signal.SIGKILL)
    if answer != b"launched\n":
        raise BenchmarkError("the orchestrator did not launch")


class Repeat:
    """One worker, from its launch to its end."""

    def __init__(self, scenario: Scenario, root: Path, pinned_gib: int) -> None:
        """`root` is an empty folder; `pinned_gib` counts only where the scenario pins host memory."""
        self._scenario = scenario
        self._folder = root / "worker"
        self._folder.mkdir()
        (self._folder / "pinned_gib").write_text(str(pinned_gib if scenario.pinned else 0))
        self._launcher = LocalLauncher()

    def measure(self) -> float:
        """Returns milliseconds from the scenario's reference to the tree's end. Raises BenchmarkError."""
        job = self._job()
        try:
            if self._scenario.orphaned:
                _start_and_die(job, self._folder)
            else:
                self._launcher.start(job, self._folder)
            return self._measure(job)
        except BenchmarkError as error:
            raise BenchmarkError(f"{self._scenario.name}: {error}\n{self._logs()}") from error
        finally:
            self._clean_up()

    def _job(self) -> WorkerJob:
        boot_id, now_ms = self._launcher.boot()
        paid_ms = _FAR_MS if self._scenario.paid_late else PAID_MS
        program = [sys.executable, "-P", str(Path(__file__).absolute())]
        return WorkerJob(
            worker="benchmark",
            command=[*program, "--hang", self._scenario.name, str(self._folder)],
            model="",
            data="",
            rung_rows=1,
            origin_boot_ms=now_ms,
            boot_id=boot_id,
            fence=1,
            paid_ms=paid_ms,
            work_ms=paid_ms,
            checkpoint_ms=paid_ms,
            grace_ms=GRACE_MS,
        )

    def _measure(self, job: WorkerJob) -> float:
        self._wait_hung(_SETUP_S if self._scenario.paid_late else (PAID_MS - GRACE_MS) / 1000)
        pids = json.loads((self._folder / "watchdog.json").read_text())
        tree = find_tree(pids["watchdog"])
        if len(tree) != self._scenario.tree or pids["worker"] not in {process.pid for process in tree}:
            raise BenchmarkError(f"expected {self._scenario.tree} processes, the worker among them; found {tree}")
        reference_ns = self._reference_ns(job, pids)
        gone_ns = wait_gone(tree, pids["watchdog"], reference_ns + int(_OUTLIVED_S * 1e9))
        self._check_end()
        return (gone_ns - reference_ns) / _NS_PER_MS

    def _reference_ns(self, job: WorkerJob, pids: dict[str, int]) -> int:
        """Returns nanoseconds since boot of the reference; pays for the last stretch or kills where it is due."""
        if self._scenario.reference != "paid time":
            time.sleep(_SETTLE_S)
            victim = pids["watchdog" if self._scenario.reference == "kill -9 of the watchdog" else "worker"]
            now_ns = processes.boot_ns()
            os.kill(victim, signal.SIGKILL)
            return now_ns
        paid_ms = job.paid_ms
        if self._scenario.paid_late:
            # Time to see how much memory the tree holds, and to kill it so much earlier.
            dying_ms = processes.dying_ms([pids["worker"]])
            paid_ms = processes.boot_ms() - job.origin_boot_ms + PAID_MS + dying_ms
            command = Slice(fence=1, paid_ms=paid_ms, work_ms=paid_ms, checkpoint_ms=paid_ms)
            if not self._launcher.send(self._folder, command):
                raise BenchmarkError("nobody reads the commands")
        return (job.origin_boot_ms + paid_ms) * _NS_PER_MS

    def _wait_hung(self, timeout_s: float) -> None:
        give_up = time.monotonic() + timeout_s
        while not (self._folder / "hung").exists():
            usage = self._launcher.read_usage(self._folder)
            if time.monotonic() > give_up or (usage is not None and usage.ended):
                raise BenchmarkError("the worker did not come to hang, or not before the first signal")
            time.sleep(0.01)

    def _check_end(self) -> None:
        """Makes sure that the worker was ended by the SIGKILL that the scenario is about. Raises BenchmarkError."""
        if self._scenario.reference == "kill -9 of the watchdog":
            return
        expected = "paid_until" if self._scenario.reference == "paid time" else "exit"
        give_up = time.monotonic() + 5
        while (usage := self._launcher.read_usage(self._folder)) is None or not usage.ended:
            if time.monotonic() > give_up:
                raise BenchmarkError("the watchdog wrote no final record")
            time.sleep(0.01)
        if (usage.exit_code, usage.why) != (-signal.SIGKILL, expected):
            raise BenchmarkError(f"the worker ended otherwise: {usage}")

    def _logs(self) -> str:
        paths = [self._folder / "watchdog.log", self._folder / "worker.log"]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    def _clean_up(self) -> None:
        self._launcher.send(self._folder, Stop(fence=1, within_ms=0))
        self._launcher.send(self._folder, Release(fence=1, stop=False))
        if not self._launcher.wait_dead(self._folder, 5):
            self._launcher.stop(self._folder)
            if not self._launcher.wait_dead(self._folder, _OUTLIVED_S):
                raise BenchmarkError(f"{self._scenario.name}: worker or watchdog cannot be ended")


# --- the program ----------------------------------------------------------------------------------------------------


def hang(name: str, folder: Path) -> None:
    """Plays the worker of a scenario in a worker's folder: what trainers.worker does first, then the hang."""
    processes.die_with_parent()
    processes.hold_lock(folder / "worker.lock", wait_s=1.0)
    BY_NAME[name].hang(folder)


_ASK_DEVICE = """
import torch
if torch.cuda.is_available():
    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
"""


@functools.cache
def cuda_device() -> str | None:
    """Returns the GPU's name and memory; None where torch or a GPU is missing."""
    if importlib.util.find_spec("torch") is None:
        return None
    # In a process of its own, so that the benchmark itself holds nothing of the GPU.
    answer = subprocess.run([sys.executable, "-c", _ASK_DEVICE], check=True, stdout=subprocess.PIPE, text=True).stdout
    return answer.strip() or None


def measure(scenario: Scenario, repeats: int, pinned_gib: int) -> dict[str, Any]:
    """Runs a scenario; returns its row (`*_ms`: milliseconds from the reference to the end of the tree)."""
    samples = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as root:
            samples.append(round(Repeat(scenario, Path(root), pinned_gib).measure(), 2))
    row: dict[str, Any] = {
        "scenario": scenario.name,
        "from": scenario.reference,
        "repeats": repeats,
        "min_ms": min(samples),
        "median_ms": round(statistics.median(samples), 2),
        "max_ms": max(samples),
        "late": sum(sample > 0 for sample in samples) if scenario.reference == "paid time" else None,
        "cores": os.cpu_count(),
        "samples_ms": samples,
    }
    if scenario.cuda:
        row |= {"gpu": cuda_device(), "gpu_share": _GPU_SHARE, "pinned_gib": pinned_gib if scenario.pinned else 0}
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints one line a scenario, in milliseconds."""
    print(f"{'scenario':<20} {'ms from':<24} {'n':>3} {'min':>9} {'median':>9} {'max':>9}  late")
    for row in rows:
        figures = " ".join(f"{row[key]:>9.1f}" for key in ("min_ms", "median_ms", "max_ms"))
        late = "-" if row["late"] is None else row["late"]
        print(f"{row['scenario']:<20} {row['from']:<24} {row['repeats']:>3} {figures}  {late:>4}")


def main(arguments: list[str]) -> int:
    """Measures what the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watchdog", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, metavar="N")
    parser.add_argument("--scenarios", nargs="+", choices=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME))
    parser.add_argument("--pinned-gib", type=int, default=16, metavar="N", help="host memory that cuda_pinned pins")
    parser.add_argument("--json", action="store_true", help="one line of JSON a scenario, as soon as it is measured")
    parser.add_argument("--hang", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.hang:
        hang(options.hang[0], Path(options.hang[1]))
        return 0
    chosen = [scenario for scenario in SCENARIOS if options.scenarios is None or scenario.name in options.scenarios]
    if any(scenario.cuda for scenario in chosen) and cuda_device() is None:
        if options.scenarios is not None:
            parser.error("the cuda scenarios need torch and a GPU")
        chosen = [scenario for scenario in chosen if not scenario.cuda]
        print("no torch with CUDA here: the cuda scenarios are left out", file=sys.stderr)
    rows = []
    for scenario in chosen:
        rows.append(measure(scenario, options.repeats, options.pinned_gib))
        if options.json:
            print(json.dumps(rows[-1]), flush=True)
    if not options.json:
        print_table(rows)
    return int(any(row["late"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
