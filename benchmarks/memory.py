"""Predicted against measured peak GPU memory: packed LoRA and full-parameter training at several shapes.

    python -m benchmarks.memory [--shape SHAPE ...] [--method lora full] [--seconds 120] [--total 350] [--out FILE]
    python -m benchmarks.memory --dry          the whole way on the CPU with the tiny shape; nothing is measured there

Weights and tokens are random and nothing is read from disk. Every shape and method is a process of its own, ended after
`--seconds`, and none is begun after `--total`; in it the configurations run in turn, the largest first, on engines that
share what is compiled, each for a few steps from an empty allocator. A JSON line a configuration, as it ends:

    predicted_bytes, parts    by trainers/memory.py from the model's shape, uncorrected
    allocated_bytes           most that the allocator had handed out, with what captured graphs hold
    reserved_bytes            most that it had taken from the device
    error                     predicted over allocated, less one

The last line has the median and the worst error, alone and where every second peak corrected the others. `failed` says
why a configuration was not measured. The exit code is 1 if none was run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.workload import ROOT, SHAPES, random_model
from trainers.engine import Engine, TrialFailed
from trainers.memory import Peak, Setup, Shape, correct, peak
from trainers.messages import TrialConfig, WorkerJob
from trainers.models import Base, head_of
from trainers.peak import held_by_graphs
from trainers.shapes import shape_of
from trainers.splits import Split

LENGTH = 512  # tokens of every example, half of them scored: so all streams of a configuration have one shape
SETTLED, STEPS = 4, 7  # a stream is captured at its third use; from SETTLED on steps are as they will be
MICRO_TOKENS = 8192
SECONDS, TOTAL = 120.0, 350.0
EIGHT_BIT = ("bitsandbytes", "torchao")

# Slots, tokens a stream, rank, targets; the first is the largest.
PACKS: dict[str, list[tuple[int, int, int, Any]]] = {
    "smollm2-135m": [(32, 65536, 64, "all-linear"), (16, 32768, 16, "all-linear"), (8, 8192, 16, "attention")],
    "1.5b": [(16, 16384, 64, "all-linear"), (8, 16384, 16, "mlp"), (4, 8192, 16, "all-linear")],
    "8b": [(8, 8192, 32, "all-linear"), (4, 4096, 16, "attention")],
    "tiny": [(4, 4096, 64, "all-linear"), (2, 2048, 16, "mlp")],
}
# Examples a batch, checkpointing, optimizer.
FULLS: dict[str, list[tuple[int, bool, Any]]] = {
    "smollm2-135m": [(32, False, "adamw"), (16, False, "adamw"), (16, True, "adamw"), (16, False, "adamw-8bit")],
    "1.5b": [(16, False, "adamw"), (4, False, "adamw"), (16, True, "adamw"), (16, True, "adamw-8bit")],
    "tiny": [(8, False, "adamw"), (8, True, "adamw")],  # of 8B the states alone are 134 GiB
}


def shape_by_name(name: str) -> Shape:
    """A benchmark's shape, from the meta device."""
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(SHAPES[name].config))


