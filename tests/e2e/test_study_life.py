"""A study's life through the real command line, on recorded curves: launch, budget, resume, close."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from studies import CURVES, kill, machine_micros, pids, read, spent, start, sweep, wait_for, write_spec

from budgets.money import cost_micros


def test_a_study_ends_inside_its_cap_with_a_winner(tmp_path: Path) -> None:
    """Proves the main job: trials are asked, promoted, pruned by the projection; every cent is accounted for."""
    spec = write_spec(tmp_path, cap="$0.06", timings=True, method=["lora", "full"])
    done = sweep("launch", str(spec), "--yes", cwd=tmp_path)
    assert "Next: sweep best words" in done.stderr
    found = read(tmp_path)
    states = [trial.state for trial in found["trials"]]
    assert len(states) >= 8 and states.count("completed") >= 1
    assert any("projected $" in trial.reason and "of $0.06" in trial.reason for trial in found["trials"])
    assert found["held"] == 0 and spent(found["accounts"]) <= 60_000
    (worker,) = found["workers"]
    assert spent(found["accounts"]) == cost_micros(worker.micros_per_hour, worker.settled_ms)
    assert all(trial.told == (trial.state in {"completed", "pruned", "failed"}) for trial in found["trials"])
    best = json.loads(sweep("best", "--json", cwd=tmp_path).stdout)
    losses = [trial.full_loss for trial in found["trials"] if trial.state == "completed"]
    assert best["loss"] == min(losses) and best["gain"] > 0.25
    drawn = json.loads(sweep("statement", "--json", cwd=tmp_path).stdout)
    lines = sum(t["micros"] for t in drawn["trials"]) + sum(v["micros"] for v in drawn["overhead"].values())
    assert lines + drawn["idle"]["micros"] == drawn["spent"]["micros"] == spent(found["accounts"])


def test_optuna_reads_the_study_as_any_other(tmp_path: Path) -> None:
    """Proves that optuna.load_study sees all trials and values, and paused ones as RUNNING until the close."""
    spec = write_spec(tmp_path, cap="$0.05", timings=True, trials=8)
    # By rank: with money for all of them the model of curves would leave none behind.
    by_rank = ["--set", "search.promote=halving", "--set", "search.rungs=[0.05, 0.1, 0.2, 0.4]"]
    sweep("launch", str(spec), "--yes", *by_rank, cwd=tmp_path)
    found = read(tmp_path)
    url = f"sqlite:///{tmp_path}/studies.db"
    with optuna_study(url) as stored:
        assert len(stored.trials) == len(found["trials"]) == 8
        by_state = {"completed": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
        for ours, theirs in zip(found["trials"], stored.trials, strict=True):
            assert theirs.state.name == by_state.get(ours.state, "RUNNING")
            assert theirs.params["lora_rank"] == ours.config.rank
            assert not ours.diverged or theirs.value is None
        complete = [t for t in found["trials"] if t.state == "completed"]
        assert stored.best_value == min(t.full_loss for t in complete)
    paused = [t.number for t in found["trials"] if t.state == "paused"]
    assert paused
    sweep("close", "words", cwd=tmp_path)
    with optuna_study(url) as stored:
        assert all(stored.trials[number].state.name == "PRUNED" for number in paused)
    assert "is closed" in sweep("resume", "words", cwd=tmp_path, check=2).stderr


@contextlib.contextmanager
def optuna_study(url: str) -> Iterator[optuna.Study]:
    """Opens the study with Optuna alone; load_study would leave its connections to the garbage collector."""
    stored = optuna.storages.RDBStorage(url)
    try:
        yield optuna.load_study(study_name="words", storage=stored)
    finally:
        stored.remove_session()
        stored.engine.dispose()


def test_the_same_seed_gives_the_same_study_also_when_it_is_killed(tmp_path: Path) -> None:
    """Proves determinism on recorded timings: two runs, and one killed -9 and resumed, ask and measure the same.

    The killed one is of LoRA: a full-parameter trial whose state was never written costs more to go on with after a
    kill, and who is worth the next dollar may be another one then.
    """
    outcomes = []
    for name, methods in (("a", ["lora", "full"]), ("b", ["lora", "full"]), ("alone", ["lora"])):
        (tmp_path / name).mkdir()
        spec = write_spec(tmp_path / name, cap="$5", timings=True, trials=10, method=methods)
        sweep("launch", str(spec), "--yes", cwd=tmp_path / name)
        outcomes.append(_asked_and_measured(tmp_path / name))
    folder = tmp_path / "killed"
    folder.mkdir()
    out = folder / "out.txt"
    spec = write_spec(folder, cap="$5", timings=True, sleep=0.0003, trials=10, method=["lora"])
    process = start("launch", str(spec), "--yes", cwd=folder)
    wait_for(lambda: out.exists() and "promoted" in out.read_text())
    assert kill(pids(folder)["worker"])
    wait_for(lambda: "worker 2 is ready" in out.read_text())
    process.kill()
    process.wait()
    sweep("resume", "words", cwd=folder)
    assert outcomes[0] == outcomes[1]
    assert outcomes[2] == _asked_and_measured(folder)


def _asked_and_measured(folder: Path) -> tuple[list[object], list[object]]:
    found = read(folder)
    return [(t.number, t.config, t.state, t.loss, t.full_loss) for t in found["trials"]], found["evaluations"]


def test_more_money_goes_on_where_the_cap_stopped(tmp_path: Path) -> None:
    """Proves resume --cap: parked trials go on, the cap spans both runs, a cap below what is spent is refused."""
    spec = write_spec(tmp_path, cap="$0.03", timings=True)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    before = read(tmp_path)
    refused = sweep("resume", "words", "--cap", "$0.001", cwd=tmp_path, check=2)
    assert "spent and held already" in refused.stderr
    sweep("resume", "words", "--cap", "$0.08", cwd=tmp_path)
    after = read(tmp_path)
    assert len(after["trials"]) > len(before["trials"])
    assert 30_000 < spent(after["accounts"]) <= 80_000
    completed = [t.number for t in before["trials"] if t.state == "completed"]
    assert all(after["trials"][n].full_loss == before["trials"][n].full_loss for n in completed)


def test_ctrl_c_checkpoints_and_settles(tmp_path: Path) -> None:
    """Proves the interrupt: exit 130, nothing held, the resume ends the study; a second orchestrator is refused."""
    spec = write_spec(tmp_path, cap="$0.2", sleep=0.001, trials=6)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "out.txt").exists() and "starts" in (tmp_path / "out.txt").read_text())
    wait_for(lambda: "trial 1" in (tmp_path / "out.txt").read_text())
    assert "another orchestrator" in sweep("resume", "words", cwd=tmp_path, check=6).stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert "sweep resume words" in (tmp_path / "out.txt").read_text()
    assert read(tmp_path)["held"] == 0
    sweep("resume", "words", cwd=tmp_path)
    assert read(tmp_path)["held"] == 0


@pytest.mark.parametrize("victim", ["watchdog", "worker", "orchestrator", "all"])
def test_kill_minus_nine_of_anything_loses_nothing(tmp_path: Path, victim: str) -> None:
    """Proves recovery: the study ends, no trial is lost, charges equal machine time, workers follow one another."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=6)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "out.txt").exists() and "promoted" in (tmp_path / "out.txt").read_text())
    running = pids(tmp_path)
    if victim in {"orchestrator", "all"}:
        process.kill()
        process.wait()
    if victim in {"watchdog", "all"}:
        assert kill(running["watchdog"])
    if victim in {"worker", "all"}:
        kill(running["worker"])
    if victim in {"orchestrator", "all"}:
        sweep("resume", "words", cwd=tmp_path)
    else:
        assert process.wait(timeout=90) == 0
    found = read(tmp_path)
    assert len(found["trials"]) == 6 and found["held"] == 0
    assert all(trial.state in {"completed", "paused", "pruned"} for trial in found["trials"])
    assert spent(found["accounts"]) == machine_micros(found["workers"])
    if victim == "orchestrator":
        assert len(found["workers"]) == 1, "the living worker was taken over, not replaced"
    else:
        assert len(found["workers"]) == 2


