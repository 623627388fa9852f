"""The question that the project exists for, asked of a tiny real model through the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from studies import read, spent, sweep

ROOT = Path(__file__).parents[2]
MAKE = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import tiny; "


def write_study(folder: Path) -> Path:
    """A label task that even a tiny model learns, and text of another kind to see what it unlearns."""
    make = [sys.executable, "-c", MAKE + "tiny.save_model(Path(sys.argv[2]))"]
    subprocess.run([*make, str(ROOT / "tests" / "trainers"), str(folder / "tiny")], check=True, capture_output=True)
    labels = [("good", "yes") if row % 3 else ("bad", "no") for row in range(300)]
    rows = [
        {"prompt": f"{word} film number {row} is ", "completion": label} for row, (word, label) in enumerate(labels)
    ]
    (folder / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = (ROOT / "examples" / "data" / "jargon.jsonl").read_text().splitlines(keepends=True)[:10]
    (folder / "other.jsonl").write_text("".join(other))
    data = {"train": str(folder / "films.jsonl"), "validation": 0.1, "test": 0.2, "max_tokens": 128}
    spec = {
        "study": "films",
        "model": str(folder / "tiny"),
        "data": data | {"retention": str(folder / "other.jsonl")},
        "machine": {"price": "$0.60/hour"},
        "budget": {"cap": "$0.05", "reserve": "$0.03"},
        "objective": "accuracy",
        "search": {"method": ["lora", "full"], "rank": [4, 8], "alpha": 16, "targets": "all-linear", "trials": 6}
        | {"learning_rate": {"low": 1e-3, "high": 1e-1}, "batch_size": 8, "epochs": 0.5, "rungs": [0.3]},
        "endgame": {"seeds": 3, "configurations": 2},
    }
    path = folder / "films.yaml"
    path.write_text(json.dumps(spec))
    return path


def test_lora_or_full(tmp_path: Path) -> None:
    """Proves the whole way: both methods searched, each confirmed under three seeds, judged on rows that chose nothing.

    The verdict's figures are those of the recorded scores, and everything stays inside the cap.
    """
    sweep("launch", str(write_study(tmp_path)), "--yes", cwd=tmp_path, timeout=280)
    found = read(tmp_path, "films")
    assert spent(found["accounts"]) <= 50_000
    confirmed = [trial for trial in found["trials"] if trial.source is not None]
    seeds = {method: {t.config.seed for t in confirmed if t.config.method == method} for method in ("lora", "full")}
    assert all(len(these) >= 3 and found["study"].spec.seed not in these for these in seeds.values())
    verdict = json.loads(sweep("compare", "films", "--json", cwd=tmp_path).stdout)
    assert "accuracy" in verdict["sentence"] and verdict["untrained"] < verdict["majority"] < 1
    said = sweep("compare", "films", cwd=tmp_path).stdout
    assert "majority" in said and "forgetting: loss on 10 retention examples" in said
    best = json.loads(sweep("best", "films", "--json", cwd=tmp_path).stdout)
    assert best["confirmed"] and len(best["confirmation"]["runs"]) >= 3
