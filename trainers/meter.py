"""The worker's meter: cumulative time by cost centre, whose sum is the time that passed, to the millisecond.

It runs on the clock since the launch (`origin_boot_ms`), so the launch itself and the interpreter's start count as
`load`. Tests and replays give a file of timings instead; then only `work` moves it, and every run meters the same.

    {"load": seconds, "evaluate": seconds a token, "checkpoint": seconds, "restore": seconds,
     "train": {"lora": seconds a token, "full": seconds a token}}
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainers import processes
from trainers.messages import Method, WorkerJob

Kind = Literal["load", "train", "evaluate", "checkpoint", "restore"]

_NS_PER_MS = 1_000_000
_STALE = 64  # entries that are out of date, beside as many as there are others, before they are thrown out
_SHARED = "(shared)"  # time of a stretch whose centres are known only at its end


@dataclass(frozen=True)
class Timings:
    """Seconds that work takes on a meter that runs on a file."""

    load: float
    evaluate: float  # a token
    checkpoint: float
    restore: float
    train: dict[Method, float]  # a token

    def seconds(self, kind: Kind, method: Method, tokens: int) -> float:
        """Returns what this piece of work takes."""
        match kind:
            case "train":
                return self.train[method] * tokens
            case "evaluate":
                return self.evaluate * tokens
            case _:
                return float(getattr(self, kind))


class Meter:
    """Charges every nanosecond to the current cost centre: `load` until `ready`, `idle` between stretches of work."""

    def __init__(self, clock_ns: Callable[[], int] | None, timings: Timings | None = None) -> None:
        """`clock_ns` returns nanoseconds since the origin; without it the meter runs on `timings`."""
        if (clock_ns is None) == (timings is None):
            raise ValueError("a meter runs either on a clock or on timings")
        self._timings = timings
        self._worked_ns = 0
        self._clock_ns = clock_ns or (lambda: self._worked_ns)
        self._spent_ns: dict[str, int] = {}
        self._reported_ms: dict[str, int] = {}
        self._reported = 0  # their sum
        self._moved: set[str] = set()  # centres that were charged since the last report
        self._owed_ns: dict[str, int] = {}  # to each centre beyond what was reported, then
        self._owing: list[tuple[int, str]] = []  # heap of (-owed, centre): out of date where not as in `_owed_ns`
        self._mark_ns = 0
        self._centre = "load"

    def now_ns(self) -> int:
        """Returns nanoseconds since the origin; the current centre is charged up to here."""
        # A clock that started before the origin (a resumed virtual machine) must not give time back.
        now_ns = max(self._clock_ns(), self._mark_ns)
        self._charge(self._centre, now_ns - self._mark_ns)
        self._mark_ns = now_ns
        return now_ns

    def _charge(self, centre: str, ns: int) -> None:
        self._spent_ns[centre] = self._spent_ns.get(centre, 0) + ns
        self._moved.add(centre)

    def now_ms(self) -> int:
        """Returns whole milliseconds since the origin."""
        return self.now_ns() // _NS_PER_MS

    def spent_ns(self, centre: str) -> int:
        """Returns what the centre was charged so far."""
        self.now_ns()
        return self._spent_ns.get(centre, 0)

    def ready(self) -> None:
        """Ends `load`: from here on, time outside of any work is `idle`."""
        self.now_ns()
        self._centre = "idle"

    @contextlib.contextmanager
    def on(self, centre: str) -> Iterator[None]:
        """Charges the time inside to `centre`."""
        self.now_ns()
        outer, self._centre = self._centre, centre
        try:
            yield
        finally:
            self.now_ns()
            self._centre = outer

    @contextlib.contextmanager
    def shared(self, weights: dict[str, int]) -> Iterator[None]:
        """Charges the time inside to the centres in `weights`, in their proportions at the end (all zero: equally)."""
        try:
            with self.on(_SHARED):
                yield
        finally:
            # After the centre is the outer one again: what the division itself takes must not be left in no one's name.
            self._divide(self._spent_ns.pop(_SHARED), weights)

    def _divide(self, spent_ns: int, weights: dict[str, int]) -> None:
        if not any(weights.values()):
            weights = dict.fromkeys(weights or ["idle"], 1)
        left_ns, left_weight = spent_ns, sum(weights.values())
        for centre, weight in weights.items():
            part_ns = left_ns * weight // left_weight if weight else 0
            self._charge(centre, part_ns)
            left_ns, left_weight = left_ns - part_ns, left_weight - weight

    def work(self, kind: Kind, method: Method, tokens: int) -> None:
        """Moves a meter that runs on a file by the time this work takes; on a clock, time passes by itself."""
        if self._timings is not None:
            self._worked_ns += round(self._timings.seconds(kind, method, tokens) * 1e9)

    def usage(self) -> tuple[int, dict[str, int]]:
        """Returns milliseconds since the origin and by centre: the parts sum to the whole and never fall."""
        at_ms = self.now_ns() // _NS_PER_MS
        # Rounded against what was reported before, not afresh: a centre that was rounded up once must not fall later.
        # Whole milliseconds go to whom they are owed, then one each to those that are owed most. Of all the trials that
        # there ever were few are looked at: a worker has thousands, and this is asked at every event.
        for centre in self._moved:
            self._owe(centre, self._spent_ns.get(centre, 0) - self._reported_ms.get(centre, 0) * _NS_PER_MS)
        self._moved.clear()
        left_ms = at_ms - self._reported
        for least_ns in (_NS_PER_MS, -math.inf):
            paid = {}
            while left_ms and (centre := self._most_owed(least_ns)) is not None:
                owed_ns = self._owed_ns.pop(centre)
                part_ms = min(left_ms, max(owed_ns // _NS_PER_MS, 1))
                self._reported_ms[centre] = self._reported_ms.get(centre, 0) + part_ms
                left_ms -= part_ms
                paid[centre] = owed_ns - part_ms * _NS_PER_MS
            for centre, owed_ns in paid.items():
                self._owe(centre, owed_ns)
        self._reported = at_ms - left_ms
        return at_ms, {centre: ms for centre, ms in self._reported_ms.items() if ms}

    def _owe(self, centre: str, ns: int) -> None:
        self._owed_ns[centre] = ns
        heapq.heappush(self._owing, (-ns, centre))
        if len(self._owing) > _STALE + 2 * len(self._owed_ns):
            self._owing = [(-owed_ns, one) for one, owed_ns in self._owed_ns.items()]
            heapq.heapify(self._owing)

    def _most_owed(self, least_ns: float) -> str | None:
        """Takes off the heap the centre that is owed most; None where that is less, or there is none."""
        while self._owing and self._owing[0][0] <= -least_ns:
            less_ns, centre = heapq.heappop(self._owing)
            if self._owed_ns.get(centre) == -less_ns:
                return centre
        return None


def open_meter(job: WorkerJob) -> Meter:
    """Returns the meter of a job: on the clock, or on its file of timings. Raises OSError, ValueError, TypeError."""
    if job.timings is not None:
        return Meter(None, Timings(**json.loads(Path(job.timings).read_text())))
    origin_ns = job.origin_boot_ms * _NS_PER_MS
    return Meter(lambda: processes.boot_ns() - origin_ns)
