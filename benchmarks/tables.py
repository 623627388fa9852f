"""Tables of recorded learning curves: what searches are compared on (benchmarks/search.py).

A table is one Parquet file under benchmarks/tables, written by benchmarks/record.py (or, where its name and its facts
say so, made up by benchmarks/synthetic.py). One line of it is one run: a configuration under one seed.

    row, seed            which configuration; a fifth of them were trained under three seeds
    method, rank, alpha, targets, learning_rate, batch_size
    tokens, losses       lists: input tokens trained on and validation loss (nats a completion token) at each of the
                         recording's evaluations (SHARES); where the run diverged they are shorter, and tokens has one
                         more: the evaluation that it did not live to see, up to which it is charged
    diverged
    seconds_per_token    of this configuration alone on the machine (one slot)
    evaluate_seconds     of one evaluation, alone
    peak_bytes           of GPU memory, alone; null on a CPU

Facts of the recording (task, model, base loss, space, versions) are JSON in the file's metadata, under `recording`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FOLDER = Path(__file__).absolute().parent / "tables"
# Of a whole run, at which it is evaluated: every twentieth and more at first, where early cuts look, fewer late.
SHARES = (
    0.01,
    0.02,
    0.03,
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    *(0.6, 0.7, 0.8, 0.9, 0.95, 1),
)
COOLDOWN, LEAST = 0.2, 6  # share of the steps, and how many at least, over which a rate decays (benchmarks/branches.py)
BEST_SHARE = 0.02  # of the configurations: the goal of a search
RUN_SECONDS = 600.0  # that a whole run is made to last in replays: starts would be most of what recorded seconds cost
RATE_WEIGHT = 4.0  # of the learning rate in the distance between configurations (Pool)
SPACE = ("rank", "alpha", "targets", "learning_rate", "batch_size")

_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("seed", pa.int32()),
        ("method", pa.string()),
        ("rank", pa.int32()),
        ("alpha", pa.float64()),
        ("targets", pa.string()),
        ("learning_rate", pa.float64()),
        ("batch_size", pa.int32()),
        ("tokens", pa.list_(pa.int64())),
        ("losses", pa.list_(pa.float32())),
        ("diverged", pa.bool_()),
        ("seconds_per_token", pa.float64()),
        ("evaluate_seconds", pa.float64()),
        ("peak_bytes", pa.int64()),
    ]
)


def cooldown_steps(step: int) -> int:
    """How many steps a copy that leaves a trial after so many is trained on."""
    return max(LEAST, math.ceil(COOLDOWN * step))


class TableError(Exception):
    """A file that is no table. One line."""


@dataclass(frozen=True)
class Run:
    """One configuration under one seed; `losses` ends where the run diverged, `tokens` one after that."""

    tokens: NDArray[np.int64]
    losses: NDArray[np.float64]
    diverged: bool


@dataclass(frozen=True)
class Row:
    """One configuration: `config` has the names of SPACE and `method`, `runs` are by seed."""

    number: int
    config: dict[str, Any]
    runs: dict[int, Run]
    seconds_per_token: float
    evaluate_seconds: float
    peak_bytes: int | None

    def final(self, base_loss: float) -> float:
        """The mean over seeds of the loss at the end; a run that diverged is worth the untrained model."""
        return float(np.mean([base_loss if run.diverged else run.losses[-1] for run in self.runs.values()]))


@dataclass(frozen=True)
class Table:
    """All runs of one task."""

    name: str
    facts: dict[str, Any]
    rows: list[Row]

    @property
    def synthetic(self) -> bool:
        """Whether it was made up."""
        return bool(self.facts.get("synthetic"))

    @property
    def base_loss(self) -> float:
        """Of the untrained model."""
        return float(self.facts["base_loss"])

    @property
    def shares(self) -> list[float]:
        """Of a whole run, at which it was evaluated; the last is 1."""
        return [float(share) for share in self.facts["shares"]]

    def loss(self, run: Run, share: float) -> float:
        """The loss after a share of the whole run, straight between evaluations."""
        grid = [0.0, *self.shares[: len(run.losses)]]
        return float(np.interp(share, grid, [self.base_loss, *run.losses.tolist()]))

    def death(self, run: Run) -> float:
        """The share at which a run is known to have diverged, the evaluation after its last; else infinity."""
        return self.shares[len(run.losses)] if run.diverged else math.inf

    def of(self, method: str) -> Table:
        """The configurations of one method alone."""
        return replace(self, rows=[row for row in self.rows if row.config["method"] == method])

    def finals(self) -> dict[int, float]:
        """Seed-mean loss at the end by row number."""
        return {row.number: row.final(self.base_loss) for row in self.rows}

    def best(self, share: float = BEST_SHARE) -> set[int]:
        """The row numbers of the best share of the configurations: at least one."""
        finals = self.finals()
        return set(sorted(finals, key=lambda number: (finals[number], number))[: math.ceil(share * len(finals))])

    @property
    def run_tokens(self) -> float:
        """Input tokens of a whole run, on average over the data; which examples a seed draws moves it by a percent."""
        return float(self.facts["examples"]) * float(self.facts["tokens_per_example"])

    def run_seconds(self) -> float:
        """What one run to its end takes alone, its evaluation included, on average over the configurations."""
        return float(np.mean([row.seconds_per_token * self.run_tokens + row.evaluate_seconds for row in self.rows]))

    def lasting(self, seconds: float) -> Table:
        """The same table on a machine on which a LoRA run takes so long: all recorded seconds times one factor."""
        factor = seconds / self.of("lora").run_seconds()
        rows = [
            replace(
                row, seconds_per_token=row.seconds_per_token * factor, evaluate_seconds=row.evaluate_seconds * factor
            )
            for row in self.rows
        ]
        return replace(self, rows=rows)


def write(path: Path, table: Table) -> None:
    """Writes a table. Raises OSError."""
    lines: list[dict[str, Any]] = []
    for row in table.rows:
        for seed, run in sorted(row.runs.items()):
            lines.append(
                {"row": row.number, "seed": seed, "diverged": run.diverged}
                | {"tokens": run.tokens.tolist(), "losses": run.losses.tolist()}
                | {name: row.config.get(name) for name in ("method", *SPACE)}
                | {"seconds_per_token": row.seconds_per_token, "evaluate_seconds": row.evaluate_seconds}
                | {"peak_bytes": row.peak_bytes}
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"recording": json.dumps({"name": table.name, **table.facts})}
    pq.write_table(pa.Table.from_pylist(lines, _SCHEMA.with_metadata(metadata)), path, compression="zstd")


def read(path: Path) -> Table:
    """Reads a table. Raises TableError."""
    try:
        found = pq.read_table(path)
        facts = json.loads(found.schema.metadata[b"recording"])
        lines = found.to_pylist()
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path}: is no table: {str(error).splitlines()[0]}") from error
    if not lines:
        raise TableError(f"{path}: has no runs")
    rows: dict[int, Row] = {}
    for line in lines:
        run = Run(np.asarray(line["tokens"], np.int64), np.asarray(line["losses"], np.float64), line["diverged"])
        if line["row"] in rows:
            rows[line["row"]].runs[line["seed"]] = run
            continue
        config = {name: line[name] for name in ("method", *SPACE)}
        measured = line["seconds_per_token"], line["evaluate_seconds"], line["peak_bytes"]
        rows[line["row"]] = Row(line["row"], config, {line["seed"]: run}, *measured)
    return Table(facts.pop("name"), facts, [rows[number] for number in sorted(rows)])


def find(names: Iterable[str], folder: Path = FOLDER) -> list[Table]:
    """Reads the tables that are named, or all of a folder. Raises TableError."""
    wanted = [folder / f"{name}.parquet" for name in names] or sorted(folder.glob("*.parquet"))
    if not wanted:
        raise TableError(f"{folder}: has no tables; record some (benchmarks.record) or make some up (--synthetic)")
    return [read(path) for path in wanted]


class Pool:
    """The rows of a table that a search has not taken yet, and which of them is nearest to what its sampler wants.

    A sampler suggests a point of the continuous space and gets the nearest row that nobody took before it in this
    search; it is told the parameters of that row, not its own, so its model stays true. Why not the nearest row, taken
    or not: a sampler that homes in on the optimum would buy one row again and again. Why not rows as a categorical
    index: no model can learn from one, and every sampler would be as good as random.

    The distance is Euclidean. Learning rate, rank, alpha and batch size count on a log scale, each from 0 to 1 over the
    table's range, other targets count 1/2. The learning rate counts RATE_WEIGHT times: it decides most, and with a
    hundred rows in five dimensions an even distance would move it by a factor of ten to keep the rank.
    """

    def __init__(self, table: Table) -> None:
        """Makes a pool of all rows."""
        self._rows = {row.number: row for row in table.rows}
        self._numeric = [name for name in SPACE if name != "targets"]
        logs = {name: [math.log(row.config[name]) for row in table.rows] for name in self._numeric}
        self._low = {name: min(values) for name, values in logs.items()}
        self._width = {name: (max(values) - min(values)) or 1.0 for name, values in logs.items()}

    def __len__(self) -> int:
        return len(self._rows)

    def _distance(self, config: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        total = 0.25 if config["targets"] != other["targets"] else 0.0
        for name in self._numeric:
            away = (math.log(config[name]) - math.log(other[name])) / self._width[name]
            total += (away * (RATE_WEIGHT if name == "learning_rate" else 1.0)) ** 2
        return total

    def take(self, config: Mapping[str, Any]) -> Row:
        """Returns the nearest row that is left, which is gone then. Raises LookupError if there is none."""
        if not self._rows:
            raise LookupError("every row of the table is taken")
        number = min(self._rows, key=lambda n: (self._distance(config, self._rows[n].config), n))
        return self._rows.pop(number)


@dataclass(frozen=True)
class Space:
    """What a sampler may choose from: choices in the order of their size, and the range of the learning rate."""

    choices: dict[str, list[Any]]
    low: float
    high: float

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"choices": self.choices, "learning_rate": [self.low, self.high]}


def space_of(table: Table) -> Space:
    """The space that a table's rows were drawn from, as far as they show it; the range of rates is the recording's."""
    choices = {
        name: sorted({row.config[name] for row in table.rows}) for name in ("rank", "alpha", "targets", "batch_size")
    }
    low, high = table.facts["space"]["lora"]["learning_rate"]
    return Space(choices, low, high)


@dataclass(frozen=True)
class Prior:
    """First guesses, the best first: what a person who knows the field would try."""

    guesses: list[dict[str, Any]]


def prior_of(space: Space, wrong_by: float = 1.0) -> Prior:
    """Known-good LoRA settings, moved into the space; `wrong_by` divides their learning rates.

    Rank 16, all linear layers, alpha twice the rank and 2e-4 is what PEFT's and TRL's examples use; 1e-3 at alpha 32 is
    Schulman et al., "LoRA Without Regret" (2025), for short runs. A rate that is too low by so much is no better than
    one that is too high, which would lie outside of the space.
    """

    def near(name: str, value: float) -> Any:
        return min(space.choices[name], key=lambda choice: abs(math.log(choice / value)))

    targets = "all-linear" if "all-linear" in space.choices["targets"] else space.choices["targets"][0]
    wanted = [(16, 32, 2e-4), (16, 32, 1e-3), (8, 16, 5e-4)]
    return Prior(
        [
            {"rank": near("rank", rank), "alpha": near("alpha", alpha), "targets": targets}
            | {"batch_size": near("batch_size", 8)}
            | {"learning_rate": min(max(rate / wrong_by, space.low), space.high)}
            for rank, alpha, rate in wanted
        ]
    )


def choose_seed(row: Row, seed: int) -> int:
    """Which of a row's recorded seeds a search with this seed sees: always the same one."""
    seeds: Sequence[int] = sorted(row.runs)
    return seeds[int(np.random.default_rng((seed, row.number)).integers(len(seeds)))]
