"""The watchdog against workers that misbehave, and what an orchestrator can find out and do with the folder alone."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from process_bench import Bench, gone, wait_until

from sweep.launchers.base import LaunchError
from sweep.launchers.local import LocalLauncher
from trainers import processes
from trainers.messages import Admit, Drop, Release, Slice, Stop

# These hold a process to a deadline of seconds: with another test beside them they would measure the machine's load.
pytestmark = pytest.mark.alone

DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SLEEP = "time.sleep(60)\n"
EVENT = """print('{"type":"ended","at_ms":%d,"usage":{"load":%d},"reason":"stop","message":"%s"}', flush=True)\n"""
DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        note()
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(0.3)
"""
# PyDLL keeps the interpreter's lock, so no handler runs; a mutex, unlike a sleep, is waited for on after a signal.
IN_C = """
import ctypes
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)
libc.pthread_mutex_init(mutex, None)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""


@pytest.fixture(scope="module", autouse=True)
def abandoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A worker that ended, and nobody releases its machine: its watchdog waits ten seconds while other tests run."""
    bench = Bench(tmp_path_factory.mktemp("abandoned"))
    bench.start_python("", stop_command=f"echo stopped >> '{bench.root / 'stopped.txt'}'")
    yield bench
    bench.close()


def _death_ms(bench: Bench, count: int) -> int:
    """Waits until all `count` noted processes are dead; returns the milliseconds on the meter, just after."""
    wait_until(lambda: len(bench.pids()) == count, f"{count} processes")
    wait_until(lambda: all(gone(pid) for pid in bench.pids()), "death")
    return bench.launcher.boot()[1]


@pytest.mark.parametrize(
    ("code", "count", "end"),
    [
        (DEAF + SLEEP, 1, (-9, "paid_until")),
        ("os.kill(os.getpid(), signal.SIGSTOP)\n", 1, (-9, "paid_until")),
        (DEAF + DAEMON + SLEEP, 2, (-9, "paid_until")),
        (DEAF + DAEMON, 2, (0, "exit")),
        (IN_C, 1, (-9, "paid_until")),
    ],
    ids=["ignores SIGTERM", "stopped", "setsid daemon", "daemon outlives the worker", "hangs in C with the GIL"],
)
def test_dead_by_paid_ms(bench: Bench, code: str, count: int, end: tuple[int, str]) -> None:
    """Whatever the worker does, it and all its descendants are gone by paid_ms, and the final record says so."""
    job = bench.start_python(code, paid_ms=3000, grace_ms=1000)
    died_ms = _death_ms(bench, count) - job.origin_boot_ms
    record = bench.wait_ended()
    assert died_ms <= 3000 and record.ms <= 3000
    assert (record.exit_code, record.why) == end
    assert (died_ms > 2000) == (record.why == "paid_until")
    print(f"dead {3000 - died_ms} ms before paid_ms")


def test_sigterm_comes_first(bench: Bench) -> None:
    """A worker that obeys SIGTERM gets it at paid_ms - grace_ms and has the grace to itself."""
    bench.start_python(SLEEP, paid_ms=1500, grace_ms=1000)
    record = bench.wait_ended()
    assert (record.exit_code, record.why) == (-15, "paid_until") and 500 <= record.ms < 800


def test_deadline_without_an_orchestrator(bench: Bench) -> None:
    """The orchestrator that launched is killed with its whole session; the watchdog still ends the worker in time."""
    job = bench.job(command=[sys.executable, "-c", DEAF_NOTED % str(bench.root / "pids.txt")], paid_ms=2000)
    (bench.root / "job.txt").write_text(json.dumps(job.__dict__))
    launch = (
        "import json, pathlib, time\nfrom sweep.launchers.local import LocalLauncher\n"
        "from trainers.messages import load_job\n"
        f"LocalLauncher().start(load_job(pathlib.Path({str(bench.root / 'job.txt')!r}).read_text()), "
        f"pathlib.Path({str(bench.folder)!r}))\nprint('launched', flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", launch], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"launched\n"
        os.killpg(process.pid, signal.SIGKILL)
    assert bench.launcher.alive(bench.folder)
    assert _death_ms(bench, 1) - job.origin_boot_ms <= 2000
    assert bench.wait_ended().why == "paid_until"


DEAF_NOTED = (
    "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "open(%r, 'a').write(f'{os.getpid()}\\n')\ntime.sleep(60)\n"
)


