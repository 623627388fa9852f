"""What the sampler is shown: judged by where its suggestions land."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from sweep import space
from sweep.spec import RangeSpec, SearchSpec
from sweep.store import Store
from sweep.study import Memory

SEARCH = SearchSpec(
    rank=(8,), alpha=(8,), targets=("mlp",), batch_size=(8,), learning_rate=RangeSpec(low=1e-5, high=1e-1)
)
BEST = 1e-3


def ask(memory: Memory, number: int, paused: dict[int, int], diverged: set[int]) -> float:
    """Asks and returns the learning rate."""
    _, chosen = memory.ask(number, lambda trial: space.suggest(trial, SEARCH), paused, diverged)
    return float(chosen["lora_learning_rate"])


@pytest.fixture
def memory(tmp_path: Path):
    """A study of one dimension."""
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    opened = Memory(store, "s", 0)
    yield opened
    opened.close()
    store.dispose()


@pytest.mark.parametrize("shown", [True, False])
def test_paused_trials_teach_the_sampler(memory: Memory, shown: bool) -> None:
    """Proves the view: shown as pruned, paused trials lead to the best rate; left RUNNING they would not."""
    paused: dict[int, int] = {}
    away = []
    for number in range(32):
        rate = ask(memory, number, paused if shown else {}, set())
        memory.report(number, 0, abs(math.log10(rate / BEST)))
        paused[number] = 0
        away.append(abs(math.log10(rate / BEST)))
    late = statistics.mean(away[-12:])
    assert late < 0.7 if shown else late > 0.8, "1.0 is what guessing gives"


def test_diverged_trials_repel(memory: Memory) -> None:
    """Proves that a region where everything diverged is left alone, although nothing there has a value."""
    diverged: set[int] = set()
    late = []
    for number in range(36):
        rate = ask(memory, number, {}, diverged)
        if rate > 1e-2:
            diverged.add(number)
            memory.tell(number, "pruned", None, {})
        else:
            memory.tell(number, "completed", abs(math.log10(rate / BEST)), {})
        late.append(rate > 1e-2)
    assert sum(late[-12:]) <= 2, "guessing gives three"


def test_a_question_can_be_asked_again(tmp_path: Path) -> None:
    """Proves resume: the same number under the same history is the same question, also when it was left half asked."""
    rates = []
    for name in ("a", "b"):
        store = Store(f"sqlite:///{tmp_path}/{name}.db", create=True)
        first = Memory(store, "s", 7)
        for number in range(14):
            ask(first, number, {}, set())
            first.tell(number, "completed", 1.0 + number, {})
        if name == "b":
            first._study.ask()  # killed between the question and its parameters
            first.close()
            first = Memory(store, "s", 7)
        rates.append(ask(first, 14, {}, set()))
        first.close()
        store.dispose()
    assert rates[0] == rates[1]
