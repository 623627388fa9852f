"""What a worker gets done while trials come and go: a pack whose trials are judged, dropped and replaced all the time.

    python -m benchmarks.turnover [--shape smollm2-135m] [--data short] [--slots 32] [--seconds 15] [--out FILE]

A worker runs as in a study, and in the orchestrator's place is somebody who answers at once: a trial that comes to its
first rung is dropped for a fresh one, but every third goes on to its end. Search and sampler have no part in what this
measures. Run it as benchmarks.packing, whose data, weights and trials it uses. The first `--warm-up` seconds, in which
streams are captured, do not count. One JSON line:

    tokens_per_second   trained tokens of the stretches that ended in a judgement, a second of machine time: stretches
                        are to be short beside the time that is measured
    judged_per_second   evaluations
    shares              of the time, by cost centre, trials together
    gpu_busy            the mean of nvidia-smi's utilization.gpu; null without a GPU
    mean_width          trials that trained at once, where they were judged
    start_up_seconds    from the launch until the worker was ready
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine_time import Looks, busy, grouped
from benchmarks.packing import Report, conditions, parsed
from benchmarks.workload import SHAPES, draw_trials, weights_folder
from sweep.launchers.local import LocalLauncher
from trainers.messages import Admit, Command, Continue, Drop, Ended, Evaluated, Event, Failed, Ready, Stop, WorkerJob
from trainers.splits import load_split

FENCE = 1
STEPS = 60  # of a whole run; its first rung is at a tenth
GOES_ON = 3  # every such trial
START_S = 240.0  # for which a worker is waited for at most
PAID_MS = 600_000


class Crowd:
    """The trials, and who answers for the orchestrator."""

    def __init__(self, launcher: LocalLauncher, folder: Path, mean_tokens: float) -> None:
        self._launcher, self._folder = launcher, folder
        self._configs = draw_trials(5000, 0, steps=STEPS)
        self._rung = round(STEPS * self._configs[0].batch_size * mean_tokens / 10)
        self._offset = self._next = 0
        self.events: list[Event] = []

    def _send(self, command: Command) -> None:
        self._launcher.send(self._folder, command)

    def admit(self) -> None:
        """Sends the next trial in, to its first rung."""
        config = self._configs[self._next]
        self._next += 1
        folder = str(self._folder / f"trial {config.number}")
        self._send(
            Admit(fence=FENCE, config=config, attempt=f"a{config.number}", folder=folder, until_tokens=self._rung)
        )

    def answer(self) -> list[Event]:
        """Reads what the worker said since, and answers it; returns it."""
        new = []
        for offset, event in self._launcher.read_events(self._folder, self._offset):
            self._offset = offset
            new.append(event)
            if isinstance(event, Evaluated):
                if not event.final and event.trial % GOES_ON == 0:
                    self._send(Continue(fence=FENCE, trial=event.trial, until_tokens=None))
                else:
                    self._send(Drop(fence=FENCE, trial=event.trial))
                    self.admit()
            elif isinstance(event, Failed):
                self.admit()
        self.events += new
        return new

    def wait_ready(self) -> None:
        """Waits until the worker is ready. Raises SystemExit where it never is."""
        give_up = time.monotonic() + START_S
        while not any(isinstance(event, Ready) for event in self.answer()):
            if time.monotonic() > give_up or not self._launcher.alive(self._folder):
                raise SystemExit(f"the worker is not ready: see {self._folder / 'worker.log'}")
            time.sleep(0.05)

    def until(self, seconds: float) -> None:
        """Answers for so long. Raises SystemExit where the worker ends."""
        over = time.monotonic() + seconds
        while time.monotonic() < over:
            if any(isinstance(event, Ended) for event in self.answer()):
                raise SystemExit(f"the worker ended: see {self._folder / 'worker.log'}")
            time.sleep(0.002)

    def close(self) -> None:
        """Ends the worker."""
        self._send(Stop(fence=FENCE, within_ms=0))
        self._launcher.wait_dead(self._folder, 30)


def measure(options: argparse.Namespace, model: Path, root: Path) -> dict[str, Any]:
    """The figures of one worker. Raises SystemExit where it does not start, or ends."""
    launcher, folder = LocalLauncher(), root / "worker"
    boot_id, now_ms = launcher.boot()
    job = WorkerJob(
        worker="w1",
        command=launcher.worker_command(folder),
        model=str(model.absolute()),
        data=str(options.rows),
        rung_rows=options.rung_rows,
        origin_boot_ms=now_ms,
        boot_id=boot_id,
        fence=FENCE,
        paid_ms=PAID_MS,
        work_ms=PAID_MS - 60_000,
        checkpoint_ms=60_000,
        slots=options.slots,
        methods=["lora"],
    )
    launcher.start(job, folder)
    crowd = Crowd(launcher, folder, load_split(options.rows, "train").lengths.mean())
    looks = Looks()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a time limit"))
    try:
        crowd.wait_ready()
        looks.start()
        for _ in range(options.slots):
            crowd.admit()
        crowd.until(options.warm_up)
        first = crowd.events[-1]
        crowd.until(options.seconds)
        last = crowd.events[-1]
    finally:  # else the worker has the GPU for as long as is paid
        if looks.is_alive():
            looks.stop()
        crowd.close()

    passed = (last.at_ms - first.at_ms) / 1000
    seen = [e for e in crowd.events if isinstance(e, Evaluated) and first.at_ms < e.at_ms <= last.at_ms]
    before, after = grouped(first.usage), grouped(last.usage)
    return {
        "tokens_per_second": round(sum(e.train_tokens for e in seen) / passed),
        "judged_per_second": round(len(seen) / passed, 2),
        "shares": {name: round((ms - before.get(name, 0)) / passed, 4) for name, ms in after.items()},
        "gpu_busy": busy(looks.seen, now_ms, first, last),
        "mean_width": round(statistics.mean([e.width for e in seen]), 2),
        "start_up_seconds": next(e for e in crowd.events if isinstance(e, Ready)).at_ms / 1000,
        "seconds": round(passed, 1),
    }


def main(arguments: list[str]) -> int:
    """Prints the line and, with --out, appends it to a file; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turnover", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--rung-rows", type=int, default=128, help="that a trial is judged on")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds after the slots were filled")
    parser.add_argument("--seconds", type=float, default=15.0, help="that are measured")
    options = parsed(parser, ["--data", "short", *arguments])
    device = torch.device(options.device)
    model, weights = weights_folder(SHAPES[options.shape], options.model, options.scratch, device)
    common = {**conditions(options, weights, device), "slots": options.slots}
    with tempfile.TemporaryDirectory(dir=options.scratch) as root:
        Report(options.out).add({**common, **measure(options, model, Path(root))})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
