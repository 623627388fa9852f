"""Has the packed engine's GPU kernels compiled by other processes, begun before this one imports torch.

A worker's imports take as long as theirs, 5 to 10 s on a machine that was just rented: they go on side by side. What
they do is in trainers/lora/precompile.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers import processes, splits
from trainers.messages import WorkerJob

_MOST = 8  # processes; each imports torch and transformers first
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: compute capability


def capability(index: int = 0) -> tuple[int, int] | None:
    """The compute capability of a GPU, asked of the driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return None if failed else (numbers[0].value, numbers[1].value)


@contextmanager
def compiling(job: WorkerJob) -> Iterator[list[subprocess.Popen[bytes]]]:
    """While the context lasts, processes compile what the job's packed trials launch, where they train on a GPU.

    It yields them; whoever needs the kernels waits for their ends. One that failed costs time alone: what it left out
    is compiled when it is launched. What they say goes to stderr. Those that still run at the context's end are killed.
    """
    kind, _, index = job.device.partition(":")
    found = capability(int(index or 0)) if "lora" in job.methods and kind != "cpu" else None
    if found is None:
        yield []
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(_MOST, cores - 1))
    longest = max(splits.longest(Path(job.data), name) for name in ("train", "validation"))
    wanted = {"slots": job.slots, "max_rank": job.max_rank, "longest": longest}
    wanted |= {"precision": job.precision, "capability": found}
    # A child of the worker would take the watchdog's pid for its own parent's, and end itself.
    environment = {**os.environ, processes.WATCHDOG_PID: str(os.getpid())}
    started = []
    for share in range(count):
        request = json.dumps(wanted | {"share": [share, count]})
        command = [sys.executable, "-P", "-m", "trainers.lora.precompile", job.model, request]
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, env=environment))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
