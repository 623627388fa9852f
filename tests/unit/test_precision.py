"""Where a configuration's precision comes from, and what was stored before there was any."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sweep import space
from sweep.spec import SearchSpec
from trainers.engine import TrialFailed
from trainers.messages import TrialConfig
from trainers.replay import Curve, ReplayEngine, Script

CONFIG = TrialConfig(number=1, method="lora", learning_rate=1e-3, batch_size=4, examples=100, seed=0, rank=8, alpha=8.0)


def test_the_precision_of_the_search_is_lora_s() -> None:
    """Proves that a full-parameter run, planned beside a search in 8-bit floats, is not forecast as fast as in them."""
    search = SearchSpec(precision="fp8")
    assert [space.typical(method, search, 100, 0).precision for method in ("lora", "full")] == ["fp8", "bf16"]


def test_a_checkpoint_from_before_precisions_is_of_the_same_configuration(tmp_path: Path) -> None:
    """Proves that a recorded trial goes on from what an earlier version wrote, and not from the other precision's."""
    recorded = {"base_loss": 3.0, "tokens_per_example": 10.0, "validation_tokens": 100}
    curve = Curve(floor=1.0, scale=100.0)
    engine = ReplayEngine(Script(slots={"lora": 2}, parameters=1000, default=curve, **recorded), 2)
    engine.admit(CONFIG, None, None)
    engine.checkpoint(1, tmp_path / "ckpt-0")
    state = json.loads((tmp_path / "ckpt-0" / "state.json").read_text())
    assert state["config"].pop("precision") == "bf16"
    (tmp_path / "ckpt-0" / "state.json").write_text(json.dumps(state))
    engine.drop(1)
    with pytest.raises(TrialFailed, match="of another configuration"):
        engine.admit(replace(CONFIG, precision="fp8"), tmp_path / "ckpt-0", None)
    assert engine.admit(CONFIG, tmp_path / "ckpt-0", None).step == 0
