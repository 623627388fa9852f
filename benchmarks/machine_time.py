"""Where the machine's time goes in a study: until it is ready, in the GPU's kernels, beside them, in empty slots.

    python -m benchmarks.machine_time SPEC [--set KEY=VALUE ...] [--folder DIR] [--out FILE]

Runs the study as `sweep launch` does, in a process of its own, in `--folder` (by default a new one; in one used
before, another `--set study=NAME` shows a start with warm caches), and looks at the GPU twice a second meanwhile. Then
it reads what the workers said. One JSON line a worker, printed and appended to `--out`:

    start_up_seconds    from the launch until the worker was ready, and what of it was charged to what
    usage_seconds       by cost centre, trials together
    beside_share        of machine time since the first trial was admitted, what was no trial's training or evaluation,
                        nor the scoring of the base model
    gpu_busy            since then, the mean of nvidia-smi's utilization.gpu: the share of time in which a kernel ran;
                        null without a GPU
    occupancy           real tokens over tokens computed
    empty_slot_seconds  from the event with which a trial left its slot until the next one that came was in

The exit code is that of the sweep.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.messages import (
    Admitted,
    BaseExamined,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Failed,
    Paused,
    Ready,
    parse_event,
)

_LOOK_S = 0.5


class Looks(threading.Thread):
    """Samples the GPU's utilization; `seen` are (CLOCK_BOOTTIME ms, percent)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[tuple[float, float]] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Looks until told to stop; where there is no nvidia-smi, not at all."""
        if shutil.which("nvidia-smi") is None:
            return
        command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"]
        while not self._over.wait(_LOOK_S):
            said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
            if said and said[0].isdigit():
                self.seen.append((time.clock_gettime(time.CLOCK_BOOTTIME) * 1000, float(said[0])))

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self.join()


def busy(looks: Sequence[tuple[float, float]], origin_ms: float, first: Event, last: Event) -> float | None:
    """The share of the time between two events of a worker in which a kernel ran; None where nobody could look."""
    seen = [percent for ms, percent in looks if first.at_ms <= ms - origin_ms <= last.at_ms]
    return round(statistics.mean(seen) / 100, 4) if seen else None


def grouped(usage: dict[str, int]) -> dict[str, float]:
    """Seconds by cost centre; all trials are one."""
    found: dict[str, float] = {}
    for centre, ms in usage.items():
        name = "trials" if centre.startswith("trial:") else centre
        found[name] = found.get(name, 0.0) + ms / 1000
    return {name: round(seconds, 3) for name, seconds in sorted(found.items())}


def _gaps(events: Sequence[Event]) -> list[float]:
    """Seconds from each leaving of a slot until the next admission took it."""
    left: list[int] = []
    gaps = []
    for event in events:
        if isinstance(event, Paused | Dropped | Failed):
            left.append(event.at_ms)
        elif isinstance(event, Admitted) and left:
            gaps.append((event.at_ms - left.pop(0)) / 1000)
    return gaps


def worker_line(folder: Path, looks: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """The figures of one worker from its folder; None where it admitted no trial."""
    events = [parse_event(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    origin_ms = json.loads((folder / "job.json").read_text())["origin_boot_ms"]
    ready = next((event for event in events if isinstance(event, Ready)), None)
    first = next((event for event in events if isinstance(event, Admitted)), None)
    if ready is None or first is None:
        return None
    last = events[-1]
    before, after = grouped(first.usage), grouped(last.usage)
    passed = (last.at_ms - first.at_ms) / 1000
    scored = sum(e.examine_ms for e in events if isinstance(e, BaseExamined)) / 1000
    worked = after.get("trials", 0.0) - before.get("trials", 0.0) + scored
    said = [e.occupancy for e in events if isinstance(e, Evaluated | Ended) and e.occupancy is not None]
    gaps = _gaps(events)
    return {
        "worker": folder.name,
        "device": ready.device,
        "slots": ready.slots,
        "start_up_seconds": ready.at_ms / 1000,
        "start_up_usage": grouped(ready.usage),
        "usage_seconds": after,
        "seconds_after_first_admission": round(passed, 3),
        "beside_share": round(1 - worked / passed, 4),
        "gpu_busy": busy(looks, origin_ms, first, last),
        "occupancy": round(said[-1], 4) if said else None,
        "empty_slot_seconds": {"count": len(gaps)}
        | ({"median": round(statistics.median(gaps), 3), "worst": round(max(gaps), 3)} if gaps else {}),
        "evaluations": sum(isinstance(event, Evaluated) for event in events),
        "mean_width": round(statistics.mean([e.width for e in events if isinstance(e, Evaluated)] or [1.0]), 2),
    }


def main(arguments: list[str]) -> int:
    """Runs the study and prints what its workers' time went to; returns the sweep's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.machine_time", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="passed on to sweep launch")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the study's database and runs are")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines here")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [part for text in options.set for part in ("--set", text)]
    command = [sys.executable, "-m", "sweep", "launch", str(options.spec.absolute()), "--yes", "--anyway", *overrides]
    known = set(folder.glob("runs/*/workers/*"))
    looks = Looks()
    looks.start()
    with subprocess.Popen(command, cwd=folder) as study:
        # A time limit stops the study as Ctrl-C would; what there is by then is printed all the same.
        signal.signal(signal.SIGTERM, lambda *_: study.terminate())
        code = study.wait()
    looks.stop()
    for worker in sorted(set(folder.glob("runs/*/workers/*")) - known):
        line = worker_line(worker, looks.seen)
        if line is None:
            continue
        text = json.dumps({"study": worker.parent.parent.name, **line})
        print(text, flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
