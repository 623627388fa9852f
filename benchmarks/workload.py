"""The workload of the packing benchmark: model shapes, texts, trials, and the arithmetic they need.

    python -m benchmarks.workload [--model models/smollm2-135m] [--folder benchmarks/data] [--seed 0]

Run it in the root of a checkout, in the project's environment. It makes the texts once, out of the source code and the
docstrings of Python's standard library, and prepares them as `sweep launch` would. Another machine gets the folder as
it is, tokenizer included, so that the rows are the same everywhere:

    long/   pieces of source code of 100 to 600 tokens, 300 on average; the first part of a piece is the prompt
    short/  under 40 tokens: a name, and the first line of its docstring
    tokenizer/

Everything but the making works without `datasets`.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import json
import math
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config
from transformers.initialization import no_init_weights

from trainers.messages import Targets, TrialConfig
from trainers.splits import Split, load_split

ROOT = Path(__file__).absolute().parents[1]
DATA = ROOT / "benchmarks" / "data"
TOKENIZER = DATA / "tokenizer"
KINDS = ("long", "short")

# --- shapes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A model's architecture, and the batch size its trials have."""

    name: str
    config: PretrainedConfig
    batch_size: int = 8


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


SMOLLM2 = Shape(
    "smollm2-135m",
    LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters=_rope(1e5),
        tie_word_embeddings=True,
    ),
)
QWEN_1B5 = Shape(
    "1.5b",
    Qwen2Config(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=_rope(1e6),
        tie_word_embeddings=True,
    ),
)
LLAMA_8B = Shape(
    "8b",
    LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters=_rope(5e5),
        tie_word_embeddings=False,
    ),
    batch_size=4,
)
QWEN_14B = Shape(
    "14b",
    Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=_rope(1e6),
        tie_word_embeddings=False,
    ),
    batch_size=4,
)
# It costs nothing, but has every part of the others.
TINY = Shape(
    "tiny",
    LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters=_rope(1e4),
        tie_word_embeddings=True,
    ),
)
SHAPES = {shape.name: shape for shape in (SMOLLM2, QWEN_1B5, LLAMA_8B, QWEN_14B, TINY)}


@torch.no_grad()
def random_model(config: PretrainedConfig, device: torch.device) -> Any:
    """Builds a bf16 model with random weights straight on the device: ones in norms, zeros in biases, else N(0, 0.02).

    Not meant to be run before it was saved and loaded: buffers are what the architecture puts there.
    """
    torch.manual_seed(0)
    with torch.device(device), no_init_weights():
        build: Any = AutoModelForCausalLM.from_config
        model = build(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    # Untied weights would be saved as two, and be loaded untied.
    model.tie_weights()
    return model


def weights_folder(shape: Shape, model: Path, scratch: Path, device: torch.device) -> tuple[Path, str]:
    """Returns a folder that `from_pretrained` loads, and whether its weights are `real` or `random`.

    Real ones exist for SmolLM2 alone, where `model` has them. Random ones are saved under `scratch` once, with the
    tokenizer, so that a load is a load from disk for every shape.
    """
    if shape is SMOLLM2 and (model / "config.json").is_file() and any(model.glob("*.safetensors")):
        return model, "real"
    folder = scratch / f"packing-{shape.name}"
    if not folder.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".packing-", dir=scratch))
        try:
            random_model(shape.config, device).save_pretrained(temporary, max_shard_size="5GB")
            for file in (TOKENIZER if TOKENIZER.is_dir() else model).glob("tokenizer*.json"):
                shutil.copy(file, temporary)
            # A run that was cut off leaves no folder under the final name.
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return folder, "random"


# --- arithmetic -----------------------------------------------------------------------------------------------------

PEAK_FLOPS = 989e12  # an H100 SXM's dense bf16 rate by its datasheet; an H200's is the same