def test_slice_moves_the_deadline(bench: Bench) -> None:
    """A later paid_ms keeps the worker alive past the first; an earlier one ends it at once; low fences do neither."""
    bench.start_python(DEAF + SLEEP, paid_ms=2500, grace_ms=1000, fence=5)
    send = bench.launcher.send
    send(bench.folder, Slice(fence=5, paid_ms=60_000, work_ms=50_000, checkpoint_ms=1000))
    send(bench.folder, Slice(fence=4, paid_ms=1, work_ms=1, checkpoint_ms=1000))
    send(bench.folder, Stop(fence=4, within_ms=0))
    time.sleep(2.5)
    assert bench.launcher.alive(bench.folder) and not gone(bench.pids()[0])
    send(bench.folder, Slice(fence=6, paid_ms=4000, work_ms=1, checkpoint_ms=1000))
    send(bench.folder, Slice(fence=5, paid_ms=60_000, work_ms=1, checkpoint_ms=1000))
    record = bench.wait_ended()
    assert record.why == "paid_until" and record.ms <= 4000
    assert "ignored stop with fence 4" in (bench.folder / "watchdog.log").read_text()


def test_stop_bounds_a_hung_worker(bench: Bench) -> None:
    """Stop(within_ms) ends a worker that reads nothing, and a later Slice can't save it."""
    bench.start_python(DEAF + SLEEP)
    bench.launcher.send(bench.folder, Stop(fence=1, within_ms=800))
    bench.launcher.send(bench.folder, Slice(fence=1, paid_ms=90_000, work_ms=80_000, checkpoint_ms=1000))
    started = time.monotonic()
    record = bench.wait_ended()
    assert time.monotonic() - started <= 0.8 and (record.exit_code, record.why) == (-9, "stop")


def test_full_stdin_does_not_block(bench: Bench) -> None:
    """A worker that never reads gets more than a pipe holds; the watchdog still beats, obeys and kills."""
    bench.start_python(DEAF + SLEEP)
    drop = Drop(fence=1, trial=10**3000)
    for _ in range(60):
        wait_until(lambda: _try_send(bench, drop), "room in the FIFO")
    beats = len(bench.usage())
    wait_until(lambda: len(bench.usage()) > beats + 2, "heartbeats")
    bench.launcher.send(bench.folder, Stop(fence=1, within_ms=0))
    assert bench.wait_ended(2).why == "stop"


def _try_send(bench: Bench, command: Drop) -> bool:
    try:
        return bench.launcher.send(bench.folder, command)
    except LaunchError:
        return False


def test_killed_watchdog(make_bench: Callable[..., Bench]) -> None:
    """kill -9 of the watchdog takes a worker in the middle of a long step with it: locks free, no final record."""
    bench = make_bench(sleep_seconds_per_token=0.05)
    bench.start()
    bench.admit(batch_size=20)
    bench.wait_event("admitted")
    pids = json.loads((bench.folder / "watchdog.json").read_text())
    assert bench.launcher.worker_alive(bench.folder)
    os.kill(pids["watchdog"], signal.SIGKILL)
    assert bench.launcher.wait_dead(bench.folder, 2)
    wait_until(lambda: gone(pids["worker"]), "the worker's death")
    usage = bench.launcher.read_usage(bench.folder)
    assert usage is not None and not usage.ended
    assert bench.launcher.send(bench.folder, Stop(fence=1, within_ms=0)) is False


def test_terminated_watchdog(bench: Bench) -> None:
    """SIGTERM to the watchdog is a stop: the worker checkpoints, and the record is final."""
    bench.start()
    bench.wait_event("ready")
    bench.admit(examples=10**9)
    bench.wait_event("admitted")
    os.kill(json.loads((bench.folder / "watchdog.json").read_text())["watchdog"], signal.SIGTERM)
    record = bench.wait_ended()
    assert (record.exit_code, record.why) == (0, "stop")
    assert [event.type for event in bench.poll()][-2:] == ["checkpointed", "ended"]


def test_last_resort(bench: Bench) -> None:
    """`stop` kills a watchdog that does not run any more, with its worker."""
    bench.start()
    bench.wait_event("ready")
    os.kill(json.loads((bench.folder / "watchdog.json").read_text())["watchdog"], signal.SIGSTOP)
    bench.launcher.stop(bench.folder)
    assert bench.launcher.wait_dead(bench.folder, 3)
    bench.launcher.stop(bench.folder)


def test_last_resort_after_the_paid_time(bench: Bench) -> None:
    """A stopped watchdog lets the paid time pass; `stop` then ends it, and with it a worker that ignores SIGTERM."""
    hold = f"processes.hold_lock(Path({str(bench.folder / 'worker.lock')!r}), 1.0)\n"
    code = "from pathlib import Path\nfrom trainers import processes\n" + hold + DEAF + SLEEP
    job = bench.start_python(code, paid_ms=2000, grace_ms=400)
    wait_until(lambda: bench.launcher.worker_alive(bench.folder), "the worker's lock")
    wait_until(lambda: bench.launcher.read_usage(bench.folder), "a heartbeat: the worker's pid is written down before")
    os.kill(json.loads((bench.folder / "watchdog.json").read_text())["watchdog"], signal.SIGSTOP)
    wait_until(lambda: bench.launcher.boot()[1] > job.origin_boot_ms + 2000, "the paid time")
    assert not gone(bench.pids()[0])
    bench.launcher.stop(bench.folder)
    assert bench.launcher.wait_dead(bench.folder, 3)
    wait_until(lambda: gone(bench.pids()[0]), "the worker's death")
    record = bench.launcher.read_usage(bench.folder)
    assert record is not None and not record.ended


