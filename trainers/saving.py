"""Checkpoints that are written while training goes on, on threads of their own.

What a checkpoint holds is taken down at once (`Engine.snapshot`); making files of it and forcing them to the disk takes
many times longer, and would let every slot of a pack wait for one trial. Whoever began a write hears of its end from
`finished`, in the thread that asks, so nothing else needs a lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_THREADS = 4  # that write at once: forcing files to the disk is waiting, not work
_NS_PER_MS = 1_000_000


@dataclass(frozen=True)
class Written:
    """A checkpoint that was begun: of which trial, where, and what the caller wanted to remember of it."""

    trial: int
    path: Path
    step: int
    then: Callable[[int], None]  # is called by the caller, with the milliseconds that the write took
    result: Future[int]


class Saver:
    """Writes checkpoints in the background, at most one of a trial at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, "saver")
        self._writes: list[Written] = []

    def begin(
        self, trial: int, path: Path, step: int, write: Callable[[Path], None], then: Callable[[int], None]
    ) -> None:
        """Begins a write. Raises RuntimeError while another of the same trial is under way."""
        if self.of(trial):
            raise RuntimeError(f"a checkpoint of trial {trial} is being written")

        def timed() -> int:
            started_ns = time.monotonic_ns()
            write(path)
            return (time.monotonic_ns() - started_ns) // _NS_PER_MS

        self._writes.append(Written(trial, path, step, then, self._pool.submit(timed)))

    def of(self, trial: int) -> bool:
        """Whether a write of this trial is under way, or its end was not taken yet."""
        return any(written.trial == trial for written in self._writes)

    @property
    def busy(self) -> bool:
        """Whether any write's end was not taken yet."""
        return bool(self._writes)

    @property
    def waiting(self) -> bool:
        """Whether a write came to its end that was not taken yet."""
        return any(written.result.done() for written in self._writes)

    def finished(self, trial: int | None = None, *, wait: bool = False) -> Iterator[Written]:
        """Takes the writes that came to their end, of one trial or of all, in the order in which they were begun.

        With `wait`, all of them. `Written.result` holds the milliseconds, or the error that the write raised.
        """
        for written in list(self._writes):
            if (trial is None or written.trial == trial) and (wait or written.result.done()):
                written.result.exception()  # waits
                self._writes.remove(written)
                yield written
