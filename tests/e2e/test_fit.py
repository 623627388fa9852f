"""`sweep fit` through the command line, and a study in which configurations run out of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies import CURVES, read, sweep, write_spec
from transformers import LlamaConfig, Qwen2Config

QWEN_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A 7B model of which there is the configuration alone."""
    Qwen2Config(**QWEN_7B).save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def write(folder: Path, model: Path | str, **changes: Any) -> Path:
    """A spec whose data is not there: it is not needed."""
    spec = {
        "study": "fit",
        "model": str(model),
        "data": {"train": "nowhere.jsonl", "max_tokens": 512},
        "machine": {"gpu": "A100-80GB"},
        "budget": {"cap": "$1"},
        "search": {"method": ["lora", "full"], "rank": [16, 64]},
    }
    path = folder / "fit.yaml"
    path.write_text(json.dumps(spec | changes))
    return path


def test_fit_says_what_fits_and_what_would(tmp_path: Path, model: Path) -> None:
    """Proves the verb without data, GPU, weights or database: a class a line, in 80 columns, and the remedy; and the
    same figures as JSON, of whatever memory is stated."""
    path = write(tmp_path, model)
    shown = sweep("fit", str(path), cwd=tmp_path).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "7,615,616,512 parameters" in shown and "A100-80GB, 80.0 GiB" in shown
    assert "full.processes: 2" in shown
    larger = json.loads(sweep("fit", str(path), "--memory", "141GB", "--json", cwd=tmp_path).stdout)
    assert larger["memory_bytes"] == 141 * 2**30
    assert [row["fits"] for row in larger["rows"]] == [True] * 6 + [False, True]
    assert all(sum(row["parts"].values()) == row["peak_bytes"] for row in larger["rows"])
    assert not (tmp_path / "studies.db").exists()


def test_fit_refuses_in_one_line(tmp_path: Path) -> None:
    """Proves the codes of a model that is not there, of a size that is none, of no GPU at all and of a recording."""
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4).save_pretrained(
        tmp_path / "tiny"
    )
    nowhere = sweep("fit", str(write(tmp_path, "nobody/no-such-model")), cwd=tmp_path, check=7)
    assert "nobody/no-such-model" in nowhere.stderr and len(nowhere.stderr.strip().splitlines()) == 1
    path = write(tmp_path, tmp_path / "tiny", machine={"price": "$1/hour"})
    assert "fit no GPU of this size" in sweep("fit", str(path), "--memory", "1GB", cwd=tmp_path).stdout
    assert "no size" in sweep("fit", str(path), "--memory", "much", cwd=tmp_path, check=2).stderr
    assert "--memory 80GB" in sweep("fit", str(path), cwd=tmp_path, check=2).stderr
    recording = write_spec(tmp_path, cap="$1")
    assert "is a recording" in sweep("fit", str(recording), cwd=tmp_path, check=7).stderr


def test_out_of_memory_is_data_for_the_sampler(tmp_path: Path) -> None:
    """Proves a whole study in which ranks from 32 on run out of memory: it ends with a winner, the first of them fails
    with its reason, and no rank as large is started after that. Its workers are told how to train in full."""
    path = write_spec(
        tmp_path,
        cap="$1",
        timings=True,
        trials=16,
        rank=[4, 8, 16, 32, 64],
        alpha=[16],
        targets=["all-linear"],
        method=["lora"],
    )
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"full": {"optimizer": "adamw-8bit", "checkpointing": True}})
    )
    lacking = {"match": {"rank": [32, 64]}, "floor": 3.0, "scale": 1000, "out_of_memory": True}
    (tmp_path / "curves.json").write_text(json.dumps(CURVES | {"curves": [lacking]}))
    sweep("launch", str(path), "--yes", cwd=tmp_path)
    trials = read(tmp_path)["trials"]
    job = json.loads((tmp_path / "runs" / "words" / "workers" / "001" / "job.json").read_text())
    assert (job["optimizer"], job["checkpointing"], job["processes"]) == ("adamw-8bit", True, 1)
    large = [trial for trial in trials if (trial.config.rank or 0) >= 32]
    assert large and all(trial.state == "failed" and trial.reason.startswith("out of memory") for trial in large)
    tried = [trial for trial in large if "not started" not in trial.reason]
    first = min(tried, key=lambda trial: trial.number)
    assert "the replay file says so" in first.reason
    # Trials that were in the queue by then were asked before anybody knew.
    later = [t for t in large if (t.config.rank or 0) >= (first.config.rank or 0) and t not in tried]
    assert len(large) > len(tried) and later and all(trial.tokens == 0 for trial in later)
    assert any(trial.state == "completed" and (trial.config.rank or 0) < 32 for trial in trials)