def test_reattach(make_bench: Callable[..., Bench]) -> None:
    """A second reader goes on from an offset with the very events that followed, and can command; a torn tail waits."""
    bench = make_bench(sleep_seconds_per_token=0.0005)
    bench.start()
    bench.wait_event("ready")
    again = LocalLauncher()
    offset = bench.offset
    bench.admit(until=100)
    bench.wait_event("evaluated")
    seen = again.read_events(bench.folder, offset)
    assert [event for _, event in seen] == bench.events[1:]
    assert again.send(bench.folder, Stop(fence=2, within_ms=3000))
    assert bench.wait_ended().exit_code == 0
    path = bench.folder / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert len(again.read_events(bench.folder, 0)) == whole.count(b"\n") - 1


def test_events_are_whole_and_only_events(bench: Bench) -> None:
    """What is no message, and a last line without its end, stay out of events.jsonl; the rest is there in order."""
    code = EVENT % (1, 1, "one") + "print('Loading...', flush=True)\n" + EVENT % (2, 2, "two") + "os.write(1, b'{')\n"
    bench.start_python(code)
    bench.wait_ended()
    assert [event.at_ms for event in bench.poll()] == [1, 2]
    assert "Loading" in (bench.folder / "watchdog.log").read_text()


def test_fence_off_prevents_the_start(bench: Bench) -> None:
    """A folder fenced off before the launch never gets a worker; a live one can't be fenced off."""
    assert bench.launcher.fence_off(bench.folder)
    with pytest.raises(LaunchError, match="fenced"):
        bench.start_python(SLEEP)
    assert bench.pids() == [] and not (bench.folder / "usage.jsonl").exists()
    other = Bench(bench.root)
    other.folder = bench.root / ("long " * 40).strip() / ("path " * 40).strip()
    other.start_python(SLEEP)
    assert not other.launcher.fence_off(other.folder)
    other.close()


def test_second_launch(bench: Bench) -> None:
    """One folder, one watchdog, one life: a second launch is refused while the first lives, and after it ended."""
    bench.start_python(SLEEP)
    with pytest.raises(LaunchError, match="another watchdog"):
        bench.start_python(SLEEP)
    bench.launcher.send(bench.folder, Stop(fence=1, within_ms=0))
    bench.launcher.send(bench.folder, Release(fence=1, stop=False))
    assert bench.launcher.wait_dead(bench.folder, 3)
    with pytest.raises(LaunchError, match="used before"):
        bench.start_python(SLEEP)


def test_asking_does_not_stop_a_start(bench: Bench) -> None:
    """Whoever asks whether the watchdog lives holds its lock for a moment; a starting watchdog waits for that."""
    bench.folder.mkdir()
    lock = processes.hold_lock(bench.folder / "watchdog.lock", 0)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.5)
        os._exit(0)
    os.close(lock)  # the child's copy holds the lock on
    bench.start_python(SLEEP)
    os.waitpid(pid, 0)
    assert bench.launcher.alive(bench.folder)


def test_worker_that_cannot_start(bench: Bench) -> None:
    """A command that does not exist ends with 127 and a line in the log; a restarted machine, with a refusal."""
    bench.start(command=["/does/not/exist"])
    assert bench.wait_ended().exit_code == 127
    assert "cannot start the worker" in (bench.folder / "watchdog.log").read_text()
    bench.close()
    bench.folder = bench.root / "another boot"
    with pytest.raises(LaunchError, match="restarted"):
        bench.start(boot_id="another")


def test_late_start(bench: Bench) -> None:
    """A watchdog that comes to life after the paid time starts nothing."""
    bench.start_python(SLEEP, paid_ms=0)
    assert bench.wait_ended().why == "paid_until"
    assert bench.pids() == []


@pytest.mark.parametrize("stop", [True, False])
def test_release(bench: Bench, stop: bool) -> None:
    """A release with stop=True runs the stop command, one with stop=False doesn't; either ends the watchdog at once."""
    mark = bench.root / "stopped.txt"
    bench.start_python("", stop_command=f"echo output; touch '{mark}'")
    bench.wait_ended()
    bench.launcher.send(bench.folder, Release(fence=1, stop=stop))
    assert bench.launcher.wait_dead(bench.folder, 3)
    assert mark.exists() is stop
    assert ("\noutput\n" in (bench.folder / "watchdog.log").read_text()) is stop


