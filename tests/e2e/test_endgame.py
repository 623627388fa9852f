"""Confirmation on recorded curves, through the real command line: the race, its money, its crashes."""

from __future__ import annotations

import json
import signal
import sqlite3
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from studies import environment, kill, machine_micros, pids, read, spent, start, sweep, wait_for, write_spec
from test_study_life import optuna_study

from sweep import records, tables

CRASH_AT = Path(__file__).with_name("crash_at.py")
ENDED = {"completed", "pruned", "failed"}


def a_spec(folder: Path, *, cap: str, spread: float = 0.02, **more: Any) -> Path:
    """A study of both methods whose losses differ by `spread` from seed to seed."""
    folder.mkdir(exist_ok=True)
    usual = {"timings": True, "method": ["lora", "full"], "trials": 10, "endgame": {"seeds": 3}}
    spec = write_spec(folder, cap=cap, **(usual | more))
    curves = folder / "curves.json"
    curves.write_text(json.dumps(json.loads(curves.read_text()) | {"seed_spread": spread}))
    return spec


def scored(folder: Path) -> dict[int, int]:
    """By trial how many examples of the test rows were scored."""
    with sqlite3.connect(folder / "studies.db") as connection:
        rows = connection.execute("SELECT trial, nll, tokens FROM sweep_scores WHERE split = 'test'").fetchall()
    connection.close()
    assert all(len(json.loads(nll)) == len(json.loads(tokens)) for _, nll, tokens in rows)
    return {trial: len(json.loads(nll)) for trial, nll, _ in rows}


def raced(found: dict[str, Any]) -> list[tuple[object, ...]]:
    """What was confirmed, by what was measured."""
    confirmations = records.confirmations(found["trials"])
    return [(t.label, t.config, t.state, t.loss, t.full_loss) for t in confirmations]


def searched(found: dict[str, Any]) -> list[tuple[object, ...]]:
    """The search as it went."""
    trials = records.searched(found["trials"])
    return [(t.number, t.config, t.state, t.rung, t.loss, t.full_loss, t.told) for t in trials]


def checked(folder: Path) -> dict[str, Any]:
    """What was found, after what holds at any end: audited, all charged, the sampler saw the search alone."""
    found = read(folder)
    assert found["held"] == 0
    if found["study"].timings is None or len(found["workers"]) == 1:  # else their meters are not the machine's clock
        assert spent(found["accounts"]) == machine_micros(found["workers"])
    numbers = [trial.number for trial in records.searched(found["trials"])]
    with optuna_study(f"sqlite:///{folder}/studies.db") as stored:
        assert [trial.number for trial in stored.trials] == numbers == list(range(len(numbers)))
    for trial in records.confirmations(found["trials"]):
        assert trial.source == trial.run[0] and not trial.told
        rungs = [row for row in found["evaluations"] if row[0] == trial.number]
        assert len(rungs) == int(trial.state == "completed"), "nothing before the end"
    return found


