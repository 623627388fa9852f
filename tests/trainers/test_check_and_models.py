"""Looking before paying: `python -m trainers.check`, and what it finds out about models."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_model
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, OPTConfig

from trainers import check, models
from trainers.named import ModelError
from trainers.splits import DataError

ROOT = Path(__file__).parents[2]


def request(model: Path | str, data: Path | str, out: Path, **changes: Any) -> dict[str, Any]:
    """A request with defaults."""
    return {
        "model": str(model),
        "train": str(data),
        "validation": 0.2,
        "test": 0.1,
        "max_tokens": 64,
        "seed": 3,
        "out_folder": str(out),
        "targets": ["attention", "mlp", "all-linear"],
        "methods": ["lora", "full"],
        **changes,
    }


def ask(tmp_path: Path, content: dict[str, Any], limit: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the check as the orchestrator does, offline."""
    path = tmp_path / "request.json"
    path.write_text(json.dumps(content))
    command = f"{limit} exec {sys.executable} -m trainers.check {path}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_good_input_is_described(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """A good request gives one line of JSON with the model's size, its targets and the data, exit code 0, no noise."""
    done = ask(tmp_path, request(model_folder, rows_file, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    assert answer["parameters"] == AutoModelForCausalLM.from_pretrained(model_folder).num_parameters()
    assert answer["trained_parameters_per_rank"] == {"attention": 448, "mlp": 480, "all-linear": 928}
    assert (answer["hidden_size"], answer["layers"], answer["model_type"]) == (32, 2, "llama")
    assert answer["cpu_cores"] >= 1
    assert answer["data"] == json.loads((tmp_path / "out" / "data.json").read_text())
    assert sum(split["rows"] for split in answer["data"]["splits"].values()) == 60


def test_bad_input_is_one_line_and_exit_code_7(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Bad data and a model that cannot be had are one line of JSON and exit code 7, without a traceback."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a"}\n')
    for content, kind, said in (
        (request(model_folder, bad, tmp_path / "out"), "data", "bad.jsonl: has columns question"),
        (request("nobody/nothing", rows_file, tmp_path / "out"), "model", "nobody/nothing: is no local folder"),
    ):
        done = ask(tmp_path, content)
        assert (done.returncode, done.stderr) == (7, "")
        answer = json.loads(done.stdout)
        assert (answer["ok"], answer["kind"]) == (False, kind)
        assert answer["message"].startswith(said)
        assert "\n" not in answer["message"]
        assert answer["hint"]


def test_rows_beyond_the_model_s_positions_are_refused(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Proves that a worker does not find out, which is paid: some models look positions up in a table that ends."""
    short = shutil.copytree(model_folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    with pytest.raises(DataError, match=r"^a row has \d+ tokens, short positions for 8: lower data\.max_tokens$"):
        check.check(request(short, rows_file, tmp_path / "out"))


def test_a_full_parameter_winner_s_configuration_is_its_model_s_own(model_folder: Path) -> None:
    """Proves that training leaves no setting of its own in what is handed over: generation keeps its cache."""
    own = json.loads((model_folder / "config.json").read_text())
    assert models.load_base(str(model_folder), "cpu").model.config.use_cache is own.get("use_cache", True) is True


def test_full_disk_is_exit_code_8(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """A write that the system refuses is a matter of the disk, not of the data, and leaves no half-written file."""
    done = ask(tmp_path, request(model_folder, rows_file, tmp_path / "out"), limit="ulimit -f 1;")
    assert (done.returncode, done.stderr) == (8, "")
    assert json.loads(done.stdout)["kind"] == "disk"
    assert list((tmp_path / "out").glob(".tmp*")) == []


def test_other_system_errors_are_not_called_disk(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a full disk is reported as one."""

    def refuse(_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(check, "check", refuse)
    with pytest.raises(PermissionError):
        check._answer(request(model_folder, "x", tmp_path))


def broken(folder: Path, copy: Path, case: str) -> Path:
    """A copy of the model with one thing wrong."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    if case == "no config.json":
        (copy / "config.json").unlink()
    elif case == "unheard_of":
        (copy / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    elif case == "tokenizer":
        (copy / "tokenizer.json").unlink()
    elif case == "no *.safetensors":
        (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    elif case == "damaged":
        os.truncate(copy / "model.safetensors", 3000)
    elif case == "lack":
        (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    return copy


@pytest.mark.parametrize("case", ["no config.json", "unheard_of", "tokenizer", "no *.safetensors", "damaged", "lack"])
def test_broken_models_are_refused_in_one_line(model_folder: Path, tmp_path: Path, case: str) -> None:
    """Each way in which a model folder can be incomplete is named; missing weights are never made up."""
    with pytest.raises(ModelError) as caught:
        models.load_base(str(broken(model_folder, tmp_path / "copy", case)), "cpu")
    assert case in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_are_no_model(tmp_path: Path) -> None:
    """A missing folder, a file, a GGUF file and a GPU that is not there are told apart."""
    (tmp_path / "file").write_text("x")
    for name, said in (("absent", "no such folder"), ("file", "is a file"), ("model.gguf", "convert it")):
        with pytest.raises(ModelError, match=said):
            models.resolve(str(tmp_path / name))
    with pytest.raises(ModelError, match="usable GPUs"):
        models.pick_device("cuda:99")
    with pytest.raises(ModelError, match=r"broken\.gguf: cannot be read as GGUF"):
        (tmp_path / "broken.gguf").write_bytes(b"GGUFxxxx")
        models.convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_targets_are_found_by_structure(model_folder: Path) -> None:
    """Attention and mlp are told apart by the modules around a layer; the head is left out."""
    llama = models.skeleton(AutoConfig.from_pretrained(model_folder))
    assert models.target_modules(llama, "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert models.target_modules(llama, "mlp") == ["down_proj", "gate_proj", "up_proj"]
    assert len(models.target_linears(llama, "all-linear")) == 14
    opt = models.skeleton(OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2))
    assert models.target_modules(opt, "mlp") == ["fc1", "fc2"]
    assert models.target_modules(opt, "attention") == ["k_proj", "out_proj", "q_proj", "v_proj"]
    gpt2 = models.skeleton(GPT2Config(n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="no linear layers for targets mlp"):
        models.target_modules(gpt2, "mlp")
    with pytest.raises(ModelError, match="use attention, mlp or all-linear"):
        models.target_modules(llama, "embedding")


def test_ambiguous_endings_are_lengthened() -> None:
    """Where attention and mlp name a layer alike, the ending grows until it matches the meant one alone."""
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = models.skeleton(config)
    assert models.target_modules(model, "attention") == ["dense", "query_key_value"]
    layer: Any = model.gpt_neox.layers[0]
    layer.mlp.dense = torch.nn.Linear(2, 2, device="meta")
    assert models.target_modules(model, "attention") == ["attention.dense", "query_key_value"]


@pytest.mark.smollm
def test_check_reads_the_real_model(tmp_path: Path, rows_file: Path) -> None:
    """The converted SmolLM2 is described without loading it: 134,515,008 parameters, 210 linear layers."""
    folder = ROOT / "models" / "smollm2-135m"
    if not folder.is_dir():
        pytest.skip("models/smollm2-135m is not converted")
    answer = check.check(request(folder, rows_file, tmp_path / "out"))
    assert answer["parameters"] == 134_515_008
    assert sum(count for *_, count in answer["linear_shapes"]) == 210
    per_rank = answer["trained_parameters_per_rank"]
    assert per_rank["all-linear"] == per_rank["attention"] + per_rank["mlp"]
    assert not issubclass(DataError, ModelError)


def test_gemma_is_refused_before_anything_is_paid(tmp_path: Path, rows_file: Path) -> None:
    """A model whose logits the loss does not know is refused by the check already."""
    from transformers import Gemma2Config

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    folder = save_model(tmp_path / "gemma", Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **small))
    code, answer = check._answer(request(folder, rows_file, tmp_path / "out"))
    assert (code, answer["kind"]) == (7, "model")
    assert "final_logit_softcapping" in answer["message"]
