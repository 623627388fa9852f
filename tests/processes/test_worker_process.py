"""The worker over a real watchdog, with replayed curves: what it says, in which order, and what it leaves on disk."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from process_bench import TIMINGS, Bench, config, wait_until

from trainers import processes
from trainers.engine import Position
from trainers.live import LiveTrial
from trainers.messages import Admit, Continue, Drop, EvaluateBase, Pause, Release, Slice, Stop, parse_event
from trainers.meter import Meter, Timings, open_meter
from trainers.saving import Saver
from trainers.worker import Worker

SLOW = {"sleep_seconds_per_token": 0.0005}


def test_full_round(make_bench: Callable[..., Bench]) -> None:
    """One whole life: launch, admit, progress, evaluated, continue, pause, resume, final, stop, release."""
    bench = make_bench(sleep_seconds_per_token=0.001)
    bench.start()
    ready = bench.wait_event("ready")
    assert (ready.device, ready.slots, ready.parameters) == ("cpu", {"lora": 2, "full": 1}, 1000)
    bench.launcher.send(bench.folder, EvaluateBase(fence=1))
    assert bench.wait_event("base_evaluated").loss == pytest.approx(4.0)
    bench.admit(until=500, examples=400)
    bench.admit(until=500, examples=400)  # the repetition changes nothing
    first = bench.wait_event("evaluated")
    expected = 1 + 3 * math.exp(-500 / 1000)
    assert (first.trial, first.tokens, first.final, first.full_loss) == (0, 500, False, None)
    assert first.loss == pytest.approx(expected)
    assert first.train_tokens == 500 and first.train_ms >= 450 and first.train_loss > first.loss
    again = Continue(fence=1, trial=0, until_tokens=2000)
    bench.launcher.send(bench.folder, again)
    assert bench.wait_event("progress").tokens > 500
    assert bench.wait_event("evaluated", 2).tokens == 2000
    bench.launcher.send(bench.folder, again)
    bench.launcher.send(bench.folder, EvaluateBase(fence=1))
    bench.wait_event("base_evaluated", 2)  # so that a repetition taken for a command would have its time
    bench.launcher.send(bench.folder, Pause(fence=1, trial=0))
    bench.launcher.send(bench.folder, Pause(fence=1, trial=0))
    bench.launcher.send(bench.folder, Drop(fence=1, trial=77))
    paused = bench.wait_event("paused")
    assert json.loads(Path(paused.checkpoint, "state.json").read_text())["tokens"] == 2000
    bench.admit(resume=paused.checkpoint, examples=400)
    final = bench.wait_event("evaluated", 3)
    assert final.final and final.tokens == 4000 and final.full_loss is not None and final.train_tokens == 2000
    assert len(list((bench.root / "trial 0").glob("ckpt-*"))) == 2
    bench.launcher.send(bench.folder, Stop(fence=1, within_ms=5000))
    record = bench.wait_ended()
    assert (record.exit_code, record.why) == (0, "stop")
    assert bench.wait_event("ended").reason == "stop"
    assert [event.type for event in bench.events].count("paused") == 1
    assert [event.type for event in bench.events].count("evaluated") == 3
    bench.launcher.send(bench.folder, Release(fence=1, stop=False))
    assert bench.launcher.wait_dead(bench.folder, 3)


def test_work_time_over(make_bench: Callable[..., Bench]) -> None:
    """At work_ms the worker checkpoints every live trial and ends by itself with 0, well before its paid time."""
    bench = make_bench(**SLOW)
    bench.start(paid_ms=4000, work_ms=1500, grace_ms=500)
    bench.admit(0, examples=100_000)
    bench.admit(1, examples=100_000)
    record = bench.wait_ended()
    assert (record.exit_code, record.why) == (0, "exit") and 1400 <= record.ms <= 2500
    saved = [event for event in bench.poll() if event.type == "checkpointed"]
    assert {event.trial for event in saved} == {0, 1}
    assert all(Path(event.checkpoint, "state.json").exists() for event in saved)
    assert bench.wait_event("ended").reason == "paid_time"
    trials = {c: ms for c, ms in bench.events[-1].usage.items() if c.startswith("trial:")}
    assert abs(trials["trial:0"] - trials["trial:1"]) < 150


def test_slow_checkpoints_start_early(make_bench: Callable[..., Bench]) -> None:
    """A worker whose checkpoints take long leaves time for them before paid_ms - grace_ms, though work_ms is later."""
    bench = make_bench(sleep_seconds_per_checkpoint=0.6, **SLOW)
    bench.start(paid_ms=5000, work_ms=4900, grace_ms=500, checkpoint_ms=500)
    bench.admit(0, examples=100_000)
    record = bench.wait_ended()
    assert (record.exit_code, record.why) == (0, "exit") and record.ms < 4500


def test_a_write_keeps_nobody_from_training(make_bench: Callable[..., Bench]) -> None:
    """While a trial's checkpoint is being written its neighbour trains on; only then is the trial said to be judged."""
    bench = make_bench(sleep_seconds_per_checkpoint=1.0, **SLOW)
    bench.start()
    bench.admit(0, until=100)
    bench.admit(1, examples=100_000)
    first = bench.wait_event("evaluated")
    bench.launcher.send(bench.folder, Continue(fence=1, trial=0, until_tokens=200))
    second = bench.wait_event("evaluated", 2)
    assert second.write_ms >= 1000 and Path(second.checkpoint, "state.json").exists()
    waited = {c: ms - first.usage.get(c, 0) for c, ms in second.usage.items()}
    assert waited["trial:1"] > 800 > waited.get("checkpoint", 0) and second.checkpoint_ms < 500


