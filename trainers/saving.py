"""Checkpoints of live trials, written while others train on.

What a checkpoint holds is taken down at once (`Engine.snapshot`); making files of it and forcing them to the disk takes
many times longer, and would let every slot of a pack wait for one trial: on curves in 32 slots, checkpoints of 0.1 s
took a third of the machine's time (docs/log.md). So threads write. The end of a write is taken up by `collect`,
in the thread that trains, so nothing else needs a lock.
"""

from __future__ import annotations

import contextlib
import errno
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainers.engine import Engine
from trainers.live import LiveTrial
from trainers.messages import WRITERS, Method
from trainers.meter import Meter

_NS_PER_MS = 1_000_000
_DECAY = 0.95  # one slow write must not count as the usual one for ever
_LATEST = 32  # writes that say what is usual
_SPARE = 1.5  # times the longest
_DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@dataclass(frozen=True)
class Written:
    """A write that was begun: of whom, at which step, where, and what is to be called with its milliseconds."""

    trial: LiveTrial
    step: int
    path: Path
    then: Callable[[int], None]
    result: Future[int]


class DiskFull(Exception):
    """A checkpoint does not fit on the disk; its trial can't go on, nor can the worker."""

    def __init__(self, trial: LiveTrial, message: str) -> None:
        super().__init__(message)
        self.trial = trial


class Saver:
    """Checkpoints the trials of a worker, at most one write of a trial at a time."""

    threads = WRITERS  # that write at once: forcing files to the disk is waiting, not work

    def __init__(
        self,
        meter: Meter,
        trials: Mapping[int, LiveTrial],
        first_guess_ms: int,
        trim: Callable[[Path], None],
        *,
        background: bool,
    ) -> None:
        """`trials` are the live ones, by number. Without `background` every write is waited for.

        `trim` is called with a trial's folder when a write is done, in the same thread: it must leave the last
        checkpoint but one, which is the newest that anybody was told of.
        """
        self._trim = trim
        self._guess_ms = first_guess_ms
        self._longest_ms: dict[Method, int] = {}  # that a write of a trial of the method took lately
        self._latest_ms: dict[Method, deque[int]] = {}  # what the last writes took
        self._meter = meter
        self._trials = trials
        self._background = background
        self._pool = ThreadPoolExecutor(self.threads, "saver")
        self._writes: list[Written] = []

    def at_once(self, engine: Engine) -> int:
        """How many checkpoints of this engine are written at the same time."""
        return self.threads if self._background and engine.slots > 1 else 1

    def takes_ms(self, method: Method, rounds: int) -> float:
        """What so many writes of a method's trials, one after the other, take at most: the longest of late, with
        something to spare, and twice what is usual for the others. A disk that hung for a moment does not always, so as
        many as wait for it together are left out of what is usual."""
        if not rounds:
            return 0.0
        latest = sorted(self._latest_ms.get(method, [self._guess_ms]))
        usual = statistics.fmean(latest[: -self.threads] if len(latest) > 2 * self.threads else latest)
        return _SPARE * self._longest_ms.get(method, self._guess_ms) + (rounds - 1) * 2 * usual

    def of(self, number: int) -> bool:
        """Whether a write of the trial with this number is under way, or its end was not taken up yet."""
        return any(written.trial.number == number for written in self._writes)

    @property
    def busy(self) -> bool:
        """Whether any write's end was not taken up yet."""
        return bool(self._writes)

    @property
    def waiting(self) -> bool:
        """Whether a write came to its end that a standing trial waits for: any other's is taken up in passing."""
        return any(written.trial.standing and written.result.done() for written in self._writes)

    def save(self, engine: Engine, trial: LiveTrial, then: Callable[[int, int], None]) -> None:
        """Checkpoints the trial unless its last checkpoint is current, and calls `then` when it is on the disk.

        One that is standing is written from its slot, which it must keep until then, without training.
        `then` takes the milliseconds that kept the machine from training, and those until the end. Raises DiskFull.
        """
        self.collect(trial.number, wait=True)
        if trial.saved_step == trial.at.step:
            then(0, 0)
            return
        path = trial.folder / f"ckpt-{trial.at.step:06d}"
        started_ns = self._meter.now_ns()
        with self._meter.on("checkpoint"):
            write = engine.snapshot(trial.number, still=trial.standing) if self._background else None
            if write is None:
                with _disk(trial, path):
                    engine.checkpoint(trial.number, path)
                self._meter.work("checkpoint", trial.config.method, 0)
        taken_ms = (self._meter.now_ns() - started_ns) // _NS_PER_MS
        if write is None:
            self._saved(trial, path, trial.at.step, taken_ms)
            then(taken_ms, taken_ms)
            self._trim(trial.folder)
            return
        result = self._pool.submit(_timed, write, path, self._trim)
        self._writes.append(Written(trial, trial.at.step, path, lambda write_ms: then(taken_ms, write_ms), result))

    def collect(self, number: int | None = None, *, wait: bool = False) -> None:
        """Takes up the writes that came to their end, of one trial or of all; with `wait`, all of them.

        In the order in which they were begun. Raises DiskFull.
        """
        for written in [w for w in self._writes if number is None or w.trial.number == number]:
            if not (wait or written.result.done()):
                continue
            with self._meter.on("checkpoint"):
                written.result.exception()  # waits
            self._writes.remove(written)
            if self._trials.get(written.trial.number) is written.trial:  # else it left, and nobody asks any more
                with _disk(written.trial, written.path):
                    write_ms = written.result.result()
                self._saved(written.trial, written.path, written.step, write_ms)
                written.then(write_ms)

    def _saved(self, trial: LiveTrial, path: Path, step: int, write_ms: int) -> None:
        trial.saved, trial.saved_step = str(path), step
        method = trial.config.method
        self._longest_ms[method] = max(round(self._longest_ms.get(method, self._guess_ms) * _DECAY), write_ms)
        self._latest_ms.setdefault(method, deque(maxlen=_LATEST)).append(write_ms)


def _timed(write: Callable[[Path], None], path: Path, trim: Callable[[Path], None]) -> int:
    started_ns = time.monotonic_ns()
    write(path)
    taken_ms = (time.monotonic_ns() - started_ns) // _NS_PER_MS
    trim(path.parent)
    return taken_ms


@contextlib.contextmanager
def _disk(trial: LiveTrial, path: Path) -> Iterator[None]:
    """Makes DiskFull of the errors that mean it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise DiskFull(trial, f"cannot write {path}: {error.strerror}") from error