def test_full_disk_ends_the_worker(bench: Bench) -> None:
    """Events that can't be recorded even without the ballast end the worker; the events file stays whole.

    The log is on a full disk too (/dev/full), which must not end the watchdog.
    """
    code = "for n in range(9):\n    " + EVENT.replace("%d", "1").replace("%s", "x" * 50_000) + SLEEP
    job = bench.job(command=[sys.executable, "-c", "import time\n" + code])
    bench.folder.mkdir()
    (bench.folder / "job.json").write_text(json.dumps(job.__dict__))
    os.mkfifo(bench.folder / "commands")
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
        f"sys.argv = ['watchdog', {str(bench.folder)!r}]; runpy.run_module('trainers.watchdog', run_name='__main__')"
    )
    with (
        Path("/dev/full").open("wb") as full,
        subprocess.Popen([sys.executable, "-c", limited], stderr=full) as process,
    ):
        record = bench.wait_ended()
        assert record.why == "disk" and record.exit_code == -15
        assert 1 <= len(bench.poll()) < 9 and (bench.folder / "events.jsonl").read_bytes().endswith(b"\n")
        bench.launcher.send(bench.folder, Release(fence=1, stop=False))
        assert process.wait(5) == 0


def test_heartbeats(bench: Bench) -> None:
    """Usage records come at their pace and only grow; the meter starts at the job's origin, not at the process."""
    boot_id, now_ms = bench.launcher.boot()
    bench.start_python(SLEEP, origin_boot_ms=now_ms - 5000, boot_id=boot_id)
    wait_until(lambda: bench.launcher.read_usage(bench.folder), "a heartbeat")
    time.sleep(0.6)
    beats = [record.ms for record in bench.usage()]
    assert len(beats) >= 4 and beats == sorted(beats) and beats[0] >= 5000


def test_commands_too_long_and_locks(bench: Bench, tmp_path: Path) -> None:
    """A command that could be torn is refused; a lock is seen from outside, and only while it is held."""
    bench.start_python(SLEEP)
    config = json.loads('{"number":0,"method":"lora","learning_rate":0.1,"batch_size":1,"examples":1,"seed":0}')
    long = Admit(fence=1, config=config, attempt="a", folder="x" * 5000, until_tokens=None)
    with pytest.raises(LaunchError, match="bytes long"):
        bench.launcher.send(bench.folder, long)
    assert bench.launcher.send(tmp_path / "nowhere", Stop(fence=1, within_ms=0)) is False
    with (bench.folder / "worker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bench.launcher.worker_alive(bench.folder)
    assert not bench.launcher.worker_alive(bench.folder)


def test_abandoned_machine_is_stopped(abandoned: Bench) -> None:
    """When nobody releases the machine within ten seconds, the watchdog runs the stop command once and leaves."""
    assert abandoned.launcher.wait_dead(abandoned.folder, 12)
    assert (abandoned.root / "stopped.txt").read_text() == "stopped\n"
    assert "no release" in (abandoned.folder / "watchdog.log").read_text()


def test_a_daemon_outlives_no_watchdog(bench: Bench) -> None:
    """kill -9 of the watchdog takes the worker along but not its daemon, whose parent is another by then: `stop` finds
    it by the environment that it inherited."""
    daemon = "os.setsid()\n    if os.fork() == 0:\n        note()\n        time.sleep(600)\n    os._exit(0)\n"
    fork = "from trainers import processes\nprocesses.die_with_parent()\nif os.fork() == 0:\n    "
    bench.start_python(fork + daemon + SLEEP)
    wait_until(lambda: len(bench.pids()) == 2, "the daemon")
    os.kill(json.loads((bench.folder / "watchdog.json").read_text())["watchdog"], signal.SIGKILL)
    assert bench.launcher.wait_dead(bench.folder, 3)
    worker, daemon_pid = bench.pids()
    wait_until(lambda: gone(worker), "the worker's death")
    assert not gone(daemon_pid)
    bench.launcher.stop(bench.folder)
    wait_until(lambda: gone(daemon_pid), "the daemon's death")


def test_a_process_whose_first_thread_ended_is_found() -> None:
    """A zombie with living threads still runs: `descendants` counts it, so the deadline kills it."""
    code = "import ctypes, threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    process = subprocess.Popen([sys.executable, "-c", code + "ctypes.CDLL(None).pthread_exit(None)"])
    try:
        state = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", "the first thread's end")
        assert process.pid in processes.descendants(os.getpid())
    finally:
        process.kill()
        process.wait()