def test_a_full_parameter_trial_is_written_when_it_is_put_aside(make_bench: Callable[..., Bench]) -> None:
    """At a rung only the reading leaves the worker; a pause writes the state, a drop does not, and the end does."""
    bench = make_bench(sleep_seconds_per_checkpoint=0.3)
    bench.start()
    bench.launcher.send(bench.folder, EvaluateBase(fence=1))
    full = {"method": "full", "rank": None}
    bench.admit(0, until=300, **full)
    folder = bench.root / "trial 0"
    first = bench.wait_event("evaluated")
    assert first.checkpoint is None and first.checkpoint_ms == first.write_ms == 0 and not list(folder.iterdir())
    bench.launcher.send(bench.folder, Continue(fence=1, trial=0, until_tokens=600))
    assert bench.wait_event("evaluated", 2).checkpoint is None and not list(folder.iterdir())
    bench.launcher.send(bench.folder, Pause(fence=1, trial=0))
    paused = bench.wait_event("paused")
    assert json.loads(Path(paused.checkpoint, "state.json").read_text())["tokens"] == 600
    bench.admit(1, until=300, **full)
    bench.wait_event("evaluated", 3)
    bench.launcher.send(bench.folder, Drop(fence=1, trial=1))
    bench.wait_event("dropped")
    assert not list((bench.root / "trial 1").iterdir())
    bench.admit(0, resume=paused.checkpoint, **full)
    final = bench.wait_event("evaluated", 4)
    assert final.final and final.tokens == 1000 and Path(final.checkpoint, "state.json").exists()
    assert final.checkpoint_ms == 0, "nobody knew yet how long an end takes, so it was written before"
    bench.launcher.send(bench.folder, Drop(fence=1, trial=0))
    bench.admit(2, **full)
    assert bench.wait_event("evaluated", 5).checkpoint_ms >= 300


def test_due_checkpoints(make_bench: Callable[..., Bench]) -> None:
    """A live trial is checkpointed every checkpoint_ms of training; only the newest two stay, told or not yet."""
    bench = make_bench(**SLOW)
    bench.start(checkpoint_ms=200)
    bench.admit(0, examples=100_000)
    bench.wait_event("checkpointed", 4)
    bench.launcher.send(bench.folder, Drop(fence=1, trial=0))
    bench.wait_event("dropped")
    told = [Path(event.checkpoint).name for event in bench.events if event.type == "checkpointed"]

    def settled() -> bool:
        left = sorted(path.name for path in (bench.root / "trial 0").glob("ckpt-*"))
        # One may have been written since, which nobody was told of before the trial left.
        return left == told[-2:] or (len(left) == 2 and left[0] == told[-1] < left[1])

    # The thread that writes removes the oldest after the newest is there, and the drop waits for neither.
    wait_until(settled, "the newest two checkpoints alone")


