"""The base model: found, checked, loaded frozen; its linear layers by kind; GGUF files made into safetensors.

Weights come from safetensors only. No pickle is opened and no code of a model's author is run.
"""

from __future__ import annotations

import importlib
import math
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trainers.checkpoints import write_folder
from trainers.engine import Engine
from trainers.memory import MICRO_TOKENS
from trainers.messages import Targets, WorkerJob
from trainers.named import ModelError, model_folder, with_config
from trainers.splits import Split

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# What model configs call a function between lm_head and the loss; the chunked loss knows none of them.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_scale")


@dataclass
class Base:
    """One base model, shared by all engines of a worker.

    `decoder` maps token ids to hidden states, `head` hidden states to logits; both are modules of `model`. `busy` is
    true while a trial's weights are in the model.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: nn.Module
    head: nn.Linear
    device: torch.device
    busy: bool = False


@dataclass(frozen=True)
class LoadedEngines:
    """What a worker needs to start: engines by method over one base model, and what `ready` tells of it."""

    engines: dict[str, Engine]
    device: str
    parameters: int
    linear_shapes: list[list[int]]
    gpu: torch.device | None = None
    full_bytes: float = 0.0  # of the GPU, that full-parameter trials may take

    def make_room(self, method: str) -> None:
        """Before trials of a method come: has the other engine rest where they may not fit beside what it keeps."""
        for other, engine in self.engines.items():
            if other == method or self.gpu is None:
                continue
            kept = engine.kept()
            free, whole = torch.cuda.mem_get_info(self.gpu)
            cached = torch.cuda.memory_reserved(self.gpu) - torch.cuda.memory_allocated(self.gpu) - kept.in_graphs
            # A pack was planned into nine tenths of what was free when it was alone (trainers/lora/probe.py).
            little = kept.allocated + kept.in_graphs < whole / 20
            if not little if method == "lora" else free + cached < self.full_bytes:
                engine.rest()


def one_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def resolve(model: str, files: Sequence[str] = FILES) -> Path:
    """Returns the folder of a model: itself, or the local snapshot of a hub id, of which `files` are downloaded if need
    be.

    Raises ModelError where there is none.
    """
    local = model_folder(model)
    if local is not None:
        return local
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{model}: is no local folder and cannot be had from the hub: {one_line(error)}") from error
    return with_config(model, folder)


def load_config(folder: Path) -> PretrainedConfig:
    """Reads a model's configuration. Raises ModelError for one that is unknown or that the loss does not fit."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder.name}: config.json is not usable: {one_line(error)}") from error
    for key in LOGIT_CHANGES:
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{folder.name}: its logits are changed by {key}, which the loss here does not know; use another"
            )
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer. Raises ModelError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder.name}: has no usable tokenizer: {one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder.name}: its tokenizer has no end-of-sequence token; set eos_token")
    return tokenizer


def check_weights(folder: Path) -> None:
    """Opens the header of every weights file. Raises ModelError where one is missing, cut short or no safetensors."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder.name}: has no *.safetensors file; other formats may hold pickles and are not loaded")
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder.name}: {file.name} is damaged: {one_line(error)}; download it again") from error


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Builds the model without memory for its weights (meta device); `dtype` None is what the configuration says.

    Raises ModelError for an unknown architecture.
    """
    chosen = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **chosen)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{config.model_type}: is no causal language model transformers knows: {one_line(error)}"
        ) from error


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into logits. Raises ModelError unless it is a linear layer without bias."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ModelError(f"{model.config.model_type}: its head is not a linear layer without bias; use another model")
    return head


