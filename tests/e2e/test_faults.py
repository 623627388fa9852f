"""Faults of processes and of the database while a whole study runs, through the real command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from beancount import loader
from sqlalchemy import create_engine, text
from studies import environment, kill, pids, read, spent, start, sweep, underway, wait_for, write_spec

from budgets.ledger import Ledger
from sweep import records
from sweep.launchers.local import LocalLauncher
from sweep.store import Store

CRASH_AT = Path(__file__).with_name("crash_at.py")


def outcome(folder: Path) -> tuple[object, ...]:
    """What must not depend on crashes: what was asked, how each trial ended, what was measured."""
    found = read(folder)
    asked = [(t.number, t.config, t.state, t.loss, t.full_loss, t.told) for t in found["trials"]]
    return asked, found["evaluations"]


def crash_once(folder: Path, commit: int, when: str) -> bool:
    """Launches a study that dies at a commit, then resumes it; False if the study ended before."""
    folder.mkdir()
    spec = write_spec(folder, cap="$5", timings=True, trials=4, method=["lora", "full"])
    command = [sys.executable, str(CRASH_AT), str(commit), when, "launch", str(spec), "--yes"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return False
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = sweep("resume", "words", cwd=folder, check=None)
    if again.returncode == 4:  # it died before the study was stored: launching it again is the way on
        assert commit <= 3
        sweep("launch", str(spec), "--yes", cwd=folder)
    else:
        assert again.returncode == 0, again.stderr
    return True


def check_crashes(tmp_path: Path, points: list[tuple[int, str]]) -> int:
    """Proves for each point that the study ends as one that was never killed, with every cent charged once."""
    whole = tmp_path / "whole"
    assert not crash_once(whole, 10**9, "before")
    expected = outcome(whole)
    crashed = 0
    for commit, when in points:
        folder = tmp_path / f"{commit}-{when}"
        if not crash_once(folder, commit, when):
            break
        crashed += 1
        assert outcome(folder) == expected, f"crashed {when} commit {commit}"
        found = read(folder)
        assert found["held"] == 0
        assert spent(found["accounts"]) == sum(w.tariff.cost(w.settled_ms) for w in found["workers"])
    return crashed


def test_an_orchestrator_that_dies_at_a_commit_changes_nothing(tmp_path: Path) -> None:
    """Proves F3 at a few points: asked and not stored, held and not launched, launched and not noted, settled and not
    told. `make stress` takes every commit of the study."""
    assert check_crashes(tmp_path, [(6, "after"), (17, "before"), (41, "after")]) == 3


@pytest.mark.stress
@pytest.mark.timeout(3600)
def test_an_orchestrator_that_dies_at_any_commit_changes_nothing(tmp_path: Path) -> None:
    """Proves F3 before and after every commit of a study, Optuna's included."""
    points = [(commit, when) for commit in range(1, 10_000) for when in ("before", "after")]
    crashed = check_crashes(tmp_path, points)
    print(json.dumps({"crash_points": crashed, "outcomes": 1}))
    assert crashed > 100


def test_a_wrong_wall_clock_changes_nothing(tmp_path: Path) -> None:
    """Proves F13 and F16: with a clock that jumps by days and to 1970, in another time zone, the study asks, measures
    and charges the same; its books still add up under beancount."""
    outcomes = []
    for name, script in (("right", []), ("wrong", [str(CRASH_AT.with_name("wrong_clock.py"))])):
        folder = tmp_path / name
        folder.mkdir()
        spec = write_spec(folder, cap="$5", timings=True, trials=4)
        command = [sys.executable, *(script or ["-m", "sweep"]), "launch", str(spec), "--yes"]
        zone = environment() | ({"TZ": "Pacific/Kiritimati"} if script else {})
        subprocess.run(command, cwd=folder, env=zone, capture_output=True, check=True)
        found = read(folder)
        moved = [(t.seq, t.kind, t.debit, t.credit, t.amount_micros) for t in found["transfers"]]
        outcomes.append((outcome(folder), moved, [w.settled_ms for w in found["workers"]]))
        books = sweep("statement", "words", "--format", "beancount", cwd=folder).stdout
        assert loader.load_string(books)[1] == []
    assert outcomes[0] == outcomes[1]


