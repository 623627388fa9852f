"""What a study takes from earlier ones of its database, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies import read, spent, sweep, write_spec
from test_endgame import checked

from sweep import records, warm_start
from sweep.projection import projector_of, untaught
from sweep.records import Study
from sweep.spec import validate
from sweep.store import Store

MODEL = {"hidden_size": 576, "model_type": "llama"}
FIRST, SECOND = "words", "again"


def a_spec(folder: Path, name: str, *, best_rate: float = 2e-3, **more: Any) -> Path:
    """A study on recorded curves of a model whose width and family are known, with priors."""
    usual = {"timings": True, "method": ["lora"], "trials": 8, "priors": "default", "rungs": [0.2]}
    path = write_spec(folder, cap="$0.3", name=name, **(usual | more))
    recorded = json.loads((folder / "curves.json").read_text()) | MODEL
    recorded["default"]["best_learning_rate"] = best_rate
    recorded["default"]["diverges_above"] = 1.0
    curves = folder / f"{name}.json"
    curves.write_text(json.dumps(recorded))
    path.write_text(path.read_text().replace(str(folder / "curves.json"), str(curves)))
    return path


def configuration(trial: records.TrialRow) -> tuple[object, ...]:
    """What was searched of a trial."""
    config = trial.config
    return config.rank, config.alpha, config.targets, config.batch_size, round(config.learning_rate, 9)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A database with one finished study."""
    folder = tmp_path_factory.mktemp("earlier")
    sweep("launch", str(a_spec(folder, FIRST)), "--yes", cwd=folder)
    return folder, checked(folder)


def launched(earlier: tuple[Path, dict[str, Any]], name: str, **more: Any) -> tuple[dict[str, Any], str]:
    """A second study in the same database, and what its launch said."""
    folder, _ = earlier
    done = sweep("launch", str(a_spec(folder, name, **more)), "--yes", cwd=folder)
    return read(folder, name), " ".join(done.stderr.split())


def test_the_best_of_an_earlier_study_is_tried_first(earlier: tuple[Path, dict[str, Any]]) -> None:
    """Proves the main job: the first trials are the earlier study's best ones, the launch and a resume say so, and
    neither a trial nor a cent of that study is counted."""
    folder, before = earlier
    found, said = launched(earlier, SECOND)
    done = [t for t in before["trials"] if t.state == "completed"]
    best = min(done, key=lambda t: t.full_loss)
    assert configuration(found["trials"][0]) == configuration(best)
    assert f"warm start: trial {best.number} of study {FIRST} is tried first" in said
    assert any(text.startswith("warm start: trial") for text in found["log"])
    assert len(found["trials"]) == 8 and found["trials"][0].number == 0
    own = {code: m for code, m in found["accounts"].items() if code.startswith("trial:")}
    assert 0 < sum(own.values()) <= spent(found["accounts"]) <= 300_000
    assert read(folder, FIRST)["accounts"] == before["accounts"]
    assert "is tried first" in sweep("resume", SECOND, cwd=folder).stderr


def test_measured_speed_is_the_forecasts_prior(earlier: tuple[Path, dict[str, Any]]) -> None:
    """Proves that where the model is the same the first forecast is what the earlier study measured, and with another
    recording, a machine as far as anybody knows, the guess from the device alone."""
    folder, _ = earlier
    same = a_spec(folder, "same")
    spec = json.loads(same.read_text())
    spec["model"] = json.loads((folder / f"{FIRST}.yaml").read_text())["model"]
    same.write_text(json.dumps(spec))
    said = sweep("launch", str(same), "--yes", cwd=folder).stderr
    assert f"as study {FIRST} measured it" in " ".join(said.split())
    store = Store(f"sqlite:///{folder}/studies.db")
    with store.read() as connection:
        studies = {name: records.study(connection, name) for name in (FIRST, "same")}
        taught = projector_of(studies[FIRST], connection)
    store.dispose()
    config = read(folder, FIRST)["trials"][0].config
    guess, warm, measured = (
        p.train(config, 10_000).mean for p in (untaught(studies[FIRST]), untaught(studies["same"]), taught)
    )
    assert warm == pytest.approx(measured, rel=0.25) and guess != pytest.approx(measured, rel=0.5)


def test_a_wrong_start_is_recovered_from(earlier: tuple[Path, dict[str, Any]]) -> None:
    """Proves that guesses of a study whose best rate is forty times off are left behind: one better than all of them
    is found, and the guesses cost their trials and nothing else."""
    found, _ = launched(earlier, "moved", best_rate=5e-5, trials=24)
    guesses = sum("is tried first" in text for text in found["log"])
    ends = {t.number: t.full_loss for t in found["trials"] if t.full_loss is not None}
    best = min(ends, key=lambda number: ends[number])
    assert guesses >= 1 and best >= guesses
    first_rung = {row[0]: row[4] for row in found["evaluations"] if row[1] == 0}
    assert min(first_rung.values()) < min(first_rung[number] for number in range(guesses))


def test_it_can_be_switched_off_and_named(earlier: tuple[Path, dict[str, Any]]) -> None:
    """Proves `off`, that a study without priors takes nothing unasked, that a named one is taken whatever it is, and
    that one that is not there is refused before anything is paid."""
    _, before = earlier
    off, said = launched(earlier, "off", warm_start=False)
    assert "warm start" not in said and "flops" not in off["study"].facts
    unasked, said = launched(earlier, "unasked", priors="none")
    assert "warm start" not in said and unasked["study"].facts["priors"] is None
    named, said = launched(earlier, "named", priors="none", warm_start=[FIRST])
    best = min((t for t in before["trials"] if t.state == "completed"), key=lambda t: t.full_loss)
    assert configuration(named["trials"][0]) == configuration(best) and "is tried first" in said
    folder, _ = earlier
    spec = str(a_spec(folder, "lost", warm_start=["nowhere"]))
    done = sweep("launch", spec, "--yes", cwd=folder, check=4)
    assert "there is no study nowhere in this database" in done.stderr and "Traceback" not in done.stderr
    done = sweep("launch", str(a_spec(folder, "odd", warm_start="words")), "--yes", cwd=folder, check=2)
    assert "a list of studies' names" in done.stderr


def test_what_is_alike(earlier: tuple[Path, dict[str, Any]]) -> None:
    """Proves the order: the same model before its family, twice the width is the limit, the same data are a start."""
    study: Study = earlier[1]["study"]
    values = json.loads(json.dumps(study.spec.resolved()))

    def like(model: str, data: str, **facts: object) -> int:
        spec = validate(values | {"model": model, "data": {"train": data}}, "here")
        return warm_start.likeness(spec, MODEL | facts, study)

    mine, data = study.spec.model, study.spec.data.train
    assert like(mine, data) > like(mine, "other") > like("m", data) > like("m", "other") > 0
    assert like("m", "other", hidden_size=1153) == 0 < like("m", "other", hidden_size=1152)
    assert like("m", "other", model_type="qwen2") == 0 < like("m", data, model_type="qwen2")
