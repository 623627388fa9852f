"""A search that has enough, through the real command line: what is kept, what is said, what a raised cap does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from studies import TIMINGS, read, spent, sweep, write_spec
from test_endgame import checked

from sweep import records


def a_spec(folder: Path, stop: object, *, seeds: int = 0) -> Path:
    """A study that could ask for sixty trials, with what it says about having enough."""
    path = write_spec(
        folder,
        cap="$1",
        timings=True,
        rungs=[0.2],
        method=["lora"],
        trials=60,
        endgame={"seeds": seeds},
        reserve="$0.1",
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop": stop}))
    return path


@pytest.mark.parametrize("stop", ["patience", {"utility": {"dollars_per_percent": "$0.0001"}}])
def test_the_rest_of_the_cap_is_kept(tmp_path: Path, stop: object) -> None:
    """Proves the main job: the search ends with money left, and the last line, `status` and the log say why."""
    done = sweep("launch", str(a_spec(tmp_path, stop)), "--yes", cwd=tmp_path)
    found = checked(tmp_path)
    left = 1_000_000 - spent(found["accounts"])
    assert left > 500_000 and len(found["trials"]) < 60
    assert "the search had enough:" in done.stderr and "of the cap stay with you" in done.stderr
    assert any(text.startswith("the search has enough:") for text in found["log"])
    assert sum(text.startswith("the search has enough:") for text in found["log"]) == 1
    status = json.loads(sweep("status", "--json", cwd=tmp_path).stdout)
    assert status["stopped"] and status["left"]["micros"] == left
    assert "the search had enough" in sweep("status", cwd=tmp_path).stdout
    sweep("resume", "words", cwd=tmp_path)
    assert len(read(tmp_path)["trials"]) == len(found["trials"]), "a resume alone changes nothing"


def test_confirmation_has_its_reserve_and_no_more_and_a_raised_cap_goes_on(tmp_path: Path) -> None:
    """Proves that what the search leaves is not spent on further seeds, and that more money reopens the search."""
    stop = {"patience": {"trials": 5}}
    spec = a_spec(tmp_path, stop, seeds=20)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    before = checked(tmp_path)
    raced = [t.number for t in records.confirmations(before["trials"])]
    cost = sum(before["accounts"].get(f"trial:{number}", 0) for number in raced)
    assert raced and cost <= 100_000
    sweep("resume", "words", "--cap", "$1.2", cwd=tmp_path)
    after = checked(tmp_path)
    assert len(records.searched(after["trials"])) >= len(records.searched(before["trials"])) + 5


def test_the_last_slice_s_end_brings_the_leader_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a trial is woken for what is left although all of it is held: its last evaluation is made in that.

    A third of the cap was used, the rest went back, and no trial had come to its end.
    """
    monkeypatch.setitem(TIMINGS, "load", 5.0)
    monkeypatch.setitem(TIMINGS, "checkpoint", 1.0)
    spec = write_spec(tmp_path, cap="$0.02", timings=True)
    sweep("launch", str(spec), "--yes", "--anyway", cwd=tmp_path)
    found = read(tmp_path)
    assert [trial.number for trial in found["trials"] if trial.state == "completed"] == [0]
    assert len(found["workers"]) == 1 and spent(found["accounts"]) <= 20_000