def rows_of(count: int, vocabulary: int) -> Split:
    """Random examples of LENGTH tokens."""
    ids = np.random.default_rng(0).integers(0, vocabulary, count * LENGTH, dtype=np.int32)
    mask = np.tile(np.repeat(np.array([0, 1], dtype=np.uint8), LENGTH // 2), count)
    return Split(ids, np.arange(count + 1, dtype=np.int64) * LENGTH, mask)


def base_of(name: str, device: torch.device) -> Base:
    """A frozen model with random weights, bf16 on a GPU."""
    model = random_model(SHAPES[name].config, device)
    if device.type == "cpu":
        model.float()
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    tokenizer: Any = None
    return Base(name, model, tokenizer, model.get_decoder(), head_of(model), device)


# --- one configuration ------------------------------------------------------------------------------------------------


def pack_setup(given: tuple[int, int, int, Any]) -> Setup:
    """What a row of PACKS is to the prediction."""
    slots, tokens, rank, targets = given
    return Setup(method="lora", tokens=tokens, rank=rank, targets=targets, slots=slots)


def full_setup(given: tuple[int, bool, Any]) -> Setup:
    """What a row of FULLS is to the prediction."""
    examples, checkpointing, optimizer = given
    total = examples * LENGTH
    return Setup(
        method="full",
        tokens=min(total, MICRO_TOKENS),
        checkpointing=checkpointing,
        optimizer=optimizer,
        accumulates=total > MICRO_TOKENS,
    )


def pack(base: Base, setup: Setup) -> tuple[Engine, int]:
    """An engine with a full pack, one stream of which is a step of every trial; and how many trials there are."""
    from trainers.lora.engine import LoraEngine

    batch = max(1, setup.tokens // LENGTH // setup.slots)
    train = rows_of(2 * batch * STEPS, base.head.out_features)
    engine = LoraEngine(base, train, train, 1, setup.tokens, setup.slots)
    for number in range(setup.slots):
        own = {"method": "lora", "rank": setup.rank, "alpha": 16.0, "targets": setup.targets}
        engine.admit(trial(number, batch, **own), None, None)
    return engine, setup.slots


def full(base: Base, setup: Setup, examples: int) -> tuple[Engine, int]:
    """An engine with a full-parameter trial."""
    from trainers.full.engine import FullEngine

    train = rows_of(2 * examples * STEPS, base.head.out_features)
    times = dict.fromkeys(("rung_rows", "origin_boot_ms", "fence", "paid_ms", "work_ms", "checkpoint_ms"), 1)
    how = {"optimizer": setup.optimizer, "checkpointing": setup.checkpointing}
    job = WorkerJob(worker="w", command=[], model=base.name, data="", boot_id="", **times, **how)
    engine: Any = FullEngine(base, train, train, 1, MICRO_TOKENS, job=job)
    engine.admit(trial(0, examples, method="full"), None, None)
    return engine, 1


def trial(number: int, batch: int, **own: Any) -> TrialConfig:
    """A configuration that trains longer than it is looked at."""
    return TrialConfig(
        number=number, learning_rate=1e-5, batch_size=batch, examples=2 * batch * STEPS, seed=number, **own
    )


def marks(device: torch.device, captured: bool) -> tuple[int, int]:
    """The allocator's high-water marks since they were reset: handed out, and taken from the device.

    Once graphs are `captured`, what they compute in is free to the allocator's books, and nobody else's.
    """
    if device.type != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    held = held_by_graphs() if captured else 0
    return torch.cuda.max_memory_allocated() + held, torch.cuda.max_memory_reserved()


def tidy(device: torch.device) -> None:
    """Empties the allocator and forgets its marks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run(device: torch.device, make: Callable[[], tuple[Engine, int]], tokens: int) -> dict[str, Any]:
    """Trains STEPS steps; returns the high-water marks, the higher of first and settled steps. Raises TrialFailed."""
    engine, trials = make()
    done = 0

    def pause() -> bool:
        nonlocal done
        done += 1
        return done in (SETTLED, STEPS)

    try:
        engine.advance(pause)
        first = marks(device, captured=False)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        engine.advance(pause)
        settled = marks(device, captured=True)
    finally:
        for number in range(trials):
            try:
                engine.drop(number)
            except KeyError:
                continue  # it has failed
    if (halved := getattr(engine, "micro_tokens", tokens)) < tokens:
        return {"failed": f"out of memory: streams fell to {halved} tokens"}
    return {"allocated_bytes": max(first[0], settled[0]), "reserved_bytes": max(first[1], settled[1]), "steps": done}


def line_of(name: str, shape: Shape, setup: Setup, found: dict[str, Any]) -> dict[str, Any]:
    """A result line."""
    predicted = peak(shape, setup)
    line = {"shape": name, **dataclasses.asdict(setup), "predicted_bytes": predicted.total, "parts": predicted.parts}
    line |= found
    if found.get("allocated_bytes"):
        line["error"] = round(predicted.total / found["allocated_bytes"] - 1, 4)
    return line


def run_all(name: str, method: str, device: torch.device) -> None:
    """Runs a shape's configurations of a method and prints their lines."""
    shape, base = shape_by_name(name), base_of(name, device)
    for given in PACKS[name] if method == "lora" else FULLS[name]:
        started = time.monotonic()
        setup = pack_setup(given) if method == "lora" else full_setup(given)  # type: ignore[arg-type]
        tidy(device)
        try:
            if setup.optimizer == "adamw-8bit" and not any(importlib.util.find_spec(module) for module in EIGHT_BIT):
                found = {"failed": f"none of {', '.join(EIGHT_BIT)} is installed"}
            elif method == "lora":
                found = run(device, lambda setup=setup: pack(base, setup), setup.tokens)  # type: ignore[misc]
            else:
                examples = int(given[0])
                found = run(device, lambda s=setup, n=examples: full(base, s, n), setup.tokens)  # type: ignore[misc]
        except (TrialFailed, torch.OutOfMemoryError) as error:
            found = {"failed": str(error).splitlines()[0][:200]}
        found["seconds"] = round(time.monotonic() - started, 1)
        print(json.dumps(line_of(name, shape, setup, found)), flush=True)


# --- all of them ------------------------------------------------------------------------------------------------------


def child(name: str, method: str, device: str, seconds: float) -> list[dict[str, Any]]:
    """Runs one shape and method in a process of its own; returns its lines, and one that failed if it was cut off."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name, method, "--device", device]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=seconds, check=False)
        out, why = done.stdout, (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1][:200]
        cut = f"exit code {done.returncode}: {why}" if done.returncode else None
    except subprocess.TimeoutExpired as error:
        out, cut = error.stdout or b"", f"took more than {seconds:.0f} s"
    lines = [json.loads(line) for line in out.decode().splitlines() if line.startswith("{") and line.endswith("}")]
    return lines + ([{"shape": name, "method": method, "failed": cut}] if cut else [])


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and worst error over all measured, alone and corrected by every second peak of the same method."""
    measured = [line for line in lines if line.get("allocated_bytes")]
    found: dict[str, Any] = {"summary": True, "configurations": len(lines), "measured": len(measured)}
    if not measured:
        return found
    errors = [abs(line["error"]) for line in measured]
    found |= {"median_error": round(statistics.median(errors), 4), "worst_error": max(errors)}
    corrected = []
    for method in {line["method"] for line in measured}:
        of_method = [line for line in measured if line["method"] == method]
        peaks = [Peak(line["parts"]) for line in of_method]
        sizes = [line["allocated_bytes"] for line in of_method]
        learned = correct(peaks[::2], sizes[::2])
        corrected += [
            abs(learned.apply(one).total / size - 1) for one, size in zip(peaks[1::2], sizes[1::2], strict=True)
        ]
        found[f"factor_{method}"] = round(learned.factor, 4)
    if corrected:
        found |= {
            "corrected_median_error": round(statistics.median(corrected), 4),
            "corrected_worst_error": round(max(corrected), 4),
        }
    return found


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=["smollm2-135m", "1.5b", "8b"])
    parser.add_argument("--method", choices=("lora", "full"), nargs="+", default=["lora", "full"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of one shape and method")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds after which no other is begun")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry", action="store_true", help="on the CPU with the tiny shape")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the lines here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        run_all(*options.child, torch.device(options.device))
        return 0
    if options.dry:
        options.shape, options.device = ["tiny"], "cpu"
    started, lines = time.monotonic(), []
    for method in options.method:
        for name in options.shape:
            if not (PACKS if method == "lora" else FULLS).get(name):
                continue
            left = options.total - (time.monotonic() - started)
            seconds = min(options.seconds, left)
            begun = [{"shape": name, "method": method, "failed": "no time was left"}]
            found = child(name, method, options.device, seconds) if left > 0 else begun
            lines += found
            _tell(found, options.out)
    _tell([summary(lines)], options.out)
    return int(all("failed" in line for line in lines))


def _tell(lines: list[dict[str, Any]], out: Path | None) -> None:
    for line in lines:
        text = json.dumps(line)
        print(text, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
