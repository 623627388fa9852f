"""Kernels compiled ahead, for a GPU that is not there: Triton's compiler needs to know the target alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import save_model

from trainers.lora import ahead
from trainers.messages import WorkerJob

pytest.importorskip("triton")

# A share of what a worker with short streams would launch; prints the kernels' names.
SHARE = """
import json, sys
from trainers.lora import precompile
launches = [precompile.Launches(slots=2, rank=16, lengths=[512], longest=64, dropout=True, target=("cuda", 90))]
print(json.dumps(sorted(set(precompile.compile_share(sys.argv[1], launches, int(sys.argv[2]), int(sys.argv[3]))))))
"""


def test_shares_fill_the_cache_for_hopper(tmp_path: Path) -> None:
    """Two processes compile every kernel of a model's layers for compute capability 9.0; a third finds them all.

    It also proves that each kernel passes Triton's compiler, which refuses what the interpreter lets through.
    """
    model = save_model(tmp_path / "model")
    cache = tmp_path / "cache"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", SHARE, str(model)]
    shares = [subprocess.Popen([*command, share, "2"], env=environment) for share in ("0", "1")]
    assert [process.wait() for process in shares] == [0, 0]
    compiled = set(cache.rglob("*.cubin"))
    assert {path.stem.strip("_") for path in compiled} >= {
        *("down", "up", "outer", "dropped", "forward", "backward_key", "squares", "stepped"),
    }
    done = subprocess.run([*command, "0", "1"], env=environment, capture_output=True, text=True, check=True)
    assert "_outer" in done.stdout and "_backward_query" in done.stdout
    assert set(cache.rglob("*.cubin")) == compiled, "a launch found no kernel that was compiled ahead"


def test_a_worker_s_request_is_understood(tmp_path: Path) -> None:
    """Proves that what trainers/lora/ahead.py asks for is compiled: the first of many shares, with the optimizer."""
    model, cache = save_model(tmp_path / "model"), tmp_path / "cache"
    request = json.dumps(
        {"slots": 2, "max_rank": 16, "longest": 64, "precision": "bf16", "capability": [9, 0], "share": [0, 1000]}
    )
    command = [sys.executable, "-m", "trainers.lora.precompile", str(model), request]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    subprocess.run(command, env=environment, check=True)
    names = {path.stem.strip("_") for path in cache.rglob("*.cubin")}
    assert {"squares", "stepped"} < names and "down" in names


def test_compilers_are_started_for_packed_trials_on_a_gpu(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that they are not where nobody needs them, and that none outlives the start-up."""
    monkeypatch.setattr(ahead, "capability", lambda index: (9, 0))  # in the place of a GPU
    times = {"origin_boot_ms": 0, "paid_ms": 0, "work_ms": 0, "checkpoint_ms": 0}
    names = {"worker": "w", "command": [], "boot_id": "", "model": str(tmp_path), "data": str(data_folder)}
    job = WorkerJob(**names, **times, fence=0, rung_rows=5)  # type: ignore[arg-type]
    for other in (replace(job, device="cpu"), replace(job, methods=["full"])):
        with ahead.compiling(other) as compiling:
            assert compiling == []
    with ahead.compiling(job) as compiling:
        assert compiling
    assert all(process.returncode is not None for process in compiling)
