"""Kernels compiled ahead, for a GPU that is not there: Triton's compiler needs to know the target alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_model

pytest.importorskip("triton")

# What a worker's launches would be, gone through in one process; prints kernels launched and seconds of the slowest.
AGAIN = """
import json, sys
from trainers.lora import precompile
launches = [precompile.Launches(**{**v, "target": tuple(v["target"])}) for v in json.loads(sys.argv[2])["launches"]]
print(json.dumps(sorted(set(precompile.compile_share(sys.argv[1], launches, 0, 1)))))
"""
REQUEST = (
    '{"launches": [{"slots": 2, "rank": 16, "lengths": [512], "longest": 64, "dropout": true, "target": ["cuda", 90]}],'
    ' "share": [%d, 2]}'
)


def test_shares_fill_the_cache_for_hopper(tmp_path: Path) -> None:
    """Two processes compile every kernel of a model's layers for compute capability 9.0; a third finds them all.

    It also proves that each kernel passes Triton's compiler, which refuses what the interpreter lets through.
    """
    model = save_model(tmp_path / "model")
    cache = tmp_path / "cache"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "trainers.lora.precompile", str(model)]
    shares = [subprocess.Popen([*command, REQUEST % share], env=environment) for share in (0, 1)]
    assert [process.wait() for process in shares] == [0, 0]
    compiled = set(cache.rglob("*.cubin"))
    assert {path.stem.strip("_") for path in compiled} >= {
        *("down", "up", "outer", "dropped", "forward", "backward_key", "squares", "stepped"),
    }
    again = [sys.executable, "-c", AGAIN, str(model), REQUEST % 0]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, check=True)
    assert "_outer" in done.stdout and "_backward_query" in done.stdout
    assert set(cache.rglob("*.cubin")) == compiled, "a launch found no kernel that was compiled ahead"