def test_both_methods_are_confirmed_within_the_cap(tmp_path: Path) -> None:
    """Proves the main job: three common seeds for each method's best, scored, shown as means, and all accounted for."""
    sweep("launch", str(a_spec(tmp_path, cap="$0.15")), "--yes", cwd=tmp_path)
    found = checked(tmp_path)
    confirmations = records.confirmations(found["trials"])
    assert spent(found["accounts"]) <= 150_000 and len(found["workers"]) == 1
    over = dict.fromkeys(("lora", "full"), 0)
    for source in {trial.source for trial in confirmations}:
        mine = [trial for trial in confirmations if trial.source == source]
        original = found["trials"][source].config
        assert [t.run[1] for t in mine] == list(range(1, len(mine) + 1)) and len(mine) <= 6
        assert all(t.config.learning_rate == original.learning_rate and t.config.seed != 0 for t in mine)
        over[original.method] = max(over[original.method], len(mine))
    assert min(over.values()) >= 3
    assert len({t.config.seed for t in confirmations}) == max(over.values()), "seeds are common"
    assert set(scored(tmp_path)) == {tables.UNTRAINED, *(t.number for t in confirmations)}
    best = json.loads(sweep("best", "--json", cwd=tmp_path).stdout)
    mine = [t for t in confirmations if t.source == best["trial"]["number"]]
    assert best["confirmed"] and best["loss"] == pytest.approx(statistics.fmean(t.full_loss for t in mine))
    test = best["confirmation"]["test"]["loss"]
    assert test["sd"] > 0 and test["mean"] < test["untrained"]
    export = min(mine, key=lambda t: t.full_loss)
    assert best["confirmation"]["export"]["label"] == export.label
    text = sweep("best", cwd=tmp_path).stdout
    assert f"confirmed over {len(mine)} other seeds" in text and f"sd {test['sd']:.4f}" in text
    assert f"run {export.label}, the best of its runs" in text and str(export.checkpoint) in text
    drawn = json.loads(sweep("statement", "--json", cwd=tmp_path).stdout)
    charged = [m for code, m in found["accounts"].items() if code.startswith("trial:1000")]
    assert drawn["confirmation"]["micros"] == sum(charged) > 0
    assert export.label in sweep("trials", cwd=tmp_path).stdout
    shown = sweep("show", export.label.replace("·", "."), cwd=tmp_path).stdout
    assert f"confirms       trial {export.source}" in shown and "under another seed" in shown
    status = json.loads(sweep("status", "--json", cwd=tmp_path).stdout)
    assert status["trials"] == 10 and status["confirmations"]["all"] == len(confirmations)


def test_the_search_is_as_if_nothing_were_confirmed(tmp_path: Path) -> None:
    """Proves that trials, losses and what the sampler was told are the same with a race after it as without."""
    outcomes = []
    for name, seeds in (("with", 3), ("without", 0)):
        spec = a_spec(tmp_path / name, cap="$0.2", reserve="$0.05", endgame={"seeds": seeds})
        sweep("launch", str(spec), "--yes", cwd=tmp_path / name)
        found = checked(tmp_path / name)
        assert bool(records.confirmations(found["trials"])) == bool(seeds)
        outcomes.append((searched(found), [row for row in found["evaluations"] if row[0] < tables.CONFIRMATIONS]))
    assert outcomes[0] == outcomes[1]


def test_packs_of_confirmations(tmp_path: Path) -> None:
    """Proves that runs share the slots: several train at once, and a full-parameter one has the machine to itself.

    A run takes some real time here: recorded time passes at once, and the first would end before the second comes.
    """
    spec = a_spec(tmp_path, cap="$0.3", machine={"slots": 4}, trials=8, sleep=3e-5)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = checked(tmp_path)
    confirmations = {trial.number: trial for trial in records.confirmations(found["trials"])}
    assert all(trial.state == "completed" for trial in confirmations.values())
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        rows = connection.execute(
            "SELECT trial, width FROM sweep_evaluation WHERE trial >= ?", (tables.CONFIRMATIONS,)
        ).fetchall()
    connection.close()
    widths: dict[str, set[int]] = {"lora": set(), "full": set()}
    for trial, width in rows:
        widths[confirmations[trial].config.method].add(width)
    assert max(widths["lora"]) > 2 and widths["full"] == {1}


