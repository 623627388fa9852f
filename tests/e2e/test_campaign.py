"""The long kill campaign: several studies and bare ledgers on one database, anything killed -9 at random instants.

Run by `make stress`; CAMPAIGN_MINUTES (10) on each database, CAMPAIGN_SEED (1). What a killed orchestrator left is
taken over by the next one, which is the reaper too: it settles or expires the holds of workers that died unseen.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from sqlalchemy import func, select
from studies import kill, pids, start, write_spec

from budgets.ledger import BudgetExhausted, HoldClosed, Ledger
from budgets.schema import hold, transfer
from sweep import records
from sweep.audit import violations
from sweep.store import Store

STUDIES, CLERKS = 2, 3
CAP = "$0.2"
CLERKS_CAP = 1_000_000


def clerk(url: str, number: int, seed: int) -> None:
    """Holds, extends and settles for ever, as fast as the database allows; every verb is tried twice."""
    chance, store = random.Random(seed), Store(url)
    for turn in range(10**9):
        name, amount = f"c{number}-{seed}-{turn}", chance.randint(1_000, 400_000)
        used = chance.randint(1, 999)  # little, so that clerks that die before the refund do not use the cap up
        try:
            for _ in range(2):
                with store.write() as connection:
                    Ledger(connection, "clerks").hold(name, amount, fence=number, purpose="load")
            for _ in range(2):
                with store.write() as connection:
                    ledger = Ledger(connection, "clerks")
                    ledger.settle(name, {"trial:1": used, "idle": 1}, fence=number)
            for code, amount in (("idle", 1), ("trial:1", used)):
                with store.write() as connection:
                    Ledger(connection, "clerks").refund(f"settle:{name}:{code}", amount, note="load")
        except BudgetExhausted:
            time.sleep(0.01)
        except HoldClosed:
            pass  # the machine was so busy that the reaper took us for dead: what it decided stands


def reaper(url: str) -> None:
    """Expires the holds of clerks that died: a hold that stood open for two looks, a second apart, is an orphan's."""
    store = Store(url)
    before: set[str] = set()
    while True:
        with store.read() as connection:
            held = set(Ledger(connection, "clerks").open_holds())
        for name in sorted(held & before):
            with store.write() as connection:
                row = connection.execute(select(hold).where(hold.c.id == name)).one()
                if row.state == "open":
                    ledger = Ledger(connection, "clerks")
                    ledger.expire(name, {"idle": 1}, fence=row.fence, note="its clerk is gone")
                    ledger.refund(f"expire:{name}:idle", row.amount_micros, note="load")
        before = held
        time.sleep(1)