def test_nothing_stays_of_a_full_parameter_trial_that_was_stopped(make_bench: Callable[..., Bench]) -> None:
    """What such a trial wrote on its way, 14 bytes a parameter, is removed when it is dropped."""
    bench = make_bench(**SLOW)
    bench.start(checkpoint_ms=100)
    bench.admit(0, method="full", rank=None, examples=100_000)
    bench.wait_event("checkpointed", 2)
    assert list((bench.root / "trial 0").glob("ckpt-*"))
    bench.launcher.send(bench.folder, Drop(fence=1, trial=0))
    bench.wait_event("dropped")
    # Nobody waits for the removal, which is begun after that was said.
    wait_until(lambda: not list((bench.root / "trial 0").iterdir()), "an empty folder")


def test_failed_trial_leaves_the_others(make_bench: Callable[..., Bench]) -> None:
    """A diverging trial, one of another method and one too many fail; the neighbour trains on to its end."""
    bench = make_bench(sleep_seconds_per_token=0.0002)
    bench.start()
    bench.admit(0, examples=200)
    bench.admit(1, learning_rate=1.0)
    assert bench.wait_event("failed").code == "diverged"
    bench.admit(2, method="full", rank=None)
    assert "lora" in bench.wait_event("failed", 2).message
    bench.admit(3, examples=200)
    bench.admit(4)
    assert bench.wait_event("failed", 3).message == "all 2 slots are taken"
    assert {bench.wait_event("evaluated", n).trial for n in (1, 2)} == {0, 3}


def test_disk_full_at_a_checkpoint(bench: Bench) -> None:
    """A checkpoint that the disk refuses fails the trial with `disk`, ends the worker with 8, and leaves no part."""
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); "
    run = f"sys.argv = ['worker', {str(bench.folder)!r}]; runpy.run_module('trainers.worker', run_name='__main__')"
    bench.start(command=[bench.launcher.worker_command(bench.folder)[0], "-c", limit + run])
    bench.admit(until=100)
    record = bench.wait_ended()
    assert record.exit_code == 8
    assert bench.wait_event("failed").code == "disk" and bench.wait_event("ended").reason == "disk"
    assert list((bench.root / "trial 0").iterdir()) == []


def test_error_ends_with_one_line(bench: Bench) -> None:
    """An error nobody expected becomes one line in `ended`, and a traceback in worker.log."""
    (bench.root / "replay.json").write_text('{"slots": {}}')
    bench.start()
    assert bench.wait_ended().exit_code == 1
    ended = bench.wait_event("ended")
    assert ended.reason == "error" and ended.message.startswith("TypeError: ")
    assert "Traceback" in (bench.folder / "worker.log").read_text()


def test_killed_worker(make_bench: Callable[..., Bench]) -> None:
    """kill -9 of the worker: the final record says -9, and a new worker goes on from the last checkpoint."""
    bench = make_bench(**SLOW)
    bench.start(checkpoint_ms=100)
    bench.admit(0, examples=100_000)
    saved = bench.wait_event("checkpointed")
    os.kill(json.loads((bench.folder / "watchdog.json").read_text())["worker"], signal.SIGKILL)
    record = bench.wait_ended()
    assert (record.exit_code, record.why) == (-9, "exit")
    assert not bench.launcher.worker_alive(bench.folder)
    bench.close()
    bench.folder, bench.offset, bench.events = bench.root / "another worker", 0, []
    bench.start()
    bench.admit(0, resume=saved.checkpoint, examples=100_000)
    assert bench.wait_event("admitted").tokens == saved.tokens


