"""The kill campaign: one real study, ten kills -9 at random instants, each charge itemised. Run by `make stress`."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from studies import kill, machine_micros, pids, read, spent, start, wait_for

from budgets.money import usd

ROOT = Path(__file__).parents[2]
KILLS = 10
CAP_MICROS = 80_000
STUDY = "define-words"


class Witness(threading.Thread):
    """Looks at the process table every 10 ms: which workers live, and from when to when their processes were seen."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = str(folder)
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.most = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.01):
            now = time.clock_gettime(time.CLOCK_BOOTTIME)
            workers = set()
            for entry in os.scandir("/proc"):
                if not entry.name.isdecimal():
                    continue
                try:
                    words = Path(entry.path, "cmdline").read_bytes().decode().split("\0")
                except (OSError, UnicodeDecodeError):
                    continue
                if "trainers.worker" in words or "trainers.watchdog" in words:
                    folder = next((w for w in words if w.startswith(self.folder)), None)
                    if folder is not None:
                        self.first.setdefault(folder, now)
                        self.last[folder] = now
                        if "trainers.worker" in words:
                            workers.add(folder)
            self.most = max(self.most, len(workers))


def wasted(found: dict[str, Any], repeated: float, rows: list[tuple[int, float, float, str, int | None]]) -> float:
    """Micro-dollars that the crashes cost beyond the unavoidable start of another worker.

    That is the share of training that was repeated, and time that was charged although nothing ran any more.
    """
    on_trials = sum(m for code, m in found["accounts"].items() if code.startswith("trial:"))
    unused = sum(max(charged - seen, 0.0) for _, charged, seen, _, _ in rows)
    return float(on_trials * repeated + unused * found["workers"][0].micros_per_hour / 3600)


@pytest.mark.stress
@pytest.mark.smollm
@pytest.mark.timeout(1800)
def test_ten_kills_of_one_study(tmp_path: Path) -> None:
    """Proves invariant 5 under random kills, with an independent witness of the machine's time."""
    seed = int(os.environ.get("KILL_SEED", "8"))
    chance = random.Random(seed)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    witness = Witness(tmp_path / "runs" / STUDY / "workers")
    witness.start()
    out = tmp_path / "out.txt"
    cap = f"${CAP_MICROS / 1e6}"
    process = start("launch", "examples/quickstart.yaml", "--yes", "--cap", cap, cwd=tmp_path)
    wait_for(lambda: out.exists() and "is ready" in out.read_text(), seconds=120)
    killed = []
    while len(killed) < KILLS and process.poll() is None:
        time.sleep(chance.uniform(1, 20))
        victim = chance.choice(["orchestrator", "watchdog", "worker"])
        if process.poll() is not None:
            break
        if victim == "orchestrator":
            process.kill()
            process.wait()
            killed.append(victim)
            time.sleep(chance.uniform(0, 5))
            process = start("resume", STUDY, cwd=tmp_path)
        elif kill(pids(tmp_path, STUDY)[victim]):
            killed.append(victim)
    code = process.wait(timeout=600)
    witness.stop.set()
    witness.join()
    text = out.read_text()
    assert code == 0, text[-2000:]
    found = read(tmp_path, STUDY)
    numbers = [trial.number for trial in found["trials"]]
    assert numbers == list(range(len(numbers))) and found["held"] == 0
    assert witness.most == 1, "never two workers alive at once"
    rows = []
    for worker in found["workers"]:
        seen = witness.last[worker.folder] - worker.origin_boot_ms / 1000
        rows.append((worker.ordinal, worker.settled_ms / 1000, seen, worker.why, worker.exit_code))
        # Without a last record up to a heartbeat more is charged than was used.
        assert -0.2 < worker.settled_ms / 1000 - seen < 1.6
    total = machine_micros(found["workers"])
    assert spent(found["accounts"]) == total
    trained = sum(a.tokens - a.from_tokens for a in found["attempts"])
    repeated = trained - sum(t.tokens for t in found["trials"])
    share = wasted(found, repeated / trained, rows) / len(killed) / CAP_MICROS
    figures = {"seed": seed, "kills": killed, "spent": usd(total), "repeated_tokens": repeated}
    print(json.dumps(figures | {"wasted_share_of_cap_per_kill": round(share, 5)}))
    for row in rows:
        print("worker {}: charged {:.3f} s, seen {:.3f} s, {}, exit {}".format(*row))
    assert share < 0.01, "a crash wastes less than a hundredth of the cap"
