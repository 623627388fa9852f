"""Bad input costs nothing: one line on stderr, its exit code, nothing held, nothing charged, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from studies import sweep, write_spec

ROWS = "".join(json.dumps({"prompt": f"word {n}: ", "completion": f"meaning {n}"}) + "\n" for n in range(40))


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["model=/nowhere/at/all"], 7, "/nowhere/at/all"),
        (["data.train=missing.jsonl"], 7, "missing.jsonl"),
        (["data.train=broken.jsonl"], 7, "broken.jsonl"),
        (["data.train=holes.jsonl"], 7, "row"),
        (["data.max_tokens=64", "objective=nowhere:score"], 7, "metric nowhere:score: nowhere cannot be imported"),
        (["data.max_tokens=64", "objective={metric: accuracy, choices: [a, b]}"], 7, "is none of the choices ('a', "),
        (["budget.cap=$0"], 2, "budget.cap"),
        (["machine.price=-1"], 2, "machine.price"),
        (["search.targets=[attenton]"], 2, "attenton"),
        (["machine={gpu: A100-81GB}"], 2, "did you mean"),
        (["sarch.rank=8"], 2, "did you mean search"),
    ],
)
def test_refused_before_anything_is_held(tmp_path: Path, overrides: list[str], code: int, message: str) -> None:
    """Proves invariant 9 for every mistake that the issue names."""
    spec = write_spec(tmp_path, cap="$1")
    (tmp_path / "good.jsonl").write_text(ROWS)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion"\n')
    (tmp_path / "holes.jsonl").write_text(ROWS + json.dumps({"prompt": "x", "completion": ""}) + "\n")
    model = Path(__file__).parents[2] / "models" / "smollm2-135m"
    flags = [f"--set=model={model}", "--set=data.train=good.jsonl"] if overrides[0].startswith("data") else []
    flags += [f"--set={override}" for override in overrides]
    done = sweep("launch", str(spec), "--yes", *flags, cwd=tmp_path, check=code)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("sweep: ")
    assert sweep("list", "--json", cwd=tmp_path, check=None).stdout in {
        "",
        '{\n  "schema_version": 1,\n  "studies": []\n}\n',
    }


def test_other_refusals(tmp_path: Path) -> None:
    """Proves the codes for what is not there, what nobody can confirm, what is taken, and what the cap cannot pay."""
    assert "there is no database" in sweep("status", cwd=tmp_path, check=4).stderr
    spec = write_spec(tmp_path, cap="$1", timings=True, trials=2)
    assert "add --yes" in sweep("launch", str(spec), cwd=tmp_path, check=2).stderr
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    assert "exists already" in sweep("launch", str(spec), "--yes", cwd=tmp_path, check=2).stderr
    assert "there is no study other" in sweep("status", "other", cwd=tmp_path, check=4).stderr
    assert "has no trial 99" in sweep("show", "99", cwd=tmp_path, check=4).stderr
    error = json.loads(sweep("show", "99", "--json", cwd=tmp_path, check=4).stderr)["error"]
    assert error["code"] == "not_found" and error["hint"]
    small = "--study", "poor", "--cap", "$0.0001"
    poor = sweep("launch", str(spec), "--yes", *small, cwd=tmp_path, check=3)
    assert "for the search pay for no trial: a worker's start" in poor.stderr and "Traceback" not in poor.stderr
    assert "there is no study poor" in sweep("status", "poor", cwd=tmp_path, check=4).stderr
    anyway = sweep(
        "launch", str(spec), "--yes", "--anyway", "--study", "poor", "--cap", "$0.0001", cwd=tmp_path, check=3
    )
    assert "no trial was trained to its end" in anyway.stderr and "Traceback" not in anyway.stderr


def test_eight_bit_moments_without_a_library(tmp_path: Path) -> None:
    """Proves that what a paid worker would stumble over is refused before: processes find none (tests/without)."""
    spec = write_spec(tmp_path, cap="$1")
    (tmp_path / "good.jsonl").write_text(ROWS)
    model = Path(__file__).parents[2] / "models" / "smollm2-135m"
    flags = [f"--set=model={model}", "--set=data.train=good.jsonl", "--set=search.method=[lora, full]"]
    done = sweep("launch", str(spec), "--yes", *flags, "--set=full.optimizer=adamw-8bit", cwd=tmp_path, check=7)
    assert done.stderr.strip().splitlines()[-1].startswith("sweep: full.optimizer adamw-8bit: neither bitsandbytes")
    assert "pip install" in done.stderr


def test_a_tampered_ledger_is_refused(tmp_path: Path) -> None:
    """Proves that the audit stands before every resume: exit 5, naming the first invariant that does not hold."""
    import sqlite3

    spec = write_spec(tmp_path, cap="$1", timings=True, trials=2)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    assert sweep("audit", cwd=tmp_path).stdout == ""
    with sqlite3.connect(tmp_path / "studies.db") as connection:
        connection.execute("UPDATE sweep_account SET balance_micros = balance_micros + 1 WHERE code = 'idle'")
    connection.close()
    assert "account idle says" in sweep("audit", cwd=tmp_path, check=5).stderr
    assert "account idle says" in sweep("resume", "words", cwd=tmp_path, check=5).stderr


def test_another_gpu_than_the_named_one(tmp_path: Path) -> None:
    """Proves that a price is not charged for a machine that it does not belong to, unless the user insists."""
    spec = write_spec(tmp_path, cap="$1")
    (tmp_path / "good.jsonl").write_text(ROWS)
    model = Path(__file__).parents[2] / "models" / "smollm2-135m"
    flags = [f"--set=model={model}", "--set=data.train=good.jsonl", "--set=machine={gpu: A100-80GB}"]
    done = sweep("launch", str(spec), "--yes", *flags, cwd=tmp_path, check=2)
    assert "names a A100-80GB, this machine" in done.stderr and "--anyway" in done.stderr
