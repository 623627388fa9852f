"""Folders and files that a spec names, looked at without torch or `datasets`, whose imports take seconds.

Most refusals are for a name that was mistyped.
"""

from __future__ import annotations

import re
from pathlib import Path

from trainers.splits import DataError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_ID = re.compile(r"^(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.-]+))?$")
EXPECTED = "prompt and completion, messages, or text"


class ModelError(Exception):
    """A base model that cannot be trained. One line: which, what is wrong, what to do."""


def model_folder(model: str) -> Path | None:
    """A model's local folder; None where the name is a hub id. Raises ModelError."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        raise ModelError(f"{model}: is a GGUF file; convert it into a folder of safetensors first")
    if path.exists() and not path.is_dir():
        raise ModelError(f"{model}: is a file; name the model's folder or a hub id")
    if path.is_dir():
        return with_config(model, path.resolve())
    if model.startswith((".", "/", "~")):
        raise ModelError(f"{model}: no such folder; check the path, or name a hub id as owner/name")
    return None


def with_config(model: str, folder: Path) -> Path:
    """The folder, if it has a configuration. Raises ModelError."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{model}: has no config.json; name a folder as transformers saves it")
    return folder


def data_file(source: str) -> Path | None:
    """A local file of rows; None where the name is a hub data set's. Raises DataError."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if not (path.exists() or suffix in BUILDERS) and HUB_ID.match(source):
        return None
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name one file ending in {', '.join(BUILDERS)}")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path, or name a hub data set as owner/name")
    if suffix not in BUILDERS:
        raise DataError(f"{path.name}: unknown kind of file; use one ending in {', '.join(BUILDERS)}")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if empty:
        raise DataError(f"{path.name}: is empty; it needs rows of {EXPECTED}")
    return path
