"""An engine that replays learning curves instead of training: searches are tested in seconds, without torch.

A job whose model is `replay:PATH.json` runs on the curves in that file:

    {"slots": {"lora": 4, "full": 1}, "parameters": 135000000,
     "tokens_per_example": 30, "train_rows": 2000, "validation_rows": 64, "validation_tokens": 2000, "base_loss": 4.8,
     "sleep_seconds_per_token": 0.0, "sleep_seconds_per_checkpoint": 0.0, "seed_spread": 0.0,
     "curves": [{"match": {"method": "lora", "rank": [4, 16]}, "points": [[0, 4.8], [6000, 1.2]]},
                {"match": {"method": "full"}, "floor": 0.9, "scale": 4000, ...}],
     "default": {"floor": 1.0, "scale": 5000, "best_learning_rate": 1e-3, "curvature": 0.3, "diverges_above": 1e-2}}

The first curve whose `match` fits the configuration counts: a value must be equal, a pair of numbers is a closed range.
`points` is a recorded table, tokens to loss, straight between its points and flat beyond them. The formula is
`floor + curvature * log10(learning_rate / best_learning_rate)^2`, approached from `base_loss` as exp(-tokens / scale);
above `diverges_above` the trial fails at its first step, and so it does, for lack of memory, on a curve that says
`out_of_memory`; after `crashes_at` steps the whole worker ends with an error. Losses are nats a token. `seed_spread` is
the largest relative difference between two seeds. Sleeps are real time; without them a trial trains as fast as the
worker can loop.

For examinations there may be `test_rows` (64) with `test_tokens` in all (as many a row as validation has),
`retention_rows` (0), `row_spread` (0) and `forgetting` (0). Over all rows the loss is the curve's; a row's is off by
a share of its own, fixed by trial seed and row, less than `row_spread`. On the retention rows the base model has
`base_loss`, and a trial `forgetting` more for each nat that it is below it elsewhere. Where the study has a metric, a
row's is 1 with probability exp(-loss), fixed by seed and row too, else 0; `majority` (0) is its baseline.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers import metrics, processes
from trainers.engine import Engine, Evaluation, Kept, Position, TrialFailed, Warm
from trainers.judging import Examination, Judgement, Measured
from trainers.messages import Scores, TrialConfig, WorkerJob
from trainers.splits import Split

PREFIX = "replay:"
RIGHT, WRONG = 1, 0  # tokens that a replayed model generates
_PLACES = {"validation": 0, "test": 1, "retention": 2}  # the token id that a split's rows consist of


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss by tokens, as a table or as a formula (module docstring)."""

    match: dict[str, Any] = field(default_factory=dict)
    points: list[list[float]] | None = None
    floor: float | None = None
    scale: float | None = None
    best_learning_rate: float | None = None
    curvature: float = 0.0
    diverges_above: float = math.inf
    out_of_memory: bool = False
    crashes_at: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a curve that is neither table nor formula."""
        if (self.points is None) == (self.floor is None or self.scale is None):
            raise ValueError("a curve has either points, or floor and scale")

    def fits(self, config: TrialConfig) -> bool:
        """Says whether this curve is the configuration's. Raises AttributeError for a field that none has."""
        for name, wanted in self.match.items():
            value = getattr(config, name)
            if isinstance(wanted, list):
                if value is None or not wanted[0] <= value <= wanted[1]:
                    return False
            elif value != wanted:
                return False
        return True

    def loss(self, learning_rate: float, tokens: int, base_loss: float) -> float:
        """Returns the loss after `tokens` of training, in nats a token."""
        if self.points is not None:
            return _interpolate(self.points, tokens)
        assert self.floor is not None and self.scale is not None
        away = math.log10(learning_rate / self.best_learning_rate) if self.best_learning_rate else 0.0
        floor = min(self.floor + self.curvature * away**2, base_loss)
        return floor + (base_loss - floor) * math.exp(-tokens / self.scale)


