"""Compiles the GPU kernels of a model's layers ahead of their first launch, many at a time, into Triton's disk cache.

Triton compiles a kernel when it is first launched, in the thread that waits for it: about thirty kernels of a second
each for a model, one after the other, and some more whenever a stream has a length that was not seen before. Here
processes of their own go through the same launches on tensors without memory, each for a share of the layers, while
the base model is being loaded. No GPU is touched: a compiler needs to know the target alone.

    python -m trainers.lora.precompile MODEL JSON

The JSON has `slots` (null: a probe will find them), `max_rank`, `longest` (tokens of an example), `precision`,
`capability` of the GPU (two numbers) and `share` (which of how many processes this is). trainers/lora/ahead.py starts
them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

from trainers import processes
from trainers.lora.bank import Group, Layout, stream_rank
from trainers.lora.stream import BLOCK, TILE, WIDE, Stream
from trainers.messages import Precision

_NAME = "sweep_shapes"
_WARP = 32


@dataclass(frozen=True)
class Launches:
    """What will be launched: streams of these `lengths` (tokens) over `slots` slots of at most `rank`.

    `target` is what Triton compiles for: ("cuda", 90) for compute capability 9.0.
    """

    slots: int
    rank: int
    lengths: list[int]
    longest: int  # tokens of the longest example
    dropout: bool
    target: tuple[str, int]


def expected(slots: int | None, max_rank: int, longest: int, capability: tuple[int, int]) -> list[Launches]:
    """What a worker on a GPU of this compute capability launches; where a probe has yet to find the slots, its streams
    too.

    Trials with dropout launch some more, which are compiled when the first of them comes.
    """
    from trainers.lora import probe
    from trainers.lora.gpu import SHORTEST, length_of
    from trainers.training import MICRO_TOKENS

    major, minor = capability
    target = ("cuda", 10 * major + minor)
    found, tokens = [], MICRO_TOKENS["cuda"]
    if slots is None:
        doubling = [probe.SHORTEST << n for n in range((probe.LONGEST // probe.SHORTEST).bit_length())]
        found.append(Launches(1, max_rank, doubling, longest, False, target))
        slots, tokens = probe.MOST_SLOTS, probe.LONGEST
    lengths = sorted(
        {length_of(size, tokens, captured=True) for size in range(SHORTEST, tokens + 1, TILE)}, reverse=True
    )
    return [*found, Launches(slots, max_rank, lengths, longest, False, target)]


def compile_only(target: tuple[str, int]) -> list[str]:
    """From here on, launches in this process compile for the target and run nothing; returns a list of their names.

    Triton asks its active driver for target, device and stream, and a launch that only warms up needs no more of it.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        def get_current_target(self) -> Any:
            return GPUTarget(*target, _WARP)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    names: list[str] = []
    launch = JITFunction.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    driver.set_active(Absent())
    JITFunction.run = warm_up
    return names


def meta_groups(model: str) -> tuple[list[Group], list[tuple[int, int, int]]]:
    """The groups of a model's linears, and its attention's (heads, key heads, width of a head) as the layers call it.

    The model is built without memory, so what its layers read and hand on has shapes and no content.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from trainers.lora.models import find_groups
    from trainers.models import Base, head_of, load_config, resolve, skeleton

    config = load_config(resolve(model, ["config.json"]))
    shapes: list[tuple[int, int, int]] = []

    def attend(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        shapes.append((q.shape[1], k.shape[1], q.shape[-1]))
        return q.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)
    built = skeleton(config).to(torch.bfloat16)
    for part in {id(c): c for m in built.modules() if (c := getattr(m, "config", None)) is not None}.values():
        part._attn_implementation = _NAME
    base: Any = Base(model, built, None, built.get_decoder(), head_of(built), torch.device("meta"))
    groups = find_groups(base)
    Layout(groups)  # gives each its place in a slot's buffer
    return groups, sorted(set(shapes))


def meta_stream(launches: Launches, length: int) -> Stream:
    """A stream of that length as the kernels see it; nothing in it has content."""
    spare = launches.slots + 1

    def table(rows: int, columns: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=dtype, device="meta")

    ids = table(1, length)
    return Stream(
        rank=stream_rank(launches.rank),
        tokens=length,
        ids=ids,
        positions=ids,
        lengths=ids[0],
        longest=launches.longest,
        dropout=launches.dropout,
        tiles=table(length // TILE + spare, 3),
        wide=table(length // WIDE + spare, 3),
        blocks=table(3 * (length // BLOCK + spare), 3),
        bounds=table(spare, 2),
        table=table(spare, 6, torch.int64),
        scales=torch.empty(spare, device="meta"),
        drops=torch.empty(spare, device="meta"),
        keys=ids[0],
    )


def compile_share(
    model: str, launches: list[Launches], share: int, count: int, precision: Precision = "bf16"
) -> list[str]:
    """Goes through every `count`-th of the launches from number `share` on; returns the names of all kernels launched.

    A launch is a group's forward and backward in a stream of one length, or attention's. Equal ones are left out. The
    optimizer's are the same for all: the first share has them.
    """
    from trainers.lora import adamw_kernels, attention_kernels
    from trainers.lora.linear import PackedGroup, launch_group

    groups, attentions = meta_groups(model)
    # Layers repeat: what a group launches depends on its shape, and on where it lies in a slot's buffer only by whether
    # that is a multiple of 16, which sizes of real models are.
    shapes = {(g.kind, g.inputs, tuple(g.outputs), g.linears[0].bias is None): g for g in reversed(groups)}
    units = [*shapes.values(), *attentions]
    # Streams of one length after those of another: kernels that both need are compiled by whoever comes first.
    work = [(wanted, length, unit) for wanted in launches for length in wanted.lengths for unit in units]
    names = compile_only(launches[0].target)
    if share == 0:
        words = 2 * adamw_kernels.ADDRESSES + adamw_kernels.NUMBERS
        adamw_kernels.step(torch.empty(words, dtype=torch.int32, device="meta"), 1, torch.bfloat16)
    for wanted, length, unit in work[share::count]:
        stream = meta_stream(wanted, length)
        if isinstance(unit, Group):
            for stream.rounded in {False, precision == "fp8"}:
                launch_group(PackedGroup(unit, precision), stream)
        else:
            assert stream.blocks is not None
            attention_kernels.launch(*unit, length, stream.blocks)
    return names


def main(arguments: list[str]) -> int:
    """Compiles one share; returns the exit code."""
    processes.die_with_parent()
    torch.set_num_threads(1)
    model, text = arguments
    request = json.loads(text)
    share, count = request["share"]
    wanted = {key: request[key] for key in ("slots", "max_rank", "longest")}
    launches = expected(**wanted, capability=request["capability"])
    compile_share(model, launches, share, count, request["precision"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
