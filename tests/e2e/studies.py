"""Studies on recorded curves, driven through the real command line in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sqlalchemy import select

from budgets.money import cost_micros
from budgets.schema import account, transfer
from sweep import records, tables
from sweep.audit import violations
from sweep.records import WorkerRow
from sweep.store import Store

CURVES = {
    "slots": {"lora": 1, "full": 1},
    "parameters": 10_000_000,
    "tokens_per_example": 20,
    "train_rows": 2000,
    "validation_rows": 64,
    "validation_tokens": 1300,
    "base_loss": 4.8,
    "default": {
        "floor": 3.0,
        "scale": 1000,
        "best_learning_rate": 2e-3,
        "curvature": 0.3,
        "diverges_above": 8e-3,
    },
}
TIMINGS = {
    "load": 2.0,
    "evaluate": 0.0002,
    "checkpoint": 0.02,
    "restore": 0.02,
    "train": {"lora": 0.001, "full": 0.0015},
}


def sweep(*arguments: str, cwd: Path, check: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs the command line; `check` is the exit code to insist on."""
    command = [sys.executable, "-W", "error", "-m", "sweep", *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )
    if check is not None:
        assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def environment() -> dict[str, str]:
    """The environment of a test's processes: nothing of CI's terminal."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SWEEP_", "FORCE_COLOR"))}


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts the command line in the background; its output goes to a file."""
    with (cwd / "out.txt").open("a") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "sweep", *arguments], cwd=cwd, stdout=out, stderr=out, text=True, env=environment()
        )


def write_spec(
    folder: Path,
    *,
    cap: str,
    timings: bool = False,
    sleep: float = 0.0,
    name: str = "words",
    machine: dict[str, Any] | None = None,
    reserve: str | None = None,
    endgame: dict[str, Any] | None = None,
    **search: Any,
) -> Path:
    """Writes a spec on recorded curves and returns its path.

    `sleep` is real seconds a token; `machine` replaces or adds keys of that section. Without `endgame` nothing is
    confirmed, so that a study is its search alone.
    """
    (folder / "curves.json").write_text(json.dumps(CURVES | {"sleep_seconds_per_token": sleep}))
    (folder / "timings.json").write_text(json.dumps(TIMINGS))
    rented = {"price": "$3.60/hour", "timings": str(folder / "timings.json") if timings else None} | (machine or {})
    spec = {
        "study": name,
        "model": f"replay:{folder / 'curves.json'}",
        "data": {"train": "recorded"},
        "machine": rented,
        "budget": {"cap": cap} | ({"reserve": reserve} if reserve else {}),
        "search": {"epochs": 0.125, "learning_rate": {"low": 1e-5, "high": 1e-2}, "priors": "none"} | search,
        "endgame": endgame or {"seeds": 0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(spec))  # JSON is YAML
    return path


def read(folder: Path, study: str = "words") -> dict[str, Any]:
    """Everything a test compares: trials, losses, accounts, workers; asserts that every invariant holds."""
    store = Store(f"sqlite:///{folder}/studies.db")
    with store.read() as connection:
        assert violations(connection, study) == []
        found = {
            "trials": records.trials(connection, study),
            "evaluations": sorted(tuple(row)[1:7] for row in records.evaluations(connection, study)),
            "study": records.study(connection, study),
            "workers": records.workers(connection, study),
            "attempts": connection.execute(select(tables.attempt)).all(),
            "accounts": {
                row.code: row.balance_micros
                for row in connection.execute(select(account).where(account.c.study == study))
            },
            "held": sum(row.held_micros for row in connection.execute(select(account))),
            "transfers": connection.execute(select(transfer).order_by(transfer.c.seq)).all(),
            "log": [row.text for row in records.log_after(connection, study, 0)],
        }
    store.dispose()
    return found


def spent(accounts: dict[str, int]) -> int:
    """Micro-dollars that left the budget, from the accounts that they went to."""
    inside = {"world", "budget", "reserve", "overrun"}
    return sum(balance for code, balance in accounts.items() if code not in inside)


def machine_micros(workers: list[WorkerRow]) -> int:
    """What the workers' time on the machine's clock costs, each moment once.

    A dead worker may be charged up to a heartbeat beyond its last record, or a whole quantum; one that is launched
    within that time has the rest of it for nothing. Worked out from the clock alone, and not from the tariffs.
    """
    total = until = 0
    for worker in workers:
        end = worker.origin_boot_ms + worker.settled_ms
        total += cost_micros(worker.micros_per_hour, max(end - max(worker.origin_boot_ms, until), 0))
        until = max(until, end)
    return total


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def underway(spec: Path, text: str, cwd: Path) -> subprocess.Popen[str]:
    """Launches a study in the background and waits until it has said `text`."""
    process = start("launch", str(spec), "--yes", cwd=cwd)
    wait_for(lambda: text in (cwd / "out.txt").read_text())
    return process


def pids(folder: Path, study: str = "words") -> dict[str, int]:
    """The pids of the newest worker and its watchdog, as they wrote them down."""
    newest = sorted((folder / "runs" / study / "workers").glob("*/watchdog.json"))[-1]
    return dict(json.loads(newest.read_text()))


def kill(pid: int | None) -> bool:
    """kill -9; says whether there was such a process."""
    if not pid:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def abandon(folder: Path, study: str = "words") -> None:
    """Ends the workers of a study that nobody resumes: on recorded timings no clock does."""
    for path in (folder / "runs" / study / "workers").glob("*/watchdog.json"):
        for pid in json.loads(path.read_text()).values():
            kill(pid)