def linear_parameters(config: PretrainedConfig) -> int:
    """Weights of the linear layers inside the decoder's layers, biases, embeddings and head left out."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * heads * head + 2 * hidden * config.num_key_value_heads * head
    return int(config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size))


def flops_per_example(
    config: PretrainedConfig, lengths: NDArray[np.int64], completion: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Floating-point operations that LoRA training of each example needs, whatever was executed beside them, [rows].

    Counted for an example of L tokens, C of them scored, in a model with N weights in the decoder layers' linears, d =
    heads x head size, hidden size h and vocabulary V:

        linears    4 N L              2N a token forward, 2N backward for activations; frozen weights have no gradient
        attention  (2 + 4) L^2 d      a layer: QK' and PV over the causal half, 2 (2 L^2 d) / 2 forward, twice that back
        head       4 V h C            forward and backward for activations, on scored tokens alone

    Not counted: padding, the adapters themselves, norms, activations, the softmax, the optimizer. The first layers'
    backward is counted whole although nothing below the first adapter needs it.
    """
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = lengths.astype(np.float64)
    linears = 4.0 * linear_parameters(config) * tokens
    attention = 6.0 * config.num_hidden_layers * width * tokens**2
    head = 4.0 * config.vocab_size * config.hidden_size * completion
    return np.asarray(linears + attention + head, dtype=np.float64)


# --- trials ---------------------------------------------------------------------------------------------------------

# Ranks and targets are the defaults of SearchSpec (sweep/spec.py), which draws each value alike. Of its alphas (8 to
# 128) and rates (1e-5 to 5e-3) these are the middle: speed does not depend on them, and at their ends trials diverge.
RANKS = (4, 8, 16, 32, 64)
ALPHAS = (16, 32)
TARGETS: tuple[Targets, ...] = ("attention", "mlp", "all-linear")
RATES = (1e-4, 3e-3)


def draw_trials(n: int, seed: int, batch_size: int = 8, steps: int = 200) -> list[TrialConfig]:
    """Draws `n` LoRA trials of `steps` steps; the first ones are the same for every `n`."""
    source = random.Random(seed)
    return [
        TrialConfig(
            number=number,
            method="lora",
            learning_rate=math.exp(source.uniform(math.log(RATES[0]), math.log(RATES[1]))),
            batch_size=batch_size,
            examples=steps * batch_size,
            seed=seed,
            rank=source.choice(RANKS),
            alpha=source.choice(ALPHAS),
            targets=source.choice(TARGETS),
        )
        for number in range(n)
    ]


# --- what a mode is given and gives back ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What every mode is given: a model folder, prepared splits, and the FLOPs of each training row, [rows]."""

    shape: Shape
    device: torch.device
    folder: Path
    weights: str
    train: Split
    validation: Split
    flops: NDArray[np.float64]


@dataclass(frozen=True)
class Work:
    """What was trained: optimizer steps over all trials, real tokens, and their FLOPs. `computed` includes padding."""

    steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    computed: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.steps + other.steps,
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.computed + other.computed,
        )

    def __sub__(self, other: Work) -> Work:
        return self + Work(-other.steps, -other.tokens, -other.flops, -other.computed)


@dataclass(frozen=True)
class Measured:
    """One measurement; `extra` goes into the result line as it is."""

    mode: str
    at_once: int
    seconds: float
    work: Work
    occupancy: float | None
    memory_gib: float | None
    extra: dict[str, Any]


def _folded(split: Split, vocabulary: int) -> Split:
    # Nothing changes but for a vocabulary smaller than the tokenizer's, which only the tiny shape has.
    return Split(split.ids % np.int32(vocabulary), split.offsets, split.mask)


def make_setup(shape: Shape, data: Path, model: Path, scratch: Path, device: torch.device) -> Setup:
    """Reads the prepared rows and finds or makes the weights. Raises DataError where there are no rows."""
    train, validation = (_folded(load_split(data, name), shape.config.vocab_size) for name in ("train", "validation"))
    completion = train.completions
    flops = flops_per_example(shape.config, train.lengths, completion)
    folder, weights = weights_folder(shape, model, scratch, device)
    return Setup(shape, device, folder, weights, train, validation, flops)


# --- texts ----------------------------------------------------------------------------------------------------------

