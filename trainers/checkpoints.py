"""Checkpoint folders: whole or absent, safetensors and JSON, never a pickle.

    checkpoint folder
      adapter_model.safetensors, adapter_config.json    (LoRA) or a transformers model folder (full)
      optimizer.safetensors    AdamW's moments, `<parameter>.exp_avg` and `<parameter>.exp_avg_sq`; of LoRA the slot's
                               buffers, `<targets>.r<rank>.weights`, `.exp_avg` and `.exp_avg_sq`
      masters.safetensors      fp32 masters, of full training in bf16
                               (neither is there of a full-parameter trial at its end)
      state.json               configuration, step, tokens, versions; what marks a folder as a checkpoint

Order of rows, schedule and dropout follow from configuration and step, so no random state is stored.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from trainers.messages import TrialConfig

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
TEMPORARY = ".tmp-"
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(Exception):
    """A folder that does not hold what is to be restored; one line."""


@dataclass(frozen=True)
class State:
    """What a checkpoint says of its trial; `rows` is the number of training rows it was drawn from."""

    config: TrialConfig
    step: int
    tokens: int
    rows: int


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _os_error(error: SafetensorError, path: Path) -> OSError:
    # safetensors reports a failed write only in its text: "I/O error: No space left on device (os error 28)".
    number = re.search(r"os error (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code), str(path))


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill; on leaving, its files are fsynced and it is renamed to `folder`.

    A folder that is there already is replaced: a trial that repeats a stretch arrives at the same name again. Raises
    OSError (also for what safetensors could not write); then nothing of the new folder is left.
    """
    temporary = folder.with_name(TEMPORARY + folder.name)
    replaced = folder.with_name(f"{TEMPORARY}old-{folder.name}")
    for stale in (temporary, replaced):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        _fsync(folder.parent)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise _os_error(error, folder) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes one safetensors file from tensors on any device. Raises SafetensorError where writing fails."""
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(ready, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Reads a safetensors file onto the CPU. Raises CheckpointError where it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


@functools.cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "peft", "transformers")}


def write_state(folder: Path, state: State) -> None:
    """Writes state.json."""
    values: dict[str, Any] = dataclasses.asdict(state)
    values["versions"] = _versions()
    (folder / STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")


def read_state(folder: Path, config: TrialConfig, rows: int) -> State:
    """Reads state.json. Raises CheckpointError where it is missing, or of another configuration or other data."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        state = State(TrialConfig(**values["config"]), int(values["step"]), int(values["tokens"]), int(values["rows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: is no checkpoint ({type(error).__name__} in {STATE})") from error
    if state.config != config:
        ours, theirs = dataclasses.asdict(config), dataclasses.asdict(state.config)
        differing = ", ".join(key for key in ours if ours[key] != theirs[key])
        raise CheckpointError(f"{folder}: is of another configuration ({differing} differ)")
    if state.rows != rows:
        raise CheckpointError(f"{folder}: was trained on {state.rows} rows, the data now has {rows}")
    return state


def holds(folder: Path, state: State) -> bool:
    """Whether the folder is a checkpoint of just this state."""
    try:
        return read_state(folder, state.config, state.rows) == state
    except CheckpointError:
        return False


def remove_older(trial_folder: Path, keep: int = 2) -> None:
    """Removes all but a trial's newest `keep` checkpoints, by step, and what a killed write left. Raises OSError."""
    steps: dict[Path, tuple[int, int]] = {}
    for folder in trial_folder.iterdir():
        if folder.name.startswith(TEMPORARY):
            shutil.rmtree(folder)
        elif (folder / STATE).exists():
            step = json.loads((folder / STATE).read_text(encoding="utf-8"))["step"]
            steps[folder] = (step, folder.stat().st_mtime_ns)
    for folder in sorted(steps, key=steps.__getitem__)[: max(len(steps) - keep, 0)]:
        shutil.rmtree(folder)