@dataclass(frozen=True, kw_only=True)
class Script:
    """A replay file."""

    slots: dict[str, int]
    parameters: int
    base_loss: float
    tokens_per_example: int
    validation_tokens: int
    train_rows: int = 2000  # for the orchestrator, which derives the longest run from it
    validation_rows: int = 64
    sleep_seconds_per_token: float = 0.0
    sleep_seconds_per_checkpoint: float = 0.0
    seed_spread: float = 0.0
    test_rows: int = 64
    test_tokens: int | None = None
    retention_rows: int = 0
    row_spread: float = 0.0
    forgetting: float = 0.0
    majority: float = 0.0
    hidden_size: int | None = None  # these two are for the orchestrator, whose priors follow from them
    model_type: str | None = None
    linear_shapes: list[list[int]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    default: Curve | None = None

    def curve(self, config: TrialConfig) -> Curve:
        """Returns the configuration's curve. Raises TrialFailed."""
        for curve in self.curves:
            if curve.fits(config):
                return curve
        if self.default is None:
            raise TrialFailed(config.number, "error", "the replay file has no curve for this configuration")
        return self.default

    def split(self, name: str) -> Split | None:
        """Rows of a split, of as good as equal numbers of tokens; None where there are none."""
        each = self.validation_tokens / self.validation_rows
        rows, tokens = {
            "validation": (self.validation_rows, self.validation_tokens),
            "test": (self.test_rows, self.test_tokens or round(self.test_rows * each)),
            "retention": (self.retention_rows, round(self.retention_rows * each)),
        }[name]
        if not rows:
            return None
        tokens = max(rows, tokens)
        offsets = np.arange(rows + 1, dtype=np.int64) * tokens // rows
        return Split(np.full(tokens, _PLACES[name], dtype=np.int32), offsets, np.ones(tokens, dtype=np.uint8))


def read_script(path: Path) -> Script:
    """Reads a replay file. Raises OSError, ValueError, TypeError."""
    values = json.loads(path.read_text())
    values["curves"] = [Curve(**curve) for curve in values.get("curves", [])]
    if values.get("default") is not None:
        values["default"] = Curve(**values["default"])
    return Script(**values)


def _interpolate(points: list[list[float]], tokens: int) -> float:
    after = bisect.bisect_right([point[0] for point in points], tokens)
    if after in (0, len(points)):
        return points[0 if after == 0 else -1][1]
    (x0, y0), (x1, y1) = points[after - 1], points[after]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


@dataclass
class _Slot:
    config: TrialConfig
    curve: Curve
    step: int
    until_tokens: int | None
    losses: list[float] = field(default_factory=list)


class ReplayEngine:
    """The Engine protocol over a script. Steps all trials in turn, one optimizer step each."""

    warm = Warm()

    def __init__(self, script: Script, slots: int) -> None:
        """Makes an engine with `slots` slots."""
        self.slots = slots
        self._script = script
        self._trials: dict[int, _Slot] = {}

    def prepare(self, config: TrialConfig, checkpoint: Path | None) -> Callable[[], None] | None:
        """See Engine: nothing."""
        return None

    def admit(self, config: TrialConfig, checkpoint: Path | None, until_tokens: int | None) -> Position:
        """See Engine."""
        step = 0
        if checkpoint is not None:
            state = json.loads((checkpoint / "state.json").read_text())
            if TrialConfig(**state["config"]) != config:
                raise TrialFailed(config.number, "error", f"{checkpoint} is of another configuration")
            step = state["step"]
        self._trials[config.number] = _Slot(config, self._script.curve(config), step, until_tokens)
        return self.position(config.number)

    def target(self, trial: int, until_tokens: int | None) -> None:
        """See Engine."""
        self._trials[trial].until_tokens = until_tokens

    def advance(self, pause: Callable[[], bool]) -> list[int]:
        """See Engine."""
        while short := [slot for slot in self._trials.values() if not self._arrived(slot)]:
            for slot in short:
                self._step(slot)
            if pause() or any(self._arrived(slot) for slot in short):
                break
        return [number for number, slot in self._trials.items() if self._arrived(slot)]

    def finish(self) -> None:
        """See Engine."""

    def position(self, trial: int) -> Position:
        """See Engine."""
        slot = self._trials[trial]
        examples = min(slot.step * slot.config.batch_size, slot.config.examples)
        done = examples >= slot.config.examples
        return Position(step=slot.step, tokens=examples * self._script.tokens_per_example, done=done)

    def train_loss(self, trial: int) -> float:
        """See Engine."""
        losses, self._trials[trial].losses = self._trials[trial].losses, []
        return sum(losses) / len(losses) if losses else math.nan

    def occupancy(self) -> float:
        """See Engine. Nothing is computed, so nothing is padded."""
        return 1.0

    def evaluate(self, trial: int | None, rows: int | None) -> Evaluation:
        """See Engine. The rung rows and the others have the same loss."""
        loss = self._script.base_loss if trial is None else self._loss(self._trials[trial])
        every = self._script.validation_rows
        seen = every if rows is None else min(rows, every)
        tokens = max(1, self._script.validation_tokens * seen // every)
        return Evaluation(
            rung_nll=loss * tokens, rung_tokens=tokens, nll=loss * tokens, completion_tokens=tokens, input_tokens=tokens
        )

    def score(self, trial: int | None, split: Split, rows: Sequence[int]) -> NDArray[np.float64]:
        """See Engine. `split` is one of the script's."""
        place = int(split.ids[0])
        loss = self._script.base_loss if trial is None else self._loss(self._trials[trial])
        if place == _PLACES["retention"]:
            loss = self._script.base_loss + self._script.forgetting * max(0.0, self._script.base_loss - loss)
        shares = np.array([_draw(self._seed(trial), place, row) for row in range(split.rows)])
        # Less their mean over tokens, so that the loss over all rows is the curve's.
        shares -= (shares * split.lengths).sum() / split.lengths.sum()
        nll: NDArray[np.float64] = split.lengths * loss * (1 + self._script.row_spread * shares)
        return nll[list(rows)]

    def generate(
        self, trial: int | None, prompts: Sequence[NDArray[np.int32]], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> list[list[int]]:
        """See Engine. A prompt is the place of a split and a row of it; what is generated is RIGHT or WRONG."""
        loss = self._script.base_loss if trial is None else self._loss(self._trials[trial])
        draws = [_draw(self._seed(trial), "answer", *prompt.tolist()) for prompt in prompts]
        return [[RIGHT if draw < math.exp(-loss) else WRONG] for draw in draws]

    def checkpoint(self, trial: int, folder: Path) -> None:
        """See Engine."""
        self._write(self._trials[trial].config, self.position(trial), folder)

    def snapshot(self, trial: int, *, still: bool) -> Callable[[Path], None] | None:
        """See Engine."""
        config, position = self._trials[trial].config, self.position(trial)
        return (lambda folder: self._write(config, position, folder)) if self.slots > 1 else None

    def _write(self, config: TrialConfig, position: Position, folder: Path) -> None:
        temporary = folder.with_name(f".tmp-{folder.name}")
        for stale in (temporary, folder):  # of a life that ended unheard; this one repeats its steps
            if stale.exists():
                shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        try:
            state = {"config": dataclasses.asdict(config), **dataclasses.asdict(position)}
            processes.write_atomically(temporary / "state.json", json.dumps(state))
            time.sleep(self._script.sleep_seconds_per_checkpoint)
            temporary.rename(folder)
        except OSError:
            shutil.rmtree(temporary)
            raise
        processes.sync_folder(folder.parent)

    def drop(self, trial: int) -> None:
        """See Engine."""
        del self._trials[trial]

    def kept(self) -> Kept:
        """See Engine."""
        return Kept()

    def rest(self) -> None:
        """See Engine."""

    def _arrived(self, slot: _Slot) -> bool:
        position = self.position(slot.config.number)
        return position.done or (slot.until_tokens is not None and position.tokens >= slot.until_tokens)

    def _step(self, slot: _Slot) -> None:
        number = slot.config.number
        if slot.config.learning_rate > slot.curve.diverges_above:
            del self._trials[number]
            raise TrialFailed(number, "diverged", f"the loss is nan at step {slot.step + 1}")
        if slot.curve.out_of_memory:
            del self._trials[number]
            raise TrialFailed(number, "out_of_memory", f"step {slot.step + 1}: the replay file says so")
        if slot.step == slot.curve.crashes_at:
            raise RuntimeError("the replay file says so")
        before = self.position(number).tokens
        slot.step += 1
        slot.losses.append(self._loss(slot))
        if self._script.sleep_seconds_per_token:
            time.sleep(self._script.sleep_seconds_per_token * (self.position(number).tokens - before))

    def _loss(self, slot: _Slot) -> float:
        tokens = self.position(slot.config.number).tokens
        loss = slot.curve.loss(slot.config.learning_rate, tokens, self._script.base_loss)
        return loss * (1 + self._script.seed_spread * (_draw(slot.config.seed) - 0.5))

    def _seed(self, trial: int | None) -> str:
        return "base" if trial is None else str(self._trials[trial].config.seed)


@functools.cache
def _draw(*key: int | str) -> float:
    """A number in [0, 1) for a key. A hash, not random.Random: it must be the same in every Python."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, key)).encode()).digest()[:8]) / 2**64


class ReplayExaminer:
    """Implements `trainers.judging.Examiner` on a script: there is no prepared data."""

    def __init__(self, job: WorkerJob) -> None:
        self._metric = job.metric != metrics.LOSS
        self._script = read_script(Path(job.model.removeprefix(PREFIX)))

    def evaluate(self, engine: Engine, trial: int | None, rows: int | None) -> Judgement:
        """See Examiner."""
        found = engine.evaluate(trial, rows)
        rung_loss = found.rung_nll / found.rung_tokens
        return Judgement(rung_loss, found.nll / found.completion_tokens, found.input_tokens)

    def measure(self, engine: Engine, trial: int, judgement: Judgement) -> Measured:
        """See Examiner."""
        if not self._metric:
            return Measured()
        values = self._values(engine, trial, "validation")
        return Measured(*metrics.mean_and_error(values), judgement.input_tokens)

    def examine(self, engine: Engine, trial: int | None) -> Examination:
        """See Examiner."""
        scores, tokens = {}, 0
        for name in ("test", "retention"):
            if (split := self._script.split(name)) is not None:
                nll = engine.score(trial, split, range(split.rows)).tolist()
                metric = self._values(engine, trial, name) if self._metric and name == "test" else None
                scores[name] = Scores(nll=nll, tokens=split.lengths.tolist(), metric=metric)
                tokens += len(split.ids)
        return Examination(scores, tokens)

    def majority(self) -> dict[str, float]:
        """See Examiner."""
        return {"test": self._script.majority} if self._metric else {}

    def _values(self, engine: Engine, trial: int | None, name: str) -> list[float]:
        split = self._script.split(name)
        rows = 0 if split is None else split.rows
        prompts = [np.array([_PLACES[name], row], dtype=np.int32) for row in range(rows)]
        return [float(ids == [RIGHT]) for ids in engine.generate(trial, prompts, 1)]


@dataclass(frozen=True)
class ReplayEngines:
    """What a worker loads: one engine by method, and what it says of itself when it is ready."""

    engines: dict[str, Engine]
    device: str
    parameters: int
    linear_shapes: list[list[int]]

    def make_room(self, method: str) -> None:
        """Nothing: curves take no room."""


def load_engines(job: WorkerJob) -> ReplayEngines:
    """Makes the engines of a job whose model is `replay:PATH.json`. Raises OSError, ValueError, TypeError.

    The job's slots, where it names them, win over the script's.
    """
    script = read_script(Path(job.model.removeprefix(PREFIX)))
    slots = script.slots | ({"lora": job.slots} if job.slots is not None and "lora" in script.slots else {})
    engines: dict[str, Engine] = {method: ReplayEngine(script, count) for method, count in slots.items()}
    return ReplayEngines(engines, "cpu", script.parameters, script.linear_shapes)


def remove_older(folder: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints of a trial's folder. Raises OSError."""
    found = sorted(folder.glob("ckpt-*"), key=lambda path: int(path.name.removeprefix("ckpt-")))
    for path in found[: max(len(found) - keep, 0)]:
        shutil.rmtree(path)
