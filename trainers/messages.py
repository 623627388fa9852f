"""The words between orchestrator, watchdog and worker: one JSON object a line, `type` first.

Commands go orchestrator -> watchdog -> worker, events come back the same way. The watchdog appends every
event to `events.jsonl` in the worker's folder before anyone acts on it, so an orchestrator that died reads
on from where it stopped. Torch-free: the orchestrator imports this module.

    folder of one worker
      job.json        WorkerJob, written by the orchestrator before the launch
      commands        a FIFO: commands, one line each, every line under PIPE_BUF (4,096 bytes), so writes are atomic
      events.jsonl    what the worker said, in order, fsynced
      usage.jsonl     UsageRecord lines by the watchdog, fsynced; the last one says how the worker ended
      watchdog.lock   flock held by the watchdog for its life    worker.lock    the same for the worker
      watchdog.json   pids of both, for people and for a last-resort kill
      fenced          written by an orchestrator that took the worker over before it started: it must not start

All times are whole milliseconds on the worker's meter, which starts at the launch (`origin_boot_ms`) and runs on
CLOCK_BOOTTIME (it counts suspended time too); nothing here is a wall-clock time. All token counts are input tokens
of training examples, prompt and completion together, unless a name says otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Method = Literal["lora", "full"]
Targets = Literal["attention", "mlp", "all-linear"]
Optimizer = Literal["adamw", "adamw-8bit"]
Precision = Literal["bf16", "fp8"]
FP8_CAPABILITY = (8, 9)  # compute capability from which on GPUs multiply 8-bit floats
FailureCode = Literal["diverged", "out_of_memory", "disk", "error"]

# In the environment of everything that a worker starts: the worker's folder.
WORKER_FOLDER = "SWEEP_WORKER_FOLDER"
EXIT_DISK = 8  # of a worker whose disk is full
WRITERS = 4  # adapters' checkpoints that a worker writes at once, where others train meanwhile
MAX_COMMAND_BYTES = 4096  # PIPE_BUF on Linux: a longer write to the FIFO could be torn by a kill


class MessageError(ValueError):
    """A line that is not one of these messages."""


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """One configuration, complete: what a trial trains depends on this and the data alone, never on its neighbours."""

    number: int
    method: Method
    learning_rate: float
    batch_size: int  # examples an optimizer step
    examples: int  # length of the whole run; the schedule runs over ceil(examples / batch_size) steps
    seed: int  # initialisation, data order, dropout
    rank: int | None = None  # rank, alpha and targets are LoRA's; None for full-parameter training
    alpha: float | None = None
    targets: Targets | None = None
    dropout: float = 0.0
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    precision: Precision = "bf16"  # of LoRA's products with the frozen base, in training


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a model makes of each example of a split: nats summed over its completion tokens, how many those are, and
    the user's metric where there is one (of generated text or of the choices, higher is better)."""

    nll: list[float]
    tokens: list[int]
    metric: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What a watchdog needs to start a worker, and the worker to start training (`job.json`)."""

    worker: str
    command: list[str]  # the worker's argv; the watchdog appends nothing
    model: str  # a folder or a hub id
    data: str  # folder of the prepared token files (trainers/data.py)
    rung_rows: int  # validation rows a rung is judged on: the first ones of the prepared file
    origin_boot_ms: int  # CLOCK_BOOTTIME at which the meter starts: when the first hold was committed
    boot_id: str
    fence: int
    paid_ms: int
    work_ms: int
    checkpoint_ms: int
    grace_ms: int = 2000  # between SIGTERM and SIGKILL, both before paid_ms
    heartbeat_ms: int = 1000  # between two usage records
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    threads: int | None = None  # CPU threads; None leaves torch's choice
    timings: str | None = None  # a file of seconds a token: the meter runs on it instead of the clock (tests, replays)
    stop_command: str | None = None
    slots: int | None = None  # LoRA trials that train at once; None: 1 on the CPU, what a probe finds on a GPU
    max_rank: int = 64  # of the search space: what a slot must have memory for
    precision: Precision = "bf16"  # of the search: with fp8 the base is rounded too, for trials that want it
    methods: list[Method] = field(default_factory=lambda: ["lora", "full"])  # that the study searches
    optimizer: Optimizer = "adamw"  # of full-parameter trials
    checkpointing: bool = False  # full-parameter trials keep no activations inside a layer: slower, and far smaller
    full_tokens: int | None = None  # of such trials through the model at once, in each process
    full_gathered: bool = False  # each of several processes keeps the whole weights from forward to backward
    processes: int = 1  # that train a full-parameter trial together, one a GPU
    metric: str = "validation_loss"  # exact_match, accuracy or module:function: measured at a trial's end
    choices: list[str] | None = None  # of accuracy; None: the distinct completions of the training rows
    max_new_tokens: int = 64  # that a metric on generated text looks at


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of everything on the wire."""

    type: ClassVar[str]

    def line(self) -> str:
        """Returns this message as one line of JSON, newline included."""
        # Not dataclasses.asdict, which copies the usage of every trial there ever was, entry by entry.
        return json.dumps({"type": self.type, **vars(self)}, separators=(",", ":"), default=vars) + "\n"