def _timed_life(bench: Bench) -> bytes:
    timings = str(bench.root / "timings.json")
    bench.start(timings=timings, work_ms=6000, paid_ms=1, checkpoint_ms=700)
    bench.wait_event("ready")
    # Stopped, so that both trials are in the pipe before the worker looks; then no clock decides who comes first.
    worker = json.loads((bench.folder / "watchdog.json").read_text())["worker"]
    os.kill(worker, signal.SIGSTOP)
    bench.admit(0, until=1000, examples=1000)
    bench.admit(1, until=3000, examples=500, learning_rate=2e-3, seed=7)
    time.sleep(0.1)
    os.kill(worker, signal.SIGCONT)
    bench.wait_event("evaluated")
    bench.launcher.send(bench.folder, Slice(fence=1, paid_ms=1, work_ms=30_000, checkpoint_ms=700))
    bench.wait_event("evaluated", 2)
    bench.launcher.send(bench.folder, Continue(fence=1, trial=1, until_tokens=None))
    bench.wait_event("evaluated", 3)
    bench.launcher.send(bench.folder, Stop(fence=1, within_ms=5000))
    record = bench.wait_ended()
    assert record.ms == bench.wait_event("ended").at_ms
    text = (bench.folder / "events.jsonl").read_bytes()
    return text.replace(str(bench.root).encode(), b"ROOT")


def test_timings_are_deterministic(make_bench: Callable[..., Bench]) -> None:
    """On a file of timings two lives give the same events, byte for byte, and no clock deadline ends them."""
    first = _timed_life(make_bench())
    assert first == _timed_life(make_bench())
    assert b'"type":"progress"' in first and b'"type":"checkpointed"' in first


def test_timings_wait_for_a_slice(bench: Bench) -> None:
    """On a file of timings the worker stands still at work_ms, and goes on when a Slice moves it."""
    bench.start(timings=str(bench.root / "timings.json"), work_ms=2500, paid_ms=1)
    bench.admit(examples=1000)
    bench.wait_event("admitted")
    time.sleep(0.5)
    assert bench.poll()[-1].type == "admitted" and bench.launcher.worker_alive(bench.folder)
    bench.launcher.send(bench.folder, Slice(fence=1, paid_ms=1, work_ms=100_000, checkpoint_ms=60_000))
    assert bench.wait_event("evaluated").tokens == 10_000


def test_timings_do_not_wait_for_ever(bench: Bench) -> None:
    """A worker on a file's meter, whose paid time no clock ends, leaves when nobody has spoken to it for long."""
    code = "import sys; from trainers import worker; worker._UNHEARD_S = 0.5; sys.exit(worker.main(sys.argv[1:]))"
    command = [sys.executable, "-P", "-c", code, str(bench.folder.absolute())]
    bench.start(command=command, timings=str(bench.root / "timings.json"), work_ms=6000, paid_ms=1)
    bench.admit(0, until=1000, examples=1000)
    bench.wait_event("evaluated")
    assert bench.wait_ended(timeout_s=10).exit_code == 0
    assert bench.wait_event("ended").reason == "paid_time"


def test_meter_sums_exactly() -> None:
    """Centres sum to the whole at every report and never fall, for awkward fractions and shared stretches."""
    meter = Meter(None, Timings(**TIMINGS))
    before: dict[str, int] = {}
    for turn in range(2000):
        with meter.on(f"trial:{turn % 7}"):
            meter.work("train", "lora", turn % 3)
        with meter.shared({"trial:1": turn % 5, "trial:2": 3}):
            meter.work("evaluate", "lora", turn % 4)
        if turn == 100:
            meter.ready()
        at_ms, usage = meter.usage()
        assert sum(usage.values()) == at_ms
        assert all(usage[centre] >= ms for centre, ms in before.items())
        before = usage


def test_clock_meter_counts_the_launch_as_load() -> None:
    """What passed before the worker started is `load`; work moves a clock's meter by nothing."""
    now = [1_500_000_000]
    meter = Meter(lambda: now[0])
    meter.work("train", "lora", 10**9)
    meter.ready()
    now[0] += 250_000_000
    with meter.shared({"trial:1": 1, "trial:2": 2}):
        now[0] += 1_000_000_000
    assert meter.usage() == (2750, {"load": 1500, "idle": 250, "trial:1": 333, "trial:2": 667})


