"""The recorder of learning curves, on a tiny model: resumed after a kill, a table at the end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import branches, record, tables, tasks
from tests.trainers.tiny import save_model
from trainers.data import prepare
from trainers.lora.engine import LoraEngine
from trainers.messages import TrialConfig
from trainers.models import load_base, load_tokenizer
from trainers.splits import load_split


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a few prepared rows of the task `speech`."""
    folder = tmp_path_factory.mktemp("record")
    model = save_model(folder / "model")
    rows = folder / "speech.rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tasks.rows_of("speech")[:40]))
    options: dict[str, Any] = {"test": None, "max_tokens": 256, "seed": 0, "model": "model"}
    prepare(load_tokenizer(model), train=str(rows), validation=0.1, folder=folder / "speech", **options)
    return folder


@pytest.fixture(autouse=True)
def small_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one and five evaluations, which fit ten examples."""
    monkeypatch.setattr(record, "SHARES", (0.1, 0.2, 0.4, 0.7, 1.0))
    for method in ("lora", "full"):
        monkeypatch.setitem(record.DRAW, method, {**record.DRAW[method], "batch_size": [1]})


def call(place: Path, verb: str, file: Path, *more: str) -> int:
    """Runs one verb of the recorder on the tiny model."""
    common = ["--task", "speech", "--model", str(place / "model"), "--data", str(place), "--file", str(file)]
    drawn = ["--device", "cpu", "--lora", "4", "--full", "1", "--examples", "10", "--slots", "3", "--seconds", "0.01"]
    return record.main([verb, *common, *drawn, *more])


def losses(file: Path) -> dict[int, list[float]]:
    """Losses by trial."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["trial"]: line["losses"] for line in lines if "trial" in line}


def test_a_recording_goes_on_after_a_kill_and_becomes_a_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proves that a file that was cut in mid-line is completed with the same curves, and what a table needs is told."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert call(place, "curves", whole) == 0
    assert "7 of 7 trials" in capsys.readouterr().out
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:3]) + lines[3][:40])
    assert call(place, "curves", cut) == 0
    assert losses(cut) == losses(whole) and len(losses(whole)) == 7
    assert all(len(curve) == 5 for curve in losses(whole).values())
    assert call(place, "table", whole, "--folder", str(tmp_path)) == 2
    assert "speeds are missing: go on" in capsys.readouterr().err
    assert call(place, "speed", whole) == 0
    assert call(place, "table", whole, "--folder", str(tmp_path)) == 0
    table = tables.read(tmp_path / "speech.parquet")
    assert not table.synthetic and len(table.rows) == 5
    assert sorted(table.rows[0].runs) == [0, 1, 2] and sorted(table.rows[1].runs) == [0]
    assert all(row.seconds_per_token > 0 and row.evaluate_seconds > 0 for row in table.rows)
    assert table.rows[1].runs[0].losses.tolist() == pytest.approx(losses(whole)[3], rel=1e-6)
    assert table.rows[4].config["method"] == "full" and table.rows[4].config["rank"] is None


def test_a_recording_is_not_mixed_with_another(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that a file that was begun with other settings is refused in a line, and so are too few examples."""
    file = tmp_path / "one.jsonl"
    assert call(place, "curves", file, "--lora", "1", "--full", "0", "--minutes", "0") == 3
    assert call(place, "curves", file, "--lora", "1", "--full", "0", "--examples", "20") == 2
    assert "was begun with another examples" in capsys.readouterr().err
    assert call(place, "curves", file, "--examples", "9") == 2
    assert call(place, "speed", tmp_path / "none.jsonl") == 2
    assert "there is no recording" in capsys.readouterr().err


def test_a_diverged_trial_is_written_down_and_its_neighbour_goes_on(place: Path, tmp_path: Path) -> None:
    """Proves that a trial whose weights become infinite ends its own curve, charged up to the next evaluation."""
    base = load_base(str(place / "model"), "cpu")
    train, validation = (load_split(place / "speech", name) for name in ("train", "validation"))
    engine = LoraEngine(base, train, validation, validation.rows, slots=2)
    common: dict[str, Any] = {"method": "lora", "batch_size": 1, "examples": 10, "seed": 0, "rank": 2, "alpha": 16.0}
    trials = [
        (0, TrialConfig(number=0, targets="mlp", learning_rate=math.inf, **common)),
        (1, TrialConfig(number=3, targets="mlp", learning_rate=1e-4, **common)),
    ]
    file = record.Recording(tmp_path / "d.jsonl", {"task": "speech"})
    assert record.record(engine, train, trials, file, record._Clock(10))
    assert file.done[0]["diverged"] and len(file.done[0]["losses"]) < 5
    assert len(file.done[0]["tokens"]) == len(file.done[0]["losses"]) + 1
    assert file.done[3]["diverged"] is None and len(file.done[3]["losses"]) == 5


def test_the_plan_counts_all_that_is_recorded(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Proves that the plan names trials, evaluations and speeds before a minute is spent."""
    options = ["--task", "speech", "--data", str(place)]
    assert record.main(["plan", *options]) == 0
    said = capsys.readouterr().out
    assert "140 LoRA trials in packs of 32" in said and f"{(140 + 24) * 5} evaluations" in said


def test_what_is_drawn_first_does_not_depend_on_how_much_is_drawn() -> None:
    """Proves that a recording can be made larger later: the first configurations of each method stay."""
    few, many = record.draw(3, 2, 0), record.draw(100, 16, 0)
    assert few == [*many[:3], *many[100:102]]
    assert record.draw(3, 2, 1) != few


def test_the_tasks_name_their_answers() -> None:
    """Proves that a row of `speech` holds the definition in its prompt, and one of four labels after it."""
    rows = tasks.rows_of("speech")
    assert len(rows) == 2000 and {row["completion"] for row in rows} == {" noun", " verb", " adjective", " adverb"}
    assert rows[0]["prompt"] == "build on: be based on; of theories and claims, for example\nPart of speech:"
    assert tasks.rows_of("sums")[0]["completion"].strip().lstrip("-").isdigit()


def test_a_copy_decays_and_changes_nobody(place: Path) -> None:
    """A trial whose copy trains beside it learns what it learns alone, to the bit; the copy's rate falls to nothing."""
    train, validation = (load_split(place / "speech", name) for name in ("train", "validation"))
    config = TrialConfig(
        number=0, method="lora", learning_rate=1e-2, batch_size=1, examples=40, seed=0, rank=4, alpha=8.0,
        targets="all-linear",
    )  # fmt: skip
    found = []
    for copied in (False, True):
        engine = branches.Branching(load_base(str(place / "model"), "cpu"), train, validation, 4, None, slots=2)
        engine.admit(config, None, None)
        for _ in range(10):
            engine.advance(lambda: True)
        if copied:
            copy = engine._of(engine.branch(0))
            rates = []
            while not copy.position.done:
                rates.append(engine._rate(copy) / config.learning_rate)
                engine.advance(lambda: True)
            assert len(rates) == tables.cooldown_steps(10) == 6
            assert rates == pytest.approx([6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
            engine.drop(branches.COPY)
        while not engine.position(0).done:
            engine.advance(lambda: True)
        found.append(engine._of(0).slot.weights.detach().clone())
        assert engine._rate(engine._of(0)) == 0.0
    assert torch.equal(*found)