def test_an_orchestrator_that_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    """Proves F5: under a newer fence the old orchestrator's next settlement is refused, and it leaves with exit 6."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.002, trials=4)
    process = underway(spec, "trial 0 starts", tmp_path)
    out = tmp_path / "out.txt"
    store = Store(f"sqlite:///{tmp_path}/studies.db")
    with store.write() as connection:  # what another machine would do, on which no file lock says that we are here
        study = records.study(connection, "words")
        records.set_study(connection, "words", fence=study.fence + 1)
        Ledger(connection, "words").take_over(study.fence + 1)
    store.dispose()
    assert process.wait(timeout=60) == 6
    assert "took study words over" in out.read_text()
    sweep("resume", "words", cwd=tmp_path)
    found = read(tmp_path)
    assert found["held"] == 0 and len(found["trials"]) == 4


def test_a_worker_that_lives_without_progress_is_not_paid_on(tmp_path: Path) -> None:
    """Proves F24: the watchdog's heartbeat goes on, the trainer stands still; its time is not renewed, it is dead at
    paid_ms, charged, and the study goes on with another worker."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=4)
    process = underway(spec, "promoted", tmp_path)
    os.kill(pids(tmp_path)["worker"], signal.SIGSTOP)
    assert process.wait(timeout=150) == 0
    first, second = read(tmp_path)["workers"]
    assert first.why == "paid_until" and first.settled_ms <= first.paid_ms
    usage = [json.loads(line) for line in (Path(first.folder) / "usage.jsonl").read_text().splitlines()]
    assert usage[-1]["ended"] and usage[-1]["ms"] == first.settled_ms
    assert second.exit_code == 0


def test_a_worker_that_always_dies_before_it_keeps_anything_is_given_up(tmp_path: Path) -> None:
    """Proves that where each worker trains and dies before its first checkpoint, the third is the last.

    Most of the cap is left: steps that are taken again and again are no progress.
    """
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.02, trials=2, rungs="none", machine={"slots": 1})
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    workers = tmp_path / "runs" / "words" / "workers"
    for number in (1, 2, 3):
        events = workers / f"{number:03d}" / "events.jsonl"
        wait_for(lambda events=events: events.exists() and '"progress"' in events.read_text())
        kill(pids(tmp_path)["worker"])
    assert process.wait(timeout=60) == 1
    last = (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert "died 3 times and nothing that it trained was kept" in last and "sweep resume words" in last
    assert spent(read(tmp_path)["accounts"]) < 100_000


def test_a_trial_that_crashes_its_workers_fails_alone(tmp_path: Path) -> None:
    """Proves that who ends every worker that it trains in, here in a pack of four, is found out.

    After two crashes each trains alone until its next checkpoint; who crashes another worker alone has failed.
    """
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.001, trials=5, rungs="none")
    curves = json.loads((tmp_path / "curves.json").read_text())
    curves |= {"slots": {"lora": 4, "full": 1}}
    curves["curves"] = [{"match": {"number": 0}, "crashes_at": 12, **curves["default"]}]
    (tmp_path / "curves.json").write_text(json.dumps(curves))
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    culprit, *others = found["trials"]
    assert culprit.state == "failed"
    assert culprit.reason.startswith("its workers crashed 3 times, the last one with it alone (error: RuntimeError: ")
    assert [trial.state for trial in others] == ["completed"] * 4
    crashed = [attempt.trial for attempt in found["attempts"] if attempt.ended == "crashed"]
    assert not crashed, "the others are above suspicion"
    assert [worker.exit_code for worker in found["workers"]] == [1, 1, 1, 0]


@pytest.mark.stress
def test_a_stopped_watchdog_is_ended_by_the_orchestrator(tmp_path: Path) -> None:
    """Proves that nobody spends on behind a watchdog that hangs: both are killed soon after the paid time."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=4)
    process = underway(spec, "promoted", tmp_path)
    both = pids(tmp_path)
    for victim in ("watchdog", "worker"):
        os.kill(both[victim], signal.SIGSTOP)
    assert process.wait(timeout=150) == 0
    first, _ = read(tmp_path)["workers"]
    assert first.settled_ms < first.paid_ms + 10_000


def test_a_watchdog_that_died_alone_is_charged_to_its_last_heartbeat(tmp_path: Path) -> None:
    """Proves that a slice without a last record is settled to the heartbeats: at most one more than was used."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.001, trials=3)
    process = underway(spec, "trial 0 starts", tmp_path)
    process.kill()
    process.wait()
    (worker,) = read(tmp_path)["workers"]
    kill(pids(tmp_path)["watchdog"])
    died = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000 - worker.origin_boot_ms
    time.sleep(4)
    sweep("resume", "words", "--cap", "$0.3", cwd=tmp_path, check=None)
    first = read(tmp_path)["workers"][0]
    assert "a heartbeat after" in first.why
    assert died - 100 <= first.settled_ms <= died + 1_500 < first.paid_ms


