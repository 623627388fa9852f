"""A process of a group is killed while a study trains: when the others are gone, what is charged, and how it goes on.

    python -m benchmarks.rank_death MODEL [--victims 1] [--device cuda] [--processes 2] [--folder DIR] [--out FILE]

Run it in the root of a checkout, on Linux. MODEL is a folder whose tokenizer and vocabulary belong together; one with
random weights will do. A study of full-parameter trials (`full: processes: 2`) is launched as `sweep launch` does it,
in `--folder` (by default a new one). For each of `--victims`, a rank (0 is the worker itself), it waits until a trial
trains, kills that rank's process with kill -9, and follows the worker's processes in /proc, asking neither launcher nor
watchdog. When the next worker trains, it is that one's turn; after the last the study is interrupted as by Ctrl-C. It
works on the CPU too (`--device cpu`). One JSON line a victim, printed and appended to `--out`:

    gone_seconds      from the kill until the last process of the worker is gone
    alive_seconds     from where the worker's meter starts, at its launch, until then
    charged_seconds   what the books charge for it, over its price; `charged_right`: within a second of being alive
    exit_code, why    as the watchdog and the ledger have it, and the worker's last words
    again_seconds     from the kill until a trial trains in the next worker; its trial `lost` its slot, and `goes_on`
                      from `from_tokens`, its last checkpoint
    violations        of the ledger's invariants when the study has ended; `study_exit_code` is 130 after Ctrl-C

The exit code is 1 if a process was not gone in time, the charge is wrong, or the study did not go on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy import select

from benchmarks.watchdog import BenchmarkError, find_tree, wait_gone
from budgets.money import MS_PER_HOUR
from budgets.schema import hold, transfer
from sweep import records, tables
from sweep.audit import violations
from sweep.records import WorkerRow
from sweep.store import Store
from trainers import processes
from trainers.full.distributed import NOTICE_S
from trainers.messages import Event, Progress, parse_event

ROOT = Path(__file__).absolute().parents[1]
STUDY = "rank-death"
FOLLOWER = b"trainers.full.distributed"  # in the command line of every process but the first
GIVE_UP_S = 60.0  # after a kill; a worker notices in NOTICE_S, and its memory takes a while to be given back
_LOOK_S = 0.02
_NS_PER_MS = 1_000_000


def spec_of(options: argparse.Namespace) -> dict[str, Any]:
    """A study that trains one long trial after the other, and that nothing but the end of this program ends."""
    machine = {"price": f"${options.price}/hour", "device": options.device, "threads": options.threads}
    return {
        "study": STUDY,
        "model": str(options.model.absolute()),
        "data": {"train": str(ROOT / "examples" / "data" / "define.jsonl"), "max_tokens": 128},
        "machine": machine,
        "budget": {"cap": f"${options.cap}"},
        "search": {
            "method": ["full"],
            "batch_size": [options.batch_size],
            "learning_rate": {"low": 1e-5, "high": 1e-4},
            "epochs": options.epochs,
            "rungs": "none",
        },
        "full": {"processes": options.processes, "checkpointing": False},
        "endgame": {"seeds": 0},
    }


class Study:
    """The study's process, folder and books."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        """Launches it."""
        self.patience = options.patience
        self.folder = folder
        spec = folder / f"{STUDY}.yaml"
        spec.write_text(json.dumps(spec_of(options)))  # JSON is YAML
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "sweep", "launch", str(spec), "--yes", "--anyway"]
        with (folder / "study.log").open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
            )

    @cached_property
    def store(self) -> Store:
        """The study's database, which its process makes."""
        return Store(f"sqlite:///{self.folder}/studies.db")

    def wait(self, found: Callable[[], Any], what: str) -> Any:
        """Waits for something; raises BenchmarkError where it does not come or the study ends."""
        give_up = time.monotonic() + self.patience
        while not (answer := found()):
            if time.monotonic() > give_up:
                raise BenchmarkError(f"waited {self.patience:.0f} s in vain for {what}")
            if self.process.poll() is not None and not found():
                raise BenchmarkError(f"the study ended with exit code {self.process.returncode} before {what}")
            time.sleep(_LOOK_S)
        return answer

    def worker_folder(self, ordinal: int) -> Path:
        """The folder of a worker, the first is 1."""
        return self.folder / "runs" / STUDY / "workers" / f"{ordinal:03d}"

    def progress(self, ordinal: int) -> Progress | None:
        """A worker's last sign of progress."""
        path = self.worker_folder(ordinal) / "events.jsonl"
        said = path.read_bytes() if path.exists() else b""
        events: list[Event] = [parse_event(line.decode()) for line in said.splitlines(True) if line.endswith(b"\n")]
        return next((event for event in reversed(events) if isinstance(event, Progress)), None)

    def worker(self, ordinal: int) -> WorkerRow:
        """A worker's row."""
        with self.store.read() as connection:
            return records.workers(connection, STUDY)[ordinal - 1]

    def ended(self, ordinal: int) -> WorkerRow | None:
        """A worker's row once it is settled."""
        row = self.worker(ordinal)
        return row if row.state == "ended" else None

    def charged(self, worker: WorkerRow) -> int:
        """Micro-dollars that were charged for a worker's holds, refunds taken off."""
        mine = select(hold.c.id).where(hold.c.purpose.like(f"{worker.id} %"))
        with self.store.read() as connection:
            rows = connection.execute(
                select(transfer.c.kind, transfer.c.amount_micros).where(transfer.c.hold_id.in_(mine))
            )
            return sum(-amount if kind == "refund" else amount for kind, amount in rows)

    def attempt(self, identifier: str) -> Any:
        """An attempt's row."""
        with self.store.read() as connection:
            return connection.execute(select(tables.attempt).where(tables.attempt.c.id == identifier)).one()

    def interrupt(self) -> int | None:
        """Ends the study as Ctrl-C does; returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()  # the same to it, and no shell has had it ignored
        try:
            return self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None

    def violations(self) -> list[str]:
        """What is wrong with the books; nothing where there are none."""
        if not (self.folder / "studies.db").exists():
            return []
        with self.store.read() as connection:
            return violations(connection, STUDY)


def command_line(pid: int) -> bytes:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def victim_of(rank: int, worker: int) -> int:
    """The pid of a rank's process. Raises BenchmarkError where there is none."""
    followers = sorted(p.pid for p in find_tree(worker) if FOLLOWER in command_line(p.pid).split(b"\0"))
    everybody = [worker, *followers]  # started in the order of their ranks
    if rank >= len(everybody):
        raise BenchmarkError(f"there is no rank {rank}: the group is {everybody}")
    return everybody[rank]


