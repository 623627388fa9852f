"""The main job on a real pretrained model and real text, through the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from studies import environment, read, spent, sweep

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "smollm2-135m"
pytestmark = [pytest.mark.smollm]


def real_spec(folder: Path, **search: object) -> Path:
    """A few seconds of training on 200 dictionary rows."""
    rows = (ROOT / "examples" / "data" / "define.jsonl").read_text().splitlines(keepends=True)[:200]
    (folder / "define.jsonl").write_text("".join(rows))
    spec = {
        "study": "words",
        "model": str(MODEL),
        "data": {"train": str(folder / "define.jsonl"), "validation": 0.1, "test": 0.1, "max_tokens": 128},
        "machine": {"price": "$0.60/hour"},
        "budget": {"cap": "$0.10"},
        "endgame": {"seeds": 0},
        "search": {"rank": 8, "alpha": 16, "targets": "all-linear", "learning_rate": [1e-3, 2e-3], "batch_size": 4}
        | {"epochs": 0.3, "rungs": [0.5], "trials": 2}
        | search,
    }
    path = folder / "words.yaml"
    path.write_text(json.dumps(spec))
    return path


PEFT_ALONE = """
import sys, json, warnings
warnings.simplefilter("ignore")
import torch, peft, safetensors.torch
folder, rows = sys.argv[1:]
model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
data = safetensors.torch.load_file(rows)
nll = tokens = 0.0
for start, end in zip(data["offsets"][:-1].tolist(), data["offsets"][1:].tolist()):
    ids, mask = data["ids"][start:end].long(), data["mask"][start:end].bool()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[mask[1:]]
    nll += losses.sum().item()
    tokens += len(losses)
print(json.dumps(nll / tokens))
"""


def test_the_best_adapter_gives_its_recorded_loss_under_peft_alone(tmp_path: Path) -> None:
    """Proves invariant 7 on SmolLM2: what the study recorded is what peft measures, row by row, without our code."""
    sweep("launch", str(real_spec(tmp_path, trials=1)), "--yes", cwd=tmp_path, timeout=280)
    best = json.loads(sweep("best", "--json", cwd=tmp_path).stdout)
    assert best["trained_to_its_end"] and best["loss"] < 0.85 * best["base_loss"]
    rows = tmp_path / "runs" / "words" / "data" / "validation.safetensors"
    command = [sys.executable, "-c", PEFT_ALONE, best["trial"]["folder"], str(rows)]
    measured = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert abs(measured - best["loss"]) < 1e-3
    assert "adapter_model.safetensors" in {p.name for p in Path(best["trial"]["folder"]).iterdir()}


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path: Path) -> None:
    """Proves exit 8, nothing held and the used time charged when a checkpoint does not fit; then the resume.

    Files are limited to 8 MiB, which holds the database but not the adapter's optimizer state.
    """
    spec = real_spec(tmp_path, trials=1, epochs=0.15)
    limited = f"ulimit -f 8192; exec {sys.executable} -m sweep launch {spec} --yes"
    done = subprocess.run(
        ["bash", "-c", limited],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env=environment(),
        check=False,
    )
    assert done.returncode == 8, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("sweep: the disk is full")
    before = read(tmp_path)
    assert before["held"] == 0 and spent(before["accounts"]) > 0
    sweep("resume", "words", cwd=tmp_path, timeout=280)
    after = read(tmp_path)
    assert [t.state for t in after["trials"]] == ["completed"]


def test_full_parameter_training_beside_lora(tmp_path: Path) -> None:
    """Proves the other branch on a tiny model: one study trains both, and a full trial leaves a whole model."""
    tiny = tmp_path / "tiny"
    script = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import tiny; "
    script += "tiny.save_model(Path(sys.argv[2]))"
    subprocess.run([sys.executable, "-c", script, str(ROOT / "tests" / "trainers"), str(tiny)], check=True)
    spec = real_spec(tmp_path, method=["lora", "full"], trials=6, batch_size=[4, 8], epochs=1.0)
    sweep("launch", str(spec), "--yes", f"--set=model={tiny}", cwd=tmp_path, timeout=280)
    found = read(tmp_path)
    assert {t.config.method for t in found["trials"]} == {"lora", "full"}
    completed = [trial for trial in found["trials"] if trial.state == "completed"]
    assert completed
    for trial in completed:
        names = {p.name for p in Path(str(trial.checkpoint)).iterdir()}
        lora = trial.config.method == "lora"
        assert {"adapter_model.safetensors" if lora else "model.safetensors", "state.json"} <= names
        assert ("optimizer.safetensors" in names) == lora, "of a whole model at its end nothing is trained on"