def pick_device(device: str) -> torch.device:
    """Turns auto, cpu, cuda or cuda:N into a device that is there. Raises ModelError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.device(device)
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise ModelError(f"{device}: this machine has {torch.cuda.device_count()} usable GPUs; use device cpu or auto")
    return found


def load_base(model: str, device: str) -> Base:
    """Loads a folder or hub id frozen onto a device: fp32 on the CPU, bf16 on a GPU. Raises ModelError."""
    folder = resolve(model)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    check_weights(folder)
    where = pick_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        loaded.to(where)
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder.name}: cannot be loaded: {one_line(error)}") from error
    if report["missing_keys"]:
        # transformers would make the missing weights up at random and only log it.
        raise ModelError(f"{folder.name}: its weights files lack {min(report['missing_keys'])}; download them again")
    if hasattr(config, "quantization_config"):
        # What is not quantised keeps the type in which it was saved, whatever was asked for. Codes have a class of
        # their own, and may be stored as any type.
        for parameter in loaded.parameters():
            if type(parameter) is nn.Parameter and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    loaded.requires_grad_(False)
    loaded.eval()
    name = str(folder) if Path(model).expanduser().is_dir() else model
    loaded.name_or_path = name  # what an adapter's configuration will name as its base
    return Base(name, loaded, tokenizer, loaded.get_decoder(), head_of(loaded), where)


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The decoder's layers: the longest list of modules in it."""
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


def layer_linears(model: PreTrainedModel) -> dict[str, tuple[nn.Linear, str]]:
    """Linear layers of the decoder's layers by full name, each with its kind, attention or mlp.

    The kind is read off the modules around it: under a module named or classed as attention it is attention,
    elsewhere in a layer (also directly in it, as in OPT) it is mlp.
    """
    found: dict[str, tuple[nn.Linear, str]] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parts = name.split(".")
        in_layer = any(part.isdigit() for part in parts)
        if not isinstance(module, nn.Linear) or not in_layer or module is model.get_output_embeddings():
            continue
        layer = next(i for i, part in enumerate(parts) if part.isdigit())
        above = [".".join(parts[:end]) for end in range(layer + 2, len(parts))]
        words = [word.lower() for path in above for word in (path.split(".")[-1], type(modules[path]).__name__)]
        found[name] = (module, "attention" if any("attn" in w or "attention" in w for w in words) else "mlp")
    return found


def target_modules(model: PreTrainedModel, targets: Targets | str) -> list[str]:
    """The module name endings that a LoRA configuration must list for a kind of targets, sorted.

    An ending is as short as it can be without matching a module that is not meant. Raises ModelError for an unknown
    kind, and for a model that has no linear layer of that kind.
    """
    if targets not in ("attention", "mlp", "all-linear"):
        raise ModelError(f"targets {targets!r}: unknown; use attention, mlp or all-linear")
    linears = layer_linears(model)
    meant = {name for name, (_, kind) in linears.items() if targets in (kind, "all-linear")}
    if not meant:
        raise ModelError(f"{model.config.model_type}: has no linear layers for targets {targets}; use full training")
    others = [name for name, _ in model.named_modules() if name not in meant]

    def ending(name: str) -> str:
        parts = name.split(".")
        for length in (1, 2):
            short = ".".join(parts[-length:])
            if not any(other == short or other.endswith(f".{short}") for other in others):
                return short
        return name

    return sorted({ending(name) for name in meant})


def target_linears(model: PreTrainedModel, targets: Targets | str) -> dict[str, nn.Linear]:
    """The linear layers a kind of targets means, by full name, in the model's order. Raises ModelError."""
    target_modules(model, targets)
    return {n: m for n, (m, kind) in layer_linears(model).items() if targets in (kind, "all-linear")}


def linear_shapes(model: PreTrainedModel) -> list[list[int]]:
    """The linear layers of the decoder as [inputs, outputs, how many]."""
    counts = Counter((m.in_features, m.out_features) for m, _ in layer_linears(model).values())
    return [[inputs, outputs, count] for (inputs, outputs), count in counts.items()]


