"""Full-parameter training in several processes (gloo, on the CPU): as in one, over pauses, and when one dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from process_bench import Bench, gone, wait_until
from safetensors.numpy import load_file, save_file

from trainers.processes import descendants

HERE = Path(__file__).parent
# 21 steps, the last of two rows: fewer than there are processes in one of the tests.
TRIAL = {"number": 2, "method": "full", "learning_rate": 3e-3, "batch_size": 4, "examples": 82, "seed": 7}
CONFIG = {**TRIAL, "weight_decay": 0.1, "clip_norm": 0.5}
WHOLE = 21


def drive(prepared: Path, tmp_path: Path, *scripts: tuple[int, list[list[Any]], dict[str, Any]]) -> list[list[Any]]:
    """What engines of so many processes give for calls, one engine after the other."""
    written = []
    for processes, calls, more in scripts:
        job = {"model": str(prepared / "tiny"), "data": str(prepared / "data"), "processes": processes}
        written.append({"calls": calls, **more, "job": job | more.get("job", {})})
    (tmp_path / "scripts.json").write_text(json.dumps(written))
    command = [sys.executable, "-W", "error", str(HERE / "full_driver.py"), str(tmp_path / "scripts.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def same(left: Any, right: Any, rel: float = 1e-5) -> bool:
    """Whether nested lists of numbers are the same within a relative tolerance."""
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b, rel) for a, b in zip(left, right, strict=True))
    return left is right is None or bool(left == pytest.approx(right, rel=rel))


def test_several_processes_train_as_one(prepared: Path, tmp_path: Path) -> None:
    """Losses of a whole run, and what trial and base are judged at, are one process's; also with recomputed layers, and
    whether weights stay gathered from forward to backward or not.

    And where a batch goes through the model in several parts, of which processes have different numbers. A step with
    fewer rows than processes is among them. After the trial left the base is what it was.
    """
    train: list[list[Any]] = [["admit", CONFIG, None], ["train", 2, WHOLE]]
    judged = [["evaluate", 2, None], ["score", 2, None], ["generate", 2, None]]
    calls = [*train, *judged, ["drop", 2], ["evaluate", None]]
    between = [["admit", CONFIG, None], ["train", 2, 8], *judged, ["train", 2, WHOLE - 8]]
    sparing, whole = {"job": {"checkpointing": True}}, {"job": {"full_gathered": True}}
    parts = [["micro", 30], *calls]
    one, two, three, spared, cut = drive(
        prepared,
        tmp_path,
        (1, calls, {}),
        (2, [*calls, *between], whole),
        (3, train, {}),
        (2, train, sparing),
        (2, parts, {}),
    )
    two, on = two[: len(calls)], two[len(calls) :]
    assert same(two, one)
    assert two[4] == one[4], "the generated tokens"
    assert two[6] == one[6] == [one[2][1]], "the base model"
    assert same(three, one[:2])
    assert spared == two[:2]
    assert same(cut[1:4], one[:3]) and cut[5] == one[4]
    assert same([*on[1], *on[5]], one[1]), "training goes on with the stepped weights after a judgement"


def test_compiled_layers_are_computed_again_where_that_is_wanted(prepared: Path, tmp_path: Path) -> None:
    """Checkpointing keeps less for backward where several processes compile their layers too, and changes no loss."""
    calls = [["admit", CONFIG, None], ["train", 2, 2], ["kept", 2], ["train", 2, 3]]
    sparing = {"compiled": True, "job": {"checkpointing": True}}
    eager, plain, spared = drive(
        prepared, tmp_path, (1, calls, {}), (2, calls, {"compiled": True}), (2, calls, sparing)
    )
    assert spared[2] < 0.6 * plain[2]
    assert all(same([*found[1], *found[3]], [*eager[1], *eager[3]]) for found in (plain, spared))


def test_pauses_move_between_one_and_two_processes(prepared: Path, tmp_path: Path) -> None:
    """A trial that goes from two processes to one and back has the losses of one that stayed; two and two, to the bit.

    What two processes write is a folder as one writes it.
    """
    first, second = str(tmp_path / "trial" / "step-7"), str(tmp_path / "trial" / "step-14")
    fresh: list[list[Any]] = [["admit", CONFIG, None], ["train", 2, 7], ["checkpoint", 2, first], ["train", 2, 14]]
    whole, stayed, alone, back = drive(
        prepared,
        tmp_path,
        (1, [["admit", CONFIG, None], ["train", 2, WHOLE]], {}),
        (2, [*fresh, ["drop", 2], ["admit", CONFIG, first], ["train", 2, 14]], {}),
        (1, [["admit", CONFIG, first], ["train", 2, 7], ["checkpoint", 2, second]], {}),
        (2, [["admit", CONFIG, second], ["train", 2, 7]], {}),
    )
    again = stayed[-2:]
    assert (alone[0], back[0], again[0]) == (7, 14, 7)
    assert same([*stayed[1], *alone[1], *back[1]], whole[1])
    assert again[1] == stayed[3]
    names = [sorted(path.name for path in Path(folder).iterdir()) for folder in (first, second)]
    assert names[0] == names[1]


def test_bf16_weights_have_fp32_masters_in_parts(prepared: Path, tmp_path: Path) -> None:
    """Over bf16 weights two processes keep fp32 masters in parts, and one process goes on from what they wrote.

    The losses differ from one process's within bf16's noise alone.
    """
    folder = str(tmp_path / "trial" / "step-5")
    fine, bf16 = {**CONFIG, "learning_rate": 1e-5}, {"bf16": True}
    train: list[list[Any]] = [["admit", fine, None], ["train", 2, 5], ["evaluate", 2, None]]
    two, one, resumed = drive(
        prepared,
        tmp_path,
        (2, [*train, ["checkpoint", 2, folder]], bf16),
        (1, train, bf16),
        (1, [["admit", fine, folder], ["evaluate", 2, None]], bf16),
    )
    assert same(two[1:3], one[1:3], rel=0.01)
    sizes = {name: (Path(folder) / f"{name}.safetensors").stat().st_size for name in ("masters", "model")}
    assert sizes["masters"] > 1.9 * sizes["model"]
    assert same(resumed[1], two[2], rel=0.005)


def test_weights_that_a_folder_leaves_untied_stay_apart(prepared: Path, tmp_path: Path) -> None:
    """A folder with a head of its own, though its configuration ties it: two processes train both, as one does."""
    shutil.copytree(prepared / "tiny", tmp_path / "untied")
    file = tmp_path / "untied" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    save_file(tensors, file, metadata={"format": "pt"})
    folder, untied = str(tmp_path / "trial" / "step-4"), {"job": {"model": str(tmp_path / "untied")}}
    one, two, resumed = drive(
        prepared,
        tmp_path,
        (1, [["admit", CONFIG, None], ["train", 2, 8]], untied),
        (2, [["admit", CONFIG, None], ["train", 2, 4], ["checkpoint", 2, folder]], untied),
        (1, [["admit", CONFIG, folder], ["train", 2, 4]], untied),
    )
    assert same([*two[1], *resumed[1]], one[1])


def test_lack_of_memory_in_another_process_fails_the_trial_alone(prepared: Path, tmp_path: Path) -> None:
    """A process that runs out of memory ends; the trial fails as `out_of_memory`, the next one has a new process."""
    calls = [["pids"], ["admit", CONFIG, None], ["train", 2, 5], ["evaluate", None]]
    calls += [["admit", CONFIG, None], ["train", 2, 4], ["pids"]]
    (found,) = drive(prepared, tmp_path, (2, calls, {"oom": str(tmp_path / "happened")}))
    assert found[2]["code"] == "out_of_memory" and "step 3" in found[2]["message"]
    assert found[4] == 0 and len(found[5]) == 4
    assert found[0] != found[6] and gone(found[0][0])


def test_nothing_of_a_trial_stays_in_memory(prepared: Path, tmp_path: Path) -> None:
    """While a trial is in, a process holds its shards and no whole weights beside the base; when it left, neither."""
    calls = [["held"], ["admit", CONFIG, None], ["held"], ["train", 2, 2], ["drop", 2], ["held"]]
    ((before, _, during, _, _, after),) = drive(prepared, tmp_path, (2, calls, {}))
    assert before == after == [0, 0] and during[0] > 10 and during[1] == 0


def start(bench: Bench, prepared: Path, **trial: Any) -> tuple[int, int]:
    """Starts a worker of two processes with a trial in it; returns their pids."""
    real = {"model": str(prepared / "tiny"), "data": str(prepared / "data"), "device": "cpu", "threads": 1}
    bench.start(**real, methods=["full"], processes=2, paid_ms=180_000, work_ms=170_000)
    assert bench.wait_event("ready", timeout_s=90).slots == {"full": 1}
    bench.admit(2, method="full", rank=None, examples=2_000_000, learning_rate=1e-4, batch_size=4, **trial)
    bench.wait_event("progress", timeout_s=60)
    worker = json.loads((bench.folder / "watchdog.json").read_text())["worker"]
    (other,) = descendants(worker)
    assert os.getpgid(other) == worker, "it is in another process group than the worker"
    return worker, other


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(bench: Bench, prepared: Path, victim: int) -> None:
    """kill -9 of either process ends both within seconds. The worker says whose end it was, if it can."""
    pids = start(bench, prepared)
    os.kill(pids[victim], signal.SIGKILL)
    record = bench.wait_ended(timeout_s=20)
    wait_until(lambda: all(gone(pid) for pid in pids), "both to end", 5)
    if victim == 0:
        assert record.exit_code == -signal.SIGKILL
    else:
        assert record.exit_code == 1
        ended = bench.wait_event("ended")
        assert ended.reason == "error"
        assert "process 1 of 2 ended: killed by signal 9" in ended.message


def test_a_process_killed_while_nothing_runs_ends_the_worker(bench: Bench, prepared: Path) -> None:
    """A trial stands at its rung and a process of it dies: it could not go on, so the worker ends by itself."""
    real = {"model": str(prepared / "tiny"), "data": str(prepared / "data"), "device": "cpu", "threads": 1}
    bench.start(**real, methods=["full"], processes=2, paid_ms=180_000, work_ms=170_000)
    bench.wait_event("ready", timeout_s=90)
    bench.admit(2, method="full", rank=None, until=200, learning_rate=1e-4)
    bench.wait_event("evaluated", timeout_s=60)
    worker = json.loads((bench.folder / "watchdog.json").read_text())["worker"]
    os.kill(descendants(worker)[0], signal.SIGKILL)
    assert bench.wait_ended(timeout_s=30).exit_code == 1
    assert "process 1 of 2 ended" in (bench.folder / "worker.log").read_text()


def test_both_processes_live_through_sigterm_to_checkpoint(bench: Bench, prepared: Path) -> None:
    """The watchdog's SIGTERM goes to the whole group: the other process stays for the checkpoint, then ends."""
    pids = start(bench, prepared)
    os.killpg(pids[0], signal.SIGTERM)
    assert bench.wait_ended(timeout_s=20).exit_code == 0
    saved = bench.wait_event("checkpointed")
    assert (Path(saved.checkpoint) / "state.json").exists()
    wait_until(lambda: all(gone(pid) for pid in pids), "both to end", 5)
    assert bench.wait_event("ended").reason == "paid_time"