LENGTHS = (102, 596, 205)  # of a triangular distribution: lowest, highest, most frequent; their mean is 301
PROMPT_SHARES = (0.3, 0.7)
SHORTEST, LONGEST, SHORT = 100, 600, 40
ROWS = {"long": (3600, 128), "short": (4000, 128)}  # training rows are whole batches, so that every step is alike
_LEFT_OUT = {"test", "tests", "site-packages", "lib2to3", "idlelib", "encodings", "pydoc_data", "turtledemo"}

Text = dict[str, str]


def sources() -> Iterator[tuple[str, str]]:
    """Yields name and text of every module of the standard library but tests and tables, in order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if not _LEFT_OUT & set(parts):
            yield ".".join(part for part in parts if part != "__init__"), path.read_text("utf-8", errors="replace")


def _length(tokenizer: Any, row: Text) -> int:
    # One more for the end of the sequence, which the preparation adds.
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row.values()) + 1


def long_texts(tokenizer: Any, source: random.Random) -> list[Text]:
    """Cuts the modules into pieces that do not overlap, each from the start of a paragraph and of a length drawn."""
    rows = []
    for _, text in sources():
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        starts = [start for start, _ in spans]
        at = 0
        for paragraph in re.finditer(r"\n[ \t]*\n(?=[ \t]*\S)", text):
            first = bisect.bisect_left(starts, paragraph.end())
            count = round(source.triangular(*LENGTHS)) - 1
            if first < at or first + count > len(spans):
                continue
            at = first + count
            cut = first + round(count * source.uniform(*PROMPT_SHARES))
            row = {
                "prompt": text[starts[first] : starts[cut]],
                "completion": text[starts[cut] : spans[at - 1][1]],
            }
            # Tokens change a little where the text is cut.
            if SHORTEST <= _length(tokenizer, row) <= LONGEST:
                rows.append(row)
    return rows


def short_texts(tokenizer: Any) -> list[Text]:
    """Asks for every documented function and class; the answer is the first line of its docstring."""
    rows = []
    for module, text in sources():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated escapes in old modules
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            row = {"prompt": f"What is {module}.{node.name}?\n", "completion": line}
            if line and _length(tokenizer, row) < SHORT:
                rows.append(row)
    return rows


def make_texts(kind: str, model: Path, folder: Path, seed: int) -> None:
    """Makes, prepares and describes the rows of one kind. Raises ValueError where the library has too few."""
    from trainers.data import prepare  # it reads rows through `datasets`, which only this needs

    tokenizer = AutoTokenizer.from_pretrained(model)
    source = random.Random(seed)
    found = long_texts(tokenizer, source) if kind == "long" else short_texts(tokenizer)
    distinct = sorted({(row["prompt"], row["completion"]) for row in found})
    train, validation = ROWS[kind]
    if len(distinct) < train + validation:
        raise ValueError(f"{kind}: the standard library has only {len(distinct)} rows of {train + validation}")
    chosen = source.sample(distinct, train + validation)
    with tempfile.TemporaryDirectory() as temporary:
        files = {"train": chosen[:train], "validation": chosen[train:]}
        for name, rows in files.items():
            lines = [json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in rows]
            (Path(temporary) / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        prepare(
            tokenizer,
            train=f"{temporary}/train.jsonl",
            validation=f"{temporary}/validation.jsonl",
            test=None,
            max_tokens=LONGEST,
            seed=seed,
            folder=folder / kind,
            model=model.name,
        )
    for name in files:
        print(describe(f"{kind}/{name}", load_split(folder / kind, name)))


def describe(name: str, split: Split) -> str:
    """Returns a split's figures in a line."""
    lengths = split.lengths
    spread = f"mean {lengths.mean():.1f}, sd {lengths.std():.1f}, min {lengths.min()}, max {lengths.max()} tokens"
    return f"{name}: {split.rows} rows, {len(split.ids)} tokens, {spread}, {split.mask.mean():.1%} completion"


def main(arguments: list[str]) -> int:
    """Makes both kinds of rows; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.workload", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m", metavar="DIR")
    parser.add_argument("--folder", type=Path, default=DATA, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for kind in KINDS:
        make_texts(kind, options.model, options.folder, options.seed)
    (options.folder / "tokenizer").mkdir(exist_ok=True)
    for file in options.model.glob("tokenizer*.json"):
        shutil.copy(file, options.folder / "tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
