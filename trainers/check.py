"""Looks at model and data before anything is paid: `python -m trainers.check REQUEST.json`.

The request is an object with `model`, `train`, `validation`, `test` (a share, a file or data set; `test` may be null),
`max_tokens`, `seed`, `out_folder`, `methods` (lora, full) and `targets` (attention, mlp, all-linear); it may have
`precision` (bf16, fp8), `retention` (a file or data set), `metric` (validation_loss, exact_match, accuracy,
module:function), `choices` (of accuracy) and `max_new_tokens` (of a metric on text). The answer is one line of JSON on
stdout, and nothing else is written there:

    {"ok": true, "parameters": ..., "shape": {...}, "data": {...}, ...}                         exit code 0
    {"ok": false, "kind": "model" | "data" | "objective", "message": "...", "hint": "..."}      exit code 7
    {"ok": false, "kind": "disk", "message": "...", "hint": "..."}                              exit code 8

No weights are loaded: the model is built on torch's meta device, and of its weights files the headers are opened. A
request of `model` alone asks for its shape (`trainers/memory.py`), for which its config.json is enough.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from trainers import metrics
from trainers.messages import Precision
from trainers.metrics import MetricError
from trainers.named import ModelError, data_file, model_folder
from trainers.splits import DataError

BAD_INPUT, DISK_FULL = 7, 8
PARTS = ("train", "validation", "test", "retention")


def _silence() -> None:
    """Keeps the libraries' progress bars, retries and advice off a user's terminal."""
    for name in ("bitsandbytes", "torch.utils._pytree", "torchao"):  # which transformers imports where they are
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import datasets
    import huggingface_hub
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity(huggingface_hub.utils.logging.CRITICAL)


def _device() -> dict[str, Any]:
    import torch

    cores = os.process_cpu_count() if sys.version_info >= (3, 13) else len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        return {"device": "cpu", "cpu_cores": cores, "gpus": 0, "gpu_memory_bytes": None, "capability": None}
    properties = torch.cuda.get_device_properties(0)
    found = {"device": properties.name, "cpu_cores": cores, "gpus": torch.cuda.device_count()}
    return found | {"gpu_memory_bytes": properties.total_memory, "capability": [properties.major, properties.minor]}


def _precision(request: dict[str, Any]) -> Precision:
    """Of LoRA's products with the base."""
    found: Precision = request.get("precision", "bf16")
    return found


def _shape(model: Any, precision: Precision) -> dict[str, Any] | None:
    """The model's shape; None where its code does not run without weights: what it needs is not predicted then."""
    from trainers.shapes import shape_of

    try:
        return dataclasses.asdict(shape_of(model, precision))
    except ModelError:
        return None


def model_alone(request: dict[str, Any]) -> dict[str, Any]:
    """What is seen of a model by its configuration. Raises ModelError."""
    from trainers import models
    from trainers.quantised import check_quantised
    from trainers.shapes import shape_of

    name, precision = request["model"], _precision(request)
    config = models.load_config(models.resolve(name, ["config.json"]))
    model = models.skeleton(config)
    models.head_of(model)
    check_quantised(name, model, request["methods"], precision)
    shape = dataclasses.asdict(shape_of(model, precision))
    return {"parameters": model.num_parameters(), "shape": shape, **_device()}


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Checks the model, prepares the data into `out_folder` and returns the answer without `ok` and `seconds`.

    `linear_shapes` is a list of [inputs, outputs, how many]; `trained_parameters_per_rank` is, by kind of targets, how
    many parameters a LoRA adapter has for each unit of rank. Raises ModelError, DataError, MetricError and OSError.
    """
    metric = request.get("metric", metrics.LOSS)
    if metric != metrics.LOSS:
        metrics.find(metric, str(Path.cwd()))
    given = _read(request)

    # Imported after what can be refused without them, since they take seconds.
    from trainers import models
    from trainers.data import prepare
    from trainers.quantised import check_quantised

    folder = models.resolve(request["model"])
    config = models.load_config(folder)
    tokenizer = models.load_tokenizer(folder)
    models.check_weights(folder)
    model = models.skeleton(config)
    models.head_of(model)
    precision = _precision(request)
    check_quantised(folder.name, model, request["methods"], precision)
    text = config.get_text_config()
    per_rank = {}
    for targets in request["targets"] if "lora" in request["methods"] else []:
        linears = models.target_linears(model, targets).values()
        per_rank[targets] = sum(m.in_features + m.out_features for m in linears)
    data = prepare(
        tokenizer,
        **given,
        max_tokens=request["max_tokens"],
        seed=request["seed"],
        folder=Path(request["out_folder"]),
        model=request["model"],
        metric=metric,
        choices=request.get("choices"),
        max_new_tokens=request.get("max_new_tokens"),
    )
    longest = max(split["longest"] for split in data["splits"].values())
    positions = getattr(text, "max_position_embeddings", None) or longest
    if longest > positions:
        raise DataError(f"a row has {longest} tokens, {folder.name} positions for {positions}: lower data.max_tokens")
    return {
        "parameters": model.num_parameters(),
        "linear_shapes": models.linear_shapes(model),
        "trained_parameters_per_rank": per_rank,
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "model_type": config.model_type,
        "shape": _shape(model, precision),
        **_device(),
        "data": data,
    }


def _read(request: dict[str, Any]) -> dict[str, Any]:
    """The rows of every source of data, and the shares, by what they are for. Raises DataError, OSError."""
    from trainers.rows import read

    named = {part: request.get(part) for part in PARTS}
    return {part: read(given) if isinstance(given, str) else given for part, given in named.items()}


def _look_at_names(request: dict[str, Any]) -> None:
    """Raises ModelError or DataError for a local folder or file that cannot be one."""
    model_folder(request["model"])
    for part in PARTS:
        if isinstance(source := request.get(part), str):
            data_file(source)


def _answer(request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    begun = time.monotonic()
    try:
        _look_at_names(request)  # first, since what follows imports torch, transformers and datasets
        _silence()
        found = check(request) if "train" in request else model_alone(request)
    except ModelError as error:
        return BAD_INPUT, _refusal("model", str(error), "model: in the spec names a folder or a hub id")
    except DataError as error:
        return BAD_INPUT, _refusal("data", str(error), "data: in the spec names the files and the shares set apart")
    except MetricError as error:
        return BAD_INPUT, _refusal("objective", str(error), "objective: in the spec names the metric")
    except OSError as error:
        from trainers.rows import DISK_ERRORS

        if error.errno not in DISK_ERRORS:
            raise
        message = f"{request['out_folder']}: {error.strerror}"
        return DISK_FULL, _refusal("disk", message, "free some space or work in another folder")
    return 0, {"ok": True, **found, "seconds": round(time.monotonic() - begun, 3)}


def _refusal(kind: str, message: str, hint: str) -> dict[str, Any]:
    return {"ok": False, "kind": kind, "message": message, "hint": hint}


def main(arguments: list[str]) -> int:
    """Answers the request in the file named by the one argument; returns the exit code."""
    # Stdout is kept for the answer: whatever a library prints, in Python or below it, goes to stderr.
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    code, answer = _answer(request)
    with answer_to:
        answer_to.write(json.dumps(answer) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
