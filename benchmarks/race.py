"""Searches by ask and tell on a table, in simulated time: parallel slots, asynchronous, dollars by the solo second.

A slot that is free asks; what it gets trains at its solo speed until the next evaluation that the search wants. Time is
charged while a slot trains, evaluates, or writes and reads a checkpoint, and once for loading the model; a slot that a
search lets wait costs nothing. At the cap everything stops, and what had not been evaluated by then was in vain.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.replay import Replayed, Seen
from benchmarks.simulated import LOAD_SECONDS, MICROS_PER_HOUR, STATE_SECONDS
from benchmarks.tables import Pool, Prior, Row, Run, Table, choose_seed, space_of

UNITS = 20  # of a whole run: the smallest resource of multi-fidelity searches is one
MAX_REFUSED = 100  # new trials, after the last row was taken
SERVE = Path(__file__).absolute().parent / "peers" / "serve.py"


class PeerError(Exception):
    """A peer's process that ended; its own words are on stderr."""


class Asked(Protocol):
    """A search; see benchmarks/peers/serve.py for the answers."""

    def begin(self, search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> dict[str, Any]:
        """Starts a search."""

    def ask(self, trial: int) -> dict[str, Any]:
        """What next."""

    def took(self, trial: int, config: dict[str, Any]) -> None:
        """Which row it was."""

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        """What came out."""


class Peer:
    """A library's searches in a process of their own."""

    def __init__(self, python: str, library: str) -> None:
        """Starts the process. Raises PeerError."""
        self._name = library
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(SERVE), library], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            raise PeerError(f"{python}: cannot be run: {error.strerror}; name the peers' one with --python") from error

    def _request(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name} ended with exit code {self._process.wait()}")
        return dict(json.loads(line))

    def begin(self, search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> dict[str, Any]:
        """See serve.py. Raises PeerError, like all others."""
        return self._request(do="begin", search=search, space=space, prior=prior, seed=seed, units=units)

    def ask(self, trial: int) -> dict[str, Any]:
        """See serve.py."""
        return self._request(do="ask", trial=trial)

    def took(self, trial: int, config: dict[str, Any]) -> None:
        """See serve.py."""
        self._request(do="took", trial=trial, config=config)

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        """See serve.py."""
        return bool(self._request(do="tell", trial=trial, unit=unit, loss=loss, seconds=seconds)["go"])

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class OneRung:
    """Random configurations for one unit, then the best to their ends (Egele et al., "Is One Epoch All You Need for
    Multi-Fidelity Hyperparameter Optimization?", 2023).

    Half of the money goes into the first unit, or less where the table has no more rows.
    """

    def __init__(self, runs: float, rows: int) -> None:
        """`runs` whole runs are what the cap pays for."""
        self._runs, self._rows = runs, rows

    def begin(self, search: str, space: dict[str, Any], prior: Any, seed: int, units: int) -> dict[str, Any]:
        """See Asked."""
        self._source = np.random.default_rng(seed)
        self._space, self._units = space, units
        self._guesses = list(prior or [])
        self._wanted = min(round(self._runs / 2 * units), self._rows)
        self._asked = 0
        self._losses: dict[int, float] = {}
        return {"at": [], "promotes": True}

    def ask(self, trial: int) -> dict[str, Any]:
        """See Asked."""
        if self._asked < self._wanted:
            self._asked += 1
            return {"config": self._guesses.pop(0) if self._guesses else self._draw(), "until": 1}
        if not self._losses:
            return {"wait": True}
        best = min(self._losses, key=lambda number: self._losses[number])
        del self._losses[best]
        return {"resume": best, "until": self._units}

    def _draw(self) -> dict[str, Any]:
        low, high = np.log(self._space["learning_rate"])
        drawn = {
            name: values[int(self._source.integers(len(values)))] for name, values in self._space["choices"].items()
        }
        return drawn | {"learning_rate": float(np.exp(self._source.uniform(low, high)))}

    def took(self, trial: int, config: dict[str, Any]) -> None:
        """See Asked."""

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        """See Asked."""
        if unit < self._units:
            self._losses[trial] = loss
        return False


@dataclass
class _Trial:
    row: Row
    run: Run
    until: int
    unit: int = 0  # how far it is
    seconds: float = 0.0

    share: float = 0.0  # of a whole run


class _Race:
    """One search on one table."""

    def __init__(self, table: Table, search: Asked, begun: dict[str, Any], seed: int, slots: int, units: int) -> None:
        self.table, self.search, self.seed, self.units = table, search, seed, units
        self.at: list[int] = begun["at"]
        self.promotes = bool(begun.get("promotes"))
        self.refused = 0
        self.pool = Pool(table)
        self.trials: dict[int, _Trial] = {}
        self.waiting: list[tuple[float, int, int, int, float]] = []  # (time, order, trial, unit, loss)
        self.free = slots
        self.order = 0

    def fill(self, now: float) -> None:
        """Gives every free slot something to do, as far as the search has something."""
        while self.free and (len(self.pool) or (self.promotes and self.refused < MAX_REFUSED)):
            number = len(self.trials) + self.refused
            answer = self.search.ask(number)
            if "wait" in answer:
                return
            if answer.get("resume") in self.trials:
                self.trials[answer["resume"]].until = answer["until"]
                self.start(now + STATE_SECONDS, answer["resume"], STATE_SECONDS)
            elif "config" in answer and len(self.pool):
                row = self.pool.take(answer["config"])
                self.search.took(number, {name: row.config[name] for name in answer["config"]})
                self.trials[number] = _Trial(row, row.runs[choose_seed(row, self.seed)], answer["until"])
                self.start(now, number)
            else:
                # No row is left for it. A search that promotes may still want earlier ones, once this one has lost.
                self.search.tell(answer.get("resume", number), answer["until"], self.table.base_loss, 0.0)
                self.refused += 1
                continue
            self.free -= 1

    def start(self, now: float, number: int, spent: float = 0.0) -> None:
        """Trains a trial up to its next evaluation."""
        trial = self.trials[number]
        unit = min((u for u in self.at if trial.unit < u < trial.until), default=trial.until)
        end = min(unit / self.units, max(self.table.death(trial.run), trial.share))
        alive = unit / self.units < self.table.death(trial.run)
        seconds = (end - trial.share) * self.table.run_tokens * trial.row.seconds_per_token
        seconds += trial.row.evaluate_seconds if alive else 0.0
        trial.share = end
        trial.seconds += seconds + spent
        loss = self.table.loss(trial.run, unit / self.units) if alive else self.table.base_loss
        heapq.heappush(self.waiting, (now + seconds, self.order, number, unit if alive else -unit, loss))
        self.order += 1

    def arrive(self, now: float, number: int, unit: int, loss: float) -> None:
        """Tells an evaluation; a negative unit is one that the trial did not live to see."""
        trial = self.trials[number]
        trial.unit = abs(unit)
        go = self.search.tell(number, abs(unit), min(loss, self.table.base_loss), trial.seconds)
        if go and unit > 0 and unit < trial.until:
            self.start(now, number)
            return
        if go and unit < 0:  # it diverged: the search is told so at every evaluation that it still wants
            for later in [u for u in self.at if trial.unit < u < trial.until] + [trial.until]:
                if later > trial.unit and not self.search.tell(number, later, self.table.base_loss, trial.seconds):
                    break
        self.free += 1


def race(
    table: Table,
    search: Asked,
    name: str,
    prior: Prior | None,
    seed: int,
    runs: float,
    slots: int = 4,
    units: int = UNITS,
) -> Replayed:
    """Runs a search under a cap that pays for `runs` whole runs; one is `units` of resource. Raises PeerError."""
    table = table.of("lora")
    cap = runs * table.run_seconds()
    guesses = prior.guesses if prior else None
    begun = search.begin(name, space_of(table).plain(), guesses, seed, units)
    course = _Race(table, search, begun, seed, slots, units)
    now, spent = 0.0, LOAD_SECONDS
    seen: list[Seen] = []
    course.fill(now)
    while course.waiting:
        busy = slots - course.free
        then, _, number, unit, loss = heapq.heappop(course.waiting)
        if spent + busy * (then - now) > cap:
            spent = cap
            break
        spent, now = spent + busy * (then - now), then
        dollars = spent / 3600 * MICROS_PER_HOUR / 1e6
        seen.append(Seen(dollars, course.trials[number].row.number, abs(unit) / units, loss))
        course.arrive(now, number, unit, loss)
        course.fill(now)
    return Replayed(seen, spent / 3600 * MICROS_PER_HOUR / 1e6, len(course.trials))


@contextlib.contextmanager
def peers(pythons: dict[str, str]) -> Iterator[dict[str, Peer]]:
    """Starts a process for each library, by name, while the context lasts."""
    with contextlib.ExitStack() as stack:
        started = {}
        for library, python in pythons.items():
            started[library] = Peer(python, library)
            stack.callback(started[library].close)
        yield started
