"""Attention over examples of many lengths: a flat stream or fixed rows, and whose kernel, forward and backward.

    python -m benchmarks.attention [--shape smollm2-135m 1.5b 8b] [--tokens 16384] [--data long] [--out FILE]

Run it in the root of a checkout that has `benchmarks/data` (`python -m benchmarks.workload`), on a GPU; with
`--device cpu --shape tiny --tokens 1024` it shows what runs. Random bf16 queries, keys and values of one layer of the
shape, the lengths of real examples up to so many tokens. One JSON line each; those of `KINDS`:

    packed       our kernels (trainers/lora/attention_kernels.py), over the flat stream
    varlen       torch.nn.attention.varlen, FlashAttention 2, over the flat stream; key heads repeated if it wants that
    flex         compiled flex_attention over the flat stream; its block mask is made for each stream (`mask_ms`)
    dense        scaled_dot_product_attention over the flat stream with a [T, T] mask
    rows         scaled_dot_product_attention over rows padded to the longest example, causal
    sorted-rows  the same, eight of about one length to a batch, padded to the longest of each

`forward_ms`, `both_ms`: forward, and forward with backward, of all examples, from CUDA graphs, so no launch is waited
for; rows lie padded already. `computed`: tokens that every other part of the model would compute, over real ones.
`error`: the largest difference of outputs from fp32, against their largest.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import graphs
from benchmarks.hf_trials import now
from benchmarks.packing import Report, machine, parsed
from benchmarks.workload import SHAPES, Shape
from trainers.lora.stream import BLOCK, blocks_of
from trainers.splits import load_split

BATCH = 8  # of sorted rows


@dataclass
class Case:
    """Queries [T, heads, d], keys and values [T, key heads, d], and where examples end [n + 1]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bounds: NDArray[np.int32]


@dataclass
class Ready:
    """A call on leaves of its own layout, and tokens computed over real ones. `flat`: it gives [T, heads, d]."""

    call: Callable[[], torch.Tensor]
    leaves: list[torch.Tensor]
    computed: float = 1.0
    flat: bool = True