def kill(study: Study, ordinal: int, rank: int, seconds: float) -> dict[str, Any]:
    """Kills a rank of a worker that trains, and says how it ended and what was charged. Raises BenchmarkError."""
    study.wait(lambda: study.progress(ordinal), f"worker {ordinal} to train")
    time.sleep(seconds)
    pids = json.loads((study.worker_folder(ordinal) / "watchdog.json").read_text())
    watchdog, worker = pids["watchdog"], pids["worker"]
    victim = victim_of(rank, worker)
    # What a process starts bears its pid in the environment: the worker the watchdog's, the others the worker's.
    tree, others = find_tree(watchdog), find_tree(worker)
    last = study.progress(ordinal)
    assert last is not None
    killed_ns = processes.boot_ns()
    os.kill(victim, signal.SIGKILL)
    give_up_ns = killed_ns + round(GIVE_UP_S * 1e9)
    gone_ns = max(wait_gone(others, worker, give_up_ns), wait_gone(tree, watchdog, give_up_ns))
    row = study.wait(lambda: study.ended(ordinal), f"worker {ordinal} to be settled")
    alive = (gone_ns / _NS_PER_MS - row.origin_boot_ms - row.tariff.paid_ms) / 1000
    charged = study.charged(row) * MS_PER_HOUR / row.micros_per_hour / 1000
    words = (study.worker_folder(ordinal) / "worker.log").read_text(errors="replace").strip().splitlines()
    return {
        "victim": rank,
        "pids": len(tree | others),
        "load_seconds": (row.load_ms or 0) / 1000,
        "gone_seconds": round((gone_ns - killed_ns) / 1e9, 3),
        "alive_seconds": round(alive, 3),
        "charged_seconds": round(charged, 3),
        "charged_micros": study.charged(row),
        "charged_right": abs(charged - alive) <= 1.0,
        "exit_code": row.exit_code,
        "why": row.why,
        "last_words": words[-1][:200] if words else "",
        "_killed_ns": killed_ns,
        "_attempt": last.attempt,
        "_trial": last.trial,
    }


def goes_on(study: Study, ordinal: int, line: dict[str, Any]) -> dict[str, Any]:
    """How the study goes on after the death of worker `ordinal`. Raises BenchmarkError."""
    follower = study.wait(lambda: study.progress(ordinal + 1), f"worker {ordinal + 1} to train")
    again_ns = processes.boot_ns()
    lost, now = study.attempt(line["_attempt"]), study.attempt(follower.attempt)
    return {
        "again_seconds": round((again_ns - line["_killed_ns"]) / 1e9, 1),
        "attempt_ended": lost.ended,
        "from_tokens": now.from_tokens,
        "goes_on": lost.ended == "lost" and follower.trial == line["_trial"],
    }


def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Launches the study, kills every victim in turn; returns the lines, the last `failed` where it did not work."""
    common = {"mode": "rank-death", "model": options.model.name, "device": options.device}
    common |= {"processes": options.processes, "price": options.price, "notice_seconds": NOTICE_S}
    lines: list[dict[str, Any]] = []
    study = Study(options, folder)
    try:
        for ordinal, rank in enumerate(options.victims, 1):
            line = kill(study, ordinal, rank, options.seconds)
            lines.append(common | line)
            lines[-1] |= goes_on(study, ordinal, line)
    except (BenchmarkError, AssertionError, OSError, SystemExit) as error:
        lines.append(common | {"failed": str(error)})
        for log in (folder / "study.log", *sorted(folder.glob("runs/*/workers/*/*.log"))):
            sys.stderr.write(f"--- {log}\n" + log.read_text(errors="replace")[-3000:] + "\n")
    finally:
        code = study.interrupt()
    wrong = study.violations()
    shown = [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]
    return [line | {"study_exit_code": code, "violations": wrong} for line in shown]


def right(line: dict[str, Any]) -> bool:
    """Whether everything in a line is as it should be."""
    whole = "failed" not in line and line["study_exit_code"] == 130 and not line["violations"]
    return whole and line["charged_right"] and line.get("goes_on", False)


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_death", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--victims", type=int, nargs="+", default=[1], metavar="RANK")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, help="of the CPU, for each process")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a trial trains before the kill")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=8.0, help="of a trial: it must outlast the wait for the kill")
    parser.add_argument("--price", default="3.99", help="dollars an hour")
    parser.add_argument("--cap", default="2.00", help="dollars: nothing is spent but this machine's time")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait for anything")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the study's database and runs are")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines here")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # and the study with it
    lines = run(options, folder.absolute())
    for line in lines:
        text = json.dumps(line)
        print(text, flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(text + "\n")
    return int(not all(right(line) for line in lines))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
