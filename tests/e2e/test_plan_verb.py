"""`sweep plan` through the command line: priors, a probe by a real worker, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from studies import sweep, write_spec

from sweep import fit, launch
from sweep.spec import validate


def files(folder: Path) -> list[str]:
    """What is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def started_with(setting: str) -> list[int]:
    """Living processes whose environment has this from their start."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def test_a_plan_leaves_nothing_and_adds_up(tmp_path: Path) -> None:
    """Proves the verb without a database: 80 columns, phases that are the cap, the same as JSON, and no file more."""
    spec = write_spec(tmp_path, cap="$0.50", timings=True, endgame={"seeds": 2})
    before = files(tmp_path)
    shown = sweep("plan", str(spec), cwd=tmp_path).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "the plan for $0.5000; nothing is spent yet" in shown and "from priors: nothing was measured" in shown
    found = json.loads(sweep("plan", str(spec), "--cap", "$0.25", "--json", cwd=tmp_path).stdout)
    assert sum(phase["cost"] for phase in found["phases"]) == found["cap"] == 250_000
    assert [other["cap"] for other in found["others"]] == [125_000, 500_000]
    assert files(tmp_path) == before


def test_a_probe_measures_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a real worker's measurements replace the priors, which are wrong here on purpose, and that worker,
    folder and trials are gone; `--set` may change the machine's slots, whose pack is measured too."""
    spec = write_spec(tmp_path, cap="$0.50", timings=True)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = files(tmp_path)
    guessed, known = (
        json.loads(sweep("plan", str(spec), "--json", "--set", "machine.slots=4", *flags, cwd=tmp_path).stdout)
        for flags in ((), ("--probe",))
    )
    assert guessed["probe_seconds"] is None and known["probe_seconds"] > 0
    costs = [found["runs"][0]["cost"] for found in (guessed, known)]
    assert costs[1] == pytest.approx(5_000, rel=0.1), "5,000 tokens at a millisecond and $3.60 an hour"
    assert abs(costs[0] / 5_000 - 1) > 0.5
    assert files(tmp_path) == before
    assert files(temporary) == [] and started_with(f"TMPDIR={temporary}") == []


def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path: Path) -> None:
    """Proves that a price by the token leaves nothing to measure, and that the line says so."""
    spec = write_spec(tmp_path, cap="$0.50", machine={"price": "$0.48/Mtok"})
    done = sweep("plan", str(spec), "--probe", cwd=tmp_path, check=2)
    assert "there is nothing to measure (leave --probe out)" in done.stderr and "Traceback" not in done.stderr
    assert "million tokens" in sweep("plan", str(spec), cwd=tmp_path).stdout


def test_a_launch_says_what_its_reserve_does_not_pay_for(tmp_path: Path) -> None:
    """Proves that the shortfall is said before the study begins, with what would make it fit."""
    endgame: dict[str, Any] = {"seeds": 3}
    spec = write_spec(tmp_path, cap="$0.10", timings=True, reserve="$0.001", endgame=endgame, trials=2)
    done = sweep("launch", str(spec), "--yes", cwd=tmp_path)
    said = " ".join(done.stderr.split())
    assert "WARNING: the best configuration over 3 seeds takes" in said and "it would fit with" in said
    assert said.index("WARNING") < said.index("starts")


def test_a_plan_is_for_the_gpu_that_is_named() -> None:
    """Proves that where this machine has no GPU the named one is planned for, and that it is said."""
    values = {"study": "words", "model": "m", "data": {"train": "t"}, "machine": {"gpu": "A100-80GB"}}
    spec = validate(values | {"budget": {"cap": "$20"}}, "here")
    facts = {"device": "cpu", "gpu_memory_bytes": None, "gpus": 0, "notes": []}
    there = launch.on_named_gpu(spec, facts)
    card = fit.listed_card("A100-80GB")
    assert card is not None and there["device"] == "A100-80GB" and there["gpu_memory_bytes"] == card.memory
    assert "the spec names a A100-80GB, this machine has no GPU" in there["notes"][0]
    here = facts | {"device": "NVIDIA A100-SXM4-80GB"}
    assert launch.on_named_gpu(spec, here) == here
