"""A bench a test, cleaned up after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from process_bench import Bench


@pytest.fixture
def make_bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Makes benches; a keyword changes the replay file."""
    made: list[Bench] = []

    def make(**script: Any) -> Bench:
        root = tmp_path / f"bench {len(made)}"
        root.mkdir()
        made.append(Bench(root, **script))
        return made[-1]

    yield make
    for bench in made:
        bench.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench]) -> Bench:
    """A bench with the usual replay file."""
    return make_bench()
