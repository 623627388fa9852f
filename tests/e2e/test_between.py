"""What happens between two steps: a worker that dies after a rung and before its decision, money between two phases."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from studies import kill, pids, read, spent, start, sweep, wait_for, write_spec

from sweep import records

ALWAYS = """
class Always:
    shares = (0.1, 0.9)

    def goes_on(self, trial, rung, losses):
        return True
"""


def events(folder: Path) -> str:
    """What the first worker said."""
    path = folder / "runs" / "words" / "workers" / "001" / "events.jsonl"
    return path.read_text() if path.exists() else ""


def left_alone(folder: Path, spec: Path, word: str, said: str) -> None:
    """Starts a study, kills the orchestrator when it said `word`, and worker and watchdog when the worker `said`."""
    driven = start("launch", str(spec), "--yes", cwd=folder)
    wait_for(lambda: word in (folder / "out.txt").read_text())
    driven.kill()
    driven.wait()
    wait_for(lambda: said in events(folder))
    for pid in pids(folder).values():
        kill(pid)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_decision_about_a_trial_that_lost_its_slot(tmp_path: Path, method: str) -> None:
    """Proves that a trial which is promoted after its worker died waits for a slot, and does not live without one."""
    (tmp_path / "always.py").write_text(ALWAYS)
    spec = write_spec(tmp_path, cap="$0.5", sleep=4e-4, trials=2, method=[method], rungs="always:Always", live=1)
    left_alone(tmp_path, spec, "trial 0 starts", '"evaluated"')
    sweep("resume", "words", cwd=tmp_path, timeout=60)
    found = read(tmp_path)
    assert [trial.state for trial in found["trials"]] == ["completed", "completed"] and len(found["workers"]) == 2


def test_who_was_parked_during_its_last_evaluation_is_judged_by_it(tmp_path: Path) -> None:
    """Proves that a trial which comes to its end after the projection had parked it is completed, and once."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=3e-4, trials=2, rungs=[0.5], live=1, promote="halving")
    left_alone(tmp_path, spec, "goes on at", '"final":true')
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        connection.execute("UPDATE sweep_trial SET state = 'paused', reason = 'parked: ...' WHERE state = 'live'")
    connection.close()
    sweep("resume", "words", cwd=tmp_path, timeout=60)
    found = read(tmp_path)
    last = {row[0]: row[1] for row in found["evaluations"]}
    assert max(last.values()) == 1 and any(trial.state == "completed" for trial in found["trials"])


def test_a_raised_cap_leaves_the_endgame_its_money(tmp_path: Path) -> None:
    """Proves that what is left of a reserve which was released for the race is not searched with after a raise."""
    ending: dict[str, Any] = {"seeds": 2, "configurations": 1}
    spec = write_spec(tmp_path, cap="$0.06", sleep=4e-4, reserve="$0.03", rungs=[0.2, 0.5], live=2, endgame=ending)
    driven = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: "the search is over" in (tmp_path / "out.txt").read_text(), 90)
    driven.send_signal(signal.SIGINT)
    assert driven.wait(60) == 130
    before = read(tmp_path)
    left = 60_000 - spent(before["accounts"])
    assert before["study"].phase == "endgame" and left > 20_000
    sweep("resume", "words", "--cap", "$0.064", cwd=tmp_path, timeout=120)
    found = read(tmp_path)
    moved = [row.amount_micros for row in found["transfers"] if (row.debit, row.credit) == ("budget", "reserve")]
    assert moved[-1] == left + 2_000
    confirmed = [trial for trial in records.confirmations(found["trials"]) if trial.state == "completed"]
    assert len({trial.run[1] for trial in confirmed}) >= 2, "both seeds are paid for"


def test_a_raised_cap_keeps_the_worker_that_lives(tmp_path: Path) -> None:
    """Proves that a worker in its last slice, whose orchestrator died, is paid on when there is more money: on a GPU
    another one would be loaded for a minute."""
    spec = write_spec(tmp_path, cap="$0.022", sleep=0.001, trials=6, live=1)
    driven = start("launch", str(spec), "--yes", "--anyway", cwd=tmp_path)
    wait_for(lambda: '"progress"' in events(tmp_path))
    driven.kill()
    driven.wait()
    assert read(tmp_path)["workers"][0].final
    sweep("resume", "words", "--cap", "$0.1", cwd=tmp_path)
    found = read(tmp_path)
    assert len(found["workers"]) == 1
    assert [trial.state for trial in found["trials"]].count("completed") >= 2


@pytest.mark.alone
def test_the_worker_of_the_search_goes_on_with_the_race(tmp_path: Path) -> None:
    """Proves that a search whose last slice is used up ends before its worker does, which would have to be loaded anew:
    writes are so slow here that the end of a slice is kept back for them while trials could still be paid."""
    ending = {"seeds": 2, "configurations": 1}
    usual = {"method": ["lora"], "rungs": [0.2], "live": 2, "machine": {"slots": 4}}
    spec = write_spec(tmp_path, cap="$0.05", reserve="$0.02", sleep=4e-4, endgame=ending, **usual)
    recording = json.loads((tmp_path / "curves.json").read_text()) | {"sleep_seconds_per_checkpoint": 0.8}
    (tmp_path / "curves.json").write_text(json.dumps(recording | {"slots": {"lora": 4, "full": 1}}))
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    assert any("parked: the cap was reached" in text for text in found["log"])
    assert len(found["workers"]) == 1
    states = [trial.state for trial in records.confirmations(found["trials"])]
    assert len(states) >= 2 and set(states) == {"completed"}, "both seeds, and more where money is left"


def test_the_same_cap_again_does_not_reopen_a_race(tmp_path: Path) -> None:
    """Proves that a resume with the cap that there is goes on with the race, and asks for nobody new."""
    spec = write_spec(tmp_path, cap="$0.1", timings=True, trials=3, endgame={"seeds": 2, "configurations": 1})
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    before = read(tmp_path)
    sweep("resume", "words", "--cap", "$0.1", cwd=tmp_path)
    after = read(tmp_path)
    assert after["study"].phase == "endgame"
    assert len(records.searched(after["trials"])) == len(records.searched(before["trials"])) == 3


def test_a_method_that_comes_to_nothing_leaves_the_money_to_the_other(tmp_path: Path) -> None:
    """Proves that neither divergence nor a lack of memory of all full-parameter trials ends the search of LoRA."""
    for name, lost in (("nan", {"diverges_above": 1e-9}), ("memory", {"out_of_memory": True})):
        folder = tmp_path / name
        folder.mkdir()
        spec = write_spec(folder, cap="$0.05", timings=True, method=["lora", "full"])
        curves = json.loads((folder / "curves.json").read_text())
        full = {**curves["default"], "match": {"method": "full"}, **lost}
        (folder / "curves.json").write_text(json.dumps(curves | {"curves": [full]}))
        sweep("launch", str(spec), "--yes", cwd=folder)
        found = read(folder)
        methods = [trial.config.method for trial in found["trials"]]
        assert methods.count("lora") >= 8 and spent(found["accounts"]) > 40_000, name
        assert 1 <= methods.count("full") <= 60, name
        assert any(t.state == "completed" and t.config.method == "lora" for t in found["trials"])
