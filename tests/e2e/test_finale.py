"""The finale on recorded curves, through the real command line: who is trained in full, its money, its crashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from studies import abandon, machine_micros, read, spent, start, sweep, wait_for
from test_endgame import ENDED, a_spec, checked, died, raced, searched, struck

from sweep import records

LONGEST, IN_FULL = 250, 500  # examples of 0.125 and of 0.25 epochs


def small(folder: Path, *, cap: str = "$1", endgame: dict[str, Any] | None = None, **more: Any) -> Path:
    """Five LoRA trials, two configurations over two seeds, and the winner for twice as long."""
    wanted = {"seeds": 2, "configurations": 2, "finale_length": 0.25} | (endgame or {})
    usual = {"method": ["lora"], "trials": 5, "rungs": [0.2]}
    return a_spec(folder, cap=cap, endgame=wanted, **(usual | more))


def ended(found: dict[str, Any]) -> list[tuple[object, ...]]:
    """The finales by what was measured."""
    return [(t.label, t.config, t.state, t.tokens, t.loss, t.full_loss) for t in records.finales(found["trials"])]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small study with a finale that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    sweep("launch", str(small(folder)), "--yes", cwd=folder)
    return folder, checked(folder)


def test_the_winner_is_trained_in_full_and_handed_over(undisturbed: tuple[Path, dict[str, Any]]) -> None:
    """Proves the main job: after the race the winner's configuration trains for the asked length, is scored, charged
    apart and handed over."""
    folder, found = undisturbed
    (final,) = records.finales(found["trials"])
    best = json.loads(sweep("best", "--json", cwd=folder).stdout)
    source = found["trials"][final.source]
    assert best["trial"]["number"] == source.number and best["confirmed"]
    assert (source.config.examples, final.config.examples) == (LONGEST, IN_FULL) and final.tokens == IN_FULL * 20
    confirmed = [t for t in records.confirmations(found["trials"]) if t.source == source.number]
    assert final.config.seed == min(confirmed, key=lambda t: t.full_loss).config.seed
    assert final.turn > max(t.turn for t in records.confirmations(found["trials"])), "after the race"
    assert best["deliverable"]["trial"]["label"] == final.label == f"{source.number}·0"
    assert final.full_loss < min(t.full_loss for t in confirmed) and best["deliverable"]["test"]["loss"]
    text = sweep("best", cwd=folder).stdout
    assert "the finale of 0.25 epochs" in text and str(final.checkpoint) in text
    drawn = json.loads(sweep("statement", "--json", cwd=folder).stdout)
    assert drawn["finale"]["micros"] == found["accounts"][f"trial:{final.number}"] > 0
    assert "its finale" in sweep("trials", cwd=folder).stdout
    assert f"of trial {source.number}" in sweep("show", f"{source.number}.0", cwd=folder).stdout


def test_nothing_is_trained_twice(tmp_path: Path) -> None:
    """Proves that without a longer length the finale costs nothing: it is the choice among the winner's runs."""
    sweep("launch", str(small(tmp_path, endgame={"finale_length": None})), "--yes", cwd=tmp_path)
    found = checked(tmp_path)
    best = json.loads(sweep("best", "--json", cwd=tmp_path).stdout)
    assert not records.finales(found["trials"])
    export = best["confirmation"]["export"]
    assert best["deliverable"]["trial"]["label"] == export["label"]
    assert "cost nothing" in best["deliverable"]["words"]
    assert any("handed over" in text and "cost nothing" in text for text in found["log"])


@pytest.mark.parametrize(("endgame", "said"), [({"finale": False}, False), ({"seeds": 0}, True)])
def test_without_finale_or_without_race(tmp_path: Path, endgame: dict[str, Any], said: bool) -> None:
    """Proves the switches: `finale: false` wins over the length, and a finale needs no race before it."""
    sweep("launch", str(small(tmp_path, endgame=endgame)), "--yes", cwd=tmp_path)
    found = checked(tmp_path)
    assert bool(records.finales(found["trials"])) == said
    best = json.loads(sweep("best", "--json", cwd=tmp_path).stdout)
    if said:
        assert not best["confirmed"] and "not confirmed" in best["deliverable"]["words"]
        assert records.finales(found["trials"])[0].source == best["trial"]["number"]


