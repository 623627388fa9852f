"""Fixtures: the tiny model on disk, data for it, and engines over both. No test here reaches the network."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import save_model, sentence
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainers.data import prepare
from trainers.messages import WorkerJob
from trainers.models import LoadedEngines, load_engines


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every attempt to reach the network fail at once."""

    def refuse(*_: Any) -> None:
        raise OSError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    """One thread, since the models are tiny, and no progress bars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer."""
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of prompt and completion, of differing lengths."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": sentence(rng, 2, 9) + " ->", "completion": " " + sentence(rng, 2, 9)} for _ in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, rows_file: Path) -> Path:
    """The rows, prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    options = {"validation": 0.2, "test": 0.1, "max_tokens": 64, "seed": 3, "model": "tiny"}
    prepare(tokenizer, train=str(rows_file), folder=folder, **options)
    return folder


@pytest.fixture
def load(model_folder: Path, data_folder: Path) -> Callable[[], LoadedEngines]:
    """Loads engines as a fresh worker would."""

    def fresh() -> LoadedEngines:
        times = {"origin_boot_ms": 0, "paid_ms": 0, "work_ms": 0, "checkpoint_ms": 0}
        job = WorkerJob(
            worker="w",
            command=[],
            model=str(model_folder),
            data=str(data_folder),
            rung_rows=5,
            boot_id="",
            fence=0,
            device="cpu",
            **times,
        )
        return load_engines(job)

    return fresh