class Campaign:
    """What runs, what was killed, and what the audits saw."""

    def __init__(self, url: str, root: Path, seed: int) -> None:
        self.url, self.root, self.chance = url, root, random.Random(seed)
        self.store = Store(url, create=True)
        with self.store.write() as connection:
            Ledger(connection, "clerks").open(CLERKS_CAP)
        self.kills: Counter[str] = Counter()
        self.exits: Counter[int] = Counter()
        self.audits = self.peak_ppm = self.launched = self.given_up = 0
        self.found: list[str] = []
        self.sweeps: dict[str, subprocess.Popen[str]] = {}
        self.clerks: list[BaseProcess] = []
        self.reaper: BaseProcess | None = None

    def folder(self, name: str) -> Path:
        """Where a study runs."""
        return self.root / name

    def tend(self) -> None:
        """Starts what is missing: studies, orchestrators of killed studies, clerks, the reaper."""
        for name, process in list(self.sweeps.items()):
            code = process.poll()
            if code == -signal.SIGKILL or self.gave_up(name, code):
                self.sweeps[name] = start("resume", name, "--storage", self.url, cwd=self.folder(name))
            elif code is not None:
                self.exits[code] += 1
                assert code in {0, 3}, (self.folder(name) / "out.txt").read_text()[-2000:]
                del self.sweeps[name]
        while len(self.sweeps) < STUDIES:
            self.launched += 1
            name = f"s{self.launched}"
            self.folder(name).mkdir()
            spec = write_spec(self.folder(name), cap=CAP, sleep=0.0008, name=name)
            arguments = ("launch", str(spec), "--yes", "--storage", self.url)
            self.sweeps[name] = start(*arguments, cwd=self.folder(name))
        self.clerks = [process for process in self.clerks if process.is_alive()]
        context = multiprocessing.get_context("spawn")
        while len(self.clerks) < CLERKS:
            arguments = (self.url, len(self.clerks), self.chance.randrange(10**9))
            self.clerks.append(context.Process(target=clerk, args=arguments, daemon=True))
            self.clerks[-1].start()
        if self.reaper is None or not self.reaper.is_alive():
            self.reaper = context.Process(target=reaper, args=(self.url,), daemon=True)
            self.reaper.start()

    def gave_up(self, name: str, code: int | None) -> bool:
        """Whether the sweep left because its workers died three times in a row, as they do here: it is resumed."""
        text = (self.folder(name) / "out.txt").read_text() if code == 1 else ""
        found = "times and nothing that it trained was kept" in text.rsplit("\nsweep: ", 1)[-1]
        self.given_up += int(found)
        return found

    def strike(self) -> None:
        """Kills one process."""
        victim = self.chance.choice(["orchestrator", "watchdog", "worker", "clerk", "clerk", "clerk", "reaper"])
        if victim == "clerk":
            struck = kill(self.chance.choice(self.clerks).pid)
        elif victim == "reaper":
            struck = self.reaper is not None and kill(self.reaper.pid)
        else:
            name = self.chance.choice(list(self.sweeps))
            if victim == "orchestrator":
                process = self.sweeps[name]
                # One that was not stored yet would have to be launched again, not resumed.
                struck = self.stored(name) and process.poll() is None and kill(process.pid)
                process.wait() if struck else None
            else:
                known = list((self.folder(name) / "runs" / name / "workers").glob("*/watchdog.json"))
                struck = bool(known) and kill(pids(self.folder(name), name)[victim])
        self.kills[victim] += int(struck)

    def stored(self, name: str) -> bool:
        """Whether the study is in the database."""
        with self.store.read() as connection:
            return name in records.study_names(connection)

    def audit(self) -> None:
        """Every invariant of every study, in one snapshot each, while all run."""
        with self.store.read() as connection:
            names = records.study_names(connection)
            for name in names:
                self.found += [f"{name}: {sentence}" for sentence in violations(connection, name)]
            for name in [*names, "clerks"]:
                balances = Ledger(connection, name).balances()
                self.peak_ppm = max(self.peak_ppm, (balances.spent + balances.held) * 1_000_000 // balances.cap)
                if balances.spent + balances.held > balances.cap or balances.overrun:
                    self.found.append(f"{name}: {balances}")
        self.audits += 1

    def finish(self) -> dict[str, object]:
        """Lets the studies end and returns the figures."""
        for process in [*self.clerks, *([self.reaper] if self.reaper else [])]:
            process.kill()
            process.join()
        for name in list(self.sweeps):
            while (code := self.sweeps[name].wait(timeout=400)) == -signal.SIGKILL or self.gave_up(name, code):
                self.sweeps[name] = start("resume", name, "--storage", self.url, cwd=self.folder(name))
            self.exits[code] += 1
        self.audit()
        with self.store.read() as connection:
            holds = connection.execute(select(func.count()).select_from(hold)).scalar_one()
            transfers = connection.execute(select(func.count()).select_from(transfer)).scalar_one()
            still = connection.execute(
                select(func.count()).where(hold.c.state == "open", hold.c.study != "clerks")
            ).scalar_one()
        self.store.dispose()
        return {
            "kills": dict(self.kills) | {"all": self.kills.total()},
            "studies": self.launched,
            "given_up_and_resumed": self.given_up,
            "exits": dict(self.exits),
            "holds": holds,
            "transfers": transfers,
            "open_holds_of_studies": still,
            "audits": self.audits,
            "violations": len(self.found),
            "peak_share_of_cap": self.peak_ppm / 1_000_000,
        }


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_kills_of_anything_under_load(tmp_path: Path, storage: str) -> None:
    """Proves F2: whatever is killed, no committed state spends or holds more than the cap, and every study ends."""
    seed, minutes = int(os.environ.get("CAMPAIGN_SEED", "1")), float(os.environ.get("CAMPAIGN_MINUTES", "10"))
    campaign = Campaign(storage, tmp_path, seed)
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        campaign.tend()
        time.sleep(campaign.chance.uniform(0.1, 3.0))
        campaign.strike()
        campaign.audit()
    campaign.tend()
    figures = campaign.finish()
    print(json.dumps({"database": storage.partition(":")[0], "seed": seed, "minutes": minutes} | figures))
    assert campaign.found == []
    assert figures["open_holds_of_studies"] == 0
