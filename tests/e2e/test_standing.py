"""What `status` and `list` say of a study that nobody drives: it must never look as if it ran."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from studies import CURVES, start, sweep, wait_for, write_spec

from sweep.launchers.local import LocalLauncher


def told(folder: Path) -> tuple[str, str, str]:
    """What kind of standing the latest study has by `status` and by `list`, and the words."""
    status = json.loads(sweep("status", "--json", cwd=folder).stdout)
    (listed,) = json.loads(sweep("list", "--json", cwd=folder).stdout)["studies"]
    words = status["standing"]["words"]
    assert words in " ".join(sweep("status", cwd=folder).stdout.split())
    return status["standing"]["kind"], listed["standing"], words


def test_a_study_whose_processes_were_killed_does_not_look_alive(tmp_path: Path) -> None:
    """Proves each stage: driven, left by its orchestrator, left by its worker too, resumed and over, closed."""
    spec = write_spec(tmp_path, cap="$1", sleep=0.002, trials=2)
    driver = start("launch", str(spec), "--yes", cwd=tmp_path)
    worker = tmp_path / "runs" / "words" / "workers" / "001"
    wait_for(lambda: (worker / "events.jsonl").exists() and "progress" in (worker / "events.jsonl").read_text())
    assert told(tmp_path) == ("running", "running", "")
    driver.kill()
    driver.wait()
    kind, listed, words = told(tmp_path)
    assert kind == listed == "unattended" and "sweep resume words" in words
    LocalLauncher().stop(worker)
    kind, listed, words = told(tmp_path)
    assert kind == listed == "broken off" and words.endswith("its worker is gone; next: sweep resume words")
    assert "no worker runs" in sweep("status", cwd=tmp_path).stdout
    sweep("resume", "words", cwd=tmp_path)
    assert told(tmp_path) == ("over", "over", "next: sweep best words")
    sweep("close", "words", cwd=tmp_path)
    assert told(tmp_path) == ("closed", "closed", "")


def test_a_study_without_enough_money_says_how_much_is(tmp_path: Path) -> None:
    """Proves the hint of a study that brought nobody to an end: with the cap that it names somebody comes there."""
    spec = write_spec(tmp_path, cap="$0.02", timings=True, trials=8)
    done = sweep("launch", str(spec), "--yes", "--anyway", "--set", "search.epochs=2", cwd=tmp_path, check=None)
    for _ in range(3):
        kind, _, words = told(tmp_path)
        if done.returncode == 0:
            break
        assert done.returncode == 3 and kind in {"out of money", "stopped"}
        (cap,) = re.findall(r"sweep resume words --cap '(\$[0-9.]+)'", done.stderr)
        assert kind == "stopped" or cap in words
        done = sweep("resume", "words", "--cap", cap, cwd=tmp_path, check=None)
    assert (done.returncode, kind) == (0, "over")


@pytest.mark.parametrize("trials", [None, 2])
def test_a_search_in_which_all_diverges_ends_and_names_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trials: int | None
) -> None:
    """Proves that a search which costs nothing and finds nothing ends, and is not told to raise its cap.

    Tokens are paid for, and trials that diverge at their first step train none.
    """
    monkeypatch.setitem(CURVES, "default", {**CURVES["default"], "diverges_above": 1e-9})
    more = {} if trials is None else {"trials": trials}
    spec = write_spec(tmp_path, cap="$0.05", machine={"price": "$1.00/Mtok"}, **more)
    done = sweep("launch", str(spec), "--yes", "--anyway", cwd=tmp_path, check=3, timeout=60)
    last = done.stderr.splitlines()[-1]
    kind, _, words = told(tmp_path)
    assert kind == "no winner" and words.split("; ", 1)[1] in last
    (asked,) = re.findall(r"all (\d+) that began diverged or failed \(the last one diverged: ", last)
    assert int(asked) == 2 if trials else 24 <= int(asked) <= 28, "those under way come to their end"
    assert "change search.learning_rate and launch another study" in last and "--cap" not in last