def test_a_longer_run_that_is_worse_is_not_handed_over(tmp_path: Path) -> None:
    """Proves that the validation rows choose between the finale and the runs that confirmed: overfitting shows."""
    spec = small(tmp_path, spread=0.0)
    curves = json.loads((tmp_path / "curves.json").read_text())
    points = {"points": [[0, 4.8], [LONGEST * 20, 3.0], [IN_FULL * 20, 3.4]]}
    (tmp_path / "curves.json").write_text(json.dumps(curves | {"default": points}))
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    checked(tmp_path)
    given = json.loads(sweep("best", "--json", cwd=tmp_path).stdout)["deliverable"]
    assert not given["trial"]["finale"] and "is worse, 3.4 against 3" in given["words"]


def test_its_money_is_kept_from_the_race_and_what_is_missing_is_said_before_and_after(tmp_path: Path) -> None:
    """Proves that a race that could use all the money leaves the finale's, and that a reserve that can't pay is said
    before the launch, and again at the end."""
    whole, poor = tmp_path / "whole", tmp_path / "poor"
    wanted = {"seeds": 20, "configurations": 20}
    spec = small(whole, cap="$0.12", trials=4, spread=0.2, endgame=wanted)
    sweep("launch", str(spec), "--yes", cwd=whole)
    found = checked(whole)
    assert [t.state for t in records.finales(found["trials"])] == ["completed"]
    assert spent(found["accounts"]) > 90_000, "the race had the rest"
    spec = small(poor, cap="$0.05", endgame={"finale_length": 4.0}, trials=4)
    launched = sweep("launch", str(spec), "--yes", cwd=poor)
    said = " ".join(launched.stderr.split())
    assert "over 2 seeds and the finale take $" in said and "it would fit with budget.reserve: $" in said
    found = checked(poor)
    assert not records.finales(found["trials"])
    assert any("no finale was trained: it is forecast at" in text for text in found["log"])


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.stress)])
def test_killed_at_commits_the_finale_goes_on(
    tmp_path: Path, undisturbed: tuple[Path, dict[str, Any]], when: str
) -> None:
    """Proves that it follows from the tables: killed at commits all over the finale, the outcome is the same."""
    _, whole = undisturbed
    in_the_finale = 0
    for point in range(256 if when == "before" else 260, 400, 9):
        folder = tmp_path / str(point)
        if not died(point, when, small(folder)):
            break
        if not records.finales(read(folder)["trials"]):
            abandon(folder)
            continue
        in_the_finale += 1
        sweep("resume", "words", cwd=folder)
        found = checked(folder)
        assert (searched(found), raced(found), ended(found)) == (searched(whole), raced(whole), ended(whole)), point
        assert len(found["workers"]) == 1
    assert in_the_finale >= 2


@pytest.mark.parametrize("victim", [pytest.param("worker", marks=pytest.mark.stress), "all", "nobody"])
def test_the_finale_survives_its_worker(tmp_path: Path, victim: str) -> None:
    """Proves recovery: it goes on from its checkpoint, every cent is charged once, and one that Ctrl-C stopped is
    parked while more money lets the search go on, and goes on after it."""
    more = {"timings": False, "sleep": 0.0004, "trials": 3}
    spec = small(tmp_path, cap="$0.5", endgame={"configurations": 1}, **more)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: "·0 starts" in (tmp_path / "out.txt").read_text(), seconds=90)
    found = struck(tmp_path, process, victim)
    assert spent(found["accounts"]) == machine_micros(found["workers"]) and len(found["workers"]) == 2
    assert all(trial.state in ENDED for trial in records.finales(found["trials"]))
    assert [t.tokens for t in records.finales(found["trials"])][-1] == IN_FULL * 20
    trained = sum(a.tokens - a.from_tokens for a in found["attempts"])
    assert trained - sum(t.tokens for t in found["trials"]) <= IN_FULL * 20, "at most the one that ran is repeated"