@dataclass(frozen=True, kw_only=True)
class Command(Message):
    """Base of the orchestrator's messages. One with a fence under the highest seen is ignored: an old sender's."""

    fence: int


@dataclass(frozen=True, kw_only=True)
class Slice(Command):
    """Time paid for, cumulative on the worker's meter.

    At `work_ms` the worker checkpoints everything and ends; at `paid_ms` its process group is dead.
    """

    type: ClassVar[str] = "slice"
    paid_ms: int
    work_ms: int
    checkpoint_ms: int  # a live trial that trained this long since its last checkpoint is checkpointed


@dataclass(frozen=True, kw_only=True)
class EvaluateBase(Command):
    """Evaluate the untrained base model on all validation rows."""

    type: ClassVar[str] = "evaluate_base"


@dataclass(frozen=True, kw_only=True)
class ExamineBase(Command):
    """Score the untrained base model on every example of the test and retention rows. Of the endgame alone."""

    type: ClassVar[str] = "examine_base"


@dataclass(frozen=True, kw_only=True)
class Admit(Command):
    """Put a trial into a free slot and train it until it has seen `until_tokens` (None: its whole run).

    Ignored if it is there already.
    """

    type: ClassVar[str] = "admit"
    config: TrialConfig
    attempt: str
    folder: str  # the trial's folder: checkpoints are its sub-folders
    until_tokens: int | None
    resume: str | None = None  # a checkpoint folder
    examine: bool = False  # at its end, score it on every example of the test and retention rows. Of the endgame alone


@dataclass(frozen=True, kw_only=True)
class Continue(Command):
    """Train an admitted trial on to its next rung, in place."""

    type: ClassVar[str] = "continue"
    trial: int
    until_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Pause(Command):
    """Checkpoint the trial (unless the last checkpoint is current) and free its slot."""

    type: ClassVar[str] = "pause"
    trial: int


@dataclass(frozen=True, kw_only=True)
class Drop(Command):
    """Free the trial's slot; nothing is written."""

    type: ClassVar[str] = "drop"
    trial: int


@dataclass(frozen=True, kw_only=True)
class Stop(Command):
    """Checkpoint every live trial and end.

    The watchdog kills what is left after `within_ms`, or at paid_ms if that is sooner.
    """

    type: ClassVar[str] = "stop"
    within_ms: int


@dataclass(frozen=True, kw_only=True)
class Release(Command):
    """To the watchdog, after the worker's end was settled: nobody needs the machine any more (`stop`)."""

    type: ClassVar[str] = "release"
    stop: bool


@dataclass(frozen=True, kw_only=True)
class Event(Message):
    """Base of the worker's messages. Every event carries the meter.

    `usage` is cumulative milliseconds by cost centre (`load`, `compile`, `checkpoint`, `teardown`, `idle`, and
    `trial:N` for training and evaluation); their sum is `at_ms`.
    """

    at_ms: int
    usage: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ready(Event):
    """The base model is loaded and checked."""

    type: ClassVar[str] = "ready"
    device: str  # "cpu" or the GPU's name
    slots: dict[str, int]  # by method; a worker trains one method at a time
    parameters: int
    linear_shapes: list[list[int]] = field(default_factory=list)
    stream_tokens: int | None = None  # that packed trials run through the model at once


@dataclass(frozen=True, kw_only=True)
class BaseEvaluated(Event):
    """The base model's validation loss, on all rows and on the rung rows."""

    type: ClassVar[str] = "base_evaluated"
    loss: float
    rung_loss: float
    tokens: int
    evaluate_ms: int


@dataclass(frozen=True, kw_only=True)
class BaseExamined(Event):
    """The untrained model's scores by split (`test`, `retention`).

    `majority` is by split what always giving the most frequent completion of the training rows would score.
    """

    type: ClassVar[str] = "base_examined"
    scores: dict[str, Scores]
    majority: dict[str, float] = field(default_factory=dict)
    examine_ms: int = 0


@dataclass(frozen=True, kw_only=True)
class TrialEvent(Event):
    """Base of events about one attempt of one trial; `step` and `tokens` are the trial's own, over all its attempts."""

    trial: int
    attempt: str
    step: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Admitted(TrialEvent):
    """The trial is in a slot, fresh or restored from its checkpoint."""

    type: ClassVar[str] = "admitted"
    restore_ms: int


@dataclass(frozen=True, kw_only=True)
class Progress(TrialEvent):
    """A sign of progress, about one a second, less often in a pack of many: mean training loss since the last one."""

    type: ClassVar[str] = "progress"
    train_loss: float


