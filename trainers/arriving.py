"""Trials on their way into a slot.

What a slot is filled with is read from a checkpoint, or drawn at random, on the host: tens of milliseconds, in which a
pack on a GPU would stand still. So threads make it ready while others train, and the thread that trains has it copied.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from trainers.engine import Engine
from trainers.messages import Admit


@dataclass
class _Coming:
    command: Admit
    work: Callable[[], None]
    future: Future[None] | None = None

    @property
    def ready(self) -> bool:
        return self.future is not None and self.future.done()


class Arrivals:
    """The trials that were asked in and are not in yet. Without `background` there are never any."""

    threads = 2  # that prepare at once: drawing numbers is work, and somebody else lays out streams
    held = 4  # trials of which something may be ready: of a large model's adapters each is gigabytes

    def __init__(self, *, background: bool) -> None:
        self._background = background
        self._pool = ThreadPoolExecutor(self.threads, "arrival")
        self._coming: dict[int, _Coming] = {}

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
            self._coming[command.config.number] = _Coming(command, work)
            self._submit()
        return work is not None

    def _submit(self) -> None:
        free = self.held - sum(coming.future is not None for coming in self._coming.values())
        for coming in [coming for coming in self._coming.values() if coming.future is None][: max(free, 0)]:
            coming.future = self._pool.submit(coming.work)

    @property
    def centre(self) -> str:
        """The cost centre of waiting for them: of a checkpoint that is read, or of the fresh trial that comes first."""
        first = next(iter(self._coming.values())).command
        return "checkpoint" if first.resume is not None else f"trial:{first.config.number}"

    @property
    def waiting(self) -> bool:
        """Whether any of them may come in."""
        return any(coming.ready for coming in self._coming.values())

    def take(self, number: int | None = None) -> list[Admit]:
        """Those that may come in, in the order of their asking; with a number that one, which is waited for."""
        if number is not None:
            coming = self._coming[number]
            coming.future = coming.future or self._pool.submit(coming.work)
            wait([coming.future])
        taken = [n for n, coming in self._coming.items() if (coming.ready if number is None else n == number)]
        commands = [self._coming.pop(n).command for n in taken]
        self._submit()
        return commands
