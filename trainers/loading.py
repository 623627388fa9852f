"""Finds a job's engines and examiner: over a model, or over recorded curves. Torch is imported only for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from trainers.engine import Engine
from trainers.judging import Examiner
from trainers.messages import WorkerJob

RemoveOlder = Callable[[Path, int], None]


class LoadedEngines(Protocol):
    """What loading a model gives."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """One engine by method."""

    @property
    def device(self) -> str:
        """ "cpu" or the GPU's name."""

    @property
    def parameters(self) -> int:
        """Of the base model."""

    @property
    def linear_shapes(self) -> list[list[int]]:
        """Of its linear layers, for predictions of memory."""

    def make_room(self, method: str) -> None:
        """Before trials of a method come to a device that other engines keep some of."""


def load(job: WorkerJob) -> tuple[LoadedEngines, Examiner, RemoveOlder]:
    """Returns the job's engines, their examiner, and what removes older checkpoints. Raises what loading raises."""
    if job.model.startswith("replay:"):
        from trainers import replay

        return replay.load_engines(job), replay.ReplayExaminer(job), replay.remove_older
    from trainers import checkpoints, models
    from trainers.examiner import DataExaminer

    examiner = DataExaminer(job)
    return models.load_engines(job), examiner, checkpoints.remove_older
