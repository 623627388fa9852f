"""A bench a test, cleaned up after it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from process_bench import Bench, write_rows

TRAINERS = Path(__file__).parents[1] / "trainers"
# In a process of its own: this one stays without torch.
PREPARE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny
from transformers import AutoTokenizer
from trainers.data import prepare
root = Path(sys.argv[2])
tiny.save_model(root / "tiny")
prepare(AutoTokenizer.from_pretrained(root / "tiny"), train=str(root / "rows.jsonl"), folder=root / "data",
        validation=0.2, test=0.1, max_tokens=64, seed=3, model="tiny")
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, and rows of differing lengths, prepared."""
    root = tmp_path_factory.mktemp("prepared")
    write_rows(root / "rows.jsonl")
    subprocess.run([sys.executable, "-c", PREPARE, str(TRAINERS), str(root)], check=True)
    return root


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