def test_who_may_not_be_judged_any_more_is_written_first(make_bench: Callable[..., Bench]) -> None:
    """Proves that time kept back for a checkpoint is free again once that is written, and goes into judging.

    A pack stood still for the 26 s that its worker was paid for, 18 s ahead at a time, and was then lost to its end.
    """
    bench = make_bench(slots={"lora": 2})
    (commands, _), (reading, writing) = os.pipe(), os.pipe()
    worker = Worker(job := bench.job(), open_meter(job), commands, writing)
    worker._load()
    for number in (0, 1):
        folder = str(bench.root / f"trial {number}")
        worker._welcome(Admit(fence=1, config=config(number), attempt="a", folder=folder, until_tokens=None))
    while not all(trial.arrived() for trial in worker._trials.values()):
        assert worker.turn() is None
    worker._saver._longest_ms, worker._judge._longest_ms = {"lora": 2000}, {"lora final": 10_000}
    # Half as much again is kept back: 15 s to judge, 3 s to write. Both do not fit, judging alone does.
    leaving_ms = job.grace_ms + processes.dying_ms([os.getpid()])
    worker._paid_ms = worker._work_ms = worker._meter.now_ms() + leaving_ms + 17_000
    deadline = time.monotonic() + 10
    while not all(trial.standing for trial in worker._trials.values()):
        assert worker.turn() is None and time.monotonic() < deadline
    worker._saver.collect(wait=True)
    said = [parse_event(line).type for line in os.read(reading, 1 << 16).decode().splitlines()]
    assert said == ["ready", "admitted", "admitted", "checkpointed", "checkpointed", "evaluated", "evaluated"]


def test_a_rung_is_not_taken_to_last_as_long_as_an_examination(make_bench: Callable[..., Bench]) -> None:
    """Proves that time which is too short for a judgement of the longest kind is used for one of a short kind, also
    where one of the long kind waits before it."""
    bench = make_bench(slots={"lora": 2})
    (commands, _), (reading, writing) = os.pipe(), os.pipe()
    worker = Worker(job := bench.job(), open_meter(job), commands, writing)
    worker._load()
    for number, until in ((0, None), (1, 20)):
        folder = str(bench.root / f"trial {number}")
        worker._welcome(
            Admit(fence=1, config=config(number), attempt="a", folder=folder, until_tokens=until, examine=number == 0)
        )
    while not all(trial.arrived() for trial in worker._trials.values()):
        worker._train()
    worker._saver._longest_ms = {"lora": 10}
    worker._judge._longest_ms = {"lora rung": 10, "lora examined": 60_000}
    worker._paid_ms = worker._work_ms = worker._meter.now_ms() + job.grace_ms + worker._dying.ms() + 8_000
    while not worker._trials[1].standing:
        assert worker.turn() is None
    assert not worker._trials[0].standing
    worker._saver.collect(wait=True)
    said = list(map(parse_event, os.read(reading, 1 << 16).decode().splitlines()))
    assert [event.trial for event in said if event.type == "evaluated"] == [1]


def test_a_disk_that_hung_for_a_moment_leaves_time_to_train(tmp_path: Path) -> None:
    """Proves that a pack of 32 keeps back one write that takes as long as four did which hung, and eight usual ones:
    nine that hang, 135 s, would have ended its worker at once."""
    saver = Saver(Meter(lambda: 0), {}, 500, lambda _: None, background=True)
    trial = LiveTrial(config(), "a", tmp_path, Position(0, 0, False), None)
    assert saver.takes_ms("lora", 0) == 0 and saver.takes_ms("lora", 1) == 750
    for write_ms in [200] * 20 + [10_000] * 4:
        saver._saved(trial, tmp_path, 0, write_ms)
    assert saver.takes_ms("lora", 1) == 15_000
    assert saver.takes_ms("lora", 9) == 15_000 + 8 * 2 * 200