def convert_gguf(path: Path, out_folder: Path) -> None:
    """Turns a GGUF file into a model folder of bf16 safetensors and tokenizer, whole or not at all.

    The model that transformers builds from a GGUF file refuses to be saved, so its weights move into a clean one.
    Raises ModelError for a file that transformers cannot read, OSError where writing fails.
    """
    try:
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (*LOAD_ERRORS, struct.error) as error:
        raise ModelError(f"{path.name}: cannot be read as GGUF: {one_line(error)}") from error
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config)
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    clean.to(torch.bfloat16)
    out_folder.parent.mkdir(parents=True, exist_ok=True)
    with write_folder(out_folder) as folder:
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _timed(what: str) -> Iterator[None]:
    """Says in worker.log what of the start-up took how long."""
    started = time.monotonic()
    yield
    sys.stderr.write(f"ready: {what} after {time.monotonic() - started:.1f} s\n")


def _pack(job: WorkerJob, base: Base, train: Split, validation: Split) -> tuple[int, int | None]:
    """How many LoRA trials train at once, and how many tokens go through the model at once (None: as usual)."""
    if job.slots is not None:
        return job.slots, None
    if base.device.type != "cuda":
        return 1, None  # packing saves nothing on a CPU, which one trial keeps busy
    from trainers.lora import probe

    width = probe.choose(base, train, validation, job.max_rank, job.precision)
    return width.slots, width.tokens


def _lora_engine(job: WorkerJob, base: Base, train: Split, validation: Split) -> Engine:
    from trainers.lora.engine import LoraEngine

    with _timed("probe"):
        slots, stream_tokens = _pack(job, base, train, validation)
    with _timed("packed engine"):
        data = train, validation, job.rung_rows
        lora = LoraEngine(base, *data, stream_tokens, slots, job.max_rank, job.precision)
        if base.device.type == "cuda":
            from trainers.lora import probe

            probe.warm_up(lora, job.max_rank, job.precision)
    return lora


def load_engines(job: WorkerJob, compiling: Sequence[subprocess.Popen[bytes]] = ()) -> LoadedEngines:
    """Loads base model and prepared data once and puts an engine of each of the job's methods over them.

    Before that the engine's loss is compared with the model's own. `compiling`: processes whose kernels the packed
    engine launches, and is not begun before they end. Raises ModelError and DataError.
    """
    # Imported here: the engines import this module.
    from trainers.full.engine import FullEngine
    from trainers.lora.float8 import check_device
    from trainers.loss import compared_rows, verify_loss
    from trainers.quantised import check_quantised
    from trainers.splits import load_split

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    train, validation = (load_split(Path(job.data), name) for name in ("train", "validation"))
    with _timed("base model"):
        base = load_base(job.model, job.device)
        check_quantised(base.name, base.model, job.methods, job.precision)
        if job.precision == "fp8":
            check_device(base.name, base.device)
        verify_loss(base, [train[row] for row in compared_rows(train)])
    with _timed("kernels"):
        if compiling:
            importlib.import_module("torch._inductor.compile_fx")  # 3 s that the first compiled layer would wait for
        for process in compiling:
            process.wait()
    engines: dict[str, Engine] = {}
    gpu = base.device if base.device.type == "cuda" else None
    device = "cpu" if gpu is None else torch.cuda.get_device_name(gpu)
    shapes = linear_shapes(base.model)
    loaded = LoadedEngines(engines, device, base.model.num_parameters(), shapes, gpu, _full_bytes(base, job))
    if "lora" in job.methods:
        engines["lora"] = _lora_engine(job, base, train, validation)
    if "full" in job.methods:
        loaded.make_room("full")
        with _timed("full engine"):
            engines["full"] = full = FullEngine(base, train, validation, job.rung_rows, job=job)
            if base.device.type == "cuda":
                full.warm_up()
    return loaded


def _full_bytes(base: Base, job: WorkerJob) -> float:
    """What full-parameter trials may take of a GPU beside the base weights, generously; trainers/memory.py counts."""
    if job.processes > 1:
        return math.inf  # the base weights leave the device meanwhile, and graphs would read where they were
    config = base.model.config.get_text_config()
    activations = 64.0 * config.hidden_size * config.num_hidden_layers * MICRO_TOKENS
    return 20.0 * base.model.num_parameters() + activations + 4 * 2**30