@dataclass(frozen=True, kw_only=True)
class Checkpointed(TrialEvent):
    """A checkpoint between evaluations is on disk; `evaluated` and `paused` name theirs themselves."""

    type: ClassVar[str] = "checkpointed"
    checkpoint: str
    checkpoint_ms: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(TrialEvent):
    """The trial reached its target, was evaluated, and stands still until it is told what next.

    `checkpoint` holds it whole, of a full-parameter trial at its end the model alone; None at the other rungs of such a
    trial, whose state is only written if it is put aside.

    `loss` is over the rung rows; `full_loss` over all validation rows, only where the run is complete (`final`). Where
    the metric is accuracy both are cross-entropies normalised over the choices. `metric` is over all validation rows,
    with its standard error; `scores` by split what was asked for by `Admit.examine`.
    The measured figures cover the stretch since the last `admitted` or `evaluated` of this attempt, `occupancy` the
    worker's life so far.
    """

    type: ClassVar[str] = "evaluated"
    loss: float
    full_loss: float | None
    final: bool
    checkpoint: str | None
    train_loss: float
    train_tokens: int
    train_ms: int
    evaluate_tokens: int
    evaluate_ms: int
    checkpoint_ms: int
    peak_bytes: int | None = None
    width: float = 1.0  # trials that trained at once, this one among them: the mean over the time that it trained
    shared_batch: float | None = None  # examples of one step of all of them, by their batch sizes: the mean likewise
    occupancy: float | None = None  # real tokens over tokens computed, in training LoRA trials; None before
    metric: float | None = None
    metric_error: float | None = None
    scores: dict[str, Scores] = field(default_factory=dict)
    examine_ms: int = 0  # of metric and scores, beyond `evaluate_ms`
    warm_ms: int = 0  # of `train_ms`, what went into compiling and capturing: charged, and no measure of speed
    warm_tokens: int = 0  # of `train_tokens`, what was trained meanwhile
    write_ms: int = 0  # until the checkpoint was on the disk; `checkpoint_ms` of it kept the machine from training


@dataclass(frozen=True, kw_only=True)
class Paused(TrialEvent):
    """The trial left its slot; `checkpoint` holds it whole."""

    type: ClassVar[str] = "paused"
    checkpoint: str
    checkpoint_ms: int = 0  # 0 where it was current


@dataclass(frozen=True, kw_only=True)
class Dropped(TrialEvent):
    """The trial left its slot."""

    type: ClassVar[str] = "dropped"


@dataclass(frozen=True, kw_only=True)
class Failed(TrialEvent):
    """The trial could not go on and left its slot. `disk` ends the worker too."""

    type: ClassVar[str] = "failed"
    code: FailureCode
    message: str


@dataclass(frozen=True, kw_only=True)
class Ended(Event):
    """The worker's last words: every live trial is checkpointed (or `reason` says why not)."""

    type: ClassVar[str] = "ended"
    reason: Literal["stop", "paid_time", "disk", "error"]
    message: str = ""
    occupancy: float | None = None  # as in Evaluated


@dataclass(frozen=True, kw_only=True)
class UsageRecord:
    """One line of usage.jsonl. The last line of a worker whose watchdog saw it out has `ended`."""

    ms: int
    ended: bool = False
    exit_code: int | None = None  # negative: killed by that signal
    why: str = ""  # exit, paid_until, stop, lost_orchestrator


def _concrete(base: type[Message]) -> dict[str, type[Message]]:
    found: dict[str, type[Message]] = {}
    for child in base.__subclasses__():
        found |= {child.type: child} if "type" in child.__dict__ else _concrete(child)
    return found


COMMANDS = _concrete(Command)
EVENTS = _concrete(Event)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    """The types of a class's fields: reading them off its text takes longer than a message does."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    hints = _hints(kind)
    if unknown := values.keys() - hints.keys():
        raise MessageError(f"{kind.__name__} has no field {sorted(unknown)[0]!r}")
    values = {k: _nested(hints[k], v) for k, v in values.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise MessageError(str(error)) from error


def _nested(hint: Any, value: Any) -> Any:
    if hint is TrialConfig:
        return _build(TrialConfig, value)
    return {name: _build(Scores, scores) for name, scores in value.items()} if hint == dict[str, Scores] else value


def _parse(line: str, kinds: dict[str, type[Message]]) -> Any:
    try:
        values = json.loads(line)
        kind = kinds[values.pop("type")]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise MessageError(f"not a message: {line[:80]!r}") from error
    return _build(kind, values)


def parse_command(line: str) -> Command:
    """Reads one command. Raises MessageError."""
    return typing.cast(Command, _parse(line, COMMANDS))


def parse_event(line: str) -> Event:
    """Reads one event. Raises MessageError."""
    return typing.cast(Event, _parse(line, EVENTS))


def parse_usage(line: str) -> UsageRecord:
    """Reads one line of usage.jsonl. Raises MessageError."""
    try:
        return typing.cast(UsageRecord, _build(UsageRecord, json.loads(line)))
    except json.JSONDecodeError as error:
        raise MessageError(f"not a usage record: {line[:80]!r}") from error


def dump_job(job: WorkerJob) -> str:
    """Returns the text of job.json."""
    return json.dumps(dataclasses.asdict(job), indent=1)


def load_job(text: str) -> WorkerJob:
    """Reads job.json. Raises MessageError."""
    try:
        return typing.cast(WorkerJob, _build(WorkerJob, json.loads(text)))
    except json.JSONDecodeError as error:
        raise MessageError("job.json is not JSON") from error
