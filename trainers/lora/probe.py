"""How wide a pack should be, found by a short measurement of this model on this GPU.

Longer streams train more tokens a second until the chip is busy, and cost memory. The probe runs streams of doubling
length, as training runs them, until another doubling gains little or would not fit; it takes the shortest length that
reaches SATURATION of the best speed. Slots follow: enough that the batches of all but one fill a stream, as far as the
memory holds them. The result is kept by model, GPU and versions, so the next worker does not measure again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainers.engine import TrialFailed
from trainers.lora.bank import RANK_STEP, Layout
from trainers.lora.engine import LoraEngine
from trainers.lora.models import find_groups
from trainers.messages import Precision, TrialConfig
from trainers.models import Base
from trainers.named import ModelError
from trainers.splits import Split

SATURATION = 0.9  # of the best speed, and of the memory that is free
SHORTEST, LONGEST = 2048, 65536  # tokens of a stream
MOST_SLOTS = 32
SMALL_BATCH = 4  # examples of an optimizer step that slots are counted for
BYTES = 18  # an adapter's parameter: fp32 weight, gradient, two moments, and the bf16 copy
_GAIN = 1.05  # what a doubling must gain for the next to be tried
_SETTLED, _STREAMS = 4, 7  # streams until everything is compiled and captured, and in all
_SLOW_S = 1.5  # a longer stream would keep an evaluation or the end of the paid time waiting


@dataclass(frozen=True)
class Width:
    """`slots` trials at once, `tokens` a stream; `seconds` the probe took (0 if its result was kept from before)."""

    slots: int
    tokens: int
    seconds: float


def slots_for(tokens: int, mean: float, free_bytes: float, slot_bytes: float) -> int:
    """Slots whose small batches fill a stream of so many tokens with one to spare, within the memory; at least 1."""
    wanted = int(tokens / (mean * SMALL_BATCH)) + 2
    return int(max(1, min(wanted, MOST_SLOTS, free_bytes // slot_bytes)))


def shortest_of(speeds: dict[int, float]) -> int:
    """The shortest length, in tokens, whose tokens a second reach SATURATION of the best."""
    best = max(speeds.values())
    return min(tokens for tokens, speed in speeds.items() if speed >= SATURATION * best)


def choose(base: Base, train: Split, validation: Split, max_rank: int, precision: Precision = "bf16") -> Width:
    """Measures, or reads what was measured before; leaves nothing on the GPU. Raises ModelError: no room."""
    started = time.monotonic()
    mean = float(train.lengths.mean())
    slot_bytes = float(BYTES * Layout(find_groups(base)).elements("all-linear", max_rank))
    key = _key(base, int(train.lengths.max()), precision)
    kept = _read().get(key)
    if kept is None:
        kept = {"speeds": {}, "peaks": {}}
        for tokens, speed, peak in _measure(base, train, validation, max_rank, precision):
            kept["speeds"][str(tokens)], kept["peaks"][str(tokens)] = speed, peak
        if not kept["speeds"]:
            raise ModelError(f"{base.name}: not even {SHORTEST} tokens at once fit on this GPU; use a smaller model")
        _write(key, kept)
    tokens = shortest_of({int(t): speed for t, speed in kept["speeds"].items()})
    free, _ = torch.cuda.mem_get_info(base.device)
    left = SATURATION * free - kept["peaks"][str(tokens)]
    return Width(slots_for(tokens, mean, left, slot_bytes), tokens, time.monotonic() - started)


def warm_up(engine: LoraEngine, max_rank: int, precision: Precision = "bf16") -> None:
    """Runs streams until everything is compiled, so that no trial pays for it. The engine is as fresh as before.

    The trial has the largest rank that is to come, since kernels are compiled for it. Raises TrialFailed.
    """
    _drive(engine, max_rank, _SETTLED, lambda: None, precision)
    engine.evaluate(None, 1)
    engine.forget_tokens()


def _measure(
    base: Base, train: Split, validation: Split, max_rank: int, precision: Precision
) -> list[tuple[int, float, int]]:
    """(tokens, tokens a second, bytes above the base) of streams of doubling length."""
    found: list[tuple[int, float, int]] = []
    tokens = SHORTEST
    while tokens <= LONGEST:
        free, _ = torch.cuda.mem_get_info(base.device)
        if found and 2 * found[-1][2] > SATURATION * free:
            break
        measured = _stream(base, train, validation, tokens, max_rank, precision)
        gc.collect()  # compiling leaves cycles that hold the engine, and with it a rounded base
        torch.cuda.empty_cache()
        if measured is None:
            break
        speed, peak = measured
        found.append((tokens, speed, peak))
        slow = tokens / speed > _SLOW_S
        if slow or (len(found) > 1 and speed < _GAIN * found[-2][1]):
            break
        tokens *= 2
    return found


def _stream(
    base: Base, train: Split, validation: Split, tokens: int, max_rank: int, precision: Precision
) -> tuple[float, int] | None:
    """Tokens a second of streams of this length, and the most bytes they took above the base; None: they do not fit.

    The trial is a small one in streams that have room for the largest: what is compiled is what training runs.
    """
    torch.cuda.reset_peak_memory_stats(base.device)
    before = torch.cuda.memory_allocated(base.device)
    try:
        engine = LoraEngine(base, train, validation, 1, tokens, slots=1, max_rank=max_rank, precision=precision)
        speed = _drive(engine, RANK_STEP, _STREAMS, lambda: torch.cuda.synchronize(base.device), precision)
    except (TrialFailed, torch.OutOfMemoryError):
        return None
    peak = torch.cuda.max_memory_allocated(base.device) - before
    engine.rest()
    if engine.micro_tokens < tokens:  # it ran out of memory and went on with less
        return None
    return speed, peak


def _drive(engine: LoraEngine, rank: int, streams: int, wait: Callable[[], None], precision: Precision) -> float:
    """Runs streams full of one trial that learns nothing; tokens a second after the settling ones, 0 if there are none.

    The trial's one batch is all rows, so that no stream is cut short by an optimizer step.
    """
    rows, total = engine.train.rows, int(engine.train.lengths.sum())
    config = TrialConfig(
        number=0,
        method="lora",
        learning_rate=0.0,
        batch_size=rows,
        examples=rows * max(2, -(-2 * streams * engine.micro_tokens // total)),
        seed=0,
        rank=rank,
        alpha=1.0,
        targets="all-linear",
        precision=precision,
    )
    engine.admit(config, None, None)
    marks: list[tuple[float, int]] = []

    def pause() -> bool:
        if len(marks) >= _SETTLED:
            wait()
        marks.append((time.monotonic(), engine.trained_tokens))
        return len(marks) >= streams

    engine.advance(pause)
    engine.drop(0)
    if len(marks) <= _SETTLED + 1:
        return 0.0
    (start, first), (end, last) = marks[_SETTLED], marks[-1]
    return (last - first) / (end - start)


def _key(base: Base, longest: int, precision: Precision) -> str:
    names = (base.name, torch.cuda.get_device_name(base.device), base.model.num_parameters(), longest, precision)
    versions = (f"{name} {version(name)}" for name in ("torch", "transformers", "triton"))
    return " | ".join([*map(str, names), *versions])


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sweep" / "probe.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_path().read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _write(key: str, kept: dict[str, Any]) -> None:
    """Keeps a result; where nothing can be written, the next worker measures again."""
    path = _path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        temporary.write_text(json.dumps({**_read(), key: kept}, indent=1), encoding="utf-8")
        temporary.replace(path)
