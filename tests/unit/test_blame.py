"""Who is to blame where workers die."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from sweep.blame import Deaths, crashed
from sweep.records import WorkerRow
from trainers.messages import UsageRecord


def worker(why: str = "", *, load_ms: int | None = 900, final: int = 0) -> WorkerRow:
    """A worker that ended."""
    return cast(WorkerRow, SimpleNamespace(why=why, load_ms=load_ms, final=final))


@pytest.mark.parametrize(
    ("exit_code", "why", "blames"),
    [
        (1, "exit", True),
        (-11, "exit", True),  # a segmentation fault
        (0, "exit", False),
        (8, "exit", False),  # the disk was full
        (-9, "exit", False),  # by the kernel for want of memory, or by somebody
        (-15, "paid_until", False),
        (1, "stop", False),
        (None, "lost_orchestrator", False),
    ],
)
def test_crashes_are_told_from_other_ends(exit_code: int | None, why: str, blames: bool) -> None:
    """Proves that who was killed from outside, or ended as it should, blames no trial."""
    assert crashed(UsageRecord(ms=5, ended=True, exit_code=exit_code, why=why)) is blames
    assert not crashed(UsageRecord(ms=5, exit_code=exit_code, why=why)), "a record that is not the last"
    assert not crashed(None)


def test_what_no_other_worker_could_use_is_given_up_at_once() -> None:
    """Proves that only a worker that never got ready, and names model or data, is the last of its study."""
    why = "error: ModelError: cuda: this machine has 0 usable GPUs; use device cpu or auto"
    said = "the worker could not start: ModelError: cuda: this machine has 0 usable GPUs; use device cpu or auto"
    assert Deaths().another(worker(why, load_ms=None), (0,)) == said
    assert Deaths().another(worker(why), (0,)) is None
    assert Deaths().another(worker("error: OutOfMemoryError: CUDA", load_ms=None), (0,)) is None


def test_the_third_death_in_a_row_is_the_last() -> None:
    """Proves that anything kept begins the count anew, and that a worker whose slice was the last ends nothing."""
    deaths = Deaths()
    assert deaths.another(worker(), (1,)) is None and deaths.another(worker(), (1,)) is None
    assert deaths.another(worker(), (2,)) is None and deaths.another(worker(), (2,)) is None
    assert deaths.another(worker(final=1), (2,)) is None
    assert deaths.another(worker("exit"), (2,)) == "the worker died 4 times and nothing that it trained was kept (exit)"