def test_what_cannot_be_paid_is_said_and_goes_on_with_more_money(tmp_path: Path) -> None:
    """Proves a reserve that is too small: no run begins that does not end, it is said, and a raised cap goes on."""
    spec = a_spec(tmp_path, cap="$0.045", trials=6)
    sweep("launch", str(spec), "--yes", cwd=tmp_path, check=None)
    before = checked(tmp_path)
    assert any("not everything is confirmed" in text for text in before["log"])
    assert spent(before["accounts"]) <= 45_000
    assert all(trial.state == "completed" for trial in records.confirmations(before["trials"]))
    sweep("resume", "words", "--cap", "$0.3", cwd=tmp_path)
    after = checked(tmp_path)
    kinds = [(row.kind, row.debit, row.credit, row.amount_micros) for row in after["transfers"]]
    kept = 63_750 + 45_000 - spent(before["accounts"])
    assert ("move", "budget", "reserve", kept) in kinds, "a quarter of what is new, and what was left for it"
    assert len(records.searched(after["trials"])) == 6
    assert len(records.confirmations(after["trials"])) > len(records.confirmations(before["trials"]))
    done = {row[0]: row for row in raced(before)}
    assert all(row == done.get(row[0], row) for row in raced(after)), "what was confirmed is not repeated"
    assert json.loads(sweep("best", "--json", cwd=tmp_path).stdout)["confirmed"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small study that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spec = small(folder)
    sweep("launch", str(spec), "--yes", cwd=folder)
    return checked(folder)


def small(folder: Path) -> Path:
    """Six trials, then two configurations of each method over two seeds."""
    return a_spec(folder, cap="$1", trials=6, rungs=[0.2], endgame={"seeds": 2, "configurations": 2})


def died(point: int, when: str, spec: Path) -> bool:
    """Launches a study in a process that kills itself at a commit; False if it came to its end before that one."""
    command = [sys.executable, str(CRASH_AT), str(point), when, "launch", str(spec), "--yes"]
    done = subprocess.run(
        command, cwd=spec.parent, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.stress)])
def test_killed_at_commits_the_race_goes_on(tmp_path: Path, undisturbed: dict[str, Any], when: str) -> None:
    """Proves that decisions follow from the tables: killed at commits all over the race, the outcome is the same.

    The worker lives on and is taken over; nothing is asked, told or charged twice.
    """
    in_the_race = 0
    for point in range(170 if when == "before" else 186, 300, 32):
        folder = tmp_path / str(point)
        if not died(point, when, small(folder)):
            break
        in_the_race += read(folder)["study"].phase == "endgame"
        sweep("resume", "words", cwd=folder)
        found = checked(folder)
        assert searched(found) == searched(undisturbed) and raced(found) == raced(undisturbed), point
        assert scored(folder).keys() == {tables.UNTRAINED, *(t.number for t in records.confirmations(found["trials"]))}
        assert len(found["workers"]) == 1
    assert in_the_race >= 2


def struck(folder: Path, process: subprocess.Popen[str], victim: str) -> dict[str, Any]:
    """Kills a running study's worker, or all its processes, or (nobody) stops it and raises its cap; what is found at
    the end of it."""
    running = pids(folder)
    if victim == "nobody":
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert read(folder)["held"] == 0
    elif victim == "all":
        process.kill()
        process.wait()
        assert kill(running["watchdog"])
    if victim != "nobody":
        kill(running["worker"])
    if victim == "worker":
        assert process.wait(timeout=120) == 0, (folder / "out.txt").read_text()
    else:
        sweep("resume", "words", *(["--cap", "$0.8"] if victim == "nobody" else []), cwd=folder)
    return checked(folder)


@pytest.mark.parametrize("victim", [pytest.param("worker", marks=pytest.mark.stress), "all", "nobody"])
def test_the_race_survives_its_worker(tmp_path: Path, victim: str) -> None:
    """Proves recovery in the endgame: a killed worker's run goes on from its checkpoint; one that Ctrl-C stopped is
    parked when more money lets the search go on, and goes on after it."""
    spec = a_spec(tmp_path, cap="$0.5", timings=False, sleep=0.0004, trials=4, rungs=[0.2], endgame={"seeds": 2})
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: "·2 starts" in (tmp_path / "out.txt").read_text(), seconds=90)
    found = struck(tmp_path, process, victim)
    assert len(found["workers"]) == 2
    confirmations = records.confirmations(found["trials"])
    assert len(confirmations) >= 4 and all(trial.state in ENDED for trial in confirmations)
    trained = sum(a.tokens - a.from_tokens for a in found["attempts"])
    assert trained - sum(t.tokens for t in found["trials"]) <= 5_000, "at most the one that ran is repeated"
