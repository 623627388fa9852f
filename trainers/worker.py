"""The process that owns one GPU, or the CPU: `python -m trainers.worker FOLDER`.

Commands come as lines on stdin, events go as lines to stdout (trainers/messages.py); whatever a library prints goes to
stderr. Trials come and go in the engine's slots while the others train on. One method at a time.

    exit codes   0 told to end, or the paid time is over    1 an error    8 the disk is full
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from trainers import peak, processes
from trainers.arriving import Arrivals
from trainers.engine import Engine, TrialFailed
from trainers.inbox import Inbox
from trainers.judging import Judge
from trainers.live import LiveTrial, nowhere, refused
from trainers.loading import LoadedEngines, RemoveOlder, any_method, load, occupancy
from trainers.messages import (
    EXIT_DISK,
    Admit,
    Admitted,
    BaseEvaluated,
    BaseExamined,
    Checkpointed,
    Continue,
    Drop,
    Dropped,
    Ended,
    EvaluateBase,
    Evaluated,
    Event,
    ExamineBase,
    Failed,
    FailureCode,
    MessageError,
    Method,
    Pause,
    Paused,
    Progress,
    Ready,
    Slice,
    Stop,
    WorkerJob,
    load_job,
    parse_command,
)
from trainers.meter import Meter, open_meter
from trainers.saving import DiskFull, Saver
from trainers.stretch import Stretch

_KEEP_CHECKPOINTS = 2
_PROGRESS_NS = 1_000_000_000  # between two reports of progress: of up to four trials, longer of more
_LONGEST_PROGRESS = 5  # times as long at most; each trial's report is an event that somebody must read
_NS_PER_MS = 1_000_000
_LOOK_S = 0.1  # a signal does not wake a select, and suspend stops it, so waits are cut to this
_UNHEARD_S = 600.0  # a worker on a file's meter, which no clock ends, leaves when it has heard nothing for so long
_SAVING_S = 0.005  # the same while a checkpoint is being written that somebody waits for
_FIRST_GUESS_MS = 500  # of a checkpoint or an evaluation, before one was measured
_SWITCH_S = 5e-5  # after which threads that read and write give the interpreter back; by default 5e-3 (docs/log.md)
_STEP_DECAY = 0.9  # one slow step (a compilation) must not count as the usual one for ever
_SAFETY = 1.5  # times the longest measured


class Worker:
    """Trains what the commands say until it is told to end or the paid time is over."""

    def __init__(self, job: WorkerJob, meter: Meter, stdin: int, stdout: int) -> None:
        """`stdin` and `stdout` are descriptors."""
        self._job = job
        self._meter = meter
        self._stdout = stdout
        self._inbox = Inbox(stdin)
        self._paid_ms, self._work_ms, self._checkpoint_ms = job.paid_ms, job.work_ms, job.checkpoint_ms
        self._trials: dict[int, LiveTrial] = {}
        self._method: Method | None = None
        self._loaded: LoadedEngines
        self._remove_older: RemoveOlder
        self._judge: Judge
        self._examine_base = False  # it was asked for
        self._stop = False
        self._terminated = False
        self._heard_s = time.monotonic()  # when there was last something to do
        self._trained_ns = 0  # metered time in which anything trained
        self._stretch: Stretch | None = None  # the present one
        self._progress_mark_ns = 0
        # On a file's meter nothing may vary, so nothing is read or written beside training.
        self._saver = Saver(meter, self._trials, _FIRST_GUESS_MS, self._trim, background=job.timings is None)
        self._arrivals = Arrivals(background=job.timings is None)
        self._dying = processes.Dying()
        self._step_ns = 0
        self._step_mark_ns = 0

    def run(self) -> int:
        """Loads, trains, ends; returns the exit code."""
        try:
            self._load()
            reason = self._loop()
            return self._end(reason)
        except DiskFull as error:
            self._fail(error.trial, "disk", str(error))
            self._emit(Ended, reason="disk", message=str(error))
            return EXIT_DISK
        except Exception as error:
            # Said first: worker.log may be on the very disk that is full.
            self._emit(Ended, reason="error", message=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
            traceback.print_exc()
            return 1

    def _load(self) -> None:
        self._loaded, examiner, self._remove_older = load(self._job)
        self._judge = Judge(examiner, self._meter, self._job.rung_rows)
        self._meter.work("load", any_method(self._loaded.engines), 0)
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "_terminated", True))
        self._emit(
            Ready,
            device=self._loaded.device,
            slots={method: engine.slots for method, engine in self._loaded.engines.items()},
            parameters=self._loaded.parameters,
            linear_shapes=self._loaded.linear_shapes,
            stream_tokens=getattr(self._loaded.engines.get("lora"), "micro_tokens", None),
        )
        self._meter.ready()
        self._heard_s = time.monotonic()

    def _loop(self) -> Literal["stop", "paid_time"]:
        while (reason := self.turn()) is None:
            pass
        return reason

    def turn(self) -> Literal["stop", "paid_time"] | None:
        """Obeys what has come and does the next piece of work, or waits a moment; returns why it is time to end."""
        self._saver.collect()
        self._obey()
        for command in self._arrivals.take():
            self._admit(command)
        if reason := self._reason_to_end():
            return reason
        ready = [trial for trial in self._trials.values() if not trial.standing and trial.arrived()]
        if self._examine_base and not self._out_of_time(evaluating=True):
            self._examine_the_base()
        elif fitting := [trial for trial in ready if not self._out_of_time(evaluating=True, trial=trial)]:
            self._conclude(fitting[0])
        elif not self._out_of_time() and any(not (t.standing or t.arrived()) for t in self._trials.values()):
            self._train()
        elif self._saver.busy or len(self._arrivals):
            with self._meter.on("checkpoint" if self._saver.busy else self._arrivals.centre):
                self._inbox.waiting(_SAVING_S)
        elif unsaved := [trial for trial in ready if trial.saved_step != trial.at.step]:
            # Time kept back for checkpoints may leave none to judge in, and the next slice is no longer (docs/log.md).
            for trial in unsaved[: self._saver.at_once(self._engine())]:
                self._save_between(trial)
        else:
            self._inbox.waiting(_LOOK_S)
            return None
        self._heard_s = time.monotonic()
        return None

    def _engine(self) -> Engine:
        assert self._method is not None
        return self._loaded.engines[self._method]

    def _anybody(self) -> tuple[Engine, Method]:  # for what concerns the base model alone
        return self._loaded.engines[one := self._method or any_method(self._loaded.engines)], one

    # --- time -------------------------------------------------------------------------------------------------------

    def _out_of_time(self, evaluating: bool = False, trial: LiveTrial | None = None) -> bool:
        """Says whether no more work may begin, other than checkpoints; `evaluating`: that of `trial`, or any.

        An evaluation may begin after `work_ms`: the paid time has a tail for it. On a meter that runs on a file only
        `work_ms` counts, so that what the worker does depends on nothing that varies.
        """
        now_ms = self._meter.now_ms()
        if self._job.timings:
            return not evaluating and now_ms >= self._work_ms
        # That may still run once no more are begun: on a GPU one is launched while another is computed.
        steps = 1 if self._loaded.device == "cpu" else 2
        last_ms = self._last_ms() - steps * self._step_ns / _NS_PER_MS
        if evaluating:
            last_ms -= self._judge.longest_ms(trial, _FIRST_GUESS_MS) * _SAFETY
        return now_ms >= (last_ms if evaluating else min(last_ms, self._work_ms))

    def _last_ms(self) -> float:
        """When the checkpoints must begin, to be done before the watchdog's SIGTERM."""
        unsaved = sum(t.saved_step != t.at.step or not (t.standing or t.arrived()) for t in self._trials.values())
        # A trial whose last write is still under way must wait for that one first.
        rounds = math.ceil(unsaved / self._saver.at_once(self._engine())) + self._saver.busy if unsaved else 0
        leaving_ms = self._job.grace_ms + self._dying.ms()
        return self._paid_ms - leaving_ms - self._saver.takes_ms(self._method or "lora", rounds)

    def _reason_to_end(self) -> Literal["stop", "paid_time"] | None:
        if self._stop:
            return "stop"
        # On a file's meter the work time may be extended at any moment of the clock: the worker waits for it.
        # On the clock it waits as long as its checkpoints leave time for, though a step might no longer fit: the next
        # slice may come.
        over = not self._job.timings and self._meter.now_ms() >= min(self._last_ms(), self._work_ms)
        if self._job.timings and time.monotonic() - self._heard_s > _UNHEARD_S:
            return "paid_time"
        waiting = (trial for trial in self._trials.values() if not trial.standing and trial.arrived())
        fits = any(not self._out_of_time(evaluating=True, trial=trial) for trial in waiting)
        return "paid_time" if self._terminated or (over and not fits) else None

    # --- commands ---------------------------------------------------------------------------------------------------

    def _obey(self) -> None:
        lines = self._inbox.take()
        for line in lines:
            try:
                command = parse_command(line)
            except MessageError as error:
                sys.stderr.write(f"ignored a command: {error}\n")
                continue
            if isinstance(command, Continue | Pause | Drop) and command.trial in self._arrivals:
                self._admit(*self._arrivals.take(command.trial))
            match command:
                case Slice():
                    self._paid_ms, self._work_ms = command.paid_ms, command.work_ms
                    self._checkpoint_ms = command.checkpoint_ms
                case Stop():
                    self._stop = True
                case EvaluateBase():
                    self._emit(BaseEvaluated, **self._judge.base(*self._anybody()))
                case ExamineBase():
                    self._examine_base = True
                case Admit():
                    self._welcome(command)
                case Continue():
                    self._go_on(command)
                case Pause() if self._sound(command.trial):
                    self._pause(self._trials[command.trial])
                case Drop() if command.trial in self._trials:
                    trial = self._trials[command.trial]
                    self._release(trial)
                    self._emit(Dropped, **trial.place())
                    self._clear(trial)
        if lines:
            self._heard_s = time.monotonic()

    def _welcome(self, command: Admit) -> None:
        """Takes a trial in, at once or as soon as what it needs is made ready."""
        config = command.config
        if config.number in self._trials or config.number in self._arrivals:
            return
        present = len(self._trials) + len(self._arrivals)
        if refusal := refused(command, self._loaded.engines, present, self._method):
            self._emit(Failed, **nowhere(command), code="error", message=refusal)
            return
        self._saver.collect(config.number, wait=True)  # of its last stay here, which it was dropped from
        if config.method != self._method:
            self._loaded.make_room(config.method)
        self._method = config.method
        if not self._arrivals.begin(self._engine(), command):
            self._admit(command)

    def _admit(self, command: Admit) -> None:
        config = command.config
        resume = Path(command.resume) if command.resume is not None else None
        Path(command.folder).mkdir(parents=True, exist_ok=True)
        if not self._trials:
            peak.take_bytes(self._loaded.engines, self._method)  # of whoever left in between
        started_ns = self._meter.now_ns()
        try:
            with self._meter.on("checkpoint" if resume else f"trial:{config.number}"):
                at = self._engine().admit(config, resume, command.until_tokens)
                if resume:
                    self._meter.work("restore", config.method, 0)
        except TrialFailed as error:
            self._emit(Failed, **nowhere(command), code=error.code, message=str(error))
            return
        trial = self._trials[config.number] = LiveTrial.admitted(command, at, self._trained_ns)
        trial.forget_later_checkpoints()
        restored_ms = (self._meter.now_ns() - started_ns) // _NS_PER_MS if resume else 0
        self._emit(Admitted, **trial.place(), restore_ms=restored_ms)

    def _go_on(self, command: Continue) -> None:
        trial = self._trials.get(command.trial)
        if trial is None or trial.at.done:
            return
        until = command.until_tokens
        farther = trial.until_tokens is not None and until is not None and until > trial.until_tokens
        if until is not None and trial.at.tokens >= until and not farther:
            return  # the repetition of a command that was carried out; farther on, one step passed two rungs
        self._saver.collect(trial.number, wait=True)  # what stands is written from its slot
        trial.until_tokens, trial.standing = until, False
        self._engine().target(trial.number, until)

    # --- training ---------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        """Trains until something is to be done, and reports it."""
        training = [trial for trial in self._trials.values() if not (trial.standing or trial.arrived())]
        self._stretch = stretch = Stretch(self._meter, self._engine(), training)
        self._step_mark_ns = stretch.started_ns
        failure: TrialFailed | None = None
        with self._meter.shared(stretch.moved):
            try:
                self._engine().advance(self._must_pause)
                if self._pausing():
                    self._engine().finish()
            except TrialFailed as error:
                failure = error
            stretch.account(failure.trial if failure else None)
        self._trained_ns += stretch.close()
        self._stretch = None
        # Of several that fail in one step the engine names one at a time; by its turn a trial may have left, judged.
        if failure is not None and failure.trial in self._trials:
            self._fail(self._trials[failure.trial], failure.code, str(failure))
        self._report_progress()
        for trial in [trial for trial in training if trial.number in self._trials and self._checkpoint_due(trial)]:
            self._save_between(trial)

    def _must_pause(self) -> bool:
        if self._stretch is not None:
            self._stretch.account()
        now_ns = self._meter.now_ns()
        self._step_ns = max(int(self._step_ns * _STEP_DECAY), now_ns - self._step_mark_ns)
        self._step_mark_ns = now_ns
        return self._pausing() or self._saver.waiting or self._inbox.waiting()

    def _pausing(self) -> bool:
        """Whether something comes next that uses the device, or asks what it computed, and would pay for training."""
        return (
            self._terminated
            or self._trained_so_far_ns() - self._progress_mark_ns >= self._progress_ns()
            or self._out_of_time()
            or any(self._checkpoint_due(trial) for trial in self._trials.values())
            or self._arrivals.waiting
        )

    def _progress_ns(self) -> int:
        return _PROGRESS_NS * min(max(len(self._trials), 4), 4 * _LONGEST_PROGRESS) // 4

    def _trained_so_far_ns(self) -> int:
        return self._trained_ns + (0 if self._stretch is None else self._meter.now_ns() - self._stretch.started_ns)

    def _checkpoint_due(self, trial: LiveTrial) -> bool:
        unsaved_ns = self._trained_so_far_ns() - trial.saved_mark_ns
        due = unsaved_ns >= self._checkpoint_ms * _NS_PER_MS and not self._saver.of(trial.number)
        return due and not trial.standing and not trial.arrived()

    def _report_progress(self) -> None:
        if self._trained_ns - self._progress_mark_ns < self._progress_ns():
            return
        self._progress_mark_ns = self._trained_ns
        for trial in self._trials.values():
            if not trial.standing and not trial.arrived() and trial.at.step > trial.shown_step:
                self._emit(Progress, **trial.place(), train_loss=trial.take_loss(self._engine()))

    # --- judging ----------------------------------------------------------------------------------------------------

    def _conclude(self, trial: LiveTrial) -> None:
        """Judges a trial that arrived, and leaves it standing.

        A LoRA trial is checkpointed beside the others' training. A full-parameter one has a state of 14 bytes a
        parameter, and nobody trains while it is written: that waits until it is put aside, which it may never be.
        """
        # Nobody knows yet how long such a judgement takes: if it is killed at the paid time, nothing else is lost.
        if not self._judge.known(trial):
            self._save_between(trial)
            self._saver.collect(trial.number, wait=True)
        try:
            judged = self._judge.trial(self._engine(), trial)
        except TrialFailed as error:
            self._fail(trial, error.code, str(error))
            return
        trial.take_loss(self._engine())
        trial.standing = True
        assert self._method is not None
        peak_bytes = peak.take_bytes(self._loaded.engines, self._method)
        keeps = trial.at.done or self._method == "lora"

        def say(checkpoint_ms: int, write_ms: int) -> None:
            self._emit(
                Evaluated,
                **trial.place(),
                **trial.measured(),
                **judged,
                checkpoint=trial.saved if keeps else None,
                checkpoint_ms=checkpoint_ms,
                write_ms=write_ms,
                peak_bytes=peak_bytes,
                occupancy=occupancy(self._loaded.engines),
            )
            trial.begin_again()

        if keeps:
            self._save(trial, say)
        else:
            say(0, 0)

    def _examine_the_base(self) -> None:
        """Scores the base model. It takes as long as it takes: if it is killed at the paid time, no trial is lost."""
        self._examine_base = False
        for trial in self._trials.values():
            self._save_between(trial)
        self._emit(BaseExamined, **self._judge.base_scores(*self._anybody()))

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _save_between(self, trial: LiveTrial) -> None:
        """Checkpoints a trial and says so, unless that is current. Raises DiskFull."""
        self._saver.collect(trial.number, wait=True)
        if trial.saved_step == trial.at.step:
            return
        place = trial.place()

        def say(checkpoint_ms: int, write_ms: int) -> None:
            # The model alone tells nothing of what a whole state takes.
            whole_ms = 0 if trial.at.done and trial.config.method == "full" else checkpoint_ms
            self._emit(Checkpointed, **place, checkpoint=trial.saved, checkpoint_ms=whole_ms)

        self._save(trial, say)

    def _save(self, trial: LiveTrial, then: Callable[[int, int], None]) -> None:
        trial.saved_mark_ns = self._trained_ns
        self._saver.save(self._engine(), trial, then)

    def _release(self, trial: LiveTrial) -> None:
        self._engine().drop(trial.number)
        del self._trials[trial.number]

    def _finish(self) -> None:
        """Lets steps that are under way come to their end: who failed in them is not put aside as if all were well."""
        while self._trials:
            try:
                return self._engine().finish()
            except TrialFailed as error:
                self._fail(self._trials[error.trial], error.code, str(error))

    def _sound(self, number: int) -> bool:
        """Whether the trial is here, and all its steps went well. One that stands was judged after them."""
        if number in self._trials and not self._trials[number].standing:
            self._finish()
        return number in self._trials

    def _pause(self, trial: LiveTrial) -> None:
        taken_ms: list[int] = []
        self._save(trial, lambda checkpoint_ms, _: taken_ms.append(checkpoint_ms))
        self._saver.collect(trial.number, wait=True)
        self._release(trial)
        self._emit(Paused, **trial.place(), checkpoint=trial.saved, checkpoint_ms=sum(taken_ms))

    def _trim(self, folder: Path) -> None:
        self._remove_older(folder, _KEEP_CHECKPOINTS)

    def _clear(self, trial: LiveTrial) -> None:
        """Removes what a full-parameter trial that is over wrote on its way, 14 bytes a parameter."""
        if trial.config.method == "full":
            self._remove_older(trial.folder, 1 if trial.at.done else 0)

    def _fail(self, trial: LiveTrial, code: FailureCode, message: str) -> None:
        """Reports a trial that left the engine because it can't go on (after a full disk, the whole worker leaves)."""
        del self._trials[trial.number]
        self._emit(Failed, **trial.place(), code=code, message=message)
        if code != "disk":
            self._clear(trial)

    def _end(self, reason: Literal["stop", "paid_time"]) -> int:
        self._finish()
        for trial in list(self._trials.values()):
            self._save_between(trial)
        self._saver.collect(wait=True)
        self._emit(Ended, reason=reason, occupancy=occupancy(self._loaded.engines))
        return 0

    def _emit(self, kind: Callable[..., Event], **fields: Any) -> None:
        at_ms, usage = self._meter.usage()
        processes.write_all(self._stdout, kind(at_ms=at_ms, usage=usage, **fields).line().encode())


def main(arguments: list[str]) -> int:
    """Runs a worker in the folder named; returns its exit code."""
    processes.die_with_parent()
    stdout = os.dup(1)
    os.dup2(2, 1)
    folder = Path(arguments[0])
    processes.hold_lock(folder / "worker.lock", wait_s=1.0)
    job = load_job((folder / "job.json").read_text())
    sys.setswitchinterval(_SWITCH_S)
    return Worker(job, open_meter(job), 0, stdout).run()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush(), sys.stderr.flush()
    # Everything is on the disk and said. The interpreter would free the model piece by piece, which took 1.2 s of paid
    # time on a CPU, and as many graphs as a GPU has; the kernel takes it all at once.
    os._exit(code)