def test_a_worker_without_an_orchestrator_ends_with_its_slice(tmp_path: Path) -> None:
    """Proves that nobody is needed to stop spending: alone, the worker ends within its paid time and is settled."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.002, trials=3)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "out.txt").exists() and "trial 0 starts" in (tmp_path / "out.txt").read_text())
    process.kill()
    process.wait()
    (worker,) = read(tmp_path)["workers"]
    usage = Path(worker.folder) / "usage.jsonl"
    wait_for(lambda: '"ended":true' in usage.read_text().replace(" ", ""), seconds=60)
    used = json.loads(usage.read_text().splitlines()[-1])["ms"]
    assert used <= read(tmp_path)["workers"][0].paid_ms
    sweep("resume", "words", "--cap", "$0.06", cwd=tmp_path, check=None)
    first = read(tmp_path)["workers"][0]
    assert first.settled_ms == used


def test_a_study_on_postgresql(tmp_path: Path, postgres_server: str) -> None:
    """Proves --storage: the same study on a real PostgreSQL server, read by Optuna from there."""
    spec = write_spec(tmp_path, cap="$5", timings=True, trials=5)
    sweep("launch", str(spec), "--yes", "--storage", postgres_server, cwd=tmp_path)
    assert not (tmp_path / "studies.db").exists()
    best = json.loads(sweep("best", "words", "--json", "--storage", postgres_server, cwd=tmp_path).stdout)
    assert best["trained_to_its_end"]
    assert sweep("audit", "words", "--storage", postgres_server, cwd=tmp_path).stderr == ""
    with optuna_study(postgres_server) as stored:
        assert len(stored.trials) == 5 and stored.best_value == best["loss"]


def test_a_machine_billed_from_boot_pays_for_waiting_and_is_stopped(tmp_path: Path) -> None:
    """Proves billed_from: boot charges the time between a crash and the resume, and that the stop command runs once."""
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, trials=4)
    values = json.loads(spec.read_text())
    values["machine"] |= {"billed_from": "boot", "stop_command": f"echo stopped >> {tmp_path}/stopped"}
    spec.write_text(json.dumps(values))
    out = tmp_path / "out.txt"
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    wait_for(lambda: out.exists() and "paused" in out.read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert not (tmp_path / "stopped").exists(), "after Ctrl-C the machine is the user's again"
    time.sleep(1.5)  # the time that the machine waits, and that is charged
    sweep("resume", "words", cwd=tmp_path)
    found = read(tmp_path)
    (gap,) = [row for row in found["transfers"] if "waited for the resume" in row.note]
    assert gap.credit == "idle" and gap.amount_micros >= 1_400
    wait_for((tmp_path / "stopped").exists)
    assert (tmp_path / "stopped").read_text() == "stopped\n"


def test_a_run_whose_last_step_passes_a_rung_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that who is judged at its end is not promoted to it: nobody stands for ever, on either kind of meter.

    Of four steps the last one passes the rung at 80 %; a run of one step passes all.
    """
    monkeypatch.setitem(CURVES, "slots", {"lora": 8, "full": 1})
    for rows, meter, judged in ((512, "clock", 2), (9, "file", 1)):
        monkeypatch.setitem(CURVES, "train_rows", rows)
        folder = tmp_path / meter
        folder.mkdir()
        options = {"sleep": 0.0001} if meter == "clock" else {"timings": True}
        spec = write_spec(folder, cap="$0.1", trials=4, batch_size=16, rungs=[0.1, 0.8], **options)
        sweep("launch", str(spec), "--yes", "--anyway", cwd=folder, timeout=50)
        found = read(folder)
        ends = [trial for trial in found["trials"] if trial.full_loss is not None]
        assert ends and all((trial.state, trial.rung, trial.target) == ("completed", 2, 2) for trial in ends)
        times = Counter(trial for trial, *_ in found["evaluations"])
        assert all(times[trial.number] == judged for trial in ends) and len(found["workers"]) == 1
