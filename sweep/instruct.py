"""Tells a worker what the tables say. Commands follow from the tables alone and each may be repeated without harm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sweep.launchers.base import Launcher
from sweep.projection import Plan
from sweep.records import Study, TrialRow, WorkerRow
from trainers.messages import Admit, Command, Continue, Drop, EvaluateBase, ExamineBase, Pause, Slice

_BASE, _SLICE, _EXAMINE = -1, -2, -3  # what is no trial's


class Instructor:
    """Remembers what the living worker was told, so that it is told once; after a crash it is told again."""

    def __init__(self, launcher: Launcher, plan: Plan) -> None:
        self.launcher = launcher
        self.plan = plan
        self.reattached: str | None = None  # a worker that an earlier orchestrator may have told something
        self._sent: dict[int, Command] = {}

    def forget(self) -> None:
        """A new worker knows nothing."""
        self._sent.clear()

    def instruct(
        self, study: Study, worker: WorkerRow, trials: Sequence[TrialRow], current: Slice, *, examined: bool
    ) -> None:
        """Sends what a ready worker should know and was not told yet.

        `examined`: the untrained model's scores are known.
        """
        if worker.id == self.reattached and _SLICE not in self._sent:
            self._once(worker, _SLICE, current)
        if study.base_loss is None:
            self._once(worker, _BASE, EvaluateBase(fence=study.fence))
        if not examined and any(t.source is not None and t.slot == worker.id for t in trials):
            self._once(worker, _EXAMINE, ExamineBase(fence=study.fence))  # before it trains: a worker obeys in order
        # Those who leave first: the slot of one that comes may be theirs.
        for trial in sorted(trials, key=lambda t: t.state == "live"):
            if trial.slot == worker.id and trial.state != "judging":
                self._trial(study, worker, trial)

    def _trial(self, study: Study, worker: WorkerRow, trial: TrialRow) -> None:
        if trial.state == "live":
            self._train(study, worker, trial)
            return
        if worker.id == self.reattached and trial.number not in self._sent:
            # It was seated, and perhaps nobody said so before the orchestrator died: the worker would take no notice,
            # and the seat be taken for ever.
            self._once(worker, trial.number, self._admit(study, trial))
        leave = Pause if trial.state in {"paused", "waiting"} else Drop
        self._once(worker, trial.number, leave(fence=study.fence, trial=trial.number))

    def _train(self, study: Study, worker: WorkerRow, trial: TrialRow) -> None:
        until = self.plan.until(trial.target)
        go_on = Continue(fence=study.fence, trial=trial.number, until_tokens=until)
        last = self._sent.get(trial.number)
        if isinstance(last, Admit | Continue):
            if last.until_tokens != until:
                self._once(worker, trial.number, go_on)
            return
        self._once(worker, trial.number, self._admit(study, trial))
        if worker.id == self.reattached:
            # It may be there already and stand at its last rung, where an Admit does not move it.
            self.launcher.send(Path(worker.folder), go_on)

    def _admit(self, study: Study, trial: TrialRow) -> Admit:
        return Admit(
            fence=study.fence,
            config=trial.config,
            attempt=trial.attempt or "",
            folder=str(Path(study.folder) / "trials" / f"{trial.number:04d}"),
            until_tokens=self.plan.until(trial.target),
            resume=trial.checkpoint,
            examine=trial.source is not None,
        )

    def _once(self, worker: WorkerRow, key: int, command: Command) -> None:
        if self._sent.get(key) != command and self.launcher.send(Path(worker.folder), command):
            self._sent[key] = command