def test_a_death_that_nobody_saw_is_charged_to_its_last_heartbeat(tmp_path: Path) -> None:
    """Proves that an orchestrator that was suspended while the watchdog died does not take its waking for the end."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.001, trials=40)
    process = underway(spec, "trial 0 starts", tmp_path)
    time.sleep(1.5)
    (worker,) = read(tmp_path)["workers"]
    os.kill(process.pid, signal.SIGSTOP)
    kill(pids(tmp_path)["watchdog"])
    died = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000 - worker.origin_boot_ms
    time.sleep(8)
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: "worker 2 starts" in (tmp_path / "out.txt").read_text())
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    first, second = read(tmp_path)["workers"]
    assert died - 100 <= first.settled_ms <= died + 1_500, first.why
    assert second.origin_boot_ms > worker.origin_boot_ms + died + 4_000, "nor does the next one pay for the silence"


def test_a_lock_that_is_waited_for_at_a_launch_is_not_paid_for(tmp_path: Path) -> None:
    """Proves that a worker's meter starts when its hold is made: a backup that locks the database costs nothing.

    The lock is taken just before the launch, and held until half of what the first slice pays for is over.
    """
    spec = write_spec(tmp_path, cap="$0.10", sleep=0.0001, trials=1)
    hook = tmp_path / "hook.py"
    hook.write_text(
        """
import sqlite3, sys, threading
from sweep import workers
from sweep.cli import main

real, held = workers.Workers.lengths, []

def lengths(self, gap_ms=0):
    found = real(self, gap_ms)
    if sys._getframe(1).f_code.co_name == "launch" and not held:
        held.append(sqlite3.connect("studies.db", isolation_level=None, check_same_thread=False))
        held[0].execute("BEGIN IMMEDIATE")
        threading.Timer(8, held[0].execute, ["ROLLBACK"]).start()
    return found

workers.Workers.lengths = lengths
main()
"""
    )
    command = [sys.executable, str(hook), "launch", str(spec), "--yes"]
    subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, check=True)
    (worker,) = read(tmp_path)["workers"]
    assert worker.load_ms is not None and worker.load_ms < 5_000


def test_what_expired_is_refunded_when_a_record_turns_up(tmp_path: Path) -> None:
    """Proves item 4 of the ledger: without any record the slice is charged in full, on evidence the rest returns."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.001, trials=3)
    process = underway(spec, "trial 0 starts", tmp_path)
    out = tmp_path / "out.txt"
    process.kill()
    process.wait()
    (worker,) = read(tmp_path)["workers"]
    usage = Path(worker.folder) / "usage.jsonl"
    wait_for(lambda: '"ended":true' in usage.read_text().replace(" ", ""), seconds=60)
    kill(pids(tmp_path)["watchdog"])  # it waits for a release that nobody sends
    record = usage.read_bytes()
    used = json.loads(record.splitlines()[-1])["ms"]
    usage.unlink()  # the folder was out of reach
    # A worker that starts within the time that is charged would use the rest of it up.
    over = (worker.origin_boot_ms + worker.paid_ms) / 1000
    wait_for(lambda: time.clock_gettime(time.CLOCK_BOOTTIME) > over)
    resume = start("resume", "words", cwd=tmp_path)
    wait_for(lambda: "worker 2 starts" in out.read_text())
    resume.send_signal(signal.SIGINT)
    resume.wait(timeout=60)
    before = read(tmp_path)
    charged = before["workers"][0]
    assert charged.settled_ms == charged.paid_ms > used
    assert any("charged in full" in entry for entry in before["log"])
    usage.write_bytes(record)
    sweep("resume", "words", cwd=tmp_path)
    found = read(tmp_path)
    assert found["workers"][0].settled_ms == used
    assert any(row.kind == "refund" and row.reverses_id for row in found["transfers"])
    assert spent(found["accounts"]) == sum(w.tariff.cost(w.settled_ms) for w in found["workers"])