def _heads_first(call: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> torch.Tensor:
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    out: torch.Tensor = call(q, k, v, enable_gqa=True, **more)
    return out[0].transpose(0, 1)


def packed(case: Case) -> Ready:
    """Our kernels."""
    from trainers.lora import attention_kernels  # noqa: F401  (registers the operator)

    count = int(sum(-(-length // BLOCK) for length in np.diff(case.bounds)))
    blocks = torch.from_numpy(blocks_of(case.bounds, count)).to(case.q.device)
    scale = case.q.shape[-1] ** -0.5

    def call() -> torch.Tensor:
        heads_first = (tensor.transpose(0, 1) for tensor in (case.q, case.k, case.v))
        out: torch.Tensor = torch.ops.sweep.attention(*heads_first, blocks, scale)[0]
        return out

    return Ready(call, [case.q, case.k, case.v])


def varlen(case: Case) -> Ready:
    """FlashAttention 2 as torch has it. Later versions share key heads themselves and say causal by a window."""
    from torch.nn.attention import varlen as module

    known = inspect.signature(module.varlen_attn).parameters
    more: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        more["enable_gqa"] = True
    shared = 1 if "enable_gqa" in known else case.q.shape[1] // case.k.shape[1]
    bounds = torch.from_numpy(case.bounds).to(case.q.device)
    longest = int(np.diff(case.bounds).max())

    def call() -> torch.Tensor:
        k, v = (tensor.repeat_interleave(shared, dim=1) if shared > 1 else tensor for tensor in (case.k, case.v))
        out = module.varlen_attn(case.q, k, v, bounds, bounds, longest, longest, **more)
        assert isinstance(out, torch.Tensor)
        return out

    return Ready(call, [case.q, case.k, case.v])


def _documents(case: Case) -> torch.Tensor:
    lengths = torch.from_numpy(np.diff(case.bounds)).to(case.q.device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=case.q.device), lengths)


def flex_mask(case: Case) -> Any:
    """The block mask of a stream."""
    documents, tokens = _documents(case), case.q.shape[0]

    def seen(_batch: Any, _head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (documents[query] == documents[key])

    return create_block_mask(seen, None, None, tokens, tokens, device=case.q.device)


def flex(case: Case) -> Ready:
    """torch's flex_attention."""
    compiled, mask = torch.compile(flex_attention), flex_mask(case)
    return Ready(lambda: _heads_first(compiled, case.q, case.k, case.v, block_mask=mask), [case.q, case.k, case.v])


def dense(case: Case) -> Ready:
    """SDPA with a mask of the whole stream."""
    documents = _documents(case)
    mask = torch.tril(documents[:, None] == documents)
    sdpa = functional.scaled_dot_product_attention
    return Ready(lambda: _heads_first(sdpa, case.q, case.k, case.v, attn_mask=mask), [case.q, case.k, case.v])


def _batched(case: Case, batches: list[list[int]]) -> Ready:
    """SDPA over batches of examples, each padded to its longest, as a loader of rows would have them."""
    lengths, device = np.diff(case.bounds), case.q.device
    leaves: list[list[torch.Tensor]] = []
    for batch in batches:
        within = np.minimum(np.arange(lengths[batch].max()), lengths[batch][:, None] - 1)
        place = torch.from_numpy(case.bounds[batch][:, None] + within).to(device)
        leaves.append([t.detach()[place].requires_grad_() for t in (case.q, case.k, case.v)])

    def call() -> torch.Tensor:
        outs = []
        for batch in leaves:
            rows = (tensor.transpose(1, 2) for tensor in batch)
            out = functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    computed = sum(batch[0].shape[0] * batch[0].shape[1] for batch in leaves) / len(case.q)
    return Ready(call, [tensor for batch in leaves for tensor in batch], computed, flat=False)


def rows(case: Case) -> Ready:
    """All examples padded to the longest."""
    return _batched(case, [list(range(len(case.bounds) - 1))])


def sorted_rows(case: Case) -> Ready:
    """Eight of about one length at a time."""
    order = np.argsort(np.diff(case.bounds), kind="stable").tolist()
    return _batched(case, [order[at : at + BATCH] for at in range(0, len(order), BATCH)])


KINDS: dict[str, Callable[[Case], Ready]] = {
    "packed": packed,
    "varlen": varlen,
    "flex": flex,
    "dense": dense,
    "rows": rows,
    "sorted-rows": sorted_rows,
}


def milliseconds(call: Callable[[], Any], device: torch.device, times: int) -> float:
    """The median time of a call that is waited for."""

    def waited() -> float:
        call()
        return now(device)

    graphs.milliseconds(waited, 3)
    return graphs.milliseconds(waited, times)[0]


def kernels_ms(call: Callable[[], Any], leaves: list[torch.Tensor], device: torch.device, times: int) -> float:
    """The median time of a call's kernels."""
    if device.type != "cuda":
        return milliseconds(call, device, times)
    from triton.testing import do_bench_cudagraph

    return round(float(do_bench_cudagraph(call, rep=times, grad_to_none=leaves, return_mode="median")), 4)


def exact(case: Case) -> torch.Tensor:
    """The same in fp32, example by example, [T, heads, d]."""
    outs = []
    for start, end in zip(case.bounds[:-1].tolist(), case.bounds[1:].tolist(), strict=True):
        part = [tensor[start:end].detach().float() for tensor in (case.q, case.k, case.v)]
        outs.append(_heads_first(functional.scaled_dot_product_attention, *part, is_causal=True))
    return torch.cat(outs)


def line(kind: str, case: Case, right: torch.Tensor, times: int) -> dict[str, Any]:
    """The figures of one kind."""
    ready, device = KINDS[kind](case), case.q.device
    with torch.no_grad():
        out = ready.call()
        forward = kernels_ms(ready.call, [], device, times)
    slope = torch.randn_like(out)

    def both() -> None:
        ready.call().backward(slope)

    figures: dict[str, Any] = {"forward_ms": forward, "both_ms": kernels_ms(both, ready.leaves, device, times)}
    if ready.flat:
        figures["error"] = float((out.float() - right).abs().max() / right.abs().max())
    if kind == "flex":
        figures["mask_ms"] = milliseconds(lambda: flex_mask(case), device, times)
    return {**figures, "computed": round(ready.computed, 3)}


def case_of(shape: Shape, lengths: NDArray[np.int64], device: torch.device) -> Case:
    """Random tensors of one layer of a shape, for examples of these lengths."""
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    config, dtype = shape.config, torch.bfloat16 if device.type == "cuda" else torch.float32
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads, *(config.num_key_value_heads,) * 2
    q, k, v = (
        torch.randn((int(bounds[-1]), count, width), device=device, dtype=dtype, requires_grad=True) for count in heads
    )
    return Case(q, k, v, bounds)


def run(options: argparse.Namespace) -> int:
    """Measures every kind for every shape; returns the exit code."""
    device, report = torch.device(options.device), Report(options.out)
    torch.manual_seed(options.seed)
    lengths = load_split(options.rows, "train").lengths
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), options.tokens, side="right"))]
    for name in options.shape:
        case = case_of(SHAPES[name], lengths, device)
        right = exact(case)
        common = {"shape": name, "data": options.data, "tokens": len(case.q), "examples": len(lengths)}
        for kind in options.kinds:
            try:
                found = line(kind, case, right, options.times)
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
            report.add({**common, "kind": kind, **found, **machine(device)})
    return int(report.failed)


def main(arguments: list[str]) -> int:
    """Reads the command line and runs what it asks for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=["smollm2-135m", "1.5b", "8b"])
    parser.add_argument("--kinds", choices=list(KINDS), nargs="+", default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=16384, help="of all examples together, at most")
    parser.add_argument(
        "--times", type=int, default=20, help="milliseconds, or calls where it is called at once, that each is measured"
    )
    return run(parsed(parser, arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
