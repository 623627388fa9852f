"""Trials on their way into a slot.

What a slot is filled with is read from a checkpoint, or drawn at random, on the host: tens of milliseconds, in which a
pack on a GPU would stand still. So threads make it ready while others train, and the thread that trains has it copied.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from trainers.engine import Engine
from trainers.messages import Admit


class Arrivals:
    """The trials that were asked in and are not in yet. Without `background` there are never any."""

    threads = 2  # that prepare at once: drawing numbers is work, and somebody else lays out streams

    def __init__(self, *, background: bool) -> None:
        self._background = background
        self._pool = ThreadPoolExecutor(self.threads, "arrival")
        self._coming: dict[int, tuple[Admit, Future[None]]] = {}

    def __contains__(self, number: int) -> bool:
        return number in self._coming

    def __len__(self) -> int:
        return len(self._coming)

    def begin(self, engine: Engine, command: Admit) -> bool:
        """Has the trial made ready; False where that is nothing, and it may come in at once."""
        if not self._background:
            return False
        work = engine.prepare(command.config, None if command.resume is None else Path(command.resume))
        if work is not None:
            self._coming[command.config.number] = command, self._pool.submit(work)
        return work is not None

    @property
    def waiting(self) -> bool:
        """Whether any of them may come in."""
        return any(future.done() for _, future in self._coming.values())

    def take(self, number: int | None = None) -> list[Admit]:
        """Those that may come in, in the order of their asking; with a number that one, which is waited for."""
        if number is not None:
            wait([self._coming[number][1]])
        taken = [n for n, (_, future) in self._coming.items() if (future.done() if number is None else n == number)]
        return [self._coming.pop(n)[0] for n in taken]