def test_an_old_copy_of_the_database_is_noticed(tmp_path: Path) -> None:
    """Proves F12: a copy without its write-ahead log is consistent, and yet the audit refuses it with exit 5."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=4)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    database, out = tmp_path / "studies.db", tmp_path / "out.txt"
    wait_for(lambda: out.exists() and "starts" in out.read_text())
    copy = database.read_bytes()  # without studies.db-wal, as a careless backup does it
    assert process.wait(timeout=90) == 0
    for path in tmp_path.glob("studies.db*"):
        path.unlink()
    database.write_bytes(copy)
    refused = sweep("audit", "words", cwd=tmp_path, check=None)
    assert refused.returncode in {4, 5}, refused.stderr
    assert refused.returncode == 4 or "-wal" in refused.stderr
    assert sweep("resume", "words", cwd=tmp_path, check=None).returncode == refused.returncode


def test_a_study_outlives_a_restart_of_postgresql(tmp_path: Path, own_postgres: tuple[str, Callable[[], None]]) -> None:
    """Proves F9 and F10 for a whole study: its connections are cut, the server restarts; it goes on by itself."""
    url, restart = own_postgres
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0008, trials=5)
    process = start("launch", str(spec), "--yes", "--storage", url, cwd=tmp_path)
    out = tmp_path / "out.txt"
    wait_for(lambda: out.exists() and "starts" in out.read_text())
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        everyone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        connection.execute(text(everyone + " AND backend_type = 'client backend'"))
    engine.dispose()
    wait_for(lambda: "trying again" in out.read_text())
    time.sleep(1)
    restart()
    assert process.wait(timeout=120) == 0, out.read_text()[-2000:]
    assert sweep("audit", "words", "--storage", url, cwd=tmp_path).stderr == ""
    status = json.loads(sweep("status", "words", "--json", "--storage", url, cwd=tmp_path).stdout)
    assert status["trials"] == 5 and status["held"]["micros"] == 0


def test_a_resume_hours_later_pays_for_nothing_in_between(tmp_path: Path) -> None:
    """Proves that the time between a crash and the resume is nobody's where the launch starts the meter, and that the
    next worker's meter starts at its own launch."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=3)
    process = underway(spec, "trial 0 starts", tmp_path)
    process.kill()
    process.wait()
    for victim in pids(tmp_path).values():
        kill(victim)
    time.sleep(6)
    before = time.clock_gettime(time.CLOCK_BOOTTIME) * 1000
    sweep("resume", "words", cwd=tmp_path)
    found = read(tmp_path)
    first, second = found["workers"]
    assert second.origin_boot_ms >= before > first.origin_boot_ms + first.settled_ms + 3_000
    assert second.why == "stop" and all(trial.state in {"completed", "paused", "pruned"} for trial in found["trials"])


def test_a_price_that_changed_while_nobody_drove_reaches_the_living_worker(tmp_path: Path) -> None:
    """Proves that a resume applies a price that was said in between to the worker that it takes over."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.001, trials=3)
    process = underway(spec, "trial 0 starts", tmp_path)
    process.kill()
    process.wait()
    sweep("reprice", "words", "$7.20/hour", cwd=tmp_path)
    sweep("resume", "words", cwd=tmp_path)
    found = read(tmp_path)
    prices = [[price for price, _ in w.tariff.pieces(w.settled_ms)] for w in found["workers"]]
    assert prices[0] == [3_600_000, 7_200_000] and all(p == [7_200_000] for p in prices[1:])


def test_a_price_that_changed_while_nobody_drove_is_charged_to_a_worker_that_ended_before_the_resume(
    tmp_path: Path,
) -> None:
    """Proves that the dead worker's meter splits at each price that was said while it lived, and at none after."""
    spec = write_spec(tmp_path, cap="$5", sleep=0.001, trials=6)
    process = underway(spec, "trial 0 starts", tmp_path)
    process.kill()
    process.wait()
    sweep("reprice", "words", "$7.20/hour", cwd=tmp_path)
    sweep("reprice", "words", "$10.80/hour", cwd=tmp_path)
    time.sleep(0.5)
    LocalLauncher().stop(tmp_path / "runs" / "words" / "workers" / "001")
    time.sleep(2.5)
    sweep("reprice", "words", "$14.40/hour", cwd=tmp_path)
    resume = start("resume", "words", cwd=tmp_path)
    wait_for(lambda: "worker 2 starts" in (tmp_path / "out.txt").read_text())
    resume.send_signal(signal.SIGINT)
    resume.wait(timeout=60)
    found = read(tmp_path)
    first, second = found["workers"]
    assert [price for price, _ in first.tariff.pieces(first.settled_ms)] == [3_600_000, 7_200_000, 10_800_000]
    assert second.tariff.prices == ((0, 14_400_000),)
    assert spent(found["accounts"]) == sum(w.tariff.cost(w.settled_ms) for w in found["workers"])


def test_what_an_erased_database_left_is_not_taken_over(tmp_path: Path) -> None:
    """Proves that a study under the name of one whose database is gone is refused before anything is paid."""
    spec = write_spec(tmp_path, cap="$0.02", timings=True, trials=2)
    sweep("launch", str(spec), "--yes", cwd=tmp_path, check=None)
    for path in tmp_path.glob("studies.db*"):
        path.unlink()
    refused = sweep("launch", str(spec), "--yes", cwd=tmp_path, check=2)
    assert "another study's" in refused.stderr and "--study" in refused.stderr


def test_the_machine_is_stopped_once_and_last(tmp_path: Path) -> None:
    """Proves that the stop command runs after the endgame's worker, not between two workers, and after a failure."""
    mark = tmp_path / "stopped"
    machine = {"stop_command": f"date +%s%N >> {mark}"}
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=3, machine=machine)
    process = underway(spec, "promoted", tmp_path)
    out = tmp_path / "out.txt"
    kill(pids(tmp_path)["worker"])
    assert process.wait(timeout=90) == 0
    wait_for(mark.exists, seconds=20)
    ended = [line for line in out.read_text().splitlines() if " ended after " in line]
    assert len(ended) == 2 and len(mark.read_text().splitlines()) == 1
