"""Studies whose trials train four at a time: on a tiny model, and on recorded curves."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import TIMINGS, kill, machine_micros, pids, read, spent, start, sweep, wait_for, write_spec

ROOT = Path(__file__).parents[2]
SAVE = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import tiny; "
SAVE += "tiny.save_model(Path(sys.argv[2]))"
WORDS = ["red", "blue", "dog", "cat", "bird", "runs", "sleeps", "sings", "slowly", "over", "the", "a", "house", "river"]


def tiny_spec(folder: Path) -> Path:
    """Eight trials of a tiny model, half a minute of training, in four slots."""
    subprocess.run([sys.executable, "-c", SAVE, str(ROOT / "tests" / "trainers"), str(folder / "tiny")], check=True)
    rng = random.Random(1)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(4, 30)))} for _ in range(200)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = {
        "study": "words",
        "model": str(folder / "tiny"),
        "data": {"train": str(folder / "rows.jsonl"), "max_tokens": 128},
        "machine": {"price": "$0.60/hour", "device": "cpu", "threads": 1, "slots": 4},
        "budget": {"cap": "$0.20"},
        "endgame": {"seeds": 0},
        "search": {"rank": [4, 8, 16], "alpha": [8, 16], "batch_size": [2, 4], "learning_rate": [1e-3, 3e-3]}
        | {"epochs": 3, "rungs": [0.2, 0.5], "trials": 8, "live": 2},
    }
    path = folder / "words.yaml"
    path.write_text(json.dumps(spec))
    return path


def checked(folder: Path) -> dict[str, Any]:
    """What was found, after everything that holds for any end: audited, all charged, all told, none lost."""
    found = read(folder)
    assert found["held"] == 0 and spent(found["accounts"]) == machine_micros(found["workers"])
    assert [trial.number for trial in found["trials"]] == list(range(8))
    assert {trial.state for trial in found["trials"]} <= {"completed", "paused", "pruned"}
    assert any(trial.state == "completed" for trial in found["trials"])
    assert all(trial.told == (trial.state in {"completed", "pruned"}) for trial in found["trials"])
    assert {attempt.ended for attempt in found["attempts"]} <= {"paused", "dropped", "failed", "lost"}
    return found


@pytest.mark.parametrize("victim", [pytest.param("worker", marks=pytest.mark.stress), "all"])
def test_a_study_of_packs(tmp_path: Path, victim: str) -> None:
    """Proves the main job with four trials at once, under kill -9 of the worker or of everything in the middle."""
    spec, out = tiny_spec(tmp_path), tmp_path / "out.txt"
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: "trial 3 starts" in out.read_text() and "promoted" in out.read_text(), seconds=120)
    running = pids(tmp_path)
    if victim == "all":
        process.kill()
        process.wait()
        assert kill(running["watchdog"])
    kill(running["worker"])
    if victim == "all":
        sweep("resume", "words", cwd=tmp_path, timeout=200)
    else:
        assert process.wait(timeout=200) == 0, out.read_text()
    found = checked(tmp_path)
    assert len(found["workers"]) == 2
    assert {worker.slots["lora"] for worker in found["workers"]} == {4}
    # Nobody was promoted before four had started, although the spec lets no more than two take turns.
    starts = [text.split()[1] for text in found["log"] if text.startswith("trial") and text.endswith("starts")]
    # They are seated in their order; in which they are made ready, beside each other, is for the machine to say.
    assert [attempt.trial for attempt in found["attempts"]][:4] == [0, 1, 2, 3]
    assert sorted(starts[:4]) == ["0", "1", "2", "3"]
    lost = [attempt for attempt in found["attempts"] if attempt.ended == "lost"]
    assert len(lost) > 1, "several trained when the worker died"
    drawn = json.loads(sweep("statement", "--json", cwd=tmp_path).stdout)
    assert drawn["occupancy"] == 1.0
    assert "occupancy: 100.0 %" in sweep("statement", cwd=tmp_path).stdout


def test_methods_take_turns_in_packs(tmp_path: Path) -> None:
    """Proves that a full-parameter trial is not overtaken for ever by those that share slots, and the study ends."""
    machine = {"slots": 3}
    spec = write_spec(tmp_path, cap="$5", timings=True, trials=14, method=["lora", "full"], live=4, machine=machine)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    assert {trial.config.method for trial in found["trials"]} == {"lora", "full"}
    assert all(trial.tokens > 0 or trial.diverged for trial in found["trials"])
    assert any(trial.state == "completed" for trial in found["trials"])
    assert found["held"] == 0 and spent(found["accounts"]) == machine_micros(found["workers"])


@pytest.mark.alone  # on a file's meter a trial trains as far as the orchestrator, slowed by others, lets it
def test_a_pack_spends_its_cap(tmp_path: Path) -> None:
    """Proves that what is kept back for the end of a slice is not a first guess for ever: checkpoints that cost nothing
    are measured too, the paid time grows as the tail shrinks, and asking begins again as trials leave the pack.

    Whether somebody came to an end depends on how far the machine's time, here five times real time, runs ahead of
    the orchestrator, and is tested on replays (tests/unit/test_search_tables.py).
    """
    spec = write_spec(tmp_path, cap="$0.06", timings=True, sleep=2e-4, machine={"slots": 16})
    (tmp_path / "timings.json").write_text(json.dumps(TIMINGS | {"evaluate": 0.0, "checkpoint": 0.0, "restore": 0.0}))
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    assert len(found["workers"]) == 1
    assert 51_000 < spent(found["accounts"]) <= 60_000
