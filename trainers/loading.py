"""Finds a job's engines and examiner: over a model, or over recorded curves. Torch is imported only for a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from trainers.engine import Engine
from trainers.judging import Examiner
from trainers.messages import Method, WorkerJob

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


def any_method(engines: Mapping[str, Engine]) -> Method:
    """Of the engines', the one that what concerns the base model alone goes through."""
    return "lora" if "lora" in engines else "full"


def occupancy(engines: Mapping[str, Engine]) -> float | None:
    """The packed engine's; None where it has trained nothing, or is not there."""
    share = engines["lora"].occupancy() if "lora" in engines else math.nan
    return None if math.isnan(share) else share


def load(job: WorkerJob) -> tuple[LoadedEngines, Examiner, RemoveOlder]:
    """Returns the job's engines, their examiner, and what removes older checkpoints. Raises what loading raises."""
    if job.model.startswith("replay:"):
        from trainers import replay

        return replay.load_engines(job), replay.ReplayExaminer(job), replay.remove_older
    from trainers.lora import ahead

    with ahead.compiling(job) as compiling:
        from trainers import checkpoints, models
        from trainers.examiner import DataExaminer

        examiner = DataExaminer(job)
        return models.load_engines(job, compiling), examiner, checkpoints.remove_older
